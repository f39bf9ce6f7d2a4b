"""The `callback_url` of a job: tells an application how far it is and how it ended, beside RunPod's own status.

GmAnimato sends one with every workflow. It reads progress nowhere else, and without a call at the end it learns that a
job is done only while somebody has its page open: half an hour later it fails the job. The calls are those of its own
RunPod worker, a fork of worker-comfyui; its webhook (`src/routes/api/i2v-webhook/[id]/+server.ts`) keeps no order, so
they go out one at a time, and none after the end.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import anyio
import httpx
import structlog

from inference.errors import AddressRefused, StorageUnreached, one_line
from inference.on_runpod.wire import MAX_ERROR_CHARS
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.network import GuardedNetwork, GuardedTransport
from inference.transfer.storage import redact
from inference.transfer.storage_errors import FOREIGN, mapped

log = structlog.get_logger(__name__)

PROGRESS_LIMIT_S = 8.0
"""For one progress call; `progress_posts.py` gives up after ten."""

END_LIMIT_S = 30.0
TRIES = 5
"""Of the call at the end, and how long each may take: as GmAnimato's own workers do it."""

NODES = ("completed_nodes", "total_nodes", "current_node", "current_node_progress")


class Callback:
    """One job's calls, for the length of a block. Whatever goes wrong with them is a line in the log and no error."""

    PAUSE_S: ClassVar[float] = 2.0
    """Before the second try of the last call; doubled each time."""

    SETTLE_S: ClassVar[float] = 3.0
    """How long the last call waits after a progress call without an answer: the server may still carry that out."""

    def __init__(self, url: str, job_id: str, *, allow_private: bool = False) -> None:
        self._url, self._job_id = url, job_id
        self._is_in_doubt = False  # the last call may yet be carried out
        self._client = httpx.AsyncClient(
            headers=IDENTITY,
            event_hooks={"response": [bounded(MAX_JSON_BYTES)]},
            transport=GuardedTransport(GuardedNetwork(allow_private=allow_private)),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def progress(self, snapshot: Mapping[str, Any]) -> None:
        """Tells how far the job is; a snapshot is a dumped Progress."""
        detail = snapshot.get("detail") or {}
        percentage = round(100 * min(max(snapshot["fraction"], 0.0), 1.0), 1)
        nodes = {name: detail[name] for name in NODES if name in detail}
        call = {"status": "processing", "progress": {"percentage": percentage, **nodes}}
        if problem := await self._tell(call, PROGRESS_LIMIT_S):
            log.info("progress_not_taken", job_id=self._job_id, problem=problem)

    async def completed(self, files: list[dict[str, str]]) -> None:
        """Tells that the job is done, and where its files are."""
        await self._end({"status": "completed", "files": files})

    async def failed(self, message: str) -> None:
        """Tells why there is no video."""
        await self._end({"status": "failed", "error": one_line(message, MAX_ERROR_CHARS)})

    async def _end(self, call: dict[str, Any]) -> None:
        if self._is_in_doubt:
            await anyio.sleep(self.SETTLE_S)
        for number in range(TRIES):
            problem = await self._tell(call, END_LIMIT_S)
            if problem is None:
                return
            log.warning("callback_not_taken", job_id=self._job_id, problem=problem, attempt=number + 1)
            if number < TRIES - 1:
                await anyio.sleep(self.PAUSE_S * 2**number)

    async def _tell(self, call: dict[str, Any], limit_s: float) -> str | None:
        """Sends one call; returns what went wrong."""
        self._is_in_doubt = True
        try:
            with anyio.fail_after(limit_s):
                response = await self._client.post(self._url, json={"id": self._job_id, **call}, timeout=limit_s)
        except FOREIGN as foreign:
            error = mapped(foreign, self._url)
            self._is_in_doubt = not isinstance(error, StorageUnreached)
            return str(error)
        except AddressRefused as error:
            self._is_in_doubt = False
            return str(error)
        self._is_in_doubt = False
        return None if response.is_success else f"{redact(self._url)}: {response.status_code}"
