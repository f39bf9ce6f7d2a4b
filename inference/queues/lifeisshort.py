"""The Life-is-Short worker API: a Next.js application that owns the queue and presigns its storage.

Its wire, and where the real server differs from its documents, is told beside each call. Every method is one try;
the only repetition is what this dialect needs to tell its answers apart.
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
from inference.media import photo
from inference.progress.tracker import Progress
from inference.providers import WorkerType
from inference.queues.item import RELEASE_S
from inference.queues.lifeisshort_wire import (
    BYPASS_HEADER,
    BYPASS_SETTING,
    PROTECTION_MARK,
    Answer,
    Backlog,
    SignedDownload,
    SignedUpload,
)
from inference.task import Lease, Video, explain, identifier, parse_task
from inference.transfer.addresses import may_be_proxied, worker_api_url
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.storage import Storage
from inference.transfer.storage_errors import FOREIGN, reason_of

logger = structlog.get_logger(__name__)

LEASE_SEQ = "lease_seq"
"""The one extra that is used: it goes back with every write (see `_fence`). All others are ignored."""

CONFIRM_SHARE = 1 / 20
"""The share of a lease that a heartbeat may pause at most before it asks again. With the pause it may take a fifth of
the lease (`keeper.py`)."""

MAX_MESSAGE_CHARS = 1000
"""Of an error reported to the queue, or of a payload in the log."""

# Supabase's words for a path that is taken; a Next.js server passes them on with whatever status.
TAKEN = re.compile("already exists|duplicate", re.IGNORECASE)

ONLY_THE_NEXT = (
    "this queue hands out only the next task, and that is another; "
    "put the item back in your app, or run without an item id"
)

REPORTED_IDS = ("runway_task_id", "veo_operation_id")  # the only external ids the report call knows


class LifeIsShortQueue:
    """TaskQueue over the worker API.

    Raises SettingsError for an address, key, worker_id or length that cannot work.
    """

    CONFIRM_AFTER_S: ClassVar[float] = 2.5
    """The real server answers a beat with 404 both for a lost lease and for a database hiccup: ask once more."""

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
        """`bypass`: the secret of Vercel's Deployment Protection, sent with every call where it is given."""
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
        # A server that never spoke of cancelling may refuse fields it does not know, so ours wait for that.
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
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def check(self) -> None:
        """As TaskQueue.check: a beat for a task that cannot exist."""
        body = {"item_id": str(uuid.uuid4()), "worker_id": f"{self._worker_id}.check", "extend_seconds": 1}
        answer = await self._ask("heartbeat", body)
        if not answer.refused_with(403, 404):
            self._data_of_known_call(answer)

    async def check_storage(self) -> str | None:
        """As TaskQueue.check_storage, learned from an upload URL for a task that cannot exist; nothing is sent there.

        None where the queue signs none without a task.
        """
        body = {"operation": "upload", "video_item_id": str(uuid.uuid4()), "file_extension": "mp4"}
        answer = await self._ask("presign", body)
        if answer.success is False:
            return None
        url = answer.data_as(SignedUpload).url
        await self._storage.check(url)
        return httpx.URL(url).host

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """As TaskQueue.lease. The server may hand one task to two callers: beat before spending anything on it."""
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
        ignored = sorted(task.extras.keys() - {LEASE_SEQ})
        if ignored:
            logger.info("ignored", item_id=task.item_id, fields=ignored)
        return Lease(task=task, worker_id=worker_id, length_s=self._extension_s)

    async def backlog(self) -> int | None:
        """As TaskQueue.backlog: an extension of the embedded server. Where it is not known, it is asked for once."""
        if self._tells_backlog:
            answer = await self._ask("backlog", self._filter)
            if answer.status not in (404, 405):
                return answer.data_as(Backlog).waiting
            self._tells_backlog = False
        return None

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """As TaskQueue.heartbeat. Sends progress once the server has shown that it knows `cancel_requested`."""
        said = {}
        if progress is not None and self._speaks_progress:
            said["progress"] = {"stage": progress.stage, "fraction": progress.fraction}
        # Rounded up: the server must not believe in a shorter lease than its holder does.
        data = await self._renew(lease, math.ceil(lease.length_s), **said)
        if isinstance(data, dict) and "cancel_requested" in data:
            self._speaks_progress = True
            if data["cancel_requested"] is True:
                raise CancelRequested(f"task {lease.task.item_id}: cancelled by a person")

    async def fetch_photo(self, lease: Lease, folder: Path) -> Path:
        """As TaskQueue.fetch_photo. A URL that has expired, or leads to nothing, is presigned again, once."""
        path = folder / f"photo{_suffix(lease.task.photo_storage_path)}"
        url = await self._presign_download(lease)
        with _reaching_storage():
            try:
                await self._storage.download(url, path)
            except (UrlExpired, ObjectMissing):
                await self._storage.download(await self._presign_download(lease), path)
        await anyio.to_thread.run_sync(photo.verify, path)
        return path

    async def deliver(self, lease: Lease, video: Video) -> str:
        """As TaskQueue.deliver.

        What lies at `videos/{item_id}.mp4` already may be of an earlier prompt, so it is neither reported nor
        overwritten: the video goes beside it, under this lease's token. If that is taken too, an earlier try of
        this lease was stored and its answer lost; a cut one leaves no object, but which video it was is unknown.

        The real server answers 500 for a path that is taken, without the reason. So the next path is asked for at
        once, and only where none is signed is it the server that failed.
        """
        for extension in ("mp4", f"{lease.token}.mp4"):
            try:
                return await self._upload(lease, video.path, extension)
            except (ObjectExists, QueueFailed) as error:
                logger.warning("no upload here", item_id=lease.task.item_id, extension=extension, problem=str(error))
        return await self._upload(lease, video.path, _unique_extension(lease))

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """As TaskQueue.complete."""
        ids = {name: video.external_ids[name] for name in REPORTED_IDS if name in video.external_ids}
        await self._report(lease, {"status": "completed", "video_storage_path": storage_path, **ids})

    async def fail(self, lease: Lease, message: str) -> None:
        """As TaskQueue.fail. Every one that lands adds to the task's retry_count."""
        await self._report(lease, {"status": "failed", "error_message": _bounded(message) or "no reason given"})

    async def release(self, lease: Lease) -> None:
        """As TaskQueue.release: the lease is cut to one second, the shortest the API takes."""
        await self._renew(lease, RELEASE_S)

    async def _renew(self, lease: Lease, extend_s: int, **said: Any) -> Any:
        """The answer to a heartbeat. Asks twice before it believes that the lease is lost. Raises LeaseLost."""
        body = {**_fence(lease), "extend_seconds": extend_s, **said}
        answer = await self._ask("heartbeat", body)
        if answer.refused_with(404):
            await anyio.sleep(min(self.CONFIRM_AFTER_S, lease.length_s * CONFIRM_SHARE))
            answer = await self._ask("heartbeat", body)
        return self._data_of_own_lease(answer, lease)

    async def _report(self, lease: Lease, said: Mapping[str, Any]) -> None:
        """Reports an end, and once more where a 404 was not meant. Raises LeaseLost, CancelRequested."""
        body = {**_fence(lease), **said}
        answer = await self._ask("report", body)
        if answer.refused_with(404):
            await self._believe_heartbeats(lease)
            answer = await self._ask("report", body)
        if answer.refused_with(404):
            raise QueueFailed(f"report: 404 {answer.error}, though it answers heartbeats for {lease.task.item_id}")
        self._data_of_own_lease(answer, lease)

    async def _believe_heartbeats(self, lease: Lease) -> None:
        """Asks whether the lease is lost: any route of the real server says 404 where its database only hiccuped.

        Raises LeaseLost where it is, CancelRequested.
        """
        await self.heartbeat(lease)

    async def _insist(self, item_id: str, payload: object, worker_id: str) -> None:
        """The real server knows no `item_id` and hands out the next task: that one goes back. Raises QueueRefused."""
        other = payload.get("item_id") if isinstance(payload, Mapping) else None
        if not isinstance(other, str) or other == item_id:
            return
        body = {"item_id": other, "worker_id": worker_id, "extend_seconds": 1}
        for pause_s in (0, self.CONFIRM_AFTER_S):  # as for a beat: the first 404 may be a hiccup
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
            # Its lease lapses, and whoever gets it next tries again.
            logger.warning("malformed task could not be reported", item_id=item_id, problem=str(error))

    async def _presign_download(self, lease: Lease) -> str:
        path = lease.task.photo_storage_path
        answer = await self._ask("presign", {"operation": "download", "storage_path": path})
        # Supabase signs only what exists. Whatever status its "Object not found" is passed on with, it stays true; but
        # the API's own 404 may be a hiccup of its database, as everywhere.
        is_missing = answer.status in (200, 404) or "not found" in answer.error.lower()
        if answer.success is False and answer.status != 401 and is_missing:
            raise ObjectUnsigned(f"{path}: the photo is gone from storage ({answer.error})")
        if answer.has_failed:
            await self._tell_missing_from_away(lease, answer)
        return answer.data_as(SignedDownload).url

    async def _tell_missing_from_away(self, lease: Lease, unsigned: Answer) -> None:
        """The real server answers 500 where the photo is missing, and where its storage does not work.

        It signs a download only where the photo exists, and an upload only where nothing does. So an upload to a path
        that nobody ever used is signed unless the storage does not work. Signing leaves no trace there.
        Raises ObjectUnsigned, StorageAway, LeaseLost.
        """
        path, said = lease.task.photo_storage_path, f"presign: {unsigned.status} {unsigned.error}"
        try:
            await self._presign_upload(lease, _unique_extension(lease))
        except QueueFailed as error:
            raise StorageAway(f"{said}; and for an upload, {error}: the queue's storage does not work") from None
        raise ObjectUnsigned(f"{path}: is the photo missing? {said}, though uploads get a URL")

    async def _presign_upload(self, lease: Lease, extension: str) -> SignedUpload:
        body = {"operation": "upload", "video_item_id": lease.task.item_id, "file_extension": extension}
        answer = await self._ask("presign", body)
        if answer.success is False and TAKEN.search(answer.error):
            # Supabase signs no upload to a path that is taken, unless told to overwrite.
            raise ObjectExists(f"presign: {answer.status} {answer.error}")
        if answer.refused_with(404):
            await self._believe_heartbeats(lease)
            raise QueueFailed(f"presign: 404 {answer.error}: no upload for task {lease.task.item_id} now")
        return answer.data_as(SignedUpload)

    async def _upload(self, lease: Lease, path: Path, extension: str) -> str:
        signed = await self._presign_upload(lease, extension)
        try:
            with _reaching_storage():
                try:
                    await self._storage.upload(signed.url, path)
                except UrlExpired:
                    signed = await self._presign_upload(lease, extension)
                    await self._storage.upload(signed.url, path)
        except ObjectMissing as error:  # of a place to put things that is no fault of the task
            raise StorageUnavailable(f"nothing can be stored there: {error}") from None
        return signed.storage_path

    def _data_of_own_lease(self, answer: Answer, lease: Lease) -> Any:
        if answer.refused_with(403, 404):
            raise LeaseLost(f"{answer.call}: {answer.status}: task {lease.task.item_id} is not ours any more")
        return answer.data()

    def _data_of_known_call(self, answer: Answer) -> Any:
        """As `data`, for calls that exist wherever the worker API does."""
        if answer.status == 404 and self._was_there:  # a deployment that changes hands; whoever waits loses no clip
            raise QueueUnavailable(f"{answer.call}: 404 {answer.error}: the worker API was there before")
        if answer.status == 404:
            raise QueueRefused(f"{answer.call}: 404: no worker API at this URL: {self._client.base_url}")
        return answer.data()

    async def _ask(self, call: str, body: Mapping[str, Any]) -> Answer:
        """Raises QueueUnavailable where there was no answer; whether the call was carried out is unknown then."""
        try:
            with anyio.fail_after(self._request_timeout_s):  # httpx's own limit is per read
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
        return Answer(
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
    """Where nobody is met at the storage's address, the next task would fare no better. Raises StorageAway."""
    try:
        yield
    except StorageUnreached as error:
        raise StorageAway(f"this worker cannot reach the queue's storage: {error}") from None


def _fit_for_a_header(name: str, secret: str | None) -> str:
    """A secret as a header holds it; empty for none. Raises SettingsError."""
    text = (secret or "").strip()
    if not text.isascii() or not text.isprintable():
        raise SettingsError(f"{name}: must be printable ASCII")
    return text


def _token() -> str:
    return secrets.token_hex(6)


def _unique_extension(lease: Lease) -> str:
    """Of a path that nobody has used, earlier tries of this lease included."""
    return f"{lease.token}-{secrets.token_hex(2)}.mp4"


def _fence(lease: Lease) -> dict[str, Any]:
    """What every write about a lease carries; `lease_seq` only where the server hands it out."""
    fence: dict[str, Any] = {"item_id": lease.task.item_id, "worker_id": lease.worker_id}
    lease_seq = lease.task.extras.get(LEASE_SEQ)
    if isinstance(lease_seq, int) and not isinstance(lease_seq, bool):
        fence[LEASE_SEQ] = lease_seq
    return fence


def _suffix(path: str) -> str:
    """The photo's extension, for people: what it is, its bytes say."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""


def _bounded(message: str) -> str:
    return one_line(message, MAX_MESSAGE_CHARS)
