"""What a bench needs, looked at before it starts: an hour in, or on a machine lent by the minute, it is too late."""

import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {"torch": "wan", "diffusers": "wan", "transformers": "wan", "imageio": "bench", "peft": "bench"}
"""Packages, and the extra of pyproject.toml that installs each."""


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


def end_if(lacking: list[str]) -> None:
    """Ends the process, saying what it lacks, unless it lacks nothing."""
    if lacking:
        sys.exit("This bench cannot start here:\n" + "\n".join(f"  {line}" for line in lacking))
