"""A video is made: of one photo, or of several segments that are joined into a film.

    for each segment, in order:  kept already? ── yes ─▶ taken from the store
                                      └─ no ─▶ generated, in turn with whoever else uses the engine ─▶ kept
    then all are joined

A finished segment is kept under a digest of everything that it depends on, before the next one begins. So whoever gets
the task next goes on where this worker was. Where an engine is paid, every segment is a payment of its own, which ends
when its clip is kept.
"""

import hashlib
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import structlog

from inference.engines.base import Job, run_in_thread
from inference.engines.turns import EngineTurns
from inference.errors import CancelRequested, I2VError, LeaseLost, MachineFault, MediaError, write_error
from inference.payments.ledger import Purchase
from inference.progress.stages import StageTracker
from inference.queues.base import SegmentStore
from inference.task import PHOTO, GenerationRequest, Segment, Video

if TYPE_CHECKING:
    from inference.media.video import VideoInfo

T = TypeVar("T")
log = structlog.get_logger(__name__)

STAGES: Mapping[str, float] = {"download": 2, "segments": 86, "join": 4, "upload": 6, "report": 2}
"""Stages of a lease whose task is a film, and their share of the whole, in percent. Joining clips of one size copies
them, in seconds; with cross-fades, 60 clips of 5 s take four minutes of two cores, and their generation an hour or two
of a GPU."""

KEY_CHARS = 32
"""Hexadecimal: 128 bits. Keys of several customers may lie in one bucket."""

NOT_IN_KEY = {"node_weights", "video_formats", "names_duration", "workflow"}
"""Fields of a request on which no segment depends."""


class Attempt(Protocol):
    """Runs an operation with retries that depend on its errors, for as long as its result is wanted."""

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T:
        """What the operation returns. Raises what it raises in the end."""
        ...


class FilmJob(Job):
    """The job of a film: whatever it reports comes with how many of its stages and segments are done."""

    def __init__(
        self,
        tracker: StageTracker | None,
        segments: int,
        stages: Mapping[str, float] = STAGES,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(tracker, None, check)
        self._stages, self.segments_total = list(stages), segments
        self.segments_done = 0

    def report(self, stage: str, done: float = 0, total: float = 1, detail: Mapping[str, Any] | None = None) -> None:
        """As Job.report, for the stages of the film. Progress inside of a segment is told by `part`."""
        index = self._stages.index(stage)
        counts = {
            "stages_completed": index,
            "stages_total": len(self._stages),
            "stage_index": index,
            "stage": stage,
            "segments_done": self.segments_done,
            "segments_total": self.segments_total,
        }
        super().report(stage, done, total, {**(detail or {}), **counts})

    def part(self, engine_stages: Mapping[str, float], purchase: Purchase | None) -> "SegmentJob":
        """The job of the next segment."""
        return SegmentJob(self, engine_stages, purchase)


class SegmentJob(Job):
    """What an engine sees of a film: one segment, with a payment of its own, that is cancelled when the film is."""

    def __init__(self, whole: FilmJob, engine_stages: Mapping[str, float], purchase: Purchase | None) -> None:
        self._inside = StageTracker(engine_stages)
        super().__init__(self._inside, purchase, whole.raise_if_lease_ended)
        self._whole = whole

    @property
    def cancelled_by(self) -> I2VError | None:
        """Why the segment is not wanted any more, or its film."""
        return self._cancelled or self._whole.cancelled_by

    def report(self, stage: str, done: float = 0, total: float = 1, detail: Mapping[str, Any] | None = None) -> None:
        """As Job.report, for the engine's stages."""
        super().report(stage, done, total, detail)
        inside = self._inside.latest.fraction if self._inside.latest else 0.0
        self._whole.report("segments", round(self._whole.segments_done + inside, 2), self._whole.segments_total)


@dataclass
class Film:
    """A film that is being made, and what it is made with."""

    turns: EngineTurns
    segments: Sequence[Segment]
    request: GenerationRequest  # what all segments share
    inputs: Mapping[str, Path]  # photos, by the names that segments have for them
    folder: Path
    job: FilmJob
    attempt: Attempt
    fade_s: float = 0.0
    recipe: str = ""  # settings of the engine on which it depends what a clip looks like
    store: SegmentStore | None = None
    purchase: Callable[[str], Purchase] | None = None  # the entry of a segment in the ledger, by its key; None: unpaid
    on_segment: Callable[[int, bool], None] = lambda _number, _found: None  # its number, from 1; whether it was kept
    unsettled: list[Purchase] = field(default_factory=list)  # to be ended when the film is delivered
    engine_s: float = 0.0  # for which it held a turn at the engine so far

    async def made(self) -> Video:
        """The film, in `folder`. Raises as EngineTurns.generate and SegmentStore, EncodeFailed, and as `attempt`.

        An error about a segment begins with its number.
        """
        requests = [self.request.for_segment(segment) for segment in self.segments]
        keys = await self._keys(requests)
        clips: list[Path] = []
        costs_usd: list[float] = []
        for number, (segment, request, key) in enumerate(zip(self.segments, requests, keys, strict=True), 1):
            self.job.raise_if_lease_ended()  # fence
            self.job.report("segments", self.job.segments_done, len(keys))
            clip = self.folder / f"segment-{number:02}.mp4"
            with _about_segment(number, len(keys)):
                found = await self._find(key, clip)
                if not found:
                    video = await self._generate(request, self.inputs[segment.photo], key, clip)
                    costs_usd += [] if video.cost_usd is None else [video.cost_usd]
            clips.append(clip)
            self.job.segments_done = number
            self.job.report("segments", number, len(keys))
            self.on_segment(number, found)
        self.job.raise_if_lease_ended()  # fence
        video = await self._join(clips)
        return video.model_copy(update={"cost_usd": sum(costs_usd) if costs_usd else None, "seed": self.request.seed})

    async def _keys(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """The digest of each segment: of its photo's bytes, its wishes, and the engine with its settings.

        A segment that is asked for twice is another clip each time, as two clips of one request are.
        """
        digests = {name: await anyio.to_thread.run_sync(_file_digest, path) for name, path in self.inputs.items()}
        keys: list[str] = []
        asked: dict[str, int] = {}
        for segment, request in zip(self.segments, requests, strict=True):
            wishes = request.model_dump(mode="json", exclude_none=True, exclude=NOT_IN_KEY)
            wishes |= {"photo": digests[segment.photo], "engine": self.turns.name, "recipe": self.recipe}
            text = json.dumps(wishes, sort_keys=True)
            repeat = asked[text] = asked.get(text, -1) + 1
            whole = f"{text} {repeat}" if repeat else text
            keys.append(hashlib.sha256(whole.encode()).hexdigest()[:KEY_CHARS])
        return keys

    async def _find(self, key: str, clip: Path) -> bool:
        """Whether the segment was kept and is at `clip` now."""
        store = self.store
        if store is None or not await self.attempt(lambda: store.find(key, clip)):
            return False
        try:
            await anyio.to_thread.run_sync(_probe, clip)
        except MediaError as error:
            log.warning("segment_damaged", key=key, error=str(error))
            return False
        if self.purchase is not None:  # whoever kept the clip may have died before its payment was ended
            await _ended(self.purchase(key), kept=True)
        return True

    async def _generate(self, request: GenerationRequest, photo: Path, key: str, clip: Path) -> Video:
        """Generates a segment, moves it to `clip` and keeps it."""
        purchase = None if self.purchase is None else self.purchase(key)
        folder = clip.with_suffix("")
        await anyio.to_thread.run_sync(_make_folder, folder)
        part = self.job.part(self.turns.stages, purchase)
        try:
            async with self.turns.taken():  # for this segment alone: others that wait need not wait for the whole film
                began_at = anyio.current_time()
                video = await self.attempt(lambda: self.turns.generate(request, {PHOTO: photo}, folder, part))
                self.engine_s += anyio.current_time() - began_at
        finally:
            self.job.hung = self.job.hung or part.hung
        await anyio.to_thread.run_sync(_take_out, video.path, clip)
        store = self.store
        if store is not None:
            await self.attempt(lambda: store.keep(key, clip))
        if purchase is not None and store is not None:
            await _ended(purchase)
        elif purchase is not None:
            self.unsettled.append(purchase)
        return video

    async def _join(self, clips: Sequence[Path]) -> Video:
        self.job.report("join")
        path = self.folder / "film.mp4"

        def joined() -> "VideoInfo":
            from inference.media import film  # noqa: PLC0415 - numpy is no matter of a process that only moves tasks

            return film.join(
                clips,
                path,
                fade_s=self.fade_s,
                check=self.job.raise_if_cancelled,
                report=lambda done, total: self.job.report("join", done, total),
            )

        info = await run_in_thread(self.job, joined)
        size_bytes = (await anyio.Path(path).stat()).st_size
        return Video(
            path=path, width=info.width, height=info.height, fps=info.fps, frames=info.frames, size_bytes=size_bytes
        )


class FolderStore:
    """Keeps segments as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def find(self, key: str, target: Path) -> bool:
        """See SegmentStore."""
        return await anyio.to_thread.run_sync(self._find, key, target)

    async def keep(self, key: str, path: Path) -> None:
        """See SegmentStore."""
        await anyio.to_thread.run_sync(self._keep, key, path)

    def _find(self, key: str, target: Path) -> bool:
        try:
            shutil.copyfile(self.folder / f"{key}.mp4", target)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise MachineFault(f"{self.folder / key}.mp4 cannot be read: {error.strerror}") from None
        return True

    def _keep(self, key: str, path: Path) -> None:
        partial = self.folder / f".{key}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial)
            partial.replace(self.folder / f"{key}.mp4")
        except OSError as error:
            raise write_error(error, f"a segment cannot be kept in {self.folder}: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _about_segment(number: int, total: int) -> Iterator[None]:
    """Errors of the block say which segment they are about."""
    try:
        yield
    except (CancelRequested, LeaseLost):
        raise
    except I2VError as error:
        error.args = (f"segment {number} of {total}: {error}", *error.args[1:])
        raise


async def _ended(purchase: Purchase, *, kept: bool = False) -> None:
    """Ends the payment of a segment whose clip is kept; `kept`: it was found, and not generated now."""
    try:
        await (purchase.settle() if kept else purchase.end("delivered"))
    except I2VError as error:  # the clip is kept all the same; whoever finds it ends the payment
        log.warning("payment_left_open", error=str(error))


def _probe(path: Path) -> "VideoInfo":
    """Raises MediaError where the file is no video."""
    from inference.media.video import probe  # noqa: PLC0415 - as above

    return probe(path)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MachineFault(f"the photo {path.name} cannot be read any more: {error.strerror}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, f"{folder.name} cannot be made: {error.strerror}") from None


def _take_out(video: Path, clip: Path) -> None:
    """Moves a finished clip out of its folder, which is removed with all else that its engine left there."""
    try:
        video.replace(clip)
    except OSError as error:
        raise write_error(error, f"{clip.name} cannot be put in place: {error.strerror}") from None
    shutil.rmtree(clip.with_suffix(""), ignore_errors=True)
