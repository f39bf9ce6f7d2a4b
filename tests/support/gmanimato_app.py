"""A GmAnimato of our own: its worker and webhook routes with their real faults, in process or on loopback.

    with GmAnimatoServer() as app:
        app.url, app.secret                     for GmAnimatoQueue, or WORKER_API_URL and WORKER_TASK_SECRET
        video_id = app.add(photo)               a job of the local queue; `add_flat` for the older form of the answer
        app.callbacks = "https"                 what it says of its own address
        app.faults["webhook"].append(REPLY_LOST)
        app.jobs[video_id].status, app.finals(video_id), app.after_the_end(video_id)

`Application` has the routes without sockets, for tests in virtual time. Where each behaviour was seen: the routes
`worker/task`, `i2v-webhook/[id]` and `video/[id]/status`, the builders of workflows and the checks of lengths were read
in the application's source; the limit of a body, statuses and orders of calls were measured with its release of May
2026 on Node. `/media/…` stands for its bucket: photos that it links, and videos that it stores itself.
"""

import base64
import binascii
import json
import re
import socket
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple, Self

import anyio
import httpx

BODY_LIMIT_BYTES = 512 * 1024
"""Of a request's body, by default: `BODY_SIZE_LIMIT` of SvelteKit's adapter for Node."""

TIMEOUT_S = 30 * 60.0
"""How long after it was handed out a job is failed, by whoever opens its page then."""

URL_CHARS = 500
"""The longest final URL that its database takes."""

STATUSES = ("pending", "processing", "completed", "failed", "cancelled")
VIDEO = re.compile(r"\.(mp4|webm)$")

WORKFLOW = {
    "14": {"class_type": "LoadImage", "inputs": {"image": "{image}"}, "_meta": {"title": "Load Image"}},
    "44": {"class_type": "WanMoeKSampler", "inputs": {"seed": 7, "steps": 6}, "_meta": {"title": "Wan MoE KSampler"}},
    "4": {"class_type": "VAEDecode", "inputs": {"samples": ["44", 0]}, "_meta": {"title": "VAE Decode"}},
    "16": {"class_type": "VHS_VideoCombine", "inputs": {"images": ["4", 0]}, "_meta": {"title": "Video Combine"}},
}
"""The shape of its graphs; the nodes are some of its template's."""

NODE_WEIGHTS = {"44": 60, "4": 20, "16": 15}


class Answer(NamedTuple):
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


def as_json(status: int, payload: object) -> Answer:
    """A route's answer."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(payload).encode())


def page(status: int, title: str, **headers: str) -> Answer:
    """A page for people, as SvelteKit's errors and gateways are."""
    return Answer(status, {"Content-Type": "text/html", **headers}, f"<!doctype html><h1>{title}</h1>".encode())


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    `carried_out`: the route did its work all the same. Without an `answer` the connection is dropped, or, where it
    `hangs`, kept open in silence until the test ends.
    """

    answer: Answer | None = None
    carried_out: bool = False
    hangs: bool = False


REPLY_LOST = Fault(carried_out=True)
REQUEST_LOST = Fault()
HANGS = Fault(hangs=True)
HANGS_AFTER = Fault(hangs=True, carried_out=True)
GATEWAY_DOWN = Fault(page(502, "Bad Gateway"))
DATABASE_DOWN = Fault(as_json(500, {"error": "PrismaClientInitializationError: Can't reach database server"}))


@dataclass
class Job:
    """One video of the application, waiting for a worker or made by one."""

    id: str
    answer: dict[str, Any]  # what the task route says of it, but for `callback_url`
    is_flat: bool = False
    error: str | None = None  # why the task route fails once it has claimed the job
    status: str = "in_queue"
    percentage: float | None = None
    details: dict[str, Any] | None = None
    final_url: str | None = None
    dequeued_at_s: float | None = None

    @property
    def job_id(self) -> str:
        """What a worker has to call it."""
        return f"local-{self.id}"


@dataclass(frozen=True)
class Asked:
    """One request, in the order in which they were carried out."""

    at_s: float
    call: str  # task, webhook, media or elsewhere
    method: str
    path: str
    headers: Mapping[str, str]
    body: Any  # what its JSON stands for; None without
    size_bytes: int
    status: int
    video_id: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether it ends a job, or would."""
        return isinstance(self.body, dict) and str(self.body.get("status")).lower() not in ("processing", "pending")


@dataclass
class Application:
    """The routes, without sockets. `handle` is one request."""

    secret: str | None = "secret-of-the-tests"
    body_limit_bytes: int = BODY_LIMIT_BYTES
    stores_videos: bool = True  # False: its own bucket refuses those that come as base64
    clock: Callable[[], float] = time.monotonic
    callbacks: Literal["right", "absent", "https", "given"] = "right"
    callback_url: str = ""  # the one that is `given`
    jobs: dict[str, Job] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    faults: defaultdict[str, deque[Fault | None]] = field(default_factory=lambda: defaultdict(deque))
    origin: str = "http://gmanimato.test"
    lock: Any = field(default_factory=threading.RLock)

    def add(
        self,
        photo: bytes,
        last_photo: bytes | None = None,
        *,
        videos: Mapping[str, bytes] = {},
        inline: bool = False,
        error: str | None = None,
        weights: bool = True,
        video_id: str | None = None,
        **fields: Any,
    ) -> str:
        """A job of the local queue, as the builder of its workflow makes it; returns the id of its video.

        `inline`: photos as data URIs (WORKER_IMAGE_INPUT_MODE=base64). `fields` replace those of `input`.
        """
        video_id = video_id or str(uuid.uuid4())
        names = [f"{video_id}.png"] if last_photo is None else [f"{video_id}_first.png", f"{video_id}_last.png"]
        files = dict(zip(names, [photo] if last_photo is None else [photo, last_photo], strict=True))
        graph = json.loads(json.dumps(WORKFLOW).replace("{image}", names[0]))
        content: dict[str, Any] = {"images": [self._image(name, body, inline=inline) for name, body in files.items()]}
        content["workflow"] = graph
        if weights:
            content["node_weights"] = NODE_WEIGHTS
        if videos:
            content["videos"] = [self._image(name, body, inline=inline) for name, body in videos.items()]
        answer = {"id": f"local-{video_id}", "input": content | fields}
        self.jobs[video_id] = Job(video_id, answer, error=error)
        return video_id

    def add_flat(self, photo: bytes, **fields: Any) -> str:
        """The same in the older form, whose worker builds the workflow itself."""
        video_id = str(uuid.uuid4())
        answer = {
            "id": video_id,
            "job_id": f"local-{video_id}",
            "original_image_url": self._image("photo.jpg", photo, inline=False)["image"],
            "prompt": "waves roll in",
            "tags": ["sea"],
            "is_photo_realistic": True,
            "is_nsfw": False,
            "processing_started_at": None,
        }
        self.jobs[video_id] = Job(video_id, answer | fields, is_flat=True)
        return video_id

    def _image(self, name: str, body: bytes, *, inline: bool) -> dict[str, str]:
        if inline:
            return {"name": name, "image": "data:image/png;base64," + base64.b64encode(body).decode()}
        key = f"{uuid.uuid4()}/{name}"
        self.objects[key] = body
        return {"name": name, "image": f"{self.origin}/media/{key}"}

    def look(self, video_id: str) -> str:
        """A person opens the page of a video; returns its status. Only this fails a job that takes too long."""
        with self.lock:
            job = self.jobs[video_id]
            is_open = job.status in ("in_queue", "processing")
            if is_open and job.dequeued_at_s is not None and self.clock() - job.dequeued_at_s > TIMEOUT_S:
                job.status = "failed"
            return job.status

    def webhooks(self, video_id: str) -> list[Asked]:
        """The calls for one video that reached the route, whatever became of them."""
        return [each for each in self.asked if each.call == "webhook" and each.video_id == video_id]

    def finals(self, video_id: str) -> list[Asked]:
        """The accepted calls that ended it."""
        return [each for each in self.webhooks(video_id) if each.is_final and each.status == 201]

    def after_the_end(self, video_id: str) -> list[Asked]:
        """Whatever was carried out after the first accepted end: it undid it, or could have."""
        calls = [each for each in self.webhooks(video_id) if each.status == 201]
        ends = [number for number, each in enumerate(calls) if each.is_final]
        return calls[ends[0] + 1 :] if ends else []

    def handle(
        self, method: str, path: str, headers: Mapping[str, str], raw: bytes, *, origin: str | None = None
    ) -> tuple[Fault | None, Answer]:
        """One request and its answer. The caller loses the answer where the fault says so."""
        headers = {name.lower(): value for name, value in headers.items()}
        path = path.partition("?")[0]
        call, video_id = self._named(path)
        with self.lock:
            fault = self.faults[call].popleft() if self.faults[call] else None
            if fault is not None and not fault.carried_out:
                answer = fault.answer or Answer(0, {}, b"")
            else:
                answer = self._route(method, path, headers, raw, origin or self.origin)
            try:
                body = json.loads(raw) if raw else None
            except ValueError:
                body = None
            kept = {name: value for name, value in headers.items() if name != "x-worker-secret"}
            at_s = self.clock()
            self.asked.append(Asked(at_s, call, method, path, kept, body, len(raw), answer.status, video_id))
            if fault is not None and fault.carried_out and fault.answer is not None:
                answer = fault.answer
            return fault, answer

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """The same for `httpx.MockTransport`: no socket, and on anybody's clock."""
        origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        fault, answer = self.handle(request.method, request.url.path, request.headers, request.content, origin=origin)
        if fault is not None and fault.hangs:
            await anyio.sleep_forever()
        if fault is not None and fault.answer is None:
            raise httpx.ReadError("the connection was dropped")
        return httpx.Response(answer.status, headers=answer.headers, content=answer.body)

    @staticmethod
    def _named(path: str) -> tuple[str, str | None]:
        if path == "/api/worker/task":
            return "task", None
        if found := re.fullmatch(r"/api/i2v-webhook/([^/]+)", path):
            return "webhook", found[1]
        return ("media" if path.startswith("/media/") else "elsewhere"), None

    def _route(  # noqa: PLR0911 - an answer each; all that a request has
        self, method: str, path: str, headers: Mapping[str, str], raw: bytes, origin: str
    ) -> Answer:
        call, video_id = self._named(path)
        match call, method:
            case "task", "GET" | "HEAD":  # SvelteKit runs GET for HEAD, and drops the body
                return self._task(headers, origin)
            case "webhook", "POST":
                return self._webhook(video_id or "", raw)
            case "media", "GET":
                body = self.objects.get(path.removeprefix("/media/"))
                return page(404, "NoSuchKey") if body is None else Answer(200, {"Content-Type": "image/jpeg"}, body)
            case "task", _:
                return self._not_allowed(method, "GET, HEAD")
            case "webhook", _:
                return self._not_allowed(method, "POST")
        if path.startswith(("/api/worker/task/", "/api/i2v-webhook")):
            return page(404, "Not Found")
        return page(303, "", Location="/login")  # its hook sends strangers away before it looks for a route

    @staticmethod
    def _not_allowed(method: str, allowed: str) -> Answer:
        return Answer(405, {"Content-Type": "text/plain", "Allow": allowed}, f"{method} method not allowed".encode())

    def _task(self, headers: Mapping[str, str], origin: str) -> Answer:
        if not self.secret:
            return as_json(500, {"error": "Worker secret not configured"})
        given = headers.get("x-worker-secret", headers.get("authorization", ""))
        if re.sub(r"^Bearer\s+", "", given, flags=re.IGNORECASE) != self.secret:
            return as_json(401, {"error": "Unauthorized"})
        job = next((job for job in self.jobs.values() if job.status == "in_queue"), None)
        if job is None:
            return as_json(404, {"message": "No tasks available"})
        job.status, job.dequeued_at_s = "processing", self.clock()
        if job.error is not None:  # the claim stays, so the job is lost
            return as_json(500, {"error": job.error})
        answer = json.loads(json.dumps(job.answer))
        inner = answer if job.is_flat else answer["input"]
        callback = f"{origin}/api/i2v-webhook/{job.id}"
        match self.callbacks:
            case "right":
                inner["callback_url"] = callback
            case "https":
                inner["callback_url"] = callback.replace("http://", "https://")
            case "given":
                inner["callback_url"] = self.callback_url
        return as_json(200, answer)

    def _webhook(self, video_id: str, raw: bytes) -> Answer:  # noqa: PLR0911 - an answer for each way to be wrong
        if len(raw) > self.body_limit_bytes:
            said = f"Content-length of {len(raw)} exceeds limit of {self.body_limit_bytes} bytes."
            return as_json(500, {"error": f"SvelteKitError: {said}"})
        try:
            body = json.loads(raw)
        except ValueError as error:
            return as_json(500, {"error": f"SyntaxError: {error}"})
        named, said = (body.get("id"), body.get("status")) if isinstance(body, dict) else (None, None)
        if not named or not said:
            return as_json(400, {"error": "missing id or status"})
        job = self.jobs.get(video_id)
        if job is None:
            return as_json(404, {"error": "not found"})
        if named != job.job_id:
            return as_json(403, {"error": "job id mismatch"})
        status, url = said.lower(), self._video_of(body.get("files"))
        if url == "":
            status = "failed"
        if status not in STATUSES:
            return as_json(400, {"error": f"Invalid status. Allowed: {', '.join(STATUSES)}"})
        if len(url or "") > URL_CHARS:
            told = f"final_video_url exceeds maximum length of {URL_CHARS} characters ({len(url or '')}/{URL_CHARS})"
            return as_json(400, {"error": told})
        self._update(job, "failed" if status == "completed" and not url else status, body.get("progress"))
        job.final_url = url or job.final_url
        return as_json(201, {"success": True, "updated": {"id": job.id, "status": job.status}})

    @staticmethod
    def _update(job: Job, status: str, progress: Any) -> None:
        job.status = status  # nothing asks what it was before
        if status in ("completed", "failed"):
            job.percentage = job.details = None
        elif isinstance(progress, dict):
            if isinstance(progress.get("percentage"), int | float):
                job.percentage = progress["percentage"]
            names = ("completed_nodes", "total_nodes", "current_node", "current_node_progress")
            job.details = {name: progress.get(name) for name in names}

    def _video_of(self, files: Any) -> str | None:
        """The URL of the first video among the files; "" where one came as base64 and is none."""
        for kind in ("s3_url", "base64"):
            for file in files if isinstance(files, list) else []:
                if file.get("type") != kind or not VIDEO.search(file.get("filename") or "") or not file.get("data"):
                    continue
                if kind == "s3_url":
                    return str(file["data"])
                try:
                    content = base64.b64decode(file["data"].rpartition(",")[2], validate=True)
                except (binascii.Error, ValueError):
                    content = b""
                if not content or not self.stores_videos:
                    return ""
                key = f"{uuid.uuid4()}.{file['filename'].rpartition('.')[2]}"
                self.objects[key] = content
                return f"{self.origin}/media/{key}"
        return None


class GmAnimatoServer(Application):
    """The same on loopback, for the length of a block."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"app": self}))
        self._server.daemon_threads = True
        self.url = self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    app: GmAnimatoServer

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = self.headers.get("Host", "")
        fault, answer = self.app.handle(self.command, self.path, dict(self.headers), raw, origin=f"http://{host}")
        if fault is not None and fault.hangs:
            self.app.ended.wait()
        if fault is not None and fault.answer is None:
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # whoever asked has gone
            return
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer.body)
        except OSError:
            self.close_connection = True  # whoever asked has gone

    do_GET = do_HEAD = do_POST = do_PUT = do_OPTIONS = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
