"""Container images: one module an image for Modal, one Dockerfile an image for RunPod and for any box, and beside each
the versions it installs.

`fetch.py` and `bake.py` are steps of RunPod's Dockerfile. Modal's steps are in `inference/on_modal/bake.py`.
pyproject.toml has the ranges; `python -m images.lock` chooses versions from them for `<image>.txt`.
"""

from pathlib import Path

import modal

from inference.settings import Settings

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
BASE = "python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c"
"""Python and nothing else: the torch wheels bring their CUDA libraries, imageio-ffmpeg brings ffmpeg."""


def lock_of(image: str) -> Path:
    """The file with the exact versions that an image installs."""
    return Path(__file__).with_name(f"{image}.txt")


def with_packages(image: modal.Image, name: str) -> modal.Image:
    """Installs what the file of the image `name` lists. The file is complete, so pip resolves nothing."""
    return image.pip_install_from_requirements(str(lock_of(name)), extra_options="--no-deps")


def with_code(image: modal.Image, settings: Settings) -> modal.Image:
    """Adds what changes most often: first the settings, then the code, which is mounted and not a layer."""
    given = settings.for_containers()
    return (image.env(given) if given else image).add_local_python_source("inference", "images")
