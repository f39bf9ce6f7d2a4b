// What workers call: next-task, heartbeat, presign, report. They hold WORKER_API_KEY, and no key of Supabase.
import { createHash, timingSafeEqual } from "node:crypto";

import { find, type Item, rpc, signedDownload, signedUpload } from "@/lib/supabase";

const URL_SECONDS = 3600;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const EXTENSION = /^([A-Za-z0-9-]{1,20}\.){0,2}(mp4|webm)$/i;

type Body = Record<string, any>;

const ok = (data: unknown) => Response.json({ success: true, data });
const no = (status: number, error: string) => Response.json({ success: false, error }, { status });
const iso = (time: string) => new Date(time).toISOString();
const seconds = (value: unknown, otherwise: number) =>
  Math.min(Math.max(Math.ceil(Number(value ?? otherwise)) || otherwise, 1), 86_400); // no task is held for good

export async function POST(request: Request, { params }: { params: Promise<{ call: string }> }): Promise<Response> {
  if (!hasKey(request.headers.get("authorization"))) return no(401, "Unauthorized");
  const { call } = await params;
  if (!Object.hasOwn(CALLS, call)) return no(404, "No such call");
  const body = await request.json().catch(() => null);
  if (typeof body !== "object" || body === null) return no(400, "body: not JSON");
  try {
    return await CALLS[call]!(body);
  } catch (error) {
    console.error(call, error);
    return no(500, "Internal error"); // workers try again
  }
}

function hasKey(header: string | null): boolean {
  const digest = (text: string) => createHash("sha256").update(text).digest();
  const given = header?.match(/^(?:Worker|Bearer) (.+)$/)?.[1];
  return !!given && !!process.env.WORKER_API_KEY && timingSafeEqual(digest(given), digest(process.env.WORKER_API_KEY));
}

const CALLS: Record<string, (body: Body) => Promise<Response>> = {
  "next-task": nextTask,
  heartbeat,
  presign,
  report,
};

async function nextTask({ worker_id, lease_duration_seconds, worker_type }: Body): Promise<Response> {
  if (!worker_id) return no(400, "worker_id: missing");
  const lease = seconds(lease_duration_seconds, 600);
  const item = await rpc("claim_video", { worker: String(worker_id), seconds: lease, kind: worker_type ?? null });
  return ok(item ? task(item) : null);
}

function task(item: Item) {
  const { id, group_id, photo_id, prompt, photo_storage_path, frame_num, inference_provider } = item;
  const leased_until = iso(item.leased_until!);
  return { item_id: id, group_id, photo_id, prompt, photo_storage_path, leased_until, frame_num, inference_provider };
}

async function heartbeat({ item_id, worker_id, extend_seconds, progress }: Body): Promise<Response> {
  const item = UUID.test(item_id) && (await rpc("renew_video", {
    item: item_id,
    worker: String(worker_id),
    seconds: seconds(extend_seconds, 300),
    at_stage: progress?.stage ?? null,
    at_fraction: progress?.fraction ?? 0,
  }));
  if (!item) return no(404, "Task not found");
  // With `cancel_requested`, an extension of the contract, workers send progress and stop where somebody cancelled.
  return ok({ leased_until: iso(item.leased_until ?? item.updated_at), cancel_requested: item.cancel_requested });
}

async function presign({ operation, storage_path, video_item_id, file_extension }: Body): Promise<Response> {
  if (operation === "download" && storage_path) {
    const url = await signedDownload(String(storage_path), URL_SECONDS);
    return url ? ok({ url, expires_in: URL_SECONDS }) : no(500, "Failed to generate download URL");
  }
  const extension = String(file_extension ?? "mp4").replace(/^\./, "");
  if (operation !== "upload" || !EXTENSION.test(extension)) return no(400, "operation or file_extension");
  if (!UUID.test(video_item_id) || !(await find(video_item_id))) return no(404, "Task not found");
  const path = `videos/${video_item_id}.${extension}`;
  const url = await signedUpload(path);
  // Also where the path is taken: the worker asks again, with an extension of its own.
  return url ? ok({ url, expires_in: URL_SECONDS, storage_path: path }) : no(500, "Failed to generate upload URL");
}

async function report(body: Body): Promise<Response> {
  const { item_id, worker_id, status, video_storage_path: video, error_message } = body;
  if (status !== "completed" && status !== "failed") return no(400, "status: completed or failed");
  const there = UUID.test(item_id) ? await find(item_id) : undefined;
  if (!there) return no(404, "Task not found");
  if (there.worker_id !== String(worker_id)) return no(403, "The task belongs to another worker");
  const completed = status === "completed";
  if (completed && !(String(video).startsWith(`videos/${item_id}.`) && (await signedDownload(video, 60)))) {
    return no(500, "Failed to generate video URL");
  }
  const item = await rpc("end_video", {
    item: item_id,
    worker: String(worker_id),
    ended_as: status,
    video: completed ? video : null,
    problem: completed ? null : String(error_message ?? "Unknown error").replaceAll("\0", "").slice(-10_000),
    runway_task: body.runway_task_id ?? null,
    veo_operation: body.veo_operation_id ?? null,
  });
  if (!item || item.status === "cancelled") return no(403, "The lease is over");
  return ok({ item_id, status: item.status });
}
