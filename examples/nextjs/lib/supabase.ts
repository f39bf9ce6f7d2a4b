// Supabase with a key that passes every policy: import this in route handlers alone, never in a page.
// Plain fetch, so that nothing has to be installed; supabase-js makes the same calls.

const BUCKET = "group-photos";

export type Item = {
  id: string;
  user_id: string;
  group_id: string;
  photo_id: string;
  photo_storage_path: string;
  prompt: string;
  frame_num: number | null;
  inference_provider: string | null;
  status: "pending" | "processing" | "completed" | "failed" | "cancelled";
  cancel_requested: boolean;
  worker_id: string | null;
  leased_until: string | null;
  updated_at: string;
  video_storage_path: string | null;
};

async function call(path: string, init: RequestInit = {}, token?: string): Promise<Response> {
  const key = process.env.SUPABASE_SERVICE_ROLE_KEY!;
  // A secret key (sb_secret_…) is no token and is refused as one; the service role's key of earlier projects has to be one.
  const bearer = token ?? (key.startsWith("sb_") ? undefined : key);
  const headers = { apikey: key, ...(bearer && { authorization: `Bearer ${bearer}` }), ...init.headers };
  return fetch(process.env.SUPABASE_URL! + path, { ...init, headers, cache: "no-store" });
}

function json(body: unknown, headers: Record<string, string> = {}): RequestInit {
  return { method: "POST", headers: { "content-type": "application/json", ...headers }, body: JSON.stringify(body) };
}

async function rows(answer: Response): Promise<Item[]> {
  if (!answer.ok) throw new Error(`database: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

/** The one row that a function of schema.sql answers with, if any. */
export async function rpc(name: string, args: object): Promise<Item | undefined> {
  return (await rows(await call(`/rest/v1/rpc/${name}`, json(args))))[0];
}

export async function find(id: string): Promise<Item | undefined> {
  return (await rows(await call(`/rest/v1/video_items?id=eq.${encodeURIComponent(id)}`)))[0];
}

export async function insert(row: object): Promise<Item> {
  const [made] = await rows(await call("/rest/v1/video_items", json(row, { prefer: "return=representation" })));
  return made!;
}

/** Who sends the request: the browser shows the access token of its session. */
export async function userOf(request: Request): Promise<{ id: string } | undefined> {
  const token = request.headers.get("authorization")?.match(/^Bearer (.+)$/)?.[1];
  const answer = token ? await call("/auth/v1/user", {}, token) : undefined;
  return answer?.ok ? answer.json() : undefined;
}

function encoded(path: string): string {
  // fetch would resolve them: whoever names a path would reach other buckets, and other services, with our key.
  if (/(^|\/)\.\.?(\/|$)/.test(path)) throw new Error(`storage: not a path: ${path}`);
  return `${BUCKET}/${path.split("/").map(encodeURIComponent).join("/")}`;
}

export async function upload(path: string, file: Blob): Promise<void> {
  const init = { method: "POST", headers: { "content-type": file.type }, body: file };
  const answer = await call(`/storage/v1/object/${encoded(path)}`, init);
  if (!answer.ok) throw new Error(`storage: ${answer.status} ${await answer.text()}`);
}

/** Nothing where there is no such object. */
export async function signedDownload(path: string, expiresIn: number): Promise<string | undefined> {
  const answer = await call(`/storage/v1/object/sign/${encoded(path)}`, json({ expiresIn }));
  return answer.ok ? `${process.env.SUPABASE_URL}/storage/v1${(await answer.json()).signedURL}` : undefined;
}

/** Nothing where the path is taken: a video is never replaced. */
export async function signedUpload(path: string): Promise<string | undefined> {
  const answer = await call(`/storage/v1/object/upload/sign/${encoded(path)}`, json({}));
  return answer.ok ? `${process.env.SUPABASE_URL}/storage/v1${(await answer.json()).url}` : undefined;
}
