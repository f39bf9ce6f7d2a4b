"""GmAnimato's queue: a SvelteKit application that hands out ComfyUI workflows and listens to a webhook.

What it does not have: leases, renewals, fences, priorities, and a way to hand a job back. It keeps no order among calls
to its webhook either: whatever arrives last is what the job is, so progress that arrives after the end undoes the end.
Therefore each lease has one place (`_Calls`) that lets one call out at a time, and none after the end was accepted.

A job that was handed out and never reported stays `processing` until somebody opens its page half an hour later.
"""

import json
import math
import mimetypes
import re
import secrets
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import anyio
import anyio.to_thread
import httpx
import structlog
from pydantic import ValidationError

from inference import inputs
from inference.errors import (
    I2VError,
    InvalidTask,
    LeaseLost,
    ObjectMissing,
    ObjectTooLarge,
    QueueError,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
    QueueUnreached,
    SettingsError,
    StorageAway,
    StorageRefused,
    StorageUnreached,
    one_line,
)
from inference.progress.stages import Progress
from inference.queues.base import SegmentStore
from inference.queues.gmanimato_wire import (
    BODY_LIMIT_BYTES,
    NO_TASK,
    ROOM,
    Job,
    Reply,
    base64_bytes,
    completed_call,
    encoded,
    failed_call,
    parse_job,
    progress_call,
)
from inference.task import Lease, Video, VideoFormat, explain, identifier
from inference.transfer.addresses import may_be_proxied
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.bucket import Bucket
from inference.transfer.json_api import NEVER_SENT
from inference.transfer.network import flaw_in, is_of_a_private_network, is_this_machine, safe_for_a_key
from inference.transfer.storage import Storage, redact
from inference.transfer.storage_errors import FOREIGN, MIN_SECRET_CHARS, reason_of
from inference.transfer.tls import tls_context

logger = structlog.get_logger(__name__)

LEASE_S = 86_400.0
"""No other worker can get the job, so nothing has to stop by the clock. After half an hour the application fails a job
whose page somebody opens, but a video that comes later still replaces that."""

BEAT_S = 2.0
"""How often its page asks for progress, about, and so how often progress is sent."""

TASK_LIMIT_S = 70.0
"""For one question for a job. The application may fetch photos before it answers and send them as base64, and a job
whose answer nobody waits for is lost: 50 MB at 6 Mbit/s take this long. `leasing/taking.py` waits 75 s."""

SILENCE_S = 30.0
"""For as long the application may send nothing, before its answer and within it."""

PROGRESS_LIMIT_S = 5.0
"""For one progress call, at each of at most two addresses; a keeper waits 15 s for a heartbeat."""

FINAL_LIMIT_S = 30.0
"""For one call that ends a job."""

MALFORMED_TRIES, MALFORMED_PAUSE_S = 3, 2.0
"""How a malformed job is reported failed: nobody else would repeat it, and the next job waits meanwhile."""

MAX_TASK_BYTES = 200_000_000
"""Of a job, whose photos and videos may be inside as data URIs."""

THREAD_BYTES = 1_000_000
"""Longer jobs are parsed in a thread: the event loop would stand still."""

MAX_URL_CHARS = 500
"""Longer URLs of videos are refused by the application: its database has no room for them."""

MAX_NAME_CHARS = 100
MAX_MESSAGE_CHARS = 1000
FORGET_S = 3600.0
"""How long it is remembered that a lease has ended."""

INLINE = "inline:"
"""Before the name of a video that travels inside the call that ends its job."""

BUCKET_REFUSES = (
    "the bucket does not accept this worker; see BUCKET_NAME, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY and "
    "BUCKET_REGION"
)

STOPPED = "the worker stopped before the video was finished"

ONLY_THE_NEXT = "this queue hands out only the next job; run without an item id"

UNPROVEN = (
    "whether WORKER_TASK_SECRET is the application's cannot be known without claiming a job, which could not be given "
    "back; the first question for a job tells"
)
"""What `check` leaves open."""


@dataclass
class _Calls:
    """What was sent to the webhook for one lease."""

    lock: anyio.Lock = field(default_factory=anyio.Lock)  # held while a call is out
    is_ending: bool = False  # a call that ends the job was begun: no more progress
    is_over: bool = False  # it was accepted, or the job is not ours: nothing at all is sent any more
    over_at: float = math.inf
    made: bytes | None = None  # the end with a video, from when it was first to be sent until it was refused
    end_in_doubt: bytes | None = None  # an end that may have been carried out, although no answer came
    progress_in_doubt_at: float = -math.inf  # when the last progress call was given up that may yet be carried out
    uses_own_route: bool = False  # the job's callback_url leads elsewhere
    is_unheard: bool = False  # the last progress call was not accepted; so that a log tells it once
    deliveries: int = 0

    def take_progress(self) -> bool:
        """Whether progress may still be sent."""
        return not self.is_ending

    def end(self) -> None:
        """Nothing is sent any more."""
        self.is_over, self.over_at = True, anyio.current_time()


class GmAnimatoQueue:
    """TaskQueue over GmAnimato's worker route and its webhook.

    Raises SettingsError for an address, secret or worker_id that cannot work.
    """

    SETTLE_S: ClassVar[float] = 3.0
    """How long the end of a job waits after a progress call that got no answer: the server may still carry it out."""

    hands_back = False
    video_formats: tuple[VideoFormat, ...] = ("mp4", "webm")  # the only ones that count as a video there

    def __init__(
        self,
        api_url: str,
        secret: str | None,
        *,
        worker_id: str,
        storage: Storage,
        bucket: Bucket | None = None,
        prefix: str = "gmanimato",
        callback_base_url: str | None = None,
        max_body_bytes: int = BODY_LIMIT_BYTES,
        max_photo_bytes: int = 50_000_000,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`bucket`: where videos go, under `prefix`; without, they travel in the body of the call that ends the job.

        `callback_base_url`: where the webhook is, in place of whatever a job says; `api_url` where that does not work.
        `max_body_bytes`: the application's BODY_SIZE_LIMIT.
        """
        self._worker_id = worker_id
        self._storage, self._bucket, self._prefix = storage, bucket, prefix.strip("/")
        self._max_body_bytes, self._max_photo_bytes = max_body_bytes, max_photo_bytes
        self._secret = _fit_for_a_header(secret)
        try:
            identifier.validate_python(f"{worker_id}.{_token()}")
        except ValidationError as error:
            raise SettingsError(f"WORKER_ID: {explain(error)}") from None
        base_url = _base_of(api_url)
        self._task_url = f"{base_url}/api/worker/task"
        self._base_url = base_url
        self._callback_base = _callback_base(callback_base_url) if callback_base_url is not None else None
        self._is_there = False  # the worker route has answered at this address
        self._calls: dict[str, _Calls] = {}  # by worker_id, which is unique to a lease
        proxied = may_be_proxied(base_url)
        self._api = httpx.AsyncClient(
            headers={"x-worker-secret": self._secret, **IDENTITY},
            event_hooks={"response": [bounded(MAX_TASK_BYTES)]},
            timeout=SILENCE_S,
            trust_env=proxied,
            verify=tls_context(),
            transport=transport,
        )
        # The webhook asks for no secret, and its address is whatever a job says.
        self._webhook = httpx.AsyncClient(
            headers=IDENTITY,
            event_hooks={"response": [bounded(MAX_JSON_BYTES)]},
            timeout=FINAL_LIMIT_S,
            trust_env=proxied,
            verify=tls_context(),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.aclose()
        await self._webhook.aclose()

    async def check(self) -> str | None:
        """As TaskQueue.check, but for the secret, which only a question for a job could prove. OPTIONS claims nothing.

        SvelteKit answers 405 for a route that is there and has no OPTIONS, with the methods that it has in `Allow`, and
        404 where there is none. It would run GET for HEAD, and claim a job. Other servers, such as nginx for files,
        answer 405 to every OPTIONS, without GET in `Allow`.
        """
        response = await self._request("OPTIONS")
        reply = self._read(response)
        has_no_get = reply.status == 405 and "GET" not in response.headers.get("Allow", "").upper()
        if reply.status == 404 or has_no_get or 300 <= reply.status < 400:
            raise QueueRefused(
                f"{reply.status} {reply.said}: no GmAnimato at {self._where}; set GMANIMATO_API_URL to its address"
            )
        if reply.status != 405 and not 200 <= reply.status < 300:
            raise self._no_task(reply)
        self._is_there = True
        return UNPROVEN

    async def check_storage(self) -> str | None:
        """As TaskQueue.check_storage: the bucket's host; None without one. Photos are wherever a job says.

        Asks for an object that is not there: a wrong key is refused, and nothing is stored. Raises SettingsError.
        """
        if self._bucket is None:
            return None
        bucket = self._bucket
        url = await anyio.to_thread.run_sync(bucket.download_url, f"{self._prefix}/check".lstrip("/"))
        await self._storage.check(url)
        with TemporaryDirectory(prefix="i2v-check-") as folder:
            try:
                await self._storage.download(url, Path(folder) / "check")
            except (ObjectMissing, StorageRefused) as error:
                is_fine = isinstance(error, ObjectMissing) and "NoSuchBucket" not in str(error)
                # Who may write but not read gets AccessDenied, and can store videos.
                if not is_fine and "AccessDenied" not in str(error):
                    raise SettingsError(f"{BUCKET_REFUSES}: {error}") from None
        return httpx.URL(url).host

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """As TaskQueue.lease. Whatever goes wrong here after the application claimed a job loses that job."""
        if item_id is not None:
            raise QueueRefused(ONLY_THE_NEXT)
        self._forget_ended()
        response = await self._request("GET")
        reply = self._read(response)
        if reply.status == 404:
            await self._believe_it_is_there(reply)
            return None
        if reply.status != 200:
            raise self._no_task(reply)
        self._is_there = True
        payload = await self._parsed(response)
        worker_id = f"{self._worker_id}.{_token()}"
        try:
            task = parse_job(payload)
        except InvalidTask as error:
            # Of what it holds only the names of fields: photos may be in it, and signed URLs.
            logger.warning("malformed job", problem=str(error), fields=_fields_of(payload))
            await self._report_malformed(Job.in_ruins(payload), str(error))
            raise
        return Lease(task=task, worker_id=worker_id, length_s=LEASE_S, beat_interval_s=BEAT_S)

    async def backlog(self) -> int | None:
        """As TaskQueue.backlog: this queue cannot tell."""
        return None

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """As TaskQueue.heartbeat: says how far the job is.

        Nothing depends on it, so whatever goes wrong is a line in the log; only where the application's own webhook
        says that the job is gone, or another's, this raises LeaseLost. Once the end of the job was begun, it does
        nothing: progress that arrives after the end would undo it.
        """
        calls, job = self._calls_of(lease), Job.of(lease)
        if not calls.take_progress():
            return
        async with calls.lock:
            if not calls.take_progress():
                return
            # Cancelled in between, it would be in doubt, and the end of the job would have to wait.
            with anyio.CancelScope(shield=True):
                problem = await self._tell_progress(job, calls, encoded(progress_call(job, progress)))
        if problem and not calls.is_unheard:
            logger.warning("progress not accepted", item_id=job.id, problem=problem)
        elif calls.is_unheard and not problem:
            logger.info("progress accepted again", item_id=job.id)
        calls.is_unheard = bool(problem)

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """As TaskQueue.fetch_inputs."""
        with _reaching_storage("this worker cannot reach the application's photos"):
            return await inputs.fetch(lease.task.inputs, folder, storage=self._storage, max_bytes=self._max_photo_bytes)

    def segments(self, lease: Lease) -> SegmentStore | None:
        """See TaskQueue."""
        del lease  # its tasks are workflows
        return None

    async def deliver(self, lease: Lease, video: Video) -> str:
        """As TaskQueue.deliver. Returns the plain URL of the video in the bucket; `inline:…` without a bucket.

        The plain URL because a presigned one would end, and is longer than the application takes. Without a bucket
        nothing is sent yet, but the video is refused here if it would not fit. Raises ObjectTooLarge.
        """
        files = _files(video)
        name = next(iter(files))
        if PurePosixPath(name).suffix.removeprefix(".") not in self.video_formats:
            raise StorageRefused(f"{name}: only .mp4 and .webm are videos to this application")
        if self._bucket is None:
            await self._inline(Job.of(lease), video)
            return f"{INLINE}{name}"
        calls, job = self._calls_of(lease), Job.of(lease)
        calls.deliveries += 1
        # A second upload of the same lease is another object: the first may be stored, and its answer lost.
        attempt = lease.token if calls.deliveries == 1 else f"{lease.token}-{calls.deliveries}"
        folder = "/".join(filter(None, (self._prefix, job.video_id, attempt)))
        base = f"{self._bucket.endpoint}/{self._bucket.name}/{folder}"
        if len(f"{base}/{name}") > MAX_URL_CHARS:
            raise StorageRefused(f"{base}/…: longer than the {MAX_URL_CHARS} characters that the application takes")
        for each, path in files.items():
            await self._upload(f"{folder}/{each}", path, self._bucket)
        return f"{base}/{name}"

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """As TaskQueue.complete."""
        job = Job.of(lease)
        if storage_path.startswith(INLINE):
            files = {
                name: b64encode(await self._content_of(path)).decode()
                for name, path in (await self._inline(job, video)).items()
            }
            call = completed_call(job, "base64", files)
        else:
            base = storage_path.rpartition("/")[0]
            call = completed_call(job, "s3_url", {name: f"{base}/{name}" for name in _files(video)})
        calls = self._calls_of(lease)
        calls.made = encoded(call)
        await self._end(job, calls, calls.made)

    async def fail(self, lease: Lease, message: str) -> None:
        """As TaskQueue.fail, and safe to repeat."""
        said = one_line(message, MAX_MESSAGE_CHARS) or "no reason given"
        job = Job.of(lease)
        await self._end(job, self._calls_of(lease), encoded(failed_call(job, said)))

    async def release(self, lease: Lease, reason: str | None = None) -> None:
        """As TaskQueue.release: the job ends failed, since no other worker could get it.

        A worker that is stopped while it tries to tell of a finished video tells of that once more instead.
        """
        calls = self._calls_of(lease)
        if calls.made is None:
            await self.fail(lease, f"{reason or STOPPED}; please start it again")
        else:
            await self._end(Job.of(lease), calls, calls.made)

    async def _tell_progress(self, job: Job, calls: _Calls, content: bytes) -> str | None:
        """Sends progress; returns what went wrong. Raises LeaseLost."""
        try:
            reply = await self._tell(job, calls, content, is_progress=True)
        except QueueUnavailable as error:
            return str(error)
        if reply.is_disowned:
            calls.is_ending = True
            calls.end()
            raise LeaseLost(f"job {job.id} is not ours any more: {reply.status} {reply.said}")
        return None if reply.is_success else f"{reply.status} {reply.said}"

    async def _end(self, job: Job, calls: _Calls, content: bytes) -> None:
        """Sends the call that ends a job, after any other call for it and before no other.

        An end whose answer was lost may have been carried out. So whatever comes after it repeats it: a video that the
        application may have is not replaced by a failure.
        Raises LeaseLost, QueueUnavailable, QueueFailed, QueueRefused, QueueAuthError.
        """
        calls.is_ending = True
        async with calls.lock:
            if calls.is_over:
                return
            await anyio.sleep_until(calls.progress_in_doubt_at + self.SETTLE_S)
            content = calls.end_in_doubt or content
            before, calls.end_in_doubt = calls.end_in_doubt, content
            try:
                reply = await self._tell(job, calls, content)
            except QueueUnreached:
                calls.end_in_doubt = before
                raise
            if reply.is_success:
                calls.end()
                _tell_if_not_kept(job, content, reply)
            elif reply.is_disowned:
                calls.end()
                raise LeaseLost(f"job {job.id} is not ours any more: {reply.status} {reply.said}")
            else:
                refusal = reply.refusal()
                if not isinstance(refusal, QueueUnavailable):
                    calls.made = calls.end_in_doubt = None  # judged, so that another end may be sent
                elif isinstance(refusal, QueueFailed):
                    calls.end_in_doubt = before
                raise refusal

    async def _tell(self, job: Job, calls: _Calls, content: bytes, *, is_progress: bool = False) -> Reply:
        """One call to the webhook: where the operator or the job says, and where that is wrong, at the route beside the
        one that handed out the job.

        The address that a job names is made from what the application believes to be its own. It may be missing, https
        for a server that has none, or lead to a login page; the operator's may be of a tunnel that is down. Raises
        QueueUnreached, QueueUnavailable.
        """
        route = f"/api/i2v-webhook/{job.video_id}"
        own = self._base_url + route
        named = self._callback_base + route if self._callback_base else _usable(job.callback_url)
        if calls.uses_own_route:
            named = None
        if named is None or named == own:
            return await self._post(own, calls, content, is_progress=is_progress)
        problem: QueueUnavailable | None = None
        try:
            reply = await self._post(named, calls, content, is_progress=is_progress)
        except QueueUnavailable as error:
            problem, said = error, str(error)
        else:
            if reply.is_verdict:
                return reply
            said = f"{reply.status} {reply.said}"
        try:
            reply = await self._post(own, calls, content, is_progress=is_progress)
        except QueueUnavailable as error:
            both = f"{said}; {error}"
            if isinstance(error, QueueUnreached) and isinstance(problem, QueueUnreached):
                raise QueueUnreached(both) from None
            raise QueueUnavailable(both) from None
        if reply.is_verdict or reply.is_disowned:
            calls.uses_own_route = True
            event = "CALLBACK_BASE_URL does not work" if self._callback_base else "callback_url does not work"
            logger.warning(event, item_id=job.id, problem=said, instead=redact(own))
        return reply

    async def _post(self, url: str, calls: _Calls, content: bytes, *, is_progress: bool) -> Reply:
        """Sends a call to one address. Raises QueueUnreached where it was certainly not sent, QueueUnavailable."""
        may_be_carried_out = True
        limit_s = PROGRESS_LIMIT_S if is_progress else FINAL_LIMIT_S
        try:
            with anyio.fail_after(limit_s):
                headers = {"Content-Type": "application/json"}
                response = await self._webhook.post(url, content=content, headers=headers, timeout=limit_s)
            reply = self._read(response)
            may_be_carried_out = reply.may_still_be_carried_out
        except NEVER_SENT as error:
            may_be_carried_out = False
            raise QueueUnreached(f"{redact(url)}: {one_line(reason_of(error), 200)}") from None
        except FOREIGN as error:
            raise QueueUnavailable(f"{redact(url)}: {one_line(reason_of(error), 200)}") from None
        finally:
            if may_be_carried_out and is_progress:
                calls.progress_in_doubt_at = anyio.current_time()
        return reply

    async def _report_malformed(self, job: Job | None, message: str) -> None:
        if job is None:
            logger.error("a claimed job without a usable id is lost", where=self._where)
            return None
        calls, content = _Calls(), encoded(failed_call(job, one_line(message, MAX_MESSAGE_CHARS)))
        for attempt in range(1, MALFORMED_TRIES + 1):
            try:
                return await self._end(job, calls, content)
            except QueueUnavailable as error:
                problem: I2VError = error
                if attempt < MALFORMED_TRIES:
                    await anyio.sleep(MALFORMED_PAUSE_S)
            except I2VError as error:
                problem = error
                break
        logger.error("malformed job could not be reported", item_id=job.id, problem=str(problem))
        return None

    async def _inline(self, job: Job, video: Video) -> dict[str, Path]:
        """The files that fit into the call that ends the job, by name: all, or the video alone.

        Raises ObjectTooLarge where not even that fits.
        """
        files = _files(video)
        sizes = {name: await _size_of(path) for name, path in list(files.items())[1:]}
        name = next(iter(files))
        sizes = {name: video.size_bytes, **sizes}
        for names in (list(files), [name]):
            bare = encoded(completed_call(job, "base64", dict.fromkeys(names, "")))
            needed_bytes = len(bare) + sum(base64_bytes(sizes[each]) for each in names)
            if needed_bytes <= self._max_body_bytes:
                return {each: files[each] for each in names}
        told = f"a video of {video.size_bytes} bytes is too large for the {self._max_body_bytes} of a request"
        raise ObjectTooLarge(f"{told}: {ROOM}")

    async def _content_of(self, path: Path) -> bytes:
        return await anyio.Path(path).read_bytes()

    async def _upload(self, key: str, path: Path, bucket: Bucket) -> None:
        content_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
        url = await self._sign(key, content_type, bucket)
        try:
            with _reaching_storage("this worker cannot reach its bucket"):
                await self._storage.upload(url, path, content_type=content_type)
        except (ObjectMissing, StorageRefused) as error:  # no such bucket, or its key is refused
            # Every other job would be rendered and then lost as well.
            raise SettingsError(f"{BUCKET_REFUSES}: {error}") from None

    @staticmethod
    async def _sign(key: str, content_type: str, bucket: Bucket) -> str:
        return await anyio.to_thread.run_sync(lambda: bucket.upload_url(key, content_type=content_type))

    def _calls_of(self, lease: Lease) -> _Calls:
        return self._calls.setdefault(lease.worker_id, _Calls())

    def _forget_ended(self) -> None:
        now = anyio.current_time()
        self._calls = {name: calls for name, calls in self._calls.items() if now < calls.over_at + FORGET_S}

    @property
    def _where(self) -> str:
        return redact(self._task_url)

    async def _believe_it_is_there(self, nothing: Reply) -> None:
        """Tells a queue without jobs from an address without a queue, at which a worker would wait for ever.

        Raises QueueRefused where there is no such route, and as `check`.
        """
        if not self._is_there and (nothing.payload or {}).get("message") != NO_TASK:
            await self.check()
        self._is_there = True

    def _no_task(self, reply: Reply) -> QueueError:
        """The error that an answer of the worker route stands for, unless it is a job or none."""
        error = reply.no_task(self._where)
        if isinstance(error, QueueFailed) and reply.payload is not None:
            # The route claims a job before it prepares it, and does not give it back. Newer versions fail it then.
            logger.error(
                "the application failed, and if it had claimed a job, that job is lost",
                answer=reply.said,
                look="its log names the job after '[Worker] Assigned task'; it may stay 'processing' for 30 minutes",
            )
        return error

    async def _request(self, method: str) -> httpx.Response:
        """One question to the worker route. Raises QueueUnreached, QueueUnavailable."""
        try:
            with anyio.fail_after(TASK_LIMIT_S):
                return await self._api.request(method, self._task_url)
        except NEVER_SENT as error:
            raise QueueUnreached(f"{self._where}: {self._clean(reason_of(error))}") from None
        except FOREIGN as error:
            lost = "; a job claimed for this answer is lost" if method == "GET" else ""
            raise QueueUnavailable(f"{self._where}: {self._clean(reason_of(error))}{lost}") from None

    def _read(self, response: httpx.Response) -> Reply:
        """The answer as it concerns every route. The body of a job is left to `_parsed`."""
        payload: Any = None
        if len(response.content) <= THREAD_BYTES:
            try:
                payload = response.json()
            except (ValueError, RecursionError):
                payload = None
        payload = payload if isinstance(payload, dict) else None
        said = str((payload or {}).get("error") or (payload or {}).get("message") or "")
        if response.has_redirect_location:
            said = f"redirected to {redact(str(response.url.join(response.headers['Location'])))}"
        elif payload is None:
            said = response.reason_phrase
        return Reply(response.status_code, payload, self._clean(said))

    async def _parsed(self, response: httpx.Response) -> Any:
        """A job. Raises QueueRefused where something else answered, InvalidTask for a job that is cut off."""
        body = response.content
        try:
            if len(body) <= THREAD_BYTES:
                return json.loads(body)
            return await anyio.to_thread.run_sync(json.loads, body)
        except (ValueError, RecursionError):
            if not (found := re.match(rb'\s*\{\s*"id"\s*:\s*"([^"]{1,200})"', body)):
                raise QueueRefused(f"{self._where}: no JSON; is GMANIMATO_API_URL the address of GmAnimato?") from None
        problem = f"malformed job: no JSON, or longer than {MAX_TASK_BYTES} bytes"
        job = Job.in_ruins({"id": found[1].decode("utf-8", "replace")})
        await self._report_malformed(job, problem)
        raise InvalidTask(problem, item_id=job and job.id)

    def _clean(self, text: str) -> str:
        # A shorter one is nobody's secret, and replacing it would garble the text.
        return one_line(text.replace(self._secret, "…") if len(self._secret) >= MIN_SECRET_CHARS else text, 300)


@contextmanager
def _reaching_storage(where: str) -> Iterator[None]:
    """If a storage's host cannot be reached, every other task would fail as well. Raises StorageAway."""
    try:
        yield
    except StorageUnreached as error:
        raise StorageAway(f"{where}: {error}") from None


def _base_of(api_url: str) -> str:
    """The address of the application, with or without a trailing slash or `/api`. Raises SettingsError.

    Its own documents use plain http between boxes of one network, so that is taken there, and told.
    """
    try:
        url = safe_for_a_key(api_url, is_of_a_private_network)
    except SettingsError as error:
        raise SettingsError(f"GMANIMATO_API_URL: {error}") from None
    if url.scheme == "http" and not is_this_machine(url.host):
        logger.warning("the secret travels unencrypted", host=url.host, setting="GMANIMATO_API_URL")
    return str(url.copy_with(path=url.path.rstrip("/").removesuffix("/api"))).rstrip("/")


def _callback_base(url: str) -> str:
    """Where the webhook is. It asks for no secret, so plain http may do. Raises SettingsError."""
    usable = _usable(url.strip())
    if usable is None or httpx.URL(usable).query:
        raise SettingsError("CALLBACK_BASE_URL: must look like https://host")
    return usable.rstrip("/").removesuffix("/api")


def _fields_of(payload: object) -> str:
    """The names of a job's fields, and of those of its `input`, for a log."""
    if not isinstance(payload, Mapping):
        return type(payload).__name__
    content = payload.get("input")
    inner = [f"input.{name}" for name in content] if isinstance(content, Mapping) else []
    return one_line(", ".join([*payload, *inner]), 300)


def _usable(url: str | None) -> str | None:
    """An address that can be called; None for any other."""
    try:
        return url if url and flaw_in(httpx.URL(url)) is None else None
    except (httpx.InvalidURL, UnicodeError):
        return None


def _fit_for_a_header(secret: str | None) -> str:
    text = (secret or "").strip()
    if not text or not text.isascii() or not text.isprintable():
        raise SettingsError("WORKER_TASK_SECRET: set it to the application's, in printable ASCII")
    return text


def _tell_if_not_kept(job: Job, content: bytes, reply: Reply) -> None:
    """Logs that the application accepted a video and failed the job all the same, as when it cannot store base64."""
    updated = (reply.payload or {}).get("updated")
    became = updated.get("status") if isinstance(updated, dict) else None
    if became == "failed" and json.loads(content)["status"] == "completed":
        logger.error(
            "the application took the video and failed the job",
            item_id=job.id,
            look="its log says why after '[Webhook]': it may be unable to store videos; BUCKET_… here would do that",
        )


def _files(video: Video) -> Mapping[str, Path]:
    """The video, and what else was made, under names that are safe in a URL. The video is the first."""
    files = {_safe(video.path.name): video.path}
    for number, (name, path) in enumerate(video.others.items(), start=1):
        safe = _safe(name)
        files[safe if safe not in files else f"{number}-{safe}"] = path
    return files


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._")[-MAX_NAME_CHARS:] or "file"


async def _size_of(path: Path) -> int:
    return (await anyio.Path(path).stat()).st_size


def _token() -> str:
    return secrets.token_hex(6)
