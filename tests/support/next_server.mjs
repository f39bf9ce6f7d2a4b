// Runs the route handlers of a Next.js application without Next.js: `node next_server.mjs FOLDER` prints its port.
//
// What is claimed of Next.js (nextjs.org/docs/app, route handlers): `app/a/[b]/route.ts` answers /a/anything, a handler
// is called with a Request and with `params`, a promise; `@/` is the folder of tsconfig.json; `after` from next/server
// runs its function once the answer has been sent.
import { readdirSync } from "node:fs";
import { createServer } from "node:http";
import { registerHooks } from "node:module";
import { join, sep } from "node:path";
import { Readable } from "node:stream";
import { pathToFileURL } from "node:url";

const root = process.argv[2];
const later = [];
globalThis.afterAnswer = (work) => later.push(work);

registerHooks({
  resolve(name, context, next) {
    if (name === "next/server") {
      return { url: "data:text/javascript,export const after = globalThis.afterAnswer", shortCircuit: true };
    }
    return next(name.startsWith("@/") ? pathToFileURL(join(root, `${name.slice(2)}.ts`)).href : name, context);
  },
});

const routes = [];
for (const file of readdirSync(join(root, "app"), { recursive: true })) {
  if (file.endsWith(`${sep}route.ts`)) {
    const names = [];
    const pattern = file.split(sep).slice(0, -1).map((part) => {
      if (!part.startsWith("[")) return part;
      names.push(part.slice(1, -1));
      return "([^/]+)";
    });
    const handlers = await import(pathToFileURL(join(root, "app", file)).href);
    routes.push({ pattern: new RegExp(`^/${pattern.join("/")}$`), names, handlers });
  }
}

async function answer(request) {
  const { pathname } = new URL(request.url);
  for (const { pattern, names, handlers } of routes) {
    const found = pattern.exec(pathname);
    if (!found) continue;
    const handler = handlers[request.method];
    const params = Object.fromEntries(names.map((name, index) => [name, decodeURIComponent(found[index + 1])]));
    return handler ? handler(request, { params: Promise.resolve(params) }) : new Response(null, { status: 405 });
  }
  return new Response("Not found", { status: 404 });
}

const server = createServer(async (incoming, outgoing) => {
  const hasBody = !["GET", "HEAD"].includes(incoming.method);
  const request = new Request(`http://${incoming.headers.host}${incoming.url}`, {
    method: incoming.method,
    headers: incoming.headers,
    body: hasBody ? Readable.toWeb(incoming) : undefined,
    duplex: "half",
  });
  const response = await answer(request).catch((error) => {
    console.error(error);
    return new Response("Internal Server Error", { status: 500 });
  });
  outgoing.writeHead(response.status, Object.fromEntries(response.headers));
  outgoing.end(Buffer.from(await response.arrayBuffer()));
  await Promise.all(later.splice(0).map((work) => work()));
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit(0)).resume(); // with whoever started it
