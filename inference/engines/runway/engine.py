"""Runway's API as an engine: prepares photos and fetches clips; `paid.py` orders and pays.

photo → upright JPEG without metadata → a task, paid for once → download → cut to length and tidied
"""

import base64
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import structlog

from inference.engines.base import Job, photo_of
from inference.engines.runway.models import is_gone, model_for, refuse_settings
from inference.engines.runway.paid import Order, PaidTask
from inference.engines.runway.wire import DATA_URI_BYTES, GONE, RunwayApi, RunwayTask
from inference.errors import (
    CancelRequested,
    EncodeFailed,
    EngineFailed,
    EngineHung,
    I2VError,
    InvalidRequest,
    LeaseLost,
    MachineFault,
    ObjectMissing,
    ProviderUnavailable,
    StorageRefused,
    StorageUnavailable,
    UrlExpired,
)
from inference.media import photo as photos
from inference.media.clip import tidy
from inference.media.video import VideoInfo, probe
from inference.task import LAST_PHOTO, GenerationRequest, Video
from inference.transfer.storage import Storage

log = structlog.get_logger(__name__)

BASE_URL = "https://api.dev.runwayml.com"

DOWNLOAD_TRIES = 3
"""URLs of clips expire; each further download asks Runway for a new one."""

MAX_VIDEO_BYTES = 500_000_000
"""Ten seconds of 1080p are some 20 MB."""

PHOTO_SIDE_PX = 4096
"""More than twice the size of any clip; Runway accepts less than 8000."""

PHOTO_WIDEST = 2.0
"""Longer side over shorter. Runway refuses wider photos, and crops all others to the clip's shape."""

DEFAULT_PROMPT = "Subtle, natural motion. The camera pushes in slowly and steadily."
"""For a model that requires a prompt."""


class RunwayEngine:
    """Generates at Runway, any number of clips at once; Runway queues what exceeds the account's tier.

    If the model does not offer a length, a longer clip is ordered and cut. The model decides the size, so `max_area_px`
    is ignored. `audio`: buy sound, where the model makes any. `default_duration_s`: the length of clips whose request
    names none; None: the queue's default. `replays`: how often a request whose answer was lost is paid for again
    without asking a person. `transport` replaces the network and its guards, for tests. Raises SettingsError for an
    unknown model, and for a size that it does not offer.
    """

    name = "runway"
    stages: Mapping[str, float] = {"prepare": 1.0, "queue": 10.0, "generate": 80.0, "fetch": 9.0}

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str = BASE_URL,
        model: str = "gen4_turbo",
        ratio: str | None = None,
        timeout_s: float = 600,
        poll_interval_s: float = 5,
        default_duration_s: float | None = None,
        audio: bool = False,
        replays: int = 0,
        trusted_origins: Collection[str] = (),
        allow_private: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        refuse_settings(model, ratio)
        self._api_key, self._base_url, self._transport = api_key, base_url, transport
        self._model, self._ratio = model, ratio
        self._timeout_s, self._poll_interval_s, self._replays = timeout_s, poll_interval_s, replays
        self._default_duration_s, self._audio = default_duration_s, audio
        self._trusted_origins, self._allow_private = trusted_origins, allow_private
        self._told: set[str] = set()

    def refuse(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest, naming the field, for what the model cannot do. Sends nothing."""
        model_for(request.provider, self._model).refuse(request)

    async def check(self) -> None:
        """As Engine.check: Runway is asked only with an order, whose answer says whether it works."""

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """Makes `runway.mp4` in `folder`, or continues with what was paid for already, according to the ledger.

        Raises InvalidRequest, ContentRefused, InvalidPhoto, EngineFailed, EngineHung, PaymentInDoubt,
        ProviderUnavailable, AccountError, BudgetSpent, StorageError, MediaError, MachineFault.
        """
        job.raise_if_cancelled()
        if self._default_duration_s is not None and not request.names_duration:
            request = request.model_copy(update={"duration_s": self._default_duration_s})
        try:
            photo = photo_of(request, inputs, self.name)
            self.refuse(request)
            if LAST_PHOTO in inputs:
                raise InvalidRequest(f"{LAST_PHOTO} is given; Runway's models are used without")
            storage = Storage(
                trusted_origins=self._trusted_origins,
                allow_private=self._allow_private,
                max_download_bytes=MAX_VIDEO_BYTES,
                transport=self._transport,
            )
            async with RunwayApi(self._api_key, self._base_url, transport=self._transport) as api, storage:
                return await self._generate(api, storage, request=request, photo=photo, folder=folder, job=job)
        except (CancelRequested, LeaseLost):
            raise
        except I2VError as error:
            failure = type(error)(f"Runway: {error}")
        raise failure

    async def _generate(
        self, api: RunwayApi, storage: Storage, *, request: GenerationRequest, photo: Path, folder: Path, job: Job
    ) -> Video:
        job.report("prepare")
        if not await anyio.Path(folder).is_dir():
            raise MachineFault(f"there is no folder {folder.name} to work in")  # checked before anything is paid
        order = await anyio.to_thread.run_sync(self._order, request, photo)
        job.raise_if_cancelled()

        async def put_photo(order: Order) -> str:
            uri = "data:image/jpeg;base64," + base64.b64encode(order.photo).decode("ascii")
            if len(uri) < DATA_URI_BYTES:
                return uri
            slot = await api.upload_slot()
            try:
                await storage.submit(
                    slot.uploadUrl, slot.fields, order.photo, name="photo.jpg", content_type="image/jpeg"
                )
            except StorageUnavailable as error:
                raise ProviderUnavailable(f"the photo could not be uploaded: {error}") from None
            return slot.runwayUri

        paid = PaidTask(api, job, order, put_photo, poll_interval_s=self._poll_interval_s, replays=self._replays)
        task: RunwayTask | None = None
        try:
            with anyio.move_on_after(self._timeout_s):
                await paid.pay()
                task = await paid.succeeded()
            if task is not None:  # paid for; fetching has time limits of its own
                job.report("fetch")
                video = await _fetch(storage, paid, task, folder, order.model.cut_s(request.duration_s))
                job.report("fetch", 1)
                return video.model_copy(update={"seed": order.seed})
        except (CancelRequested, LeaseLost, anyio.get_cancelled_exc_class()):
            await paid.let_go()
            raise
        if not paid.id:
            raise ProviderUnavailable(f"it took no order within the {self._timeout_s:g} s of RUNWAY_TIMEOUT")
        if paid.is_unheard:  # the task continues at Runway, and is fetched once Runway answers again
            await paid.let_go()
            raise ProviderUnavailable(f"it did not say how task {paid.id} is, which is paid for")
        await paid.stop()
        raise EngineHung(f"no video within the {self._timeout_s:g} s of RUNWAY_TIMEOUT; it was told to stop")

    def _order(self, request: GenerationRequest, photo: Path) -> Order:
        """What to order for a request. Blocks. Raises InvalidRequest, InvalidPhoto, MachineFault."""
        model = model_for(request.provider, self._model)
        if request.provider and is_gone(request.provider) and request.provider not in self._told:
            self._told.add(request.provider)
            log.warning("model_gone", asked_for=request.provider, used=model.name)
        info = photos.measure(photo)
        # Always encoded anew: cameras write their position and their own colour profile into the file.
        picture = photos.jpeg(photo, max_side_px=PHOTO_SIDE_PX, widest=PHOTO_WIDEST)
        try:
            photo_digest = hashlib.sha256(photo.read_bytes()).hexdigest()
        except OSError as error:
            raise MachineFault(f"the photo cannot be read any more: {error.strerror}") from None
        return Order(
            model=model,
            seconds=model.billed_seconds(request.duration_s),
            ratio=model.ratio_for(self._ratio, info.width, info.height),
            prompt=request.prompt.strip() or (DEFAULT_PROMPT if model.prompt_required else ""),
            seed=request.seed,
            photo=picture,
            photo_digest=photo_digest,
            audio=self._audio and model.sound_credits_per_s is not None,
            negative_prompt=(request.negative_prompt or "").strip(),
        )


async def _fetch(storage: Storage, paid: PaidTask, task: RunwayTask, folder: Path, cut_s: float | None) -> Video:
    """Downloads a clip and cuts it to length. The payment stays open until the queue has the video."""
    raw, path = anyio.Path(folder / ".runway.mp4"), anyio.Path(folder / "runway.mp4")
    try:
        await _download(storage, paid, task, Path(raw))
        info, as_it_came = await anyio.to_thread.run_sync(_tidied, Path(raw), Path(path), cut_s)
        size_bytes = (await path.stat()).st_size
    except BaseException:
        with anyio.CancelScope(shield=True):
            await path.unlink(missing_ok=True)
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await raw.unlink(missing_ok=True)
    return Video(
        path=Path(path),
        width=info.width,
        height=info.height,
        fps=info.fps,
        frames=info.frames,
        size_bytes=size_bytes,
        cost_usd=paid.cost_usd,
        as_it_came=as_it_came,
        external_ids={"runway_task_id": task.id},
    )


def _tidied(raw: Path, path: Path, cut_s: float | None) -> tuple[VideoInfo, str | None]:
    """Cuts and normalises a clip. If that fails, keeps the clip as it is and returns why: it is paid for. Blocks.

    Raises MediaError where it is no video, MachineFault.
    """
    try:
        return tidy(raw, path, length_s=cut_s), None
    except EncodeFailed as error:
        info = probe(raw)
        raw.replace(path)
        log.warning("clip_as_it_came", error=str(error), duration_s=info.duration_s, wanted_s=cut_s)
        return info, str(error)


async def _download(storage: Storage, paid: PaidTask, task: RunwayTask, path: Path) -> None:
    """Downloads the clip of a task. Raises StorageError, EngineFailed, ProviderUnavailable, MachineFault."""
    for tries_left in reversed(range(DOWNLOAD_TRIES)):
        try:
            await storage.download(task.output[0], path)
        except StorageUnavailable as error:
            if not tries_left:
                raise ProviderUnavailable(f"task {task.id} is paid for, and its clip cannot be had: {error}") from None
            await paid.pause()
        except (UrlExpired, ObjectMissing, StorageRefused) as error:
            if not tries_left and isinstance(error, ObjectMissing):
                await paid.ended("failed", GONE)
                raise EngineFailed(f"task {task.id} was paid for, and its clip is gone: {error}") from None
            if not tries_left:
                raise
            await paid.pause()  # a new clip may not be on every server yet, and giving up would mean paying again
        else:
            return
        found = await paid.look()
        task = found if isinstance(found, RunwayTask) and found.output else task
