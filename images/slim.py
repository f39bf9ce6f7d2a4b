"""The image without a model: the cron, Runway, and what a person runs by hand. Starts in seconds."""

import modal

from images import BASE, PYPROJECT, with_code
from inference.settings import Settings


def slim_image(settings: Settings) -> modal.Image:
    """Base install and HEIC, then settings and code."""
    packages = modal.Image.from_registry(BASE).pip_install_from_pyproject(
        str(PYPROJECT), optional_dependencies=["heic"]
    )
    return with_code(packages, settings)
