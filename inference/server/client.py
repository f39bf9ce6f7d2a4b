"""What an app does with the embedded queue: submit photos, follow tasks, fetch videos."""

import uuid
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import anyio
import httpx

from inference.errors import (
    DiskFull,
    InvalidPhoto,
    InvalidRequest,
    ItemMissing,
    NotWritable,
    QueueAuthError,
    QueueRefused,
    QueueUnavailable,
    QueueUnreached,
    WrongState,
    write_error,
)
from inference.progress.stages import Progress, Sink
from inference.transfer.addresses import may_be_proxied, worker_api_url
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.storage import Storage
from inference.transfer.storage_errors import FOREIGN, reason_of
from inference.transfer.tls import tls_context

TIMEOUT_S = 30.0

POLL_S = 1.0
"""Between two requests for a task that is waited for."""

MAX_UNANSWERED = 60
"""Requests in a row without an answer, about a minute, which is enough for a restart of the server."""

SUBMIT_PAUSES_S = (1.0, 2.0, 4.0)
"""Pauses before a submission whose answer was lost is sent again; its Idempotency-Key keeps it from counting twice."""

MAX_VIDEO_BYTES = 10_000_000_000
"""Far above any upload limit that an operator may set, so that every stored video can be fetched."""


class QueueClient:
    """The client side of the embedded queue's HTTP API. Tasks are JSON objects as the API describes them.

    Raises, from every method: QueueUnavailable, QueueAuthError, QueueRefused, ItemMissing, WrongState.
    """

    def __init__(self, api_url: str, api_key: str | None) -> None:
        base = worker_api_url(api_url).removesuffix("worker/")
        self._client = httpx.AsyncClient(
            base_url=base,
            headers=IDENTITY | ({"Authorization": f"Worker {api_key}"} if api_key else {}),
            event_hooks={"response": [bounded(MAX_JSON_BYTES)]},
            timeout=TIMEOUT_S,
            trust_env=may_be_proxied(base),
            verify=tls_context(),
        )
        # The operator is a client of their own queue, which may be at a private address.
        self._storage = Storage(allow_private=True, max_download_bytes=MAX_VIDEO_BYTES)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        await self._storage.aclose()

    async def submit(
        self, photo: Path, prompt: str = "", *, seconds: float = 5, count: int = 1, group: str | None = None
    ) -> list[dict[str, Any]]:
        """Uploads a photo and asks for `count` videos of it; returns the new tasks.

        A request whose answer was lost is sent again, under the same Idempotency-Key. Also raises InvalidPhoto for a
        file that cannot be read, InvalidRequest for text that cannot be sent.
        """
        _require_unicode("prompt", prompt)
        _require_unicode("group", group or "")
        form = {"prompt": prompt, "seconds": str(seconds), "count": str(count)} | ({"group": group} if group else {})
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        for pause_s in (*SUBMIT_PAUSES_S, None):
            try:
                with photo.open("rb") as file:
                    files = {"photo": (photo.name.encode("utf-8", "replace").decode(), file)}
                    data = await self._ask("POST", "tasks", data=form, files=files, headers=headers)
            except OSError as error:
                raise InvalidPhoto(f"{photo}: {(error.strerror or 'cannot be read').lower()}") from None
            except QueueUnavailable as error:
                if pause_s is None or isinstance(error, QueueUnreached):
                    raise
                await anyio.sleep(pause_s)
            else:
                break
        items: list[dict[str, Any]] = data["items"]
        return items

    async def tasks(
        self, *, status: str | None = None, group: str | None = None, limit: int = 20
    ) -> list[dict[str, Any]]:
        """The newest tasks, of one status or of the group with this id where that is named."""
        named = {"status": status, "group": group}
        narrowed = {name: value for name, value in named.items() if value is not None}
        data = await self._ask("GET", "tasks", params={"limit": limit, **narrowed})
        items: list[dict[str, Any]] = data["items"]
        return items

    async def overview(self) -> dict[str, Any] | None:
        """How the whole queue is doing; None where the server is of a version that does not say."""
        try:
            overview: dict[str, Any] = await self._ask("GET", "overview")
        except ItemMissing:
            return None
        return overview

    async def task(self, item_id: str) -> dict[str, Any]:
        """One task; a completed one has a presigned `video_url`."""
        task: dict[str, Any] = await self._ask("GET", _path(item_id))
        return task

    async def until_ended(self, item_id: str, sink: Sink) -> dict[str, Any]:
        """Follows a task to its end and passes its progress to `sink`. Tolerates short outages of the queue."""
        unanswered = 0
        while True:
            try:
                task = await self.task(item_id)
                unanswered = 0
            except QueueUnavailable:
                unanswered += 1
                if unanswered > MAX_UNANSWERED:
                    raise
            else:
                # What a waiting task has was told by a worker that handed it back: the next one begins anew.
                told = None if task["status"] == "pending" else task["progress"]
                told = told or {"stage": task["status"], "fraction": 0}
                sink(Progress(stage=told["stage"], done=0, total=1, fraction=told["fraction"], eta_s=task.get("eta_s")))
                if task["status"] in ("completed", "failed", "cancelled"):
                    return task
            await anyio.sleep(POLL_S)

    async def cancel(self, item_id: str) -> dict[str, Any]:
        """Cancels a waiting task, or asks the worker that has it to stop."""
        task: dict[str, Any] = await self._ask("POST", f"{_path(item_id)}/cancel")
        return task

    async def retry(self, item_id: str) -> dict[str, Any]:
        """Puts a failed or cancelled task back into the queue."""
        task: dict[str, Any] = await self._ask("POST", f"{_path(item_id)}/retry")
        return task

    async def delete(self, item_id: str) -> None:
        """Deletes a task and its video; its photo too, once no other task uses it."""
        await self._ask("DELETE", _path(item_id))

    async def save_video(self, item_id: str, path: Path) -> Path:
        """Downloads the video of a completed task. Also raises StorageError, DiskFull, NotWritable."""
        task = await self.task(item_id)
        if not task.get("video_url"):
            raise WrongState(f"task {item_id} is {task['status']} and has no video")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, f"{path.parent}: {(error.strerror or 'cannot be made').lower()}") from None
        try:
            await self._storage.download(task["video_url"], path)
        except DiskFull:
            raise DiskFull(f"{path} cannot be written: there is no room left on this machine's disk") from None
        except NotWritable:
            raise NotWritable(f"{path} cannot be written: the disk is read-only or failing") from None
        return path

    async def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = await self._client.request(method, path, **options)
        except FOREIGN as error:
            why = f"no queue answers at {self._client.base_url}: {reason_of(error)}"
            if isinstance(error, httpx.ConnectError):
                hint = "start one with `i2v up`, or say where it is with VERCEL_API_URL or --url"
                raise QueueUnreached(f"{why}; {hint}") from None
            raise QueueUnavailable(why) from None
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict) and answer.get("success") is True:
            return answer.get("data")
        text = str(answer.get("error")) if isinstance(answer, dict) else "not an answer of a queue"
        match response.status_code:
            case 401:
                raise QueueAuthError(f"the queue does not accept the key: set WORKER_API_KEY ({text})")
            case 404:
                raise ItemMissing(text)
            case 409:
                raise WrongState(text)
            case status if status >= 500 or status == 429:
                raise QueueUnavailable(f"the queue answered {status}: {text}")
            case status:
                raise QueueRefused(f"the queue answered {status}: {text}")


def _path(item_id: str) -> str:
    """The path of a task. Ids come from command lines, so they are quoted to one segment. Raises ItemMissing."""
    if not item_id:
        raise ItemMissing("the id of the task is empty")
    return f"tasks/{quote(item_id, safe='', errors='replace')}"


def _require_unicode(name: str, text: str) -> None:
    """Command-line arguments may hold bytes that are not UTF-8; these cannot be sent. Raises InvalidRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name}: not valid UTF-8 text") from None
