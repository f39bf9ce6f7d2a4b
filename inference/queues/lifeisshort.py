"""The Life-is-Short worker API: a Next.js application that owns the queue and presigns its storage.

Each method describes its protocol and where the real server differs from its documentation. Every method is one
attempt; a call is repeated only where one answer is ambiguous and a second one settles its meaning.
"""

import math
import re
import secrets
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Self

import anyio
import anyio.to_thread
import httpx
import structlog
from pydantic import ValidationError

from inference import inputs
from inference.errors import (
    CancelRequested,
    I2VError,
    InvalidTask,
    ItemMissing,
    LeaseLost,
    ObjectExists,
    ObjectMissing,
    ObjectUnsigned,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
    SettingsError,
    StorageAway,
    StorageUnavailable,
    StorageUnreached,
    UrlExpired,
    one_line,
)
from inference.progress.stages import Progress
from inference.providers import WorkerType
from inference.queues.base import SegmentStore
from inference.queues.item import RELEASE_S
from inference.queues.lifeisshort_wire import (
    BYPASS_HEADER,
    BYPASS_SETTING,
    PROTECTION_MARK,
    Backlog,
    QueueAnswer,
    SignedDownload,
    SignedUpload,
)
from inference.task import LEASE_SEQ, PHOTO, TAKES, Lease, Task, Video, VideoFormat, explain, identifier, parse_task
from inference.transfer.addresses import may_be_proxied, worker_api_url
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.storage import Storage
from inference.transfer.storage_errors import FOREIGN, reason_of
from inference.transfer.tls import tls_context

logger = structlog.get_logger(__name__)

BEAT_INTERVAL = "beat_interval_s"
"""An extra field of tasks from the embedded server: how often it would like to hear how far the work is."""

MIN_BEAT_INTERVAL_S = 0.5
"""No queue is told more often. How seldom it may be told is for the worker's own settings (`leasing/keeper.py`)."""

MAX_BEAT_INTERVAL_S = 86_400
"""The longest lease. A whole number in JSON may be too large to be a float, so something has to be the most."""

CONFIRM_SHARE = 1 / 20
"""The longest pause before a heartbeat is repeated, as a share of the lease. `keeper.py` allows a heartbeat, this pause
included, a fifth of the lease."""

MAX_MESSAGE_CHARS = 1000
"""Limit for an error message reported to the queue, and for a payload in the log."""

# What Supabase says of a path that is taken. The Next.js server passes the text on, with varying status codes.
TAKEN = re.compile("already exists|duplicate", re.IGNORECASE)

ONLY_THE_NEXT = (
    "this queue hands out only the next task, and that is another; "
    "put the item back in your app, or run without an item id"
)

COST = "cost_usd"
"""What a video cost, in the report to a queue that takes it."""

REPORTED_IDS = ("runway_task_id", "veo_operation_id")  # the only external ids the report call knows


class LifeIsShortQueue:
    """TaskQueue over the worker API.

    Raises SettingsError for an address, key, worker_id or length that cannot work.
    """

    hands_back = True
    video_formats: tuple[VideoFormat, ...] = ("mp4",)

    CONFIRM_AFTER_S: ClassVar[float] = 2.5
    """Pause before a heartbeat answered 404 is repeated: the real server says 404 for a database hiccup, too."""

    def __init__(
        self,
        api_url: str,
        api_key: str | None,
        *,
        worker_id: str,
        storage: Storage,
        auth_scheme: Literal["worker", "bearer"] = "worker",
        worker_type: WorkerType | None = None,
        lease_s: float = 600,
        extension_s: float = 300,
        request_timeout_s: float = 10,
        bypass: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`bypass`: the bypass secret of Vercel's Deployment Protection; if given, every call sends it."""
        self._worker_id = worker_id
        self._storage = storage
        self._filter = {} if worker_type is None else {"worker_type": worker_type}  # older deployments do not know it
        self._lease_s = lease_s
        self._extension_s = extension_s
        self._request_timeout_s = request_timeout_s
        headers = dict(IDENTITY)
        if key := _fit_for_a_header("WORKER_API_KEY", api_key):
            headers["Authorization"] = f"{auth_scheme.capitalize()} {key}"
        if bypass := _fit_for_a_header(BYPASS_SETTING, bypass):
            headers[BYPASS_HEADER] = bypass
        self._secrets = [secret for secret in (key, bypass) if secret]
        try:
            identifier.validate_python(f"{worker_id}.{_token()}")
        except ValidationError as error:
            raise SettingsError(f"WORKER_ID: {explain(error)}") from None
        if not (lease_s >= 2 and 2 <= extension_s <= 86_400):
            raise SettingsError("LEASE_DURATION: leases and their extensions last from 2 s to a day")
        # Progress is our extension, and other servers may refuse unknown fields. A server that reports
        # `cancel_requested` has the extension; until one does, or its task says so, no progress is sent.
        self._speaks_progress = False
        self._tells_backlog = True
        self._was_there = False  # the worker API has answered at this address
        base_url = worker_api_url(api_url)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            event_hooks={"response": [bounded(MAX_JSON_BYTES)]},
            timeout=request_timeout_s,
            trust_env=may_be_proxied(base_url),
            verify=tls_context(),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def check(self) -> str | None:
        """As TaskQueue.check: sends a heartbeat for a task that cannot exist."""
        body = {"item_id": str(uuid.uuid4()), "worker_id": f"{self._worker_id}.check", "extend_seconds": 1}
        answer = await self._ask("heartbeat", body)
        if not answer.refused_with(403, 404):
            self._data_of_known_call(answer)
        return None

    async def check_storage(self) -> str | None:
        """As TaskQueue.check_storage, from an upload URL for a task that cannot exist; nothing is uploaded.

        None where the queue presigns nothing for such a task.
        """
        body = {"operation": "upload", "video_item_id": str(uuid.uuid4()), "file_extension": "mp4"}
        answer = await self._ask("presign", body)
        if answer.success is False:
            return None
        url = answer.data_as(SignedUpload).url
        await self._storage.check(url)
        return httpx.URL(url).host

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """As TaskQueue.lease. The real server may lease a task twice: send a heartbeat before spending anything."""
        worker_id = f"{self._worker_id}.{_token()}"
        body = {"worker_id": worker_id, "lease_duration_seconds": math.ceil(self._lease_s), **self._filter}
        if item_id is not None:
            body["item_id"] = item_id
        answer = await self._ask("next-task", body)
        if item_id is not None and answer.refused_with(404):
            raise ItemMissing(f"{self._client.base_url.host} has no task {item_id} (404 {answer.error})")
        payload = self._data_of_known_call(answer)
        if payload is None:
            return None
        if item_id is not None:
            await self._insist(item_id, payload, worker_id)
        try:
            task = parse_task(payload)
        except InvalidTask as error:
            logger.warning("malformed task", problem=str(error), payload=repr(payload)[:MAX_MESSAGE_CHARS])
            if error.item_id is not None:
                await self._report_malformed(error.item_id, worker_id, str(error))
            raise
        ignored = sorted(task.extras.keys() - {LEASE_SEQ, BEAT_INTERVAL, TAKES})
        if ignored:
            logger.info("ignored", item_id=task.item_id, fields=ignored)
        return Lease(task=task, worker_id=worker_id, length_s=self._extension_s, beat_interval_s=_beat_interval_s(task))

    async def backlog(self) -> int | None:
        """As TaskQueue.backlog: an extension of the embedded server. A server without it is asked only once."""
        if self._tells_backlog:
            answer = await self._ask("backlog", self._filter)
            if answer.status not in (404, 405):
                return answer.data_as(Backlog).waiting
            self._tells_backlog = False
        return None

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """As TaskQueue.heartbeat. Sends progress to a server that takes it, or has shown `cancel_requested`."""
        said = {}
        if progress is not None and (self._speaks_progress or lease.task.takes("progress")):
            said["progress"] = {"stage": progress.stage, "fraction": progress.fraction}
        # Rounded up: the lease must not be shorter for the server than for its holder.
        data = await self._renew(lease, math.ceil(lease.length_s), **said)
        if isinstance(data, dict) and "cancel_requested" in data:
            self._speaks_progress = True
            if data["cancel_requested"] is True:
                raise CancelRequested(f"task {lease.task.item_id}: cancelled by a person")

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """As TaskQueue.fetch_inputs: this queue's tasks have a photo in its storage, and nothing else.

        If the URL has expired or its object is missing, it is presigned again, once.
        """
        path = folder / f"photo{_suffix(_photo_path(lease))}"
        url = await self._presign_download(lease)
        with _reaching_storage():
            try:
                await self._storage.download(url, path)
            except (UrlExpired, ObjectMissing):
                await self._storage.download(await self._presign_download(lease), path)
        await inputs.verify(path, "image")
        return {PHOTO: path}

    def segments(self, lease: Lease) -> SegmentStore | None:
        """See TaskQueue."""
        del lease  # its tasks have one photo
        return None

    async def deliver(self, lease: Lease, video: Video) -> str:
        """As TaskQueue.deliver.

        An object that exists at `videos/{item_id}.mp4` may be the video of an earlier prompt, so it is neither reported
        nor overwritten: the video is stored beside it, under this lease's token. If that path is taken as well, an
        earlier attempt of this lease was stored and its answer lost; since it is unknown which video it was, a third,
        unique path is used.

        The real server answers 500 for a path that is taken, without the reason. So the next path is tried at once, and
        only if none can be presigned has the server failed.
        """
        for extension in ("mp4", f"{lease.token}.mp4"):
            try:
                return await self._upload(lease, video.path, extension)
            except (ObjectExists, QueueFailed) as error:
                logger.warning("no upload here", item_id=lease.task.item_id, extension=extension, problem=str(error))
        return await self._upload(lease, video.path, _unique_extension(lease))

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """As TaskQueue.complete."""
        said: dict[str, Any] = {name: video.external_ids[name] for name in REPORTED_IDS if name in video.external_ids}
        if video.cost_usd is not None and lease.task.takes(COST):
            said[COST] = video.cost_usd
        await self._report(lease, {"status": "completed", "video_storage_path": storage_path, **said})

    async def fail(self, lease: Lease, message: str) -> None:
        """As TaskQueue.fail. Each report that the server accepts increments the task's retry_count."""
        await self._report(lease, {"status": "failed", "error_message": _bounded(message) or "no reason given"})

    async def release(self, lease: Lease, reason: str | None = None) -> None:
        """As TaskQueue.release: the lease is cut to one second, the shortest the API takes."""
        del reason  # the task goes on elsewhere
        await self._renew(lease, RELEASE_S)

    async def _renew(self, lease: Lease, extend_s: int, **said: Any) -> Any:
        """Sends a heartbeat and returns its answer. A 404 has to be confirmed by a second one. Raises LeaseLost."""
        body = {**_fence(lease), "extend_seconds": extend_s, **said}
        answer = await self._ask("heartbeat", body)
        if answer.refused_with(404):
            await anyio.sleep(min(self.CONFIRM_AFTER_S, lease.length_s * CONFIRM_SHARE))
            answer = await self._ask("heartbeat", body)
        return self._data_of_own_lease(answer, lease)

    async def _report(self, lease: Lease, said: Mapping[str, Any]) -> None:
        """Reports an end, and again if a 404 was a hiccup of the server. Raises LeaseLost, CancelRequested."""
        body = {**_fence(lease), **said}
        answer = await self._ask("report", body)
        if answer.refused_with(404):
            await self._believe_heartbeats(lease)
            answer = await self._ask("report", body)
        if answer.refused_with(404):
            raise QueueFailed(f"report: 404 {answer.error}, though it answers heartbeats for {lease.task.item_id}")
        self._data_of_own_lease(answer, lease)

    async def _believe_heartbeats(self, lease: Lease) -> None:
        """After a 404 that may be a database hiccup, which every route of the real server reports as 404.

        Raises LeaseLost if heartbeats confirm that the lease is lost, CancelRequested.
        """
        await self.heartbeat(lease)

    async def _insist(self, item_id: str, payload: object, worker_id: str) -> None:
        """Hands back a task that was not asked for: the real server ignores `item_id`. Raises QueueRefused."""
        other = payload.get("item_id") if isinstance(payload, Mapping) else None
        if not isinstance(other, str) or other == item_id:
            return
        body = {"item_id": other, "worker_id": worker_id, "extend_seconds": 1}
        for pause_s in (0, self.CONFIRM_AFTER_S):  # as for a heartbeat, the first 404 may be a hiccup
            await anyio.sleep(pause_s)
            try:
                (await self._ask("heartbeat", body)).data()
                break
            except I2VError as error:
                logger.warning("another task was not handed back", item_id=_bounded(other), problem=str(error))
        raise QueueRefused(ONLY_THE_NEXT)

    async def _report_malformed(self, item_id: str, worker_id: str, message: str) -> None:
        body = {"item_id": item_id, "worker_id": worker_id, "status": "failed", "error_message": _bounded(message)}
        try:
            (await self._ask("report", body)).data()
        except I2VError as error:
            # Its lease expires, and its next holder reports it again.
            logger.warning("malformed task could not be reported", item_id=item_id, problem=str(error))

    async def _presign_download(self, lease: Lease) -> str:
        path = _photo_path(lease)
        answer = await self._ask("presign", {"operation": "download", "storage_path": path})
        # Supabase presigns only objects that exist, and its "Object not found" means so whatever the status code. A 404
        # of the API itself may also be a hiccup of its database; ObjectUnsigned is retryable for that reason.
        is_missing = answer.status in (200, 404) or "not found" in answer.error.lower()
        if answer.success is False and answer.status != 401 and is_missing:
            raise ObjectUnsigned(f"{path}: the photo is gone from storage ({answer.error})")
        if answer.has_failed:
            await self._tell_missing_from_away(lease, answer)
        url = answer.data_as(SignedDownload).url
        logger.info("presigned", item_id=lease.task.item_id, operation="download")
        return url

    async def _tell_missing_from_away(self, lease: Lease, unsigned: QueueAnswer) -> None:
        """The real server answers 500 both for a missing photo and for a storage that is down.

        It presigns a download only if the photo exists, and an upload only if the path is free. So asking for an upload
        to a fresh path tells the cases apart: it fails only if the storage is down. Presigning stores nothing.
        Raises ObjectUnsigned, StorageAway, LeaseLost.
        """
        path, said = _photo_path(lease), f"presign: {unsigned.status} {unsigned.error}"
        try:
            await self._presign_upload(lease, _unique_extension(lease))
        except QueueFailed as error:
            raise StorageAway(f"{said}; and for an upload, {error}: the queue's storage does not work") from None
        raise ObjectUnsigned(f"{path}: is the photo missing? {said}, though uploads get a URL")

    async def _presign_upload(self, lease: Lease, extension: str) -> SignedUpload:
        body = {"operation": "upload", "video_item_id": lease.task.item_id, "file_extension": extension}
        answer = await self._ask("presign", body)
        if answer.success is False and TAKEN.search(answer.error):
            # Supabase presigns no upload to a path that is taken, unless told to overwrite.
            raise ObjectExists(f"presign: {answer.status} {answer.error}")
        if answer.refused_with(404):
            await self._believe_heartbeats(lease)
            raise QueueFailed(f"presign: 404 {answer.error}: no upload for task {lease.task.item_id} now")
        return answer.data_as(SignedUpload)

    async def _upload(self, lease: Lease, path: Path, extension: str) -> str:
        signed = await self._presign_upload(lease, extension)
        logger.info("presigned", item_id=lease.task.item_id, operation="upload")
        try:
            with _reaching_storage():
                try:
                    await self._storage.upload(signed.url, path)
                except UrlExpired:
                    signed = await self._presign_upload(lease, extension)
                    await self._storage.upload(signed.url, path)
        except ObjectMissing as error:  # an upload that meets a missing bucket or folder is not the fault of the task
            raise StorageUnavailable(f"nothing can be stored there: {error}") from None
        return signed.storage_path

    def _data_of_own_lease(self, answer: QueueAnswer, lease: Lease) -> Any:
        if answer.refused_with(403, 404):
            raise LeaseLost(f"{answer.call}: {answer.status}: task {lease.task.item_id} is not ours any more")
        return answer.data()

    def _data_of_known_call(self, answer: QueueAnswer) -> Any:
        """As `QueueAnswer.data`, for calls that every deployment of the worker API has, so never a plain 404."""
        if answer.status == 404 and self._was_there:  # the app is being redeployed; waiting loses no clip
            raise QueueUnavailable(f"{answer.call}: 404 {answer.error}: the worker API was there before")
        if answer.status == 404:
            raise QueueRefused(f"{answer.call}: 404: no worker API at this URL: {self._client.base_url}")
        return answer.data()

    async def _ask(self, call: str, body: Mapping[str, Any]) -> QueueAnswer:
        """One call. Raises QueueUnavailable where no answer came; whether it was carried out is unknown then."""
        try:
            with anyio.fail_after(self._request_timeout_s):  # the timeout of httpx is per read
                response = await self._client.post(call, json=body)
        except FOREIGN as error:
            raise QueueUnavailable(f"{call}: {self._client.base_url.host}: {self._clean(reason_of(error))}") from None
        try:
            payload = response.json()
        except (ValueError, RecursionError):
            payload, is_json = None, False
        else:
            is_json = True
        envelope = payload if isinstance(payload, dict) else {}
        success = envelope.get("success")
        self._was_there = self._was_there or success is True
        error_text = str(envelope.get("error") or "")
        if response.has_redirect_location:
            error_text = f"redirected to {response.url.join(response.headers['Location']).host}"
        return QueueAnswer(
            call=call,
            status=response.status_code,
            is_json=is_json,
            success=success if isinstance(success, bool) else None,
            payload=envelope.get("data"),
            error=self._clean(error_text),
            is_protected=response.status_code == 401 and PROTECTION_MARK in response.content,
        )

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return _bounded(text)


@contextmanager
def _reaching_storage() -> Iterator[None]:
    """If the storage's host cannot be reached, every other task would fail as well. Raises StorageAway."""
    try:
        yield
    except StorageUnreached as error:
        raise StorageAway(f"this worker cannot reach the queue's storage: {error}") from None


def _fit_for_a_header(name: str, secret: str | None) -> str:
    """A secret made ready for an HTTP header; empty for None. Raises SettingsError."""
    text = (secret or "").strip()
    if not text.isascii() or not text.isprintable():
        raise SettingsError(f"{name}: must be printable ASCII")
    return text


def _token() -> str:
    return secrets.token_hex(6)


def _unique_extension(lease: Lease) -> str:
    """The end of a path that is certainly free, also of earlier attempts of this lease."""
    return f"{lease.token}-{secrets.token_hex(2)}.mp4"


def _fence(lease: Lease) -> dict[str, Any]:
    """The fencing fields of every write; `lease_seq` is among them where the server hands it out."""
    fence: dict[str, Any] = {"item_id": lease.task.item_id, "worker_id": lease.worker_id}
    if lease.task.lease_seq is not None:
        fence[LEASE_SEQ] = lease.task.lease_seq
    return fence


def _beat_interval_s(task: Task) -> float | None:
    """How often the queue wants to hear; None where it says nothing of it, or nonsense."""
    wanted = task.extras.get(BEAT_INTERVAL)
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= MAX_BEAT_INTERVAL_S:
        logger.info("ignored", item_id=task.item_id, fields=[BEAT_INTERVAL])
        return None
    return max(MIN_BEAT_INTERVAL_S, float(wanted))


def _photo_path(lease: Lease) -> str:
    return lease.task.inputs[PHOTO].source


def _suffix(path: str) -> str:
    """The photo's extension, for people who look at the folder; the format is detected from the bytes."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""


def _bounded(message: str) -> str:
    return one_line(message, MAX_MESSAGE_CHARS)
