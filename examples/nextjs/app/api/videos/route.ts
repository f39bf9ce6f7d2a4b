// What your pages call: a photo, sent by somebody who is signed in, becomes a task, and workers are woken.
import { after } from "next/server";

import { wake } from "@/lib/i2v";
import { insert, upload, userOf } from "@/lib/supabase";

const EXTENSIONS: Record<string, string> = {
  "image/jpeg": "jpg",
  "image/png": "png",
  "image/webp": "webp",
  "image/heic": "heic",
};
const NAMED = /\.(jpe?g|png|webp|heic)$/i; // most systems have no media type for HEIC
const MAX_BYTES = 50_000_000; // Vercel itself takes no request of more than 4.5 MB

export async function POST(request: Request): Promise<Response> {
  const user = await userOf(request);
  if (!user) return Response.json({ error: "Sign in first" }, { status: 401 });
  const form = await request.formData();
  const photo = form.get("photo");
  const extension =
    photo instanceof File ? EXTENSIONS[photo.type] ?? NAMED.exec(photo.name)?.[1]!.toLowerCase() : undefined;
  if (!(photo instanceof File) || !extension || photo.size > MAX_BYTES) {
    return Response.json({ error: "A JPEG, PNG, WebP or HEIC file is needed, up to 50 MB" }, { status: 400 });
  }
  const frames = Math.round(24 * Number(form.get("seconds") || 5)) + 1;
  const [group_id, photo_id] = [crypto.randomUUID(), crypto.randomUUID()];
  const photo_storage_path = `${group_id}/${photo_id}_original.${extension}`;
  await upload(photo_storage_path, photo);
  const item = await insert({
    user_id: user.id,
    group_id,
    photo_id,
    photo_storage_path,
    prompt: String(form.get("prompt") ?? ""),
    frame_num: Math.min(Math.max(frames, 25), 241),
  });
  after(wake); // once the answer is on its way
  return Response.json({ id: item.id }, { status: 201 });
}
