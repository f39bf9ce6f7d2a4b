"""Checks a deployment on Modal before it is made: one line a check."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from pathlib import Path

import anyio.to_thread

from inference.doctor import Finding
from inference.engines.wan.presets import PRESETS
from inference.errors import I2VError, one_line
from inference.on_modal import deployment
from inference.providers import DEFAULT
from inference.settings import Settings

GPU_MEMORY_GB = {
    "T4": 16, "L4": 24, "A10": 24, "A10G": 24, "A100": 40, "A100-40GB": 40, "A100-80GB": 80, "L40S": 48,
    "RTX-PRO-6000": 96, "H100": 80, "H100!": 80, "H200": 141, "B200": 192, "B200+": 192,
}  # fmt: skip
"""Of the GPUs that Modal lists (https://modal.com/docs/guide/gpu, 2026-11)."""

CLI_LIMIT_S = 15
MAX_REASON_CHARS = 300


async def examine_modal(load: Callable[[], Settings], folder: Path) -> AsyncIterator[Finding]:
    """Checks settings, GPU, files, package, account and secret, cheapest first. `folder` is where app.py is."""
    try:
        settings = load()
        deployment.refuse_deployment(settings)
    except I2VError as error:
        for line in str(error).splitlines():
            yield Finding("deployment", "FAIL", line)
        return
    gpus = deployment.on_modal(settings).sizes[DEFAULT.pool].engines
    yield Finding(
        "deployment",
        "ok",
        f"app {settings.modal_app}, up to {gpus} containers with {settings.modal_gpu} at once",
    )
    yield _gpu(settings)
    missing = [name for name in ("app.py", "images", "inference", "pyproject.toml") if not (folder / name).exists()]
    text = f"{', '.join(missing)} not here: run this, and `modal deploy app.py`, in a clone" if missing else "all here"
    yield Finding("files", "FAIL" if missing else "ok", text)
    if find_spec("modal") is None:
        yield Finding("modal", "FAIL", "its client is not installed: pip install 'serverless-i2v[modal]'")
        return
    yield await anyio.to_thread.run_sync(_account, settings)


def _gpu(settings: Settings) -> Finding:
    preset = PRESETS[settings.wan_preset]
    memory_gb = GPU_MEMORY_GB.get(settings.modal_gpu.partition(":")[0].upper())
    if memory_gb is None:
        return Finding(
            "gpu", "skip", f"{settings.modal_gpu} is not known here; {preset.name} needs {preset.gpu_memory_gb} GB"
        )
    text = f"{settings.modal_gpu} has {memory_gb} GB, {preset.name} is made for {preset.gpu_memory_gb} GB"
    if memory_gb < preset.gpu_memory_gb:
        return Finding("gpu", "FAIL", f"{text}: weights would come and go, and every clip cost several times as much")
    return Finding("gpu", "ok", text)


def _account(settings: Settings) -> Finding:
    """Asks through Modal's command line, so that this package does not import modal."""
    try:
        said = subprocess.run(
            [sys.executable, "-m", "modal", "secret", "list", "--json"],
            capture_output=True,
            text=True,
            timeout=CLI_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("modal", "FAIL", f"no answer: {one_line(str(error), MAX_REASON_CHARS)}")
    if said.returncode:
        reason = one_line(said.stderr or said.stdout, MAX_REASON_CHARS)
        return Finding("modal", "FAIL", f"no account is set up here, or Modal does not answer (modal setup): {reason}")
    try:
        names = {name for each in json.loads(said.stdout) for key, name in each.items() if key.lower() == "name"}
    except (ValueError, AttributeError):
        return Finding("modal", "skip", "the account answers, in words this version does not know")
    if settings.modal_app not in names:
        keys = " ".join(f"{key}=…" for key in deployment.keys_of(settings))
        create = f"modal secret create {settings.modal_app} {keys}"
        return Finding("modal", "FAIL", f"the account has no secret {settings.modal_app}: {create}")
    return Finding("modal", "ok", f"the account answers and has the secret {settings.modal_app}")
