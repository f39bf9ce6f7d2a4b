"""Google's part of a call, on loopback: certificates over HTTP, OIDC tokens signed with a key of the test, and a queue
of Cloud Tasks over gRPC for the real client.

What the queue does is what Google documents (cloud.google.com/tasks/docs: "Configure queues", "Create HTTP target
tasks"): names are unique, also for a while after the task has ended; any 2xx ends a task and anything else is tried
again with growing pauses; a task is given up once `max_attempts` and `max_retry_duration` are both exceeded; an
attempt has a dispatch deadline; headers tell the queue, the task and the number of tries. Retry-After is not obeyed,
and nothing slows the queue down.
"""

import json
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from google.auth import crypt, jwt
from google.cloud import tasks_v2
from google.protobuf import empty_pb2  # noqa: F401 - registers what the client's messages refer to

AUDIENCE = "https://push.example.com/jobs/run"
ACCOUNT = "tasks@project.iam.gserviceaccount.com"
QUEUE = "projects/p/locations/europe-west1/queues/videos"


class Issuer:
    """Signs tokens, and serves the certificates for them."""

    def __init__(self) -> None:
        self.asked = 0  # how often certificates were fetched
        self.away = False  # 503 instead
        self.max_age_s = 3600
        self._keys: dict[str, tuple[crypt.Signer, str]] = {}
        self.rotate("key-1")

    def rotate(self, key_id: str, *, keep: bool = False) -> None:
        """Signs with another key from now on; certificates of others are gone unless kept."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._keys = (self._keys if keep else {}) | {
            key_id: (
                crypt.RSASigner.from_string(pem, key_id),
                certificate.public_bytes(serialization.Encoding.PEM).decode(),
            )
        }
        self.key_id = key_id

    def token(self, **claims: object) -> str:
        """A token as Cloud Tasks sends it, with claims changed or, where None, left out."""
        now = int(time.time())
        given = {
            "iss": "https://accounts.google.com",
            "aud": AUDIENCE,
            "sub": "1",
            "email": ACCOUNT,
            "email_verified": True,
            "iat": now,
            "exp": now + 3600,
        } | claims
        payload = {name: value for name, value in given.items() if value is not None}
        return jwt.encode(self._keys[self.key_id][0], payload).decode()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The URL of the certificates, while they are served."""
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                body = json.dumps({key_id: pem for key_id, (_, pem) in issuer._keys.items()}).encode()
                self.send_response(503 if issuer.away else 200)
                self.send_header("Cache-Control", f"public, max-age={issuer.max_age_s}, must-revalidate")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/certs"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@dataclass
class Delivered:
    """One attempt at a task."""

    task: str  # the last part of its name
    headers: dict[str, str]
    status: int | None  # None: no answer within the deadline, or no connection


@dataclass
class CloudTasks:
    """A queue of Cloud Tasks."""

    issuer: Issuer
    max_attempts: int = 100  # -1: no limit
    max_retry_s: float = 0.0  # 0: no limit beside the attempts
    min_backoff_s: float = 0.05
    max_backoff_s: float = 0.2
    concurrent: int = 1000
    deliveries: list[Delivered] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    tasks: dict[str, tasks_v2.Task] = field(default_factory=dict)  # all there ever were: names stay taken
    refuse: grpc.StatusCode | None = None  # of the next calls

    def __post_init__(self) -> None:
        self._closing = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """host:port of the service, which delivers meanwhile."""
        self._workers = futures.ThreadPoolExecutor(32)
        server = grpc.server(futures.ThreadPoolExecutor(8))
        methods = {
            "CreateTask": grpc.unary_unary_rpc_method_handler(
                self._create, tasks_v2.CreateTaskRequest.deserialize, tasks_v2.Task.serialize
            ),
            "GetQueue": grpc.unary_unary_rpc_method_handler(
                self._queue, tasks_v2.GetQueueRequest.deserialize, tasks_v2.Queue.serialize
            ),
        }
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("google.cloud.tasks.v2.CloudTasks", methods)]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            self._closing.set()
            server.stop(0).wait()
            self._workers.shutdown()

    def statuses(self, task: str | None = None) -> list[int | None]:
        """What attempts were answered, in order."""
        return [it.status for it in self.deliveries if task in (None, it.task)]

    def _refuse(self, context: grpc.ServicerContext) -> None:
        if self.refuse is not None:
            context.abort(self.refuse, "as the test wants it")

    def _queue(self, request: tasks_v2.GetQueueRequest, context: grpc.ServicerContext) -> tasks_v2.Queue:
        self._refuse(context)
        if request.name != QUEUE:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such queue")
        return tasks_v2.Queue(
            name=QUEUE,
            rate_limits={"max_concurrent_dispatches": self.concurrent},
            retry_config={
                "max_attempts": self.max_attempts,
                "max_retry_duration": timedelta(seconds=self.max_retry_s),
                "min_backoff": timedelta(seconds=self.min_backoff_s),
                "max_backoff": timedelta(seconds=self.max_backoff_s),
                "max_doublings": 16,
            },
        )

    def _create(self, request: tasks_v2.CreateTaskRequest, context: grpc.ServicerContext) -> tasks_v2.Task:
        self._refuse(context)
        if request.parent != QUEUE:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such queue")
        name = request.task.name.removeprefix(f"{QUEUE}/tasks/")
        if not name or not all(it.isascii() and (it.isalnum() or it in "-_") for it in name) or len(name) > 500:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Task.name has to match [A-Za-z0-9_-]{1,500}")
        with self._lock:
            if name in self.tasks:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "Requested entity already exists")
            self.tasks[name] = request.task
        self._workers.submit(self._deliver, name, request.task)
        return request.task

    def _deliver(self, name: str, task: tasks_v2.Task) -> None:
        began, backoff_s, attempts = time.monotonic(), self.min_backoff_s, 0
        request = task.http_request
        while not self._closing.is_set():
            headers = dict(request.headers) | {
                "User-Agent": "Google-Cloud-Tasks",
                "X-CloudTasks-QueueName": QUEUE.rpartition("/")[2],
                "X-CloudTasks-TaskName": name,
                "X-CloudTasks-TaskRetryCount": str(attempts),
            }
            if request.oidc_token.service_account_email:
                token = self.issuer.token(
                    aud=request.oidc_token.audience or request.url, email=request.oidc_token.service_account_email
                )
                headers["Authorization"] = f"Bearer {token}"
            status = None
            with suppress(httpx.HTTPError):
                deadline_s = task.dispatch_deadline.total_seconds() or 600
                status = httpx.post(request.url, content=request.body, headers=headers, timeout=deadline_s).status_code
            attempts += 1
            self.deliveries.append(Delivered(name, headers, status))
            if status is not None and 200 <= status < 300:
                return
            out_of_tries = 0 <= self.max_attempts <= attempts
            out_of_time = self.max_retry_s == 0 or time.monotonic() - began > self.max_retry_s
            if out_of_tries and out_of_time:
                self.given_up.append(name)
                return
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, self.max_backoff_s)
