"""Posts a job's progress to RunPod: the newest snapshot at intervals, and none after the job has ended."""

from collections.abc import Awaitable, Callable

import anyio
import structlog

from inference.progress.stages import Progress

log = structlog.get_logger(__name__)

POST_LIMIT_S = 10.0
"""How long the end of a job waits for a post that is under way."""

FIRST_LOOK_S = 0.1


class ProgressPosts:
    """Posts the newest snapshot, one post at a time: the first at once, later ones every `interval_s` at most."""

    def __init__(self, post: Callable[[dict[str, object]], Awaitable[None]], *, interval_s: float = 2.0) -> None:
        self._post, self._interval_s = post, interval_s
        self._latest: Progress | None = None
        self._over = anyio.Event()

    def sink(self, progress: Progress) -> None:
        """Takes a snapshot, from any thread."""
        self._latest = progress

    def finish(self) -> None:
        """Starts no more posts; `run` ends when the one under way has arrived. Call from the event loop."""
        self._over.set()

    async def run(self) -> None:
        """Posts until `finish`. A post that fails is dropped; it must not fail the job."""
        posted: Progress | None = None
        while not self._over.is_set():
            latest = self._latest
            if latest is not None and latest is not posted:
                posted = latest
                await self._try(latest)
            with anyio.move_on_after(self._interval_s if posted else FIRST_LOOK_S):
                await self._over.wait()

    async def _try(self, progress: Progress) -> None:
        try:
            with anyio.fail_after(POST_LIMIT_S):
                await self._post(progress.model_dump(mode="json", exclude_none=True))
        except Exception as error:  # noqa: BLE001 - foreign code, whose errors are its own
            log.warning("progress_not_posted", error=f"{type(error).__name__}: {error}")
