"""A Runway of our own on loopback: it checks requests as the documents say, keeps books, and misbehaves to order.

    with RunwayServer() as runway:
        runway.url, runway.key                  for RunwayEngine, or I2V_RUNWAY_URL and RUNWAYML_API_SECRET of a process
        runway.hold(); ...; runway.release()    tasks stand still in between, else they go on with every poll
        runway.faults["create"].append(REPLY_LOST)
        runway.endings.append("SAFETY.INPUT.TEXT")      how the next task ends, in place of SUCCEEDED
        runway.paid["slow push"], runway.tasks, runway.asked("create")

It is a real server in a thread, so tests of any kind, event loop and process reach it. Nothing in it waits for a clock:
a task goes on when somebody looks at it.
"""

import base64
import functools
import hashlib
import io
import json
import re
import secrets
import socket
import tempfile
import threading
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from inference.media.video import VideoWriter

VERSION = "2024-11-06"
DATA_URI_BYTES = 5 * 1024 * 1024
UPLOAD_BYTES = 200_000_000
SHRINK = 4
"""Clips are so many times smaller than ordered, each side: real videos, and quickly made."""

FPS = 24
GEN4 = {"1280:720", "720:1280", "1104:832", "832:1104", "960:960", "1584:672"}
VEO = {"1280:720", "720:1280", "1920:1080", "1080:1920"}
MODELS = {  # seconds, ratios, credits a second, required beside model, promptImage and ratio
    "gen4_turbo": (set(range(2, 11)), GEN4, 5, set()),
    "gen4.5": (set(range(2, 11)), GEN4, 12, {"duration", "promptText"}),
    "veo3.1": ({4, 6, 8}, VEO, 20, set()),
    "veo3.1_fast": ({4, 6, 8}, VEO, 10, set()),
}
WITH_SOUND = {"veo3.1": 40, "veo3.1_fast": 15}
"""Credits a second where `audio` is not false: sound is bought unless it is declined."""

DEFAULT_SECONDS = {"gen4_turbo": 10, "gen4.5": 5, "veo3.1": 8, "veo3.1_fast": 8}
KEYS = {"model", "promptImage", "promptText", "duration", "ratio", "seed"}
VEO_KEYS = {"audio", "negativePrompt"}


@dataclass(frozen=True)
class Fault:
    """What becomes of one request. Without a status the connection closes unanswered."""

    status: int | None = None
    body: bytes = b'{"error": "to order"}'
    carried_out: bool = False  # before the answer goes wrong
    hangs: bool = False  # until `release_hanging`, or the end
    truthful: bool = False  # carried out, and answered as it should be: only late
    headers: tuple[tuple[str, str], ...] = ()


DROPPED = Fault()
REPLY_LOST = Fault(carried_out=True)
MALFORMED = Fault(200, b'{"id": ', carried_out=True)
WITHOUT_ID = Fault(200, b"{}", carried_out=True)
HANGS = Fault(hangs=True)
HANGS_AFTER = Fault(hangs=True, carried_out=True)
SLOW = Fault(hangs=True, carried_out=True, truthful=True)
DAILY_CAP = Fault(429, b'{"error": "You have reached your daily task limit."}')
NO_CREDITS = Fault(400, b'{"error": "You do not have enough credits to run this task."}')
# Of these three Runway's documents say that the request was not carried out and may be sent again.
BAD_GATEWAY = Fault(502, b"<html>bad gateway</html>")
UNAVAILABLE = Fault(503, b'{"error": "shedding load"}')
GATEWAY_TIMEOUT = Fault(504, b"<html>gateway timeout</html>")
CRASHED_AFTER = Fault(500, b'{"error": "internal"}', carried_out=True)
NOT_FOUND = Fault(404, b'{"error": "not found"}')


def unknown_status(name: str = "RETHINKING") -> Fault:
    """A poll that is answered with a status nobody has heard of."""
    return Fault(200, json.dumps({"id": "any", "status": name}).encode())


@dataclass
class RunwayTask:
    """One task in the books."""

    id: str
    model: str
    seconds: int
    ratio: str
    prompt: str
    seed: int | None
    audio: bool
    negative_prompt: str | None
    photo: bytes
    photo_uri: str
    credits: float
    ending: str  # SUCCEEDED, CANCELLED, HANGS, or a failure code
    status: str = "PENDING"
    looks: int = 0  # since the status is what it is
    refunded: bool = False  # what was billed when it was created
    deleted: bool = False
    output_tokens: list[str] = field(default_factory=list)

    @property
    def photo_sha256(self) -> str:
        """What photo it was asked for, as it arrived."""
        return hashlib.sha256(self.photo).hexdigest()

    @property
    def billed(self) -> float:
        """Credits that it has cost."""
        return 0.0 if self.refunded else self.credits


class RunwayBooks:
    """Runway without its network. Everything may be read and set from any thread, while it runs and afterwards."""

    url = "http://runway.test"

    def __init__(self, *, key: str = "key_of_the_fake_runway", concurrency: int = 100) -> None:
        self.key = key
        self.concurrency = concurrency  # tasks that run at once; others are THROTTLED
        self.credits = 1_000_000.0
        self.pending_looks = 1  # polls that find a task PENDING, then RUNNING
        self.running_looks = 1
        self.tasks: list[RunwayTask] = []  # as they were created; deleted ones stay
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)  # by call: see `asked`
        self.endings: deque[str] = deque()  # of the next tasks
        self.ending_of: dict[str, str] = {}  # by prompt, for every task of it
        self.requests: list[tuple[str, str]] = []  # (call, path) as they arrived
        self.uploads: dict[str, bytes] = {}  # by runway:// URI
        self.clip: bytes | None = None  # the output of every task, in place of a clip as ordered
        self._slots: dict[str, tuple[str, dict[str, str]]] = {}  # upload id → URI, form fields
        self._held = False
        self._expired: set[str] = set()
        self._lock = threading.RLock()
        self.hanging = threading.Event()
        self._changed = threading.Condition(self._lock)

    # ------------------------------------------------------------ what tests read

    @property
    def paid(self) -> Counter[str]:
        """Billed tasks that were not refunded, by prompt."""
        with self._lock:
            return Counter(task.prompt for task in self.tasks if not task.refunded)

    @property
    def paid_photos(self) -> Counter[str]:
        """The same by the SHA-256 of the photo as it arrived: each photo of ours is encoded anew, always alike."""
        with self._lock:
            return Counter(task.photo_sha256 for task in self.tasks if not task.refunded)

    @property
    def billed_usd(self) -> float:
        """What all tasks cost."""
        with self._lock:
            return sum(task.billed for task in self.tasks) / 100

    def asked(self, call: str) -> int:
        """How often a call arrived: create, poll, delete, upload, form, output, organization."""
        with self._lock:
            return sum(each == call for each, _ in self.requests)

    def task(self, task_id: str) -> RunwayTask:
        """One task by its id."""
        return next(task for task in self.tasks if task.id == task_id)

    def wait_for(self, condition: Callable[[Self], bool], timeout_s: float = 30) -> None:
        """Waits until a request has made something true. Raises AssertionError."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), "nothing of the kind was asked for"

    # ------------------------------------------------------------ what tests order

    def hold(self) -> None:
        """Tasks stay in the state they are in, however often somebody looks."""
        self._held = True

    def release(self) -> None:
        """Tasks go on."""
        self._held = False

    def release_hanging(self) -> None:
        """Requests that hang are closed, later ones, too."""
        self.hanging.set()

    def finish(self, task_id: str) -> None:
        """Ends a task now, whatever the polls."""
        with self._lock:
            self._end(self.task(task_id))

    def expire_outputs(self) -> None:
        """URLs handed out until now do not work any more."""
        with self._lock:
            self._expired |= {token for task in self.tasks for token in task.output_tokens}

    def refill_hanging(self) -> None:
        """Requests hang again after `release_hanging`."""
        self.hanging = threading.Event()

    # ------------------------------------------------------------ the API

    def create(self, body: Any) -> tuple[int, Any]:
        """POST /v1/image_to_video."""
        issues, photo = self._problems(body)
        if issues:
            return 400, {"error": "Validation of body failed", "issues": issues, "docUrl": "https://docs.example"}
        seconds = body.get("duration", DEFAULT_SECONDS[body["model"]])
        audio = body["model"] in WITH_SOUND and body.get("audio", True)
        credits_ = seconds * (WITH_SOUND if audio else {name: it[2] for name, it in MODELS.items()})[body["model"]]
        if self.credits < credits_:
            return 400, {"error": "You do not have enough credits to run this task."}
        prompt = body.get("promptText", "")
        ending = self.ending_of.get(prompt) or (self.endings.popleft() if self.endings else "SUCCEEDED")
        task = RunwayTask(
            id=str(uuid.uuid4()),
            model=body["model"],
            seconds=seconds,
            ratio=body["ratio"],
            prompt=prompt,
            seed=body.get("seed"),
            audio=audio,
            negative_prompt=body.get("negativePrompt"),
            photo=photo,
            photo_uri=body["promptImage"][:40],
            credits=credits_,
            ending=ending,
        )
        self.credits -= credits_
        self.tasks.append(task)
        return 200, {"id": task.id, "estimatedCost": {"credits": credits_}}

    def look(self, task_id: str) -> tuple[int, Any]:
        """GET /v1/tasks/{id}; every look moves the task on."""
        task = self._find(task_id)
        if task is None:
            return 404, {"error": "Task not found"}
        if not self._held:
            self._advance(task)
        told: dict[str, Any] = {"id": task.id, "createdAt": "2026-11-20T00:00:00.000Z", "status": task.status}
        if task.status in ("PENDING", "THROTTLED", "RUNNING"):
            told["estimatedCost"] = {"credits": task.credits}
        else:
            told["cost"] = {"credits": int(task.billed)}
        if task.status == "RUNNING":
            told["progress"] = min(task.looks / (self.running_looks + 1), 1.0)
        if task.status == "SUCCEEDED":
            task.output_tokens.append(secrets.token_hex(8))
            told["output"] = [f"{self.url}/output/{task.id}.mp4?_jwt={task.output_tokens[-1]}"]
        if task.status == "FAILED":
            told["failure"] = "An error, for people."
            if task.ending != "UNKNOWN":
                told["failureCode"] = task.ending
        return 200, told

    def delete(self, task_id: str) -> tuple[int, Any]:
        """DELETE /v1/tasks/{id}: money comes back only for what had not begun."""
        task = self._find(task_id)
        if task is None:
            return 404, {"error": "Task not found"}
        if task.status in ("PENDING", "THROTTLED"):
            self._refund(task)
        if task.status in ("PENDING", "THROTTLED", "RUNNING"):
            task.status = "CANCELLED"
        task.deleted = True
        return 204, None

    def upload_slot(self, body: Any) -> tuple[int, Any]:
        """POST /v1/uploads."""
        if not isinstance(body, dict) or set(body) != {"filename", "type"} or body["type"] != "ephemeral":
            return 400, {"error": "Validation of body failed"}
        slot, uri = uuid.uuid4().hex, f"runway://{secrets.token_urlsafe(24)}"
        fields = {"key": f"ephemeral/{slot}", "policy": secrets.token_hex(8), "x-amz-signature": secrets.token_hex(8)}
        self._slots[slot] = uri, fields
        return 200, {
            "uploadUrl": f"{self.url}/form/{slot}?X-Sig={fields['policy']}",
            "fields": fields,
            "runwayUri": uri,
        }

    def form(self, slot: str, headers: Any, raw: bytes) -> tuple[int, Any]:
        """POST to an upload URL: a browser's form, its file last, and no key of Runway's."""
        if slot not in self._slots or headers.get("Authorization"):
            return 403, {"error": "AccessDenied"}
        uri, fields = self._slots[slot]
        message = BytesParser().parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + raw)
        parts = [(part.get_param("name", header="content-disposition"), part) for part in message.get_payload()]
        given = {name: part.get_payload(decode=True).decode() for name, part in parts[:-1]}
        name, file = parts[-1]
        content = file.get_payload(decode=True)
        if name != "file" or given != fields or not 512 <= len(content) <= UPLOAD_BYTES:
            return 400, {"error": "MalformedPOSTRequest"}
        self.uploads[uri] = content
        return 204, None

    def output(self, name: str, token: str) -> tuple[int, bytes]:
        """GET of a clip."""
        task = self._find(name.removesuffix(".mp4"))
        if task is None:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>"
        if token not in task.output_tokens or token in self._expired:
            return 403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
        if self.clip is not None:
            return 200, self.clip
        width, height = (int(side) // SHRINK for side in task.ratio.split(":"))
        return 200, clip(width, height, task.seconds)

    def organization(self) -> tuple[int, Any]:
        """GET /v1/organization."""
        models = {name: {"maxConcurrentGenerations": self.concurrency, "maxDailyGenerations": 500} for name in MODELS}
        usage = {name: {"dailyGenerations": sum(task.model == name for task in self.tasks)} for name in MODELS}
        tier = {"maxMonthlyCreditSpend": 100_000, "models": models}
        return 200, {"creditBalance": int(self.credits), "tier": tier, "usage": {"models": usage}}

    # ------------------------------------------------------------ one request

    def handle(
        self, method: str, target: str, headers: Mapping[str, str], raw: bytes
    ) -> tuple[Fault | None, int, dict[str, str], bytes]:
        """One request to its answer: what is to go wrong with it, else status, headers and body."""
        parts = urlsplit(target)
        found = [
            (call, match.groups())
            for wanted, pattern, call in CALLS
            if wanted == method and (match := re.fullmatch(pattern, parts.path))
        ]
        call, arguments = found[0] if found else ("unknown", ())
        status, payload = 500, None
        with self._changed:
            self.requests.append((call, parts.path))
            fault = self.faults[call].popleft() if self.faults[call] else None
            if fault is None or fault.carried_out:
                status, payload = self._carry_out(call, arguments, parts.query, headers, raw)
            self._changed.notify_all()
        if fault is not None and not fault.truthful:
            return fault, fault.status or 500, dict(fault.headers), fault.body
        if isinstance(payload, bytes):
            return fault, status, {"Content-Type": "video/mp4" if status == 200 else "application/xml"}, payload
        body = b"" if payload is None else json.dumps(payload).encode()
        return fault, status, {"Content-Type": "application/json"}, body

    def _carry_out(
        self, call: str, arguments: tuple[str, ...], query: str, headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        if call in ("form", "output", "unknown"):
            return self._outside(call, arguments, query, headers, raw)
        refusal = None
        if headers.get("Authorization") != f"Bearer {self.key}":
            refusal = 401, {"error": "Unauthorized"}
        elif headers.get("X-Runway-Version") != VERSION:
            refusal = 400, {"error": "Invalid API Version"}
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            refusal = 400, {"error": "Invalid JSON"}
        if refusal:
            return refusal
        carry_out = {
            "create": lambda: self.create(body),
            "upload": lambda: self.upload_slot(body),
            "poll": lambda: self.look(*arguments),
            "delete": lambda: self.delete(*arguments),
            "organization": self.organization,
        }
        return carry_out[call]()

    def _outside(
        self, call: str, arguments: tuple[str, ...], query: str, headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        """What takes no key."""
        if call == "form":
            return self.form(arguments[0], headers, raw)
        if call == "output":
            return self.output(arguments[0], parse_qs(query).get("_jwt", [""])[0])
        return 404, {"error": "not found"}

    # ------------------------------------------------------------ inside

    def _find(self, task_id: str) -> RunwayTask | None:
        return next((task for task in self.tasks if task.id == task_id and not task.deleted), None)

    def _advance(self, task: RunwayTask) -> None:
        task.looks += 1
        if task.status in ("PENDING", "THROTTLED") and task.looks > self.pending_looks:
            running = sum(other.status == "RUNNING" for other in self.tasks)
            task.status = "RUNNING" if running < self.concurrency else "THROTTLED"
            task.looks = 1 if task.status == "RUNNING" else task.looks
        elif task.status == "RUNNING" and task.looks > self.running_looks and task.ending != "HANGS":
            self._end(task)

    def _end(self, task: RunwayTask) -> None:
        task.status = task.ending if task.ending in ("SUCCEEDED", "CANCELLED") else "FAILED"
        if task.status == "FAILED" and "SAFETY" not in task.ending.split("."):
            self._refund(task)

    def _refund(self, task: RunwayTask) -> None:
        task.refunded = True
        self.credits += task.credits

    def _problems(self, body: Any) -> tuple[list[dict[str, Any]], bytes]:
        """What the API would refuse, and the photo."""
        if not isinstance(body, dict) or body.get("model") not in MODELS:
            return [_issue("model", "Invalid enum value")], b""
        found, photo = _shape_problems(body), b""
        try:
            photo = self._photo(body.get("promptImage"))
            _check_photo(photo)
        except ValueError as error:
            found.append(_issue("promptImage", str(error)))
        return found, photo

    def _photo(self, uri: Any) -> bytes:
        if uri in self.uploads:
            return self.uploads[uri]
        match = re.match(r"data:image/(jpeg|png|webp);base64,", str(uri))
        if not match:
            raise ValueError("Invalid URI")
        if len(uri) >= DATA_URI_BYTES:
            raise ValueError("Data URI is too large")
        return base64.b64decode(uri[match.end() :], validate=True)


class RunwayServer(RunwayBooks):
    """The same on loopback, for the length of a block."""

    def __init__(self, *, port: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"runway": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hanging.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _issue(key: str, message: str) -> dict[str, Any]:
    return {"code": "custom", "path": [key], "message": message}


def _shape_problems(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything but the photo."""
    seconds, ratios, _, required = MODELS[body["model"]]
    prompt, seed = body.get("promptText", "x"), body.get("seed", 0)
    known = KEYS | VEO_KEYS if body["model"] in WITH_SOUND else KEYS
    problems = [(key, "Unrecognized key", key not in known) for key in sorted(body)]
    problems += [("audio", "Expected boolean", type(body.get("audio", True)) is not bool)]
    problems += [("negativePrompt", "Expected string", not str(body.get("negativePrompt", "x")))]
    problems += [(key, "Required", key not in body) for key in sorted({"promptImage", "ratio"} | required)]
    duration = body.get("duration", min(seconds))
    problems += [
        ("duration", "Invalid duration", not (type(duration) is int and duration in seconds)),
        ("ratio", "Invalid enum value", body.get("ratio") not in ratios),
        ("promptText", "1 to 1000 characters", not 1 <= len(str(prompt).encode("utf-16-le")) // 2 <= 1000),
        ("seed", "Invalid seed", not (type(seed) is int and 0 <= seed <= 2**32 - 1)),
    ]
    return [_issue(key, message) for key, message, is_wrong in problems if is_wrong]


def _check_photo(photo: bytes) -> None:
    try:
        with Image.open(io.BytesIO(photo)) as image:
            image.load()
            width, height = image.size
    except OSError as error:
        raise ValueError("Invalid asset") from error
    if max(width, height) >= 8000:
        raise ValueError("Invalid asset dimensions")
    if not 0.5 <= round(width / height, 2) <= 2:
        raise ValueError(f"Invalid asset aspect ratio: {width / height:.3f}")


@functools.cache
def clip(width: int, height: int, seconds: int) -> bytes:
    """A real mp4: a bar that moves to the right."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, width=width, height=height, fps=FPS) as writer:
            for index in range(seconds * FPS):
                frame = np.full((height, width, 3), 90, np.uint8)
                at = index * (width - 8) // (seconds * FPS)
                frame[:, at : at + 8] = (230, 200, 40)
                writer.write(frame)
        return path.read_bytes()


CALLS = (
    ("POST", r"/v1/image_to_video", "create"),
    ("GET", r"/v1/tasks/([^/]+)", "poll"),
    ("DELETE", r"/v1/tasks/([^/]+)", "delete"),
    ("POST", r"/v1/uploads", "upload"),
    ("GET", r"/v1/organization", "organization"),
    ("POST", r"/form/([^/]+)", "form"),
    ("GET", r"/output/([^/]+)", "output"),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    runway: RunwayServer

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, status, headers, body = self.runway.handle(self.command, self.path, self.headers, raw)
        if fault is not None and fault.hangs:
            self.runway.hanging.wait()
        if fault is not None and fault.status is None and not fault.truthful:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._send(status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # whoever asked has gone

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
