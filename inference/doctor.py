"""Checks whether this machine has everything that a worker needs: one line a check."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import anyio.to_thread
import imageio_ffmpeg
import numpy as np

from inference.build.engines import choose_engine, describe_gpu, engine_note, load_template, why_eager
from inference.build.queues import bucket_of, open_queue
from inference.build.workers import build_ledger
from inference.engines.comfyui.api import ComfyApi, base_url
from inference.engines.comfyui.needs import lacking
from inference.engines.runway.models import USD_PER_CREDIT, refuse_settings
from inference.engines.runway.wire import RunwayApi
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS
from inference.errors import EngineLost, I2VError, SettingsError
from inference.media.photo_file import heic_reader
from inference.media.video import VideoWriter, probe
from inference.progress.outbox import Away
from inference.progress.redis import try_out
from inference.providers import EngineName, is_paid
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of

ROOM_BYTES = 1_000_000_000
"""Room for the temporary files of a few tasks: photos up to 50 MB, videos far smaller."""


EXTRAS = {
    "server": ("fastapi", "the embedded queue"),
    "wan": ("diffusers", "the Wan engine"),
    "comfyui": ("httpx_ws", "the ComfyUI engine"),
}
"""A package of each extra that a worker's machine may have, and what it is for. Engines have the names of theirs."""

EFFECTIVE_IDS = os.access in os.supports_effective_ids

Verdict = Literal["ok", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    text: str


async def examine(load: Callable[[], Settings]) -> AsyncIterator[Finding]:
    """Runs every check, cheapest first; a check is skipped if something that it depends on is missing."""
    settings: Settings | None = None
    try:
        settings = load()
        settings = choose_engine(settings) if settings.queue_url else settings
    except I2VError as error:
        for line in str(error).splitlines():
            yield Finding("settings", "FAIL", line)
    else:
        for finding in unread(settings):
            yield finding
        yield Finding("settings", "ok", f"worker {settings.worker_id}, engine {engine_note(settings)}")
        async for finding in _engine(settings):
            yield finding
    yield await anyio.to_thread.run_sync(_photos)
    yield await anyio.to_thread.run_sync(_ffmpeg)
    yield await anyio.to_thread.run_sync(_disk, settings.temp_dir if settings else None)
    if settings is None:
        yield Finding("queue", "skip", "settings first")
    else:
        async for finding in _around(settings):
            yield finding
    for extra in EXTRAS:
        if settings is None or extra != settings.engine:  # the engine's own was looked at before all else of it
            yield _extra(extra, "skip")


def unread(settings: Settings) -> list[Finding]:
    """Names that look like settings and are none."""
    return [Finding("settings", "skip", line) for line in settings.unread()]


async def _around(settings: Settings) -> AsyncIterator[Finding]:
    """What the worker, or the server, keeps elsewhere: data, events, tasks, videos."""
    yield await anyio.to_thread.run_sync(_data, settings)
    if settings.redis_url is not None:
        yield await anyio.to_thread.run_sync(_redis, settings.redis_url.get_secret_value())
    yield await _queue(settings)
    if settings.queue == "gmanimato":
        yield _delivery(settings)


async def _engine(settings: Settings) -> AsyncIterator[Finding]:
    """What only the engine needs, its packages first, or the other engine for which there is a key."""
    sound = True
    if settings.engine in EXTRAS:
        finding = _extra(settings.engine, "FAIL")
        sound = finding.verdict == "ok"
        yield finding
    for check in NEEDS.get(settings.engine, ()) if sound else ():
        yield await anyio.to_thread.run_sync(check, settings)
    if settings.engine == "wan" and sound:
        yield await anyio.to_thread.run_sync(_compiled, settings)
    if settings.engine == "comfyui" and sound:
        async for finding in _comfyui(settings):
            yield finding
    if is_paid(settings.engine) or settings.runway_key:
        yield await _runway(settings)
        yield await _ledger(settings)


def require_machine(settings: Settings) -> None:
    """Checks what a worker needs before it takes a task: disk, ffmpeg, packages and, for Wan, weights and a GPU.

    Loads nothing. Raises EngineLost.
    """
    checks: list[Callable[[Settings], Finding]] = [lambda _: _disk(settings.temp_dir), lambda _: _ffmpeg()]
    checks += [lambda _: _extra(settings.engine, "FAIL")] if settings.engine in EXTRAS else []
    checks += NEEDS.get(settings.engine, ())
    for check in checks:
        finding = check(settings)
        if finding.verdict == "FAIL":
            raise EngineLost(f"{finding.name}: {finding.text}")


def _extra(extra: str, missing: Verdict) -> Finding:
    """Whether the packages of an extra are there, unimported; `missing` is the verdict where they are not."""
    package, use = EXTRAS[extra]
    if find_spec(package) is not None:
        return Finding(f"extra {extra}", "ok", use)
    return Finding(f"extra {extra}", missing, f"not installed; for {use}: pip install 'serverless-i2v[{extra}]'")


def _weights(settings: Settings) -> Finding:
    preset = PRESETS[settings.wan_preset]
    try:
        if not preset.built_here:
            weights.require(preset, settings.weights_dir)
    except I2VError as error:
        return Finding("weights", "FAIL", str(error))
    text = "built when first used" if preset.built_here else "all there; `i2v weights check` reads them through"
    return Finding("weights", "ok", f"{preset.name}: {text}")


def _gpu(settings: Settings) -> Finding:
    preset = PRESETS[settings.wan_preset]
    try:
        gpu = describe_gpu()
    except I2VError as error:
        return Finding("gpu", "FAIL", str(error))
    if gpu is None:
        text = f"torch finds no CUDA device; {preset.name} is made for {preset.gpu_memory_gb} GB"
        return Finding("gpu", "FAIL", text) if not preset.built_here else Finding("gpu", "ok", "none, none needed")
    name, memory_gb = gpu
    text = f"{name}, {memory_gb:.0f} GB"
    if memory_gb < preset.gpu_memory_gb:
        text += f"; {preset.name} is made for {preset.gpu_memory_gb} GB and will be slow: its weights come and go"
    return Finding("gpu", "ok", text)


def _compiled(settings: Settings) -> Finding:
    try:
        why = why_eager(settings)
    except I2VError as error:
        return Finding("compiled", "FAIL", str(error))
    if not why:
        return Finding("compiled", "ok", "the transformer runs compiled: that was done for this machine")
    if settings.wan_compile == "on":
        return Finding("compiled", "ok", f"the next start compiles, which takes minutes: {why}")
    return Finding("compiled", "skip", f"the transformer runs without compiling: {why}")


NEEDS: dict[EngineName, tuple[Callable[[Settings], Finding], ...]] = {"wan": (_weights, _gpu)}
"""Checks of the machine that only one engine needs."""


async def _comfyui(settings: Settings) -> AsyncIterator[Finding]:
    """The server, and whether it has what the operator's graph needs. Graphs that tasks bring say so when they come."""
    try:
        template = load_template(settings)
    except I2VError as error:
        template = None
        for line in str(error).splitlines():
            yield Finding("workflow", "FAIL", f"{line}; `i2v comfy check` says more")
    missing: list[str] = []
    try:
        async with ComfyApi(base_url(settings.comfy_host), patience_s=0) as api:
            stats = await api.system_stats()
            if template is not None:
                missing = await lacking(api, template.graph, template.filled)
    except I2VError as error:
        yield Finding("comfyui", "FAIL", f"{error}; see COMFY_HOST")
        return
    system = stats.get("system")
    version = system.get("comfyui_version", "") if isinstance(system, dict) else ""
    yield Finding("comfyui", "ok", f"ComfyUI {version} answers at {settings.comfy_host}".replace("  ", " "))
    for line in missing:
        yield Finding("workflow", "FAIL", f"ComfyUI lacks {line.removeprefix('no ')}")
    if template is not None and not missing:
        yield Finding("workflow", "ok", f"{settings.comfy_workflow}: ComfyUI has every node type and model of it")


async def _runway(settings: Settings) -> Finding:
    if settings.runway_key is None:
        return Finding("runway", "FAIL", "RUNWAYML_API_SECRET is not set: the engine needs a key of dev.runwayml.com")
    try:
        refuse_settings(settings.runway_model, settings.runway_ratio)
        async with RunwayApi(settings.runway_key.get_secret_value(), settings.runway_url) as api:
            balance = (await api.organization()).creditBalance
    except I2VError as error:
        return Finding("runway", "FAIL", str(error))
    text = f"{settings.runway_url} accepts the key; {balance:.0f} credits (${balance * USD_PER_CREDIT:.2f}) are left"
    return Finding("runway", "ok", text)


async def _ledger(settings: Settings) -> Finding:
    ledger = build_ledger(settings)
    try:
        await ledger.reserve("doctor", 0.0)
        await ledger.unreserve("doctor")
        spent_usd = await ledger.spent_usd()
    except I2VError as error:
        return Finding("ledger", "FAIL", f"{error}; set I2V_LEDGER to a file that can be written")
    return Finding(
        "ledger", "ok", f"${spent_usd:.2f} of ${settings.runway_budget_usd:.2f} today, in {settings.ledger_path}"
    )


def _photos() -> Finding:
    try:
        heic_reader()
    except I2VError as error:
        return Finding("photos", "FAIL", f"{error}, which are what iPhones send: pip install pillow-heif")
    return Finding("photos", "ok", "JPEG, PNG, WebP and HEIC are read")


def _ffmpeg() -> Finding:
    try:
        with tempfile.TemporaryDirectory(prefix="i2v-doctor-") as folder:
            path = Path(folder) / "test.mp4"
            with VideoWriter(path, width=64, height=64, fps=24) as writer:
                writer.write(np.zeros((64, 64, 3), np.uint8))
            info = probe(path)
        version = subprocess.run(  # noqa: S603 - the binary that imageio-ffmpeg ships
            [imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, text=True, check=True
        ).stdout.split()[2]
    except (I2VError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Finding("ffmpeg", "FAIL", str(error))
    return Finding("ffmpeg", "ok", f"{version}, writes {info.codec} {info.pix_fmt}")


def _disk(temp_dir: Path | None) -> Finding:
    folder = temp_dir or Path(tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            "disk", "FAIL", f"{folder} cannot be written: {error.strerror}; set TEMP_DIR to a folder that can"
        )
    text = f"{free_bytes / 1e9:.1f} GB free in {folder}"
    if free_bytes < ROOM_BYTES:
        return Finding("disk", "FAIL", f"{text}: less than {ROOM_BYTES / 1e9:g} GB; set TEMP_DIR to a roomier folder")
    return Finding("disk", "ok", text)


def _data(settings: Settings) -> Finding:
    """The folder of the embedded server, or where it would be made. Nothing is made but one file, for a moment.

    A default that cannot work is no failure: a machine that only has a worker needs no such folder.
    """
    folder = settings.data_dir.absolute()
    wrong: Verdict = "FAIL" if "data_dir" in settings.model_fields_set or folder.exists() else "skip"
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            raise NotADirectoryError(0, f"{there} is a file")
        with tempfile.TemporaryFile(dir=there):
            free_bytes = shutil.disk_usage(there).free
        for kept in (folder / "queue.db", folder / "signing.key", folder / "objects") if there == folder else ():
            if kept.exists() and not os.access(kept, os.R_OK | os.W_OK, effective_ids=EFFECTIVE_IDS):
                raise PermissionError(0, f"{kept.name} in it belongs to {_owner_of(kept)}")
    except OSError as error:
        text = f"{folder} cannot be used: {error.strerror}; `i2v up` and `serve` keep the queue there"
        return Finding("data", wrong, f"{text}; set I2V_DATA_DIR to a folder that can")
    text = (
        f"{free_bytes / 1e9:.1f} GB free for {folder}{'' if there == folder else ', which `i2v up` or `serve` makes'}"
    )
    if free_bytes < ROOM_BYTES:
        return Finding(
            "data", wrong, f"{text}: less than {ROOM_BYTES / 1e9:g} GB; set I2V_DATA_DIR to a roomier folder"
        )
    if there == folder and sys.platform != "win32" and folder.stat().st_uid != os.geteuid():
        text += f"; it belongs to {_owner_of(folder)}"
    return Finding("data", "ok", text)


def _owner_of(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):  # an id without a name, as in containers
        return f"user {path.stat().st_uid}"


def _redis(url: str) -> Finding:
    try:
        found = try_out(url)
    except SettingsError as error:
        return Finding("redis", "FAIL", str(error))
    except Away as error:
        return Finding("redis", "FAIL", f"REDIS_URL: {error}; without it live progress stays in this process")
    return Finding("redis", "ok", f"{found} takes events and gives them back")


async def _queue(settings: Settings) -> Finding:
    if not settings.queue_url:
        name = names_of(Settings.model_fields[QUEUE_URL_FIELDS[settings.queue]])[0]
        return Finding("queue", "skip", f"{name} is not set; not needed for `i2v demo`, `render`, `serve` and `up`")
    try:
        async with open_queue(settings) as queue:
            left_open = await queue.check()
            storage = await queue.check_storage()
    except I2VError as error:
        return Finding("queue", "FAIL", str(error))
    leads_to = f"its storage is {storage}" if storage else "its storage cannot be checked without a task"
    if left_open:
        return Finding("queue", "ok", f"{settings.queue_url} answers; {left_open}")
    return Finding("queue", "ok", f"{settings.queue_url} answers and accepts the key; {leads_to}")


def _delivery(settings: Settings) -> Finding:
    """Where videos go, for a queue that has no storage of its own."""
    try:
        bucket = bucket_of(settings)
    except I2VError as error:
        return Finding("delivery", "FAIL", str(error))
    if bucket is not None:
        return Finding(
            "delivery", "ok", f"videos go to the bucket {bucket.name} at {bucket.origin}; nothing was stored"
        )
    room_kb = settings.webhook_bytes * 3 // 4 // 1000
    return Finding(
        "delivery",
        "skip",
        f"no bucket: a video of more than {room_kb} kB fails its task. Set BUCKET_ENDPOINT_URL and the others, or "
        "raise BODY_SIZE_LIMIT in the application and I2V_WEBHOOK_BYTES here",
    )
