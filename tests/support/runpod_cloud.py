"""RunPod on loopback: the endpoint that people call, and the platform behind it that the SDK's own job loop talks to.

    with RunPodCloud() as cloud, cloud.worker(tmp_path, env=settings) as worker:
        job_id = cloud.run({"prompt": "zoom in"}, policy={"executionTimeout": 900_000})
        assert cloud.wait(job_id).status == "COMPLETED"

    cloud.url, cloud.api_key, cloud.endpoint_id     for whoever calls /run, /runsync, /status, /cancel, /health, …
    cloud.cancel(job_id), cloud.fail_results(2), worker.terminate(), worker.kill()      what may happen

The worker is a real process with the real SDK. Jobs, deadlines and limits are kept as RunPod's documents describe them;
where they are silent, the docstrings here say what was assumed.
"""

import json
import os
import signal
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import Any, Self
from urllib.parse import parse_qsl

import httpx

from tests.support.processes import environment, forker

STAND_INS = Path(__file__).parents[1] / "stand_ins"
ROOT = Path(__file__).parents[2]
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
SHUTDOWN_S = 30


@dataclass(frozen=True)
class Post:
    """One POST to job-done, whatever became of it."""

    body: Any  # as parsed; text when it was not JSON
    size_bytes: int
    at: float  # monotonic
    is_progress: bool
    answered: int | None  # the status; None when the connection was closed instead
    content_type: str


@dataclass
class Job:
    """One job in the books."""

    id: str
    input: Any
    top: dict[str, Any]  # what came beside the input: policy, webhook, s3Config
    execution_limit_s: float
    queue_limit_s: float
    limit_bytes: int  # of the result
    queued_at: float  # this and the next two: monotonic
    started_at: float | None = None
    ended_at: float | None = None
    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    progress: list[Any] = field(default_factory=list)
    """Outputs of accepted IN_PROGRESS posts, in the order of their arrival."""
    posts: list[Post] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)
    worker_id: str | None = None
    stop_pod: bool = False
    retried: int = 0

    @property
    def is_final(self) -> bool:
        """Whether nothing can change it any more."""
        return self.status in FINAL

    @property
    def deadline(self) -> float | None:
        """When it times out, monotonic: in the queue by its ttl, then by its executionTimeout."""
        if self.is_final:
            return None
        queue_ends_at = self.queued_at + self.queue_limit_s
        return queue_ends_at if self.started_at is None else self.started_at + self.execution_limit_s

    @property
    def extras(self) -> dict[str, Any]:
        """What the worker gets beside id and input; policy and webhook are RunPod's own business."""
        return {key: it for key, it in self.top.items() if key not in {"policy", "webhook"}}

    def snapshot(self) -> "Job":
        """It, as it is now."""
        return replace(self, progress=list(self.progress), posts=list(self.posts), stream=list(self.stream))

    def as_answer(self) -> dict[str, Any]:
        """What GET /status says."""
        answer = {"id": self.id, "status": self.status}
        if self.started_at is not None:
            answer |= {"delayTime": int((self.started_at - self.queued_at) * 1000), "workerId": self.worker_id}
        if self.started_at is not None and self.ended_at is not None:
            answer["executionTime"] = int((self.ended_at - self.started_at) * 1000)
        output = self.progress[-1] if self.status == "IN_PROGRESS" and self.progress else self.output
        return answer | {key: it for key, it in (("output", output), ("error", self.error)) if it is not None}


NEEDED = ("inference.on_runpod.worker", "inference.transfer.bucket", "aiohttp", "aiohttp_retry", "paramiko", "requests")
"""By a worker, but for the SDK itself, which reads the environment when it is imported. paramiko is what it imports."""


class Worker:
    """A process that serves the endpoint, in a session of its own; gone with its children when its block ends."""

    def __init__(
        self, cloud: "RunPodCloud", pod: "_Pod", command: Sequence[object], folder: Path, env: Mapping[str, str]
    ) -> None:
        self._cloud, self._pod = cloud, pod
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{pod.id}.log"
        with self._log.open("ab") as log:
            self._popen = forker(*NEEDED).start(command, folder, env, log.fileno(), log.fileno())
        self.pid = self._popen.pid
        threading.Thread(target=self._watch, name=f"watch {pod.id}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def log(self) -> str:
        """What it said, on stdout and stderr."""
        return self._log.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.returncode if self._ended.is_set() else None

    def wait(self, deadline_s: float = SHUTDOWN_S) -> int:
        """Its exit code."""
        assert self._ended.wait(deadline_s), f"{self._pod.id} did not end within {deadline_s:g} s:\n{self.log()}"
        return self._popen.returncode

    def terminate(self) -> None:
        """SIGTERM for the process alone. RunPod hands it no more jobs, and answers its long polls.

        That is kind: a job that the SDK takes after SIGTERM is never run. `os.kill(worker.pid, …)` shows that.
        """
        self._popen.send_signal(signal.SIGTERM)
        self._cloud._leave(self._pod)

    def kill(self) -> None:
        """SIGKILL for it and its children. RunPod notices: its jobs go back to the queue."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)

    def _watch(self) -> None:
        self._popen.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # a container ends with its first process
        self._cloud._lose(self._pod)
        self._ended.set()


@dataclass(eq=False)
class _Pod:
    """One life of a worker, as the platform sees it."""

    id: str
    worker: Worker | None = None  # None for a process that somebody else started
    stops: list[str] = field(default_factory=list)
    has_polled: bool = False
    is_leaving: bool = False
    is_unhealthy: bool = False


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class _Request:
    query: dict[str, str]
    content_type: str
    raw: bytes


class RunPodCloud:
    """One endpoint. Everything may be read and called from any thread. No worker outlives its block."""

    def __init__(
        self,
        *,
        endpoint_id: str = "ep1",
        api_key: str = "rpa_test",
        payload_limit_bytes: int = 10_000_000,
        sync_limit_bytes: int = 20_000_000,
    ) -> None:
        self.endpoint_id, self.api_key = endpoint_id, api_key
        self.payload_limit_bytes, self.sync_limit_bytes = payload_limit_bytes, sync_limit_bytes
        self.execution_limit_s = 600.0
        """For jobs without a policy.executionTimeout. A test may set it below what a policy may."""
        self.queue_limit_s = 24 * 3600.0
        self.poll_s = 5.0
        self.sync_wait_s = 90.0
        self.webhook_pause_s = 10.0
        self.pings: list[dict[str, str]] = []
        self.takes: list[dict[str, str]] = []
        self.webhooks: list[tuple[str, Any, int | None]] = []
        """Attempts: where to, what, and what was answered."""
        self._jobs: dict[str, Job] = {}
        self._pods: dict[str, _Pod] = {}
        self._workers: list[Worker] = []
        self._result_faults: deque[int | None] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"cloud": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v2"
        self._threads = [
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True),
            threading.Thread(target=self._watch_deadlines, daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()
        if kind is not None:
            print(self._logs())

    # ------------------------------------------------------------ workers

    def worker_env(self, pod_id: str = "pod1") -> dict[str, str]:
        """What RunPod puts into the environment of a worker, and what lets one start here, and soon."""
        base = f"{self.url}/{self.endpoint_id}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_AI_API_KEY": self.api_key,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "PYTHONPATH": str(STAND_INS),
        }

    def worker(
        self,
        folder: Path,
        *,
        script: Path = ROOT / "runpod_handler.py",
        pod_id: str = "pod1",
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> Worker:
        """Starts one in a folder, which is its home too: the SDK prefers keys that it finds in ~/.runpod.

        It takes two seconds until it asks for a job, or heeds SIGTERM as it should.
        """
        settings = environment(HOME=folder) | self.worker_env(pod_id) | dict(env or {})
        with self._changed:
            former = self._pods.get(pod_id)
            assert not (former and former.worker and former.worker.exit_code is None), f"{pod_id} runs already"
            pod = self._pods[pod_id] = _Pod(pod_id)
            pod.worker = Worker(self, pod, [script, *arguments], folder, settings)
            self._workers.append(pod.worker)
        return pod.worker

    def fail_results(self, count: int, status: int = 500) -> None:
        """The next results that are posted, progress not counted, are answered so and not taken."""
        self._result_faults.extend([status] * count)

    def drop_results(self, count: int) -> None:
        """The next results that are posted are not taken, and the connection is closed without an answer."""
        self._result_faults.extend([None] * count)

    # ------------------------------------------------------------ jobs

    def run(self, input: object, **top: object) -> str:  # noqa: A002  # as RunPod calls it
        """What POST /run does; the id of the job."""
        return self._submit(json.dumps({"input": input, **top}).encode(), is_sync=False).id

    def cancel(self, job_id: str) -> None:
        """What POST /cancel does. The worker is told once.

        Its SDK does not listen for a job that it has taken and not started yet, so wait for a sign of life of the
        handler before you cancel; IN_PROGRESS is none.
        """
        with self._changed:
            self._end(self._find(job_id), "CANCELLED")

    @property
    def jobs(self) -> dict[str, Job]:
        """Snapshots of all, in the order of their submission."""
        with self._changed:
            return {job_id: job.snapshot() for job_id, job in self._jobs.items()}

    def job(self, job_id: str) -> Job:
        """A snapshot."""
        with self._changed:
            return self._find(job_id).snapshot()

    def wait(self, job_id: str, deadline_s: float = 60) -> Job:
        """Until its status is final."""
        return self.until(job_id, lambda job: job.is_final, deadline_s)

    def until(self, job_id: str, condition: Callable[[Job], object], deadline_s: float = 60) -> Job:
        """Until a snapshot satisfies the condition; returns it. Raises AssertionError after the deadline."""
        give_up_at = monotonic() + deadline_s
        while not condition(job := self.job(job_id)):
            assert monotonic() < give_up_at, f"not within {deadline_s:g} s: {job}\n{self._logs()}"
            with self._changed:
                self._changed.wait(0.05)  # conditions may look at more than the job
        return job

    # ------------------------------------------------------------ the endpoint, as people call it

    def handle(self, method: str, path: str, headers: Mapping[str, str], raw: bytes) -> tuple[int | None, Any]:
        """One HTTP request: the status and the body to answer with. No status: close the connection."""
        try:
            return self._dispatch(method, path, headers, raw)
        except _Refused as refused:
            return refused.status, {"error": refused.reason}

    def _dispatch(self, method: str, target: str, headers: Mapping[str, str], raw: bytes) -> tuple[int | None, Any]:
        if headers.get("Authorization", "").removeprefix("Bearer ") != self.api_key:
            raise _Refused(401, "Unauthorized")
        path, _, query = target.partition("?")
        prefix = f"/v2/{self.endpoint_id}/"
        name, *arguments = path.removeprefix(prefix).split("/")
        call = CALLS.get((method, name, len(arguments)))
        if call is None or not path.startswith(prefix):
            raise _Refused(404, "not found")
        request = _Request(dict(parse_qsl(query)), headers.get("Content-Type", ""), raw)
        return getattr(self, call)(request, *arguments)

    def _on_run(self, request: _Request) -> tuple[int, Any]:
        return 200, {"id": self._submit(request.raw, is_sync=False).id, "status": "IN_QUEUE"}

    def _on_runsync(self, request: _Request) -> tuple[int, Any]:
        job = self._submit(request.raw, is_sync=True)
        with self._changed:
            self._changed.wait_for(lambda: job.is_final or self._closing.is_set(), self.sync_wait_s)
            return 200, job.as_answer()

    def _on_status(self, _: _Request, job_id: str) -> tuple[int, Any]:
        with self._changed:
            return 200, self._find(job_id).as_answer()

    def _on_stream(self, _: _Request, job_id: str) -> tuple[int, Any]:
        with self._changed:
            job = self._find(job_id)
            parts, job.stream = job.stream, []
            return 200, {"status": job.status, "stream": parts}

    def _on_cancel(self, request: _Request, job_id: str) -> tuple[int, Any]:
        self.cancel(job_id)
        return self._on_status(request, job_id)

    def _on_purge(self, _: _Request) -> tuple[int, Any]:
        with self._changed:
            waiting = self._waiting()
            for job in waiting:
                self._end(job, "CANCELLED")
        return 200, {"removed": len(waiting), "status": "completed"}

    def _on_health(self, _: _Request) -> tuple[int, Any]:
        with self._changed:
            count = Counter(job.status for job in self._jobs.values())
            retried = sum(job.retried for job in self._jobs.values())
            busy = {job.worker_id for job in self._jobs.values() if job.status == "IN_PROGRESS"}
            pods = [pod for pod in self._pods.values() if not pod.is_leaving]
            running, ready = sum(pod.id in busy for pod in pods), sum(pod.has_polled for pod in pods)
            unhealthy = sum(pod.is_unhealthy for pod in self._pods.values())
        workers = {"idle": ready - running, "initializing": len(pods) - ready, "ready": ready, "running": running}
        jobs = {"completed": count["COMPLETED"], "failed": count["FAILED"] + count["TIMED_OUT"]}
        jobs |= {"inProgress": count["IN_PROGRESS"], "inQueue": count["IN_QUEUE"], "retried": retried}
        return 200, {"jobs": jobs, "workers": workers | {"throttled": 0, "unhealthy": unhealthy}}

    # ------------------------------------------------------------ the platform, as workers call it

    def _on_take(self, request: _Request, pod_id: str) -> tuple[int, Any]:
        """One job, or a list of up to `batch_size`."""
        batch_size = request.query.get("batch_size")
        with self._changed:
            self.takes.append(request.query)
            pod = self._pod(pod_id)
            pod.has_polled = True
            jobs = self._poll(pod, lambda: [] if pod.is_leaving else self._waiting()[: int(batch_size or 1)])
            for job in jobs:
                job.status, job.started_at, job.worker_id = "IN_PROGRESS", monotonic(), pod_id
            self._changed.notify_all()
            given = [{"id": job.id, "input": job.input, **job.extras} for job in jobs]
        if not given:
            return 204, None
        return 200, given if batch_size else given[0]

    def _on_stops(self, _: _Request, pod_id: str) -> tuple[int, Any]:
        with self._changed:
            pod = self._pod(pod_id)
            found = self._poll(pod, lambda: pod.stops)
            pod.stops = []
        return (200, {"jobsToStop": found}) if found else (204, None)

    def _on_ping(self, request: _Request, pod_id: str) -> tuple[int, Any]:
        with self._changed:
            self.pings.append(request.query)
            if request.query.get("status") == "unhealthy":
                self._pod(pod_id).is_unhealthy = True
            self._changed.notify_all()
        return 200, {}

    def _on_stream_part(self, request: _Request, _: str, job_id: str) -> tuple[int, Any]:
        with self._changed:
            self._find(job_id).stream.append(json.loads(request.raw))
            self._changed.notify_all()
        return 200, {}

    def _on_done(self, request: _Request, pod_id: str, job_id: str) -> tuple[int | None, Any]:
        """A result or progress. Whatever comes after the end is recorded, and changes nothing."""
        with self._changed:
            job, size_bytes = self._find(job_id), len(request.raw)
            try:
                body = json.loads(request.raw)
            except ValueError:
                body = request.raw.decode(errors="replace")
            is_progress = isinstance(body, dict) and body.get("status") == "IN_PROGRESS"
            if not isinstance(body, dict):
                answered = 400
            elif not is_progress and self._result_faults:
                answered = self._result_faults.popleft()
            else:
                answered = 200 if size_bytes <= job.limit_bytes else 413
            job.posts.append(Post(body, size_bytes, monotonic(), is_progress, answered, request.content_type))
            if answered == 200 and not job.is_final:
                self._accept(pod_id, job, body, is_progress=is_progress)
            self._changed.notify_all()
        return answered, {}

    def _accept(self, pod_id: str, job: Job, body: dict[str, Any], *, is_progress: bool) -> None:
        if is_progress:
            job.progress.append(body.get("output"))
            return
        job.output, job.error, job.stop_pod = body.get("output"), body.get("error"), bool(body.get("stopPod"))
        self._end(job, "FAILED" if "error" in body else "COMPLETED")
        if job.stop_pod and (worker := self._pod(pod_id).worker):
            worker.terminate()

    # ------------------------------------------------------------ inside: whoever calls holds the lock

    def _submit(self, raw: bytes, *, is_sync: bool) -> Job:
        limit_bytes = self.sync_limit_bytes if is_sync else self.payload_limit_bytes
        if len(raw) > limit_bytes:
            raise _Refused(413, f"request body exceeds {limit_bytes} bytes")
        try:
            top = json.loads(raw)
        except ValueError:
            raise _Refused(400, "body is not JSON") from None
        if not isinstance(top, dict) or "input" not in top:
            raise _Refused(400, "input is required")
        job_input, policy = top.pop("input"), top.get("policy") or {}
        execution_ms, ttl_ms = policy.get("executionTimeout", 5001), policy.get("ttl", 10_000)
        if {type(execution_ms), type(ttl_ms)} - {int, float} or execution_ms <= 5000 or ttl_ms < 10_000:
            raise _Refused(400, "policy: executionTimeout must be above 5000 ms, ttl at least 10000 ms")
        job = Job(
            id=f"{'sync-' if is_sync else ''}{uuid.uuid4()}-e1",
            input=job_input,
            top=top,
            execution_limit_s=execution_ms / 1000 if "executionTimeout" in policy else self.execution_limit_s,
            queue_limit_s=ttl_ms / 1000 if "ttl" in policy else self.queue_limit_s,
            limit_bytes=limit_bytes,
            queued_at=monotonic(),
        )
        with self._changed:
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def _find(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise _Refused(404, "job not found")
        return self._jobs[job_id]

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.status == "IN_QUEUE"]

    def _pod(self, pod_id: str) -> _Pod:
        return self._pods.setdefault(pod_id, _Pod(pod_id))

    def _poll(self, pod: _Pod, ask: Callable[[], list[Any]]) -> list[Any]:
        """Waits for an answer, but not beyond the hold, and not when the worker or the cloud is about to go."""
        give_up_at = monotonic() + self.poll_s
        while not (found := ask()) and not pod.is_leaving and not self._closing.is_set():
            left_s = give_up_at - monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        return found

    def _end(self, job: Job, status: str) -> None:
        if job.is_final:
            return
        if job.status == "IN_PROGRESS" and status in {"CANCELLED", "TIMED_OUT"}:
            self._pod(job.worker_id).stops.append(job.id)
        job.status, job.ended_at = status, monotonic()
        if url := job.top.get("webhook"):
            threading.Thread(target=self._call_webhook, args=(url, job.as_answer()), daemon=True).start()
        self._changed.notify_all()

    def _leave(self, pod: _Pod) -> None:
        with self._changed:
            pod.is_leaving = True
            self._changed.notify_all()

    def _lose(self, pod: _Pod) -> None:
        """A worker has ended, in whatever way: what it was at goes back to the queue, to its old place."""
        with self._changed:
            pod.is_leaving = True
            for job in self._jobs.values():
                if job.status == "IN_PROGRESS" and job.worker_id == pod.id:
                    job.status, job.started_at, job.worker_id = "IN_QUEUE", None, None
                    job.retried += 1
            self._changed.notify_all()

    def _watch_deadlines(self) -> None:
        with self._changed:
            while not self._closing.is_set():
                for job in self._jobs.values():
                    if job.deadline is not None and job.deadline <= monotonic():
                        self._end(job, "TIMED_OUT")
                deadlines = [job.deadline for job in self._jobs.values() if job.deadline is not None]
                self._changed.wait(max(0, min(deadlines) - monotonic()) if deadlines else None)

    def _call_webhook(self, url: str, body: dict[str, Any]) -> None:
        for attempt in range(3):
            if attempt and self._closing.wait(self.webhook_pause_s):
                return
            try:
                status = httpx.post(url, json=body, timeout=10).status_code
            except httpx.HTTPError:
                status = None
            with self._changed:
                self.webhooks.append((url, body, status))
                self._changed.notify_all()
            if status == 200:
                return

    def _logs(self) -> str:
        return "\n".join(f"── {it._pod.id}: exit code {it.exit_code}\n{it.log()[-6000:]}" for it in self._workers)


CALLS = {  # method, name, how many arguments follow in the path
    ("POST", "run", 0): "_on_run",
    ("POST", "runsync", 0): "_on_runsync",
    ("GET", "status", 1): "_on_status",
    ("POST", "status", 1): "_on_status",
    ("GET", "stream", 1): "_on_stream",
    ("POST", "stream", 1): "_on_stream",
    ("POST", "cancel", 1): "_on_cancel",
    ("POST", "purge-queue", 0): "_on_purge",
    ("GET", "health", 0): "_on_health",
    ("GET", "job-take", 1): "_on_take",
    ("GET", "job-take-batch", 1): "_on_take",
    ("GET", "job-stop", 1): "_on_stops",
    ("GET", "ping", 1): "_on_ping",
    ("POST", "job-stream", 2): "_on_stream_part",
    ("POST", "job-done", 2): "_on_done",
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # each progress of each job is a connection of its own


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    cloud: RunPodCloud

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, payload = self.cloud.handle(self.command, self.path, self.headers, raw)
        if status is None:
            self.close_connection = True
            return
        body = b"" if payload is None else json.dumps(payload).encode()
        try:
            self.send_response(status)
            if payload is not None:
                self.send_header("Content-Type", "application/json")
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # whoever asked has gone

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
