// Calls to serverless-i2v. Server only: they carry keys.

/** Says that there is work, so that a tick starts now and not with the next minute. Never throws: the cron is the net. */
export async function wake(): Promise<void> {
  if (!process.env.I2V_URL) return;
  const headers = { authorization: `Bearer ${process.env.I2V_PUSH_TOKEN}` };
  const signal = AbortSignal.timeout(5_000);
  const answer = await fetch(`${process.env.I2V_URL}/wake`, { method: "POST", headers, signal }).catch(console.warn);
  if (answer && !answer.ok) console.warn(`i2v: ${answer.status} to /wake`);
}

/** For an application without a queue of its own: a photo goes to `i2v serve`. The tasks that were made of it.
 *
 * `key`: the same for the same wish, such as a UUID that the page made, so that a repeated call makes nothing new. */
export async function submit(photo: File, prompt: string, seconds: number, key: string): Promise<{ id: string }[]> {
  const form = new FormData();
  form.set("photo", photo);
  form.set("prompt", prompt);
  form.set("seconds", String(seconds));
  const headers = { authorization: `Bearer ${process.env.WORKER_API_KEY}`, "idempotency-key": key };
  const answer = await fetch(`${process.env.I2V_SERVE_URL}/api/tasks`, { method: "POST", headers, body: form });
  const said = await answer.json().catch(() => null);
  if (!said?.success) throw new Error(`i2v: ${answer.status} ${said?.error ?? "is no answer of i2v serve"}`);
  return said.data.items;
}
