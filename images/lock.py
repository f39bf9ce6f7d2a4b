"""Exact versions of what the images install: `pip install uv`, then `python -m images.lock` writes the files anew.

    slim.txt     base, push, redis     the cron, calls and Runway, on Modal
    wan.txt      the same, and wan     GPU containers on Modal
    runpod.txt   the same, and runpod  workers on RunPod
    worker.txt   base, server, comfyui, redis, yaml   a worker or a queue on any box, without a model

Compiled from the ranges of pyproject.toml, each within those before it, so that all have the same version of
everything.
Each is complete, with the sha256 of every wheel that fits the base image, so that the locked files are installed from
whichever index. Wheels of other platforms are left out, because they would be nine lines of ten.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from images import PYPROJECT, lock_of

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "runpod": ("wan", "push", "redis", "runpod"),
    "wan": ("wan", "push", "redis"),
    "slim": ("push", "redis"),
    "worker": ("server", "comfyui", "redis", "yaml"),
}
"""Of each image, the largest first."""

PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_36"
"""Of the base image; 2.36 is the C library of bookworm."""


def compiled(image: str, limits: Sequence[Path]) -> str:
    """The contents of an image's file, with no other version of a package than `limits` have.

    Raises subprocess.CalledProcessError where nothing fits.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "pylock.toml"
        command = [shutil.which("uv") or "uv", "pip", "compile", str(PYPROJECT), "--quiet", "--no-config"]
        command += ["--format", "pylock.toml", "--output-file", str(found)]
        command += ["--python-version", PYTHON, "--python-platform", PLATFORM, "--no-build"]  # wheels or nothing
        command += [f"--extra={extra}" for extra in EXTRAS[image]]
        command += [f"--constraints={path}" for path in limits]
        subprocess.run(command, check=True)  # noqa: S603 - uv, with names from above
        packages = tomllib.loads(found.read_text())["packages"]
    return "\n".join(["# Written by `python -m images.lock`.", *_lines(packages)]) + "\n"


def _lines(packages: list[dict[str, Any]]) -> Iterator[str]:
    for package in packages:
        yield f"{package['name']}=={package['version']} \\"
        digests = sorted({wheel["hashes"]["sha256"] for wheel in package["wheels"]})
        yield " \\\n".join(f"    --hash=sha256:{digest}" for digest in digests)


def main() -> None:
    """Writes every file."""
    limits: list[Path] = []
    for image in EXTRAS:
        path = lock_of(image)
        path.write_text(compiled(image, limits))
        sys.stdout.write(f"{path.name}: {path.read_text().count('==')} packages\n")
        limits.append(path)


if __name__ == "__main__":
    main()
