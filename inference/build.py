"""Builds the parts from settings. Entry points do this once, at their start; nothing below them reads settings."""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx
import structlog

from inference import private
from inference.engines.base import Engine, Job, run_in_thread
from inference.engines.comfyui.template import Template
from inference.engines.preview import PreviewEngine
from inference.engines.runway.engine import RunwayEngine
from inference.engines.runway.models import model_for
from inference.engines.turns import EngineTurns
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS, Preset
from inference.errors import InvalidRequest, SettingsError, write_error
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.leasing.scratch import sweep
from inference.payments.ledger import Ledger
from inference.payments.records import Records, SqliteRecords
from inference.progress.eta import StageHistory
from inference.progress.hub import ProgressHub
from inference.progress.redis import open_hub
from inference.progress.stages import Sink
from inference.providers import PAID, EngineName, QueueName, is_paid
from inference.queues.base import TaskQueue
from inference.queues.gmanimato import GmAnimatoQueue
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of
from inference.task import GenerationRequest, Lease, Outcome, Task
from inference.transfer.bucket import Bucket, bucket_named_in
from inference.transfer.network import is_this_machine
from inference.transfer.storage import Storage

if TYPE_CHECKING:
    from inference.queues.video_jobs.schema import Names
    from inference.queues.video_jobs.store import JobStore
    from inference.server.config import ServerConfig


log = structlog.get_logger(__name__)

SIGNING_SECRET_CHARS = 64
"""Hexadecimal: 256 bits, as much as the HMAC-SHA256 it keys."""


PREVIEW_NOTE = "a camera move over the photo, not a generation"


def choose_engine(settings: Settings) -> Settings:
    """Settings of a worker: their engine was chosen by I2V_ENGINE, by `--engine`, or by the only key there is.

    Nobody gets previews for finished work by accident: only a queue on this machine, where things are tried out, has
    them by default. Raises SettingsError for any other where nothing was chosen.
    """
    if settings.engine == "comfyui" and settings.comfy_workflow is None and settings.queue == "lifeisshort":
        raise SettingsError(
            "I2V_COMFY_WORKFLOW is not set: tasks of this queue bring a photo and no graph; export one for them from "
            "ComfyUI (Workflow, Export (API)), and try it with `i2v comfy check`"
        )
    if "engine" in settings.model_fields_set:
        return settings
    if settings.runway_key is not None:
        return settings.model_copy(update={"engine": PAID.worker_type})
    if settings.queue == "gmanimato":
        raise SettingsError(
            f"I2V_ENGINE is not set: for GmAnimato's queue at {settings.queue_url} set it to comfyui, which runs the "
            "graphs that its tasks bring"
        )
    if settings.queue_url and not is_this_machine(httpx.URL(settings.queue_url).host):
        raise SettingsError(
            f"I2V_ENGINE is not set: set it to wan, comfyui, or runway with RUNWAYML_API_SECRET, for the queue at "
            f"{settings.queue_url}; preview ({PREVIEW_NOTE}) is the default only for a queue on this machine"
        )
    return settings


def build_engine(settings: Settings, check: Callable[[], None] = lambda: None) -> Engine:
    """The engine that `settings.engine` names, ready to generate: for one with a model, seconds to minutes.

    `check` is called between the parts of a model, and what it raises ends the loading. Raises SettingsError, and
    EngineLost or its WeightsError where this machine cannot run it.
    """
    return ENGINES[settings.engine].build(settings, check)


async def load_engine(settings: Settings) -> Engine:
    """The same from an event loop, which goes on meanwhile; stops loading where it is cancelled."""
    job = Job()
    return await run_in_thread(job, lambda: build_engine(settings, job.raise_if_cancelled))


def refuse(settings: Settings, request: GenerationRequest) -> None:
    """Raises InvalidRequest for what the engine of `settings` would refuse anyway, before it is loaded."""
    ENGINES[settings.engine].refuse(settings, request)


def engine_note(settings: Settings) -> str:
    """The engine of `settings`, for people, and what to expect of it."""
    return ENGINES[settings.engine].note(settings)


def recipe(settings: Settings) -> str:
    """The settings of the engine on which it depends what a clip looks like: finished segments are told apart by it."""
    return ENGINES[settings.engine].recipe(settings)


def price_usd(settings: Settings, task: Task) -> float | None:
    """What a task costs at the paid provider, at most; None where it cannot be made there."""
    request = GenerationRequest.from_task(task)
    if task.segments:
        prices = [_price_usd(settings, request.for_segment(segment)) for segment in task.segments]
        return None if None in prices else sum(price for price in prices if price is not None)
    if not task.names_duration and settings.runway_duration_s is not None:
        request = request.model_copy(update={"duration_s": settings.runway_duration_s})
    return _price_usd(settings, request)


def _price_usd(settings: Settings, request: GenerationRequest) -> float | None:
    try:
        model = model_for(request.provider, settings.runway_model)
        model.refuse(request)
        return model.cost_usd(request.duration_s, audio=settings.runway_audio)
    except InvalidRequest:
        return None


def _refuse_runway(settings: Settings, request: GenerationRequest) -> None:
    model_for(request.provider, settings.runway_model).refuse(request)


def _runway_note(settings: Settings) -> str:
    usd_per_s = model_for(None, settings.runway_model).usd_per_s(audio=settings.runway_audio)
    return (
        f"runway, model {settings.runway_model}: up to ${usd_per_s:.2f} a second, "
        f"${settings.runway_budget_usd:.2f} a day"
    )


def _build_runway(settings: Settings) -> RunwayEngine:
    if settings.runway_key is None:
        raise SettingsError("RUNWAYML_API_SECRET is not set: the Runway engine needs a key of dev.runwayml.com")
    return RunwayEngine(
        settings.runway_key.get_secret_value(),
        base_url=settings.runway_url,
        model=settings.runway_model,
        ratio=settings.runway_ratio,
        timeout_s=settings.runway_timeout_s,
        poll_interval_s=settings.runway_poll_interval_s,
        default_duration_s=settings.runway_duration_s,
        audio=settings.runway_audio,
        replays=int(settings.runway_replay),
        trusted_origins=[_origin(settings.runway_url)],
        allow_private=settings.allow_private_addresses,
    )


def load_template(settings: Settings) -> Template | None:
    """The graph for tasks that bring a photo and none of their own; None where there is none. Raises SettingsError."""
    if settings.comfy_workflow is None:
        return None
    return Template.load(settings.comfy_workflow, settings.comfy_mapping)


def _build_comfyui(settings: Settings) -> Engine:
    with needing_extra("comfyui", "the ComfyUI engine"):
        from inference.engines.comfyui.engine import ComfyEngine  # noqa: PLC0415 - an extra
    return ComfyEngine(settings.comfy_host, template=load_template(settings), patience_s=settings.comfy_patience_s)


def _comfyui_recipe(settings: Settings) -> str:
    """A digest of the graph that makes clips of photos, and of where photo and prompt go in it."""
    contents = hashlib.sha256()
    for path in (settings.comfy_workflow, settings.comfy_mapping):
        with suppress(OSError):  # the engine says so, before anything is made
            contents.update(path.read_bytes() if path else b"")
        contents.update(b"\0")
    return contents.hexdigest()


def _comfyui_note(settings: Settings) -> str:
    graph = f"the graph {settings.comfy_workflow.name}" if settings.comfy_workflow else "graphs that tasks bring"
    return f"comfyui at {settings.comfy_host}: {graph}"


def _wan_note(settings: Settings) -> str:
    preset = PRESETS[settings.wan_preset]
    return f"wan, preset {preset.name}" + (f": {preset.label}" if preset.label else "")


def build_ledger(settings: Settings, records: Records | None = None) -> Ledger:
    """The books of what was paid for, and what may be spent in a day.

    `records`: those that a platform lends; without, a file that every process of this machine shares.
    """
    return Ledger(records or SqliteRecords(settings.ledger_path), budget_usd=settings.runway_budget_usd)


def _build_wan(settings: Settings, check: Callable[[], None]) -> Engine:
    preset = PRESETS[settings.wan_preset]
    if not preset.built_here:
        weights.require(preset, settings.weights_dir)
        weights.read_ahead(weights.weight_files(preset, settings.weights_dir))  # while torch takes seconds to import
    build_weights(preset, settings.weights_dir)
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan.engine import WanEngine  # noqa: PLC0415 - an extra
        from inference.engines.wan.placement import Offload  # noqa: PLC0415
        from inference.engines.wan.speed import Switches  # noqa: PLC0415
    switches = Switches(
        attention=settings.wan_attention,
        compile="inductor" if settings.wan_compile else None,
        fp8=settings.wan_fp8,
        offload=None if settings.wan_offload == "auto" else Offload[settings.wan_offload.upper()],
    )
    return WanEngine.load(preset, settings.weights_dir, switches=switches, area_px=settings.wan_area_px, check=check)


def build_weights(preset: Preset, weights_dir: Path) -> None:
    """Makes the weights of a preset that is built here and not there yet. Raises SettingsError, MachineFault."""
    if not preset.built_here or weights.folder_of(weights_dir, preset.repositories[0]).is_dir():
        return
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan import tiny  # noqa: PLC0415 - an extra
    try:
        tiny.build(preset.name, weights_dir)
    except OSError as error:
        told = f"I2V_WEIGHTS_DIR: {weights_dir} cannot be written: {error.strerror or error}"
        raise write_error(error, told) from None


@dataclass(frozen=True, slots=True)
class _EngineParts:
    """What an engine needs to be chosen by its name in settings."""

    build: Callable[[Settings, Callable[[], None]], Engine]
    note: Callable[[Settings], str]
    refuse: Callable[[Settings, GenerationRequest], None]
    recipe: Callable[[Settings], str] = lambda _settings: ""  # which settings make another clip of the same request


ENGINES: dict[EngineName, _EngineParts] = {
    "preview": _EngineParts(
        build=lambda _settings, _check: PreviewEngine(),
        note=lambda _settings: f"preview: {PREVIEW_NOTE}",
        refuse=lambda _settings, _request: None,
    ),
    "wan": _EngineParts(
        build=_build_wan,
        note=_wan_note,
        refuse=lambda settings, request: PRESETS[settings.wan_preset].refuse(request),
        recipe=lambda settings: f"{settings.wan_preset} {settings.wan_area_px}",
    ),
    "comfyui": _EngineParts(
        build=lambda settings, _check: _build_comfyui(settings),
        note=_comfyui_note,
        refuse=lambda _settings, _request: None,  # the graph says, when a task is filled in
        recipe=_comfyui_recipe,
    ),
    "runway": _EngineParts(
        build=lambda settings, _check: _build_runway(settings),
        note=_runway_note,
        refuse=_refuse_runway,
        recipe=lambda settings: f"{settings.runway_model} {settings.runway_ratio} {settings.runway_audio}",
    ),
}
"""The place where an engine is added: here it is built, and `providers.py` says which hints it serves."""


def describe_gpu() -> tuple[str, float] | None:
    """Name and memory in GB of the GPU that the Wan engine would take; None without one. Raises SettingsError."""
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan.placement import describe_gpu as describe  # noqa: PLC0415 - an extra
    return describe()


@contextmanager
def needing_extra(extra: str, what: str) -> Iterator[None]:
    """Says what to install where an import in the block fails. Raises SettingsError."""
    try:
        yield
    except ImportError as error:
        raise SettingsError(f"{what} needs an extra: pip install 'serverless-i2v[{extra}]' ({error})") from None


def open_storage(settings: Settings, trusted_origins: Sequence[str] | None = None) -> Storage:
    """Downloads and uploads under the limits of `settings`; to be entered.

    `trusted_origins` may be anywhere. None: the queue's own host, which the operator named. Its presigned URLs may lead
    back there, to whichever port: the app and its storage often are two servers of one machine.
    """
    # A database holds no objects. Its address says nothing about where they may be.
    queue_url = None if settings.queue == "video_jobs" else settings.queue_url
    own = [queue_url, settings.public_url, settings.bucket_url] if trusted_origins is None else []
    return Storage(
        trusted_origins=trusted_origins or (),
        trusted_hosts=[url for url in own if url],
        allow_private=settings.allow_private_addresses,
        max_download_bytes=settings.max_photo_bytes,
    )


@asynccontextmanager
async def open_queue(settings: Settings) -> AsyncIterator[TaskQueue]:
    """A connection to the queue that `settings` names. Raises SettingsError."""
    if not settings.queue_url:
        names = names_of(Settings.model_fields[QUEUE_URL_FIELDS[settings.queue]])
        raise SettingsError(f"{' or '.join(names)} is not set")
    async with open_storage(settings) as storage, QUEUES[settings.queue](settings, storage) as queue:
        yield queue


def _life_is_short(settings: Settings, storage: Storage) -> LifeIsShortQueue:
    return LifeIsShortQueue(
        settings.api_url or "",
        settings.api_key.get_secret_value() if settings.api_key else None,
        worker_id=settings.worker_id,
        storage=storage,
        auth_scheme=settings.auth_scheme,
        worker_type=settings.worker_type,
        lease_s=settings.lease_duration_s,
        extension_s=settings.lease_extension_s,
        bypass=settings.vercel_bypass.get_secret_value() if settings.vercel_bypass else None,
    )


def _gmanimato(settings: Settings, storage: Storage) -> GmAnimatoQueue:
    return GmAnimatoQueue(
        settings.gmanimato_url or "",
        settings.gmanimato_secret.get_secret_value() if settings.gmanimato_secret else None,
        worker_id=settings.worker_id,
        storage=storage,
        bucket=bucket_of(settings),
        callback_base_url=settings.gmanimato_callback_url,
        max_body_bytes=settings.webhook_bytes,
        max_photo_bytes=settings.max_photo_bytes,
    )


@asynccontextmanager
async def _video_jobs(settings: Settings, storage: Storage) -> AsyncIterator[TaskQueue]:
    with needing_extra("push", "a queue in PostgreSQL"):
        from inference.queues.video_jobs.queue import VideoJobsQueue  # noqa: PLC0415 - an extra
    bucket = bucket_of(settings)
    if bucket is None:
        raise SettingsError("BUCKET_ENDPOINT_URL is not set: videos of jobs in PostgreSQL go to a bucket")
    # In a thread, since it connects.
    jobs = await anyio.to_thread.run_sync(open_jobs, settings)
    try:
        queue = VideoJobsQueue(
            jobs,
            worker_id=settings.worker_id,
            storage=storage,
            bucket=bucket,
            max_photo_bytes=settings.max_photo_bytes,
        )
    except SettingsError:
        jobs.close()
        raise
    async with queue:
        yield queue


def open_jobs(settings: Settings) -> "JobStore":
    """The table of jobs, to be closed; blocks while it connects. Raises SettingsError, QueueUnavailable."""
    url, names = _jobs_table(settings)
    from inference.queues.video_jobs.store import JobStore  # noqa: PLC0415 - an extra

    return JobStore(url, names, stale_s=settings.jobs_stale_s, worker_type=settings.worker_type)


def migrate_jobs(settings: Settings) -> list[str]:
    """Makes the table of jobs, or adds what it lacks; returns what was made, in words. Blocks.

    Raises SettingsError, QueueUnavailable.
    """
    url, names = _jobs_table(settings)
    from inference.queues.video_jobs.store import create  # noqa: PLC0415 - an extra

    return create(url, names)


def _jobs_table(settings: Settings) -> "tuple[str, Names]":
    with needing_extra("push", "a queue in PostgreSQL"):
        from inference.queues.video_jobs.schema import Names  # noqa: PLC0415 - an extra
    if settings.jobs_database_url is None:
        raise SettingsError("I2V_JOBS_DATABASE_URL is not set: there is no queue without a database")
    names = Names(settings.jobs_table, json.loads(settings.jobs_columns or "{}"))
    return settings.jobs_database_url.get_secret_value(), names


QUEUES: dict[QueueName, Callable[[Settings, Storage], AbstractAsyncContextManager[TaskQueue]]] = {
    "lifeisshort": _life_is_short,
    "gmanimato": _gmanimato,
    "video_jobs": _video_jobs,
}
"""The place where a queue is added."""


WEBHOOK_PAUSES_S = (2.0, 60.0)
"""Between the tries of a call that nobody answers, doubling, for a queue without leases. A job whose end is never told
stays open there, so even five tries have to outlast the restart of an application."""


def build_policy(settings: Settings) -> Policy:
    """How leases are kept, and how often things are tried."""
    return Policy(
        heartbeat_interval_s=settings.heartbeat_interval_s,
        attempt_limit_s=settings.attempt_limit_s,
        attempts=settings.max_tries,
        patience_attempts=settings.webhook_retries,
        patience_pauses_s=WEBHOOK_PAUSES_S if settings.queue == "gmanimato" else None,
        keep_temp=not settings.auto_cleanup_temp,
    )


def clear_temp(settings: Settings) -> None:
    """Makes the temporary folder, and clears away what killed workers left there. Raises SettingsError."""
    if settings.temp_dir:
        try:
            settings.temp_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"TEMP_DIR: {settings.temp_dir} cannot be made: {error.strerror}") from None
    if settings.auto_cleanup_temp:
        sweep(settings.temp_dir)


@asynccontextmanager
async def open_events(settings: Settings, *, needed: bool = True) -> AsyncIterator[ProgressHub | None]:
    """Where applications hear of the leases of this process; None where no Redis is set.

    What waits to be told is sent at the end, for some seconds at most. Raises SettingsError for a URL that is none, or
    where the package is missing; unless it is `needed`, that is a log line, and nobody hears of anything.
    """
    hub = None
    if settings.redis_url is not None:
        try:
            hub = open_hub(settings.redis_url.get_secret_value())
        except SettingsError as error:
            if needed:
                raise
            log.error("no_events", error=str(error))  # noqa: TRY400 - the message is the point
    try:
        yield hub
    finally:
        if hub is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(hub.close)


def build_runner(
    settings: Settings,
    queue: TaskQueue,
    engine: Engine | EngineTurns,
    *,
    ledger: Ledger | None = None,
    sink: Callable[[Lease], Sink] | None = None,
    hub: ProgressHub | None = None,
    history: StageHistory | None = None,
) -> Runner:
    """What runs leases; clears away what killed workers left behind.

    `hub`, `history`: as Runner has them. Raises SettingsError where the temporary folder cannot be made.
    """
    clear_temp(settings)
    return Runner(
        queue,
        engine,
        policy=build_policy(settings),
        temp_dir=settings.temp_dir,
        sink=sink,
        ledger=ledger,
        recipe=recipe(settings),
        at_once=settings.runway_concurrency if is_paid(settings.engine) else 1,
        usd_per_s=usd_per_s(settings),
        hub=hub,
        history=history,
    )


def usd_per_s(settings: Settings) -> float | None:
    """What a second of this machine's engine costs; None where that is not known, or its provider names prices."""
    if is_paid(settings.engine) or settings.gpu_usd_per_hour is None:
        return None
    return settings.gpu_usd_per_hour / 3600


def build_worker(
    settings: Settings,
    queue: TaskQueue,
    engine: Engine,
    *,
    sink: Callable[[Lease], Sink] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
    hub: ProgressHub | None = None,
) -> Worker:
    """A polling worker. Raises SettingsError where the temporary folder cannot be made."""
    pays = is_paid(settings.engine)
    # A task that cannot be handed back is not taken before the engine is free for it: another worker may be idle.
    held = settings.concurrency if queue.hands_back or "concurrency" in settings.model_fields_set else 1
    return Worker(
        queue,
        build_runner(settings, queue, engine, ledger=build_ledger(settings) if pays else None, sink=sink, hub=hub),
        concurrency=max(held, settings.runway_concurrency) if pays else held,
        poll_interval_s=settings.poll_interval_s,
        grace_s=settings.shutdown_grace_s,
        on_outcome=on_outcome,
    )


def build_server_config(settings: Settings) -> "ServerConfig":
    """What the embedded queue server is told. Makes its folder. Raises SettingsError, MachineFault."""
    with needing_extra("server", "the queue server"):
        from inference.server.config import ServerConfig  # noqa: PLC0415
    data_dir = settings.data_dir.absolute()
    try:
        private.make_folder(data_dir, "queue.db*", "signing.key", "objects")
        signing_secret = _signing_secret(data_dir / "signing.key")
    except OSError as error:
        raise write_error(error, f"I2V_DATA_DIR: {data_dir} cannot be written: {error.strerror}") from None
    database_url = (
        settings.database_url.get_secret_value() if settings.database_url else f"sqlite:///{data_dir}/queue.db"
    )
    return ServerConfig(
        database_url=database_url,
        storage_dir=data_dir / "objects",
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        signing_secret=signing_secret,
        public_url=settings.public_url,
        max_upload_bytes=settings.max_video_bytes,
        max_photo_bytes=settings.max_photo_bytes,
        retention_days=settings.retention_days,
    )


def _signing_secret(path: Path) -> str:
    """Kept in a file, so that URLs handed out before a restart work after it.

    Raises SettingsError for a file that holds no secret: an empty one would let anybody sign.
    """
    if not path.exists():
        # Linked into place when it is whole: neither a crash nor a second server at once leaves half a secret.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
            file.write(secrets.token_hex(SIGNING_SECRET_CHARS // 2))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(file.name, path)
    private.close(path)
    secret = path.read_text().strip()
    if len(secret) < SIGNING_SECRET_CHARS:
        raise SettingsError(f"{path} holds no signing secret; remove it, and a new one is made")
    return secret


def _origin(url: str) -> str:
    parsed = httpx.URL(url)
    return f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"


def bucket_of(settings: Settings) -> Bucket | None:
    """The operator's bucket. Raises SettingsError where only half of it is said."""
    secret = settings.bucket_secret.get_secret_value() if settings.bucket_secret else None
    name = settings.bucket_name or (bucket_named_in(settings.bucket_url) if settings.bucket_url else None)
    needed = {
        "BUCKET_ENDPOINT_URL": settings.bucket_url,
        "BUCKET_NAME": name,
        "BUCKET_ACCESS_KEY_ID": settings.bucket_key_id,
        "BUCKET_SECRET_ACCESS_KEY": secret,
    }
    missing = [name for name, value in needed.items() if not value]
    if len(missing) == len(needed):
        return None
    if missing:
        raise SettingsError(f"{', '.join(missing)}: not set, though other settings of the bucket are")
    return Bucket(
        settings.bucket_url or "",
        name or "",
        settings.bucket_key_id or "",
        secret or "",
        settings.bucket_region,
    )
