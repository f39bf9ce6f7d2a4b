"""Container images: one module an image. Versions come from the extras of pyproject.toml, the one list of them."""

from pathlib import Path

import modal

from inference.settings import Settings

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
BASE = "python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c"
"""Python and nothing else: the torch wheels bring their CUDA libraries, imageio-ffmpeg brings ffmpeg."""


def with_code(image: modal.Image, settings: Settings) -> modal.Image:
    """What changes most often comes last: what the operator set, then the code, which is no layer at all."""
    given = settings.for_containers()
    return (image.env(given) if given else image).add_local_python_source("inference", "images")
