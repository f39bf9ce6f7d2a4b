"""Checks a deployment on Modal before it is made: one line a check."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from pathlib import Path

import anyio.to_thread

from inference.doctor import Finding, unread
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

LACKING = """
import json, sys, modal
name, *keys = sys.argv[1:]
lacking = {}
for key in keys:
    try:
        modal.Secret.from_name(name, required_keys=[key]).hydrate()
    except modal.exception.Error as error:
        lacking[key] = str(error)
print(json.dumps(lacking))
"""
"""Asks for each key whether the secret has it: Modal tells nobody the values, and its command line no keys either."""

RUNWAY_KEY = "RUNWAYML_API_SECRET"
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
    for finding in unread(settings):
        yield finding
    yield _gpu(settings)
    missing = [name for name in ("app.py", "images", "inference", "pyproject.toml") if not (folder / name).exists()]
    text = f"{', '.join(missing)} not here: run this, and `modal deploy app.py`, in a clone" if missing else "all here"
    yield Finding("files", "FAIL" if missing else "ok", text)
    if find_spec("modal") is None:
        yield Finding("modal", "FAIL", "its client is not installed: pip install 'serverless-i2v[modal]'")
        return
    account = await anyio.to_thread.run_sync(_account, settings)
    yield account
    if account.verdict == "ok":
        for finding in await anyio.to_thread.run_sync(_secret, settings):
            yield finding


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


def _modal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with Modal's client in a process of its own, so that this package does not import modal.

    Raises OSError, TimeoutExpired.
    """
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], capture_output=True, text=True, timeout=CLI_LIMIT_S, check=False
    )


def _account(settings: Settings) -> Finding:
    try:
        said = _modal("-m", "modal", "secret", "list", "--json")
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


def _secret(settings: Settings) -> list[Finding]:
    """Which keys the secret lacks, and whether Runway's is in both places: in the secret, and where one deploys."""
    keys = deployment.keys_of(settings)
    try:
        lacking = json.loads(_modal("-c", LACKING, settings.modal_app, *dict.fromkeys([*keys, RUNWAY_KEY])).stdout)
        unknown = [error for key, error in lacking.items() if key not in error]  # a refusal names the key
    except (OSError, subprocess.TimeoutExpired, ValueError, AttributeError, TypeError) as error:
        lacking, unknown = {}, [str(error)]
    if unknown:
        reason = one_line(unknown[0], MAX_REASON_CHARS)
        return [Finding("secret", "skip", f"`modal deploy` will say whether {', '.join(keys)} are there: {reason}")]
    missing = [key for key in keys if key in lacking]
    # Modal has no command that adds a key to a secret.
    text = (
        f"add {', '.join(missing)} to {settings.modal_app} on modal.com/secrets"
        if missing
        else f"has {', '.join(keys)}"
    )
    return [
        Finding("secret", "FAIL" if missing else "ok", text),
        _runway(settings, in_secret=RUNWAY_KEY not in lacking),
    ]


def _runway(settings: Settings, *, in_secret: bool) -> Finding:
    """One key in two places: whoever deploys needs it, so that there are containers for Runway, and they to pay."""
    match settings.runway_key is not None, in_secret:
        case True, True:
            return Finding(
                "runway",
                "ok",
                f"{RUNWAY_KEY} is set here and in the secret: up to "
                f"{settings.runway_concurrency} clips at once, ${settings.runway_budget_usd:g} a day",
            )
        case True, False:
            text = f"{RUNWAY_KEY} is set here and not in the secret {settings.modal_app}: containers could not pay"
            return Finding("runway", "FAIL", text)
        case False, True:
            text = f"{RUNWAY_KEY} is in the secret and not set here: nothing would go to Runway; set it here or in .env"
            return Finding("runway", "FAIL", f"{text}, or take it out of the secret")
    return Finding("runway", "skip", f"nothing goes there: {RUNWAY_KEY} is neither set here nor in the secret")
