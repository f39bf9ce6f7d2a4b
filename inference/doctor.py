"""Checks whether this machine has everything that a worker needs: one line a check."""

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import anyio.to_thread
import imageio_ffmpeg
import numpy as np

from inference.build import build_ledger, choose_engine, describe_gpu, engine_note, open_queue
from inference.engines.runway.models import USD_PER_CREDIT, refuse_settings
from inference.engines.runway.wire import RunwayApi
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS
from inference.errors import EngineLost, I2VError
from inference.media.video import VideoWriter, probe
from inference.providers import EngineName, is_paid
from inference.settings import Settings

ROOM_BYTES = 1_000_000_000
"""Room for the temporary files of a few tasks: photos up to 50 MB, videos far smaller."""


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
        settings = choose_engine(settings) if settings.api_url else settings
    except I2VError as error:
        for line in str(error).splitlines():
            yield Finding("settings", "FAIL", line)
    else:
        for name in settings.unread():
            yield Finding("settings", "skip", f"nothing reads {name}")
        yield Finding("settings", "ok", f"worker {settings.worker_id}, engine {engine_note(settings)}")
        for check in NEEDS.get(settings.engine, ()):
            yield await anyio.to_thread.run_sync(check, settings)
        if is_paid(settings.engine) or settings.runway_key:
            yield await _runway(settings)
            yield await _ledger(settings)
    yield await anyio.to_thread.run_sync(_ffmpeg)
    yield await anyio.to_thread.run_sync(_disk, settings.temp_dir if settings else None)
    yield await _queue(settings)
    for package, extra, use in (
        ("fastapi", "server", "the embedded queue"),
        ("pillow_heif", "heic", "HEIC photos"),
        ("diffusers", "wan", "the Wan engine"),
    ):
        here = find_spec(package) is not None
        text = use if here else f"not installed; for {use}: pip install 'serverless-i2v[{extra}]'"
        yield Finding(f"extra {extra}", "ok" if here else "skip", text)


def require_machine(settings: Settings) -> None:
    """Checks what a worker needs before it takes a task: disk, ffmpeg and, for Wan, weights and a GPU. Loads nothing.

    Raises EngineLost.
    """
    checks = (lambda _settings: _disk(settings.temp_dir), lambda _settings: _ffmpeg(), *NEEDS.get(settings.engine, ()))
    for check in checks:
        finding = check(settings)
        if finding.verdict == "FAIL":
            raise EngineLost(f"{finding.name}: {finding.text}")


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


NEEDS: dict[EngineName, tuple[Callable[[Settings], Finding], ...]] = {"wan": (_weights, _gpu)}
"""Checks of the machine that only one engine needs."""


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


async def _queue(settings: Settings | None) -> Finding:
    if settings is None:
        return Finding("queue", "skip", "settings first")
    if not settings.api_url:
        return Finding(
            "queue", "skip", "VERCEL_API_URL is not set; not needed for `i2v demo`, `render`, `serve` and `up`"
        )
    try:
        async with open_queue(settings) as queue:
            await queue.check()
            storage = await queue.check_storage()
    except I2VError as error:
        return Finding("queue", "FAIL", str(error))
    leads_to = f"its storage is {storage}" if storage else "its storage cannot be checked without a task"
    return Finding("queue", "ok", f"{settings.api_url} answers and accepts the key; {leads_to}")
