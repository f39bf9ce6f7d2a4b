"""Engines, chosen and made from settings: the place where an engine is added."""

import hashlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from inference.build.extras import needing_extra, uncollected
from inference.engines.base import Engine, Job, run_in_thread
from inference.engines.runway.models import model_for
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS, Preset
from inference.errors import EngineFailed, InvalidRequest, SettingsError, write_error
from inference.providers import PAID, EngineName
from inference.settings import Settings
from inference.task import GenerationRequest, Task
from inference.transfer.network import is_this_machine

if TYPE_CHECKING:
    from inference.engines.comfyui.template import Template
    from inference.engines.wan.engine import WanEngine
    from inference.engines.wan.speed import Switches

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


def _build_runway(settings: Settings) -> Engine:
    from inference.engines.runway.engine import RunwayEngine  # noqa: PLC0415 - engines work on pixels, ticks do not

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


def load_template(settings: Settings) -> "Template | None":
    """The graph for tasks that bring a photo and none of their own; None where there is none. Raises SettingsError."""
    if settings.comfy_workflow is None:
        return None
    from inference.engines.comfyui.template import Template  # noqa: PLC0415 - as above

    return Template.load(settings.comfy_workflow, settings.comfy_mapping)


def _build_comfyui(settings: Settings) -> Engine:
    with needing_extra("comfyui", "the ComfyUI engine"):
        from inference.engines.comfyui.engine import ComfyEngine  # noqa: PLC0415 - an extra
    return ComfyEngine(settings.comfy_host, template=load_template(settings), patience_s=settings.comfy_patience_s)


def _build_preview() -> Engine:
    from inference.engines.preview import PreviewEngine  # noqa: PLC0415 - as above

    return PreviewEngine()


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


def import_wan() -> None:
    """Imports the Wan engine with torch and all it needs, which takes seconds of a core. Raises SettingsError."""
    if "inference.engines.wan.engine" not in sys.modules:
        with needing_extra("wan", "the Wan engine"), uncollected():
            import inference.engines.wan.engine  # noqa: F401, PLC0415 - an extra


def _build_wan(settings: Settings, check: Callable[[], None] = lambda: None) -> "WanEngine":
    preset = PRESETS[settings.wan_preset]
    if not preset.built_here:
        weights.require(preset, settings.weights_dir)
        weights.read_ahead(weights.weight_files(preset, settings.weights_dir))  # while torch takes seconds to import
    build_weights(preset, settings.weights_dir)
    import_wan()
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan.engine import WanEngine  # noqa: PLC0415 - an extra
    return WanEngine.load(
        preset,
        settings.weights_dir,
        switches=_switches(settings),
        area_px=settings.wan_area_px,
        compiled_dir=compiled_dir(settings),
        check=check,
    )


def _switches(settings: Settings) -> "Switches":
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan.placement import Offload  # noqa: PLC0415 - an extra
        from inference.engines.wan.speed import Switches  # noqa: PLC0415
    return Switches(
        attention=settings.wan_attention,
        compile=None if settings.wan_compile == "off" else "inductor",
        only_compiled_ahead=settings.wan_compile == "auto",
        fp8=settings.wan_fp8,
        offload=None if settings.wan_offload == "auto" else Offload[settings.wan_offload.upper()],
    )


def compiled_dir(settings: Settings) -> Path:
    """Where compiled code of the Wan engine is kept."""
    return settings.wan_compiled_dir or settings.weights_dir / "compiled"


def compile_ahead(settings: Settings) -> Path:
    """Compiles the transformer for this machine, and keeps it where starts look for it; the folder.

    Loads the engine: minutes. Raises NotWritable and DiskFull before that, and then as `build_engine`, or EngineFailed
    where nothing was compiled or kept.
    """
    folder = compiled_dir(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(error, f"{folder} cannot be written: {error.strerror}") from None
    engine = _build_wan(settings.model_copy(update={"wan_compile": "on"}))
    if not engine.compiled:
        raise EngineFailed(engine.eager_because)
    if why := why_eager(settings.model_copy(update={"wan_compile": "auto"})):
        raise EngineFailed(f"it compiled, but nothing was kept: {why}")
    return folder


def why_eager(settings: Settings) -> str:
    """Why the Wan engine would run without compiled code; empty where it was compiled ahead. Raises SettingsError."""
    if settings.wan_compile == "off":
        return "I2V_WAN_COMPILE is off"
    preset = PRESETS[settings.wan_preset]
    with needing_extra("wan", "the Wan engine"):
        from inference.engines.wan import compiled, compiler  # noqa: PLC0415 - an extra
        from inference.engines.wan.engine import default_device  # noqa: PLC0415
    facts = compiler.facts_of(preset, default_device(), _switches(settings), settings.wan_area_px)
    return compiled.find(compiled_dir(settings), preset.name, facts).why


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
        build=lambda _settings, _check: _build_preview(),
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


def _origin(url: str) -> str:
    parsed = httpx.URL(url)
    return f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"
