"""What a bench needs, looked at before it starts: an hour in, or on a machine lent by the minute, it is too late."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {"torch": "wan", "diffusers": "wan", "transformers": "wan", "imageio": "bench", "peft": "bench"}
"""Packages, and the extra of pyproject.toml that installs each."""


IMPORTED = ("torch", "diffusers", "transformers")
"""Without these nothing can be counted either."""


def packages(names: Iterable[str] = EXTRAS) -> list[str]:
    """What is to be installed, one line; nothing where all is there. Imports none of it."""
    lacking = [name for name in names if find_spec(name) is None]
    if not lacking:
        return []
    extras = ",".join(sorted({EXTRAS[name] for name in lacking}))
    return [f"{', '.join(lacking)} not installed: pip install '.[{extras}]'"]


def room(folder: Path, needed_gb: float, what: str) -> list[str]:
    """Whether a folder can be written and has room for so much."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return [f"{folder} cannot be written ({error.strerror}): {what} go there"]
    if free_gb < needed_gb:
        return [f"{folder} has {free_gb:.1f} GB free: {what} need {needed_gb:.1f}; set TMPDIR to a larger disk"]
    return []


def gpu(shapes: Iterable[str], needed_gb: float, instead: str) -> list[str]:
    """Whether there is a CUDA device with so much free memory, where `shapes` need one. Imports torch."""
    import torch

    wanted = ", ".join(shapes)
    if not wanted:
        return []
    if not torch.cuda.is_available():
        return [f"{wanted} needs a CUDA device, and torch {torch.__version__} finds none: {instead} does not"]
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    if free_gb < needed_gb:
        return [
            f"{wanted} needs {needed_gb:.0f} GB of GPU memory, {free_gb:.0f} are free: nvidia-smi says who has them"
        ]
    return []


def compiler() -> list[str]:
    """Whether torch.compile can work here: Triton builds a launcher with a C compiler and Python's headers."""
    lacking = []
    given = os.environ.get("CC", "")
    if not any(map(shutil.which, filter(None, (given, "gcc", "clang")))):
        lacking.append("no C compiler, which torch.compile needs on a GPU: apt-get install gcc, or set CC")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        lacking.append(f"no {headers}, which torch.compile needs on a GPU: apt-get install python3-dev")
    if find_spec("triton") is None:
        lacking.append("triton not installed, which torch.compile needs on a GPU: torch's CUDA wheels bring it")
    return lacking


def time(budget_s: float, least_s: float) -> list[str]:
    """Whether the budget is enough for anything."""
    if budget_s >= least_s:
        return []
    return [f"a budget of {budget_s:.0f} s, and the first comparison needs {least_s:.0f}: raise --budget-s"]


def end_if(lacking: list[str]) -> None:
    """Ends the process, saying what it lacks, unless it lacks nothing."""
    if lacking:
        sys.exit("This bench cannot start here:\n" + "\n".join(f"  {line}" for line in lacking))
