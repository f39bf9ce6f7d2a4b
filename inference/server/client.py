"""What an app does with the embedded queue: submit photos, follow tasks, fetch videos."""

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import anyio
import httpx

from inference.errors import (
    DiskFull,
    I2VError,
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
from inference.transfer.addresses import may_be_proxied, worker_api_url
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.storage import Storage
from inference.transfer.storage_errors import FOREIGN, reason_of
from inference.transfer.tls import tls_context

TIMEOUT_S = 30.0

POLL_S = 0.5
"""Between two requests for tasks that are waited for: about as often as their workers say how far they are."""

MAX_UNANSWERED = 120
"""Requests in a row without an answer, about a minute, which is enough for a restart of the server."""

PAGE = 200
"""Tasks in one answer, which is as many as the server gives."""

ENDED = ("completed", "failed", "cancelled", "deleted")
"""Where a task stays. The server knows no `deleted`: it is what a task becomes here that is no more."""

SUBMIT_PAUSES_S = (1.0, 2.0, 4.0)
"""Pauses before a submission whose answer was lost is sent again; its Idempotency-Key keeps it from counting twice."""

PHOTO_REFUSED = ("photo: ", "body: more than ")
"""How the server's answer begins where it would take the same request with another photo."""

NOT_EMBEDDED = (
    "answers, and is no queue of `i2v up` or `i2v serve`, which `i2v submit`, `fetch` and `tasks` are for: give the "
    "address of one with --url, such as http://127.0.0.1:8000. What an application has in its queue is seen there; "
    "whether a worker can use it says `i2v doctor`"
)

KNOWN_TO_PROXIES = (401, 403, 407, 408, 413, 429)
"""What may be answered without our words although the queue is there, by what is in front of it."""

MAX_VIDEO_BYTES = 10_000_000_000
"""Far above any upload limit that an operator may set, so that every stored video can be fetched."""


class QueueClient:
    """The client side of the embedded queue's HTTP API. Tasks are JSON objects as the API describes them.

    Raises, from every method: QueueUnavailable, QueueAuthError, QueueRefused, ItemMissing, WrongState.
    """

    def __init__(self, api_url: str, api_key: str | None) -> None:
        self.api_url = api_url
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

        A request whose answer was lost is sent again, under the same Idempotency-Key. Also raises InvalidPhoto, which
        names it, for a file that cannot be read or that the queue refuses, InvalidRequest for text that cannot be sent.
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
            except InvalidPhoto as error:
                raise InvalidPhoto(f"{photo}: {error}") from None
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
        page, _ = await self._page(status=status, group=group, limit=limit)
        return page

    async def of_group(self, group: str, *, since: str = "") -> list[dict[str, Any]]:
        """Every task of a group, the newest first; `since`: none that are older than the task with this id."""
        tasks, cursor = await self._page(group=group, limit=PAGE)
        while cursor is not None and cursor > since:  # ids grow with time
            page, cursor = await self._page(group=group, limit=PAGE, cursor=cursor)
            tasks += page
        return tasks

    async def group_left_s(self, group: str) -> float | None:
        """Seconds until all of a group is made; None where nobody can tell."""
        try:
            left_s: float | None = (await self._ask("GET", _path(group, "groups"))).get("left_s")
        except ItemMissing:
            return None
        return left_s

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

    async def follow(self, tasks: Sequence[Mapping[str, Any]]) -> AsyncIterator[list[dict[str, Any]]]:
        """The same tasks as they are now, twice a second, until all have ended. Tolerates short outages of the queue.

        One that is deleted meanwhile ends `deleted`.
        """
        known = {task["id"]: dict(task) for task in tasks}
        unanswered = 0
        while True:
            try:
                known |= await self._now([task for task in known.values() if task["status"] not in ENDED])
                unanswered = 0
            except QueueUnavailable:
                unanswered += 1
                if unanswered > MAX_UNANSWERED:
                    raise
            else:
                yield list(known.values())
                if all(task["status"] in ENDED for task in known.values()):
                    return
            await anyio.sleep(POLL_S)

    async def _now(self, tasks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By their ids, with one request for all of a group."""
        groups: dict[str, set[str]] = {}
        for task in tasks:
            groups.setdefault(task["group_id"], set()).add(task["id"])
        found: dict[str, dict[str, Any]] = {}
        for group, ids in groups.items():
            if len(ids) > 1:
                found |= {task["id"]: task for task in await self.of_group(group, since=min(ids)) if task["id"] in ids}
                continue
            for item_id in ids:
                with suppress(ItemMissing):
                    found[item_id] = await self.task(item_id)
        gone = {"status": "deleted", "error_message": None}
        return {task["id"]: found.get(task["id"]) or task | gone for task in tasks}

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

    async def save_video(self, item_id: str, path: Path, *, told_as: Path | None = None) -> Path:
        """Downloads the video of a completed task. Also raises StorageError, DiskFull, NotWritable.

        `told_as`: the path that errors name, where somebody moves the file from here.
        """
        named = told_as or path
        task = await self.task(item_id)
        if not task.get("video_url"):
            raise WrongState(f"task {item_id} is {task['status']} and has no video")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, f"{named.parent}: {(error.strerror or 'cannot be made').lower()}") from None
        try:
            await self._storage.download(task["video_url"], path)
        except DiskFull:
            raise DiskFull(f"{named} cannot be written: there is no room left on this machine's disk") from None
        except NotWritable:
            raise NotWritable(f"{named} cannot be written: the disk is read-only or failing") from None
        return path

    async def _page(self, **narrowed: Any) -> tuple[list[dict[str, Any]], str | None]:
        """Tasks, and the cursor of the next page if there is one."""
        params = {name: value for name, value in narrowed.items() if value is not None}
        data = await self._ask("GET", "tasks", params=params)
        return data["items"], data.get("cursor")

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
        raise self._refusal(path, response.status_code, answer)

    def _refusal(self, path: str, status: int, answer: Any) -> I2VError:
        """What an answer says that is no success."""
        is_ours = isinstance(answer, dict) and "success" in answer and "error" in answer
        text = str(answer.get("error")) if isinstance(answer, dict) else "not an answer of a queue"
        may_be_a_proxy = status >= 500 or status in KNOWN_TO_PROXIES
        if (not is_ours and not may_be_a_proxy) or (status == 404 and path == "tasks"):
            return QueueRefused(f"{self._client.base_url} {NOT_EMBEDDED}")
        match status:
            case 401:
                return QueueAuthError(f"the queue does not accept the key: set WORKER_API_KEY ({text})")
            case 404 | 409:
                return ItemMissing(text) if status == 404 else WrongState(text)
            case _ if status >= 500 or status == 429:
                return QueueUnavailable(f"the queue answered {status}: {text}")
            case 400 | 413 if text.startswith(PHOTO_REFUSED):
                return InvalidPhoto(text.partition(": ")[2])
            case _:
                return QueueRefused(f"the queue answered {status}: {text}")


def _path(item_id: str, kind: str = "tasks") -> str:
    """The path of a task or group. Ids come from command lines, so they are one segment. Raises ItemMissing."""
    if not item_id:
        raise ItemMissing("the id of the task is empty")
    return f"{kind}/{quote(item_id, safe='', errors='replace')}"


def _require_unicode(name: str, text: str) -> None:
    """Command-line arguments may hold bytes that are not UTF-8; these cannot be sent. Raises InvalidRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name}: not valid UTF-8 text") from None
