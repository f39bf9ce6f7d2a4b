"""The image without a model, for the scheduler, Runway and single runs. Starts in seconds."""

import modal

from images import BASE, with_code, with_packages
from inference.settings import Settings


def slim_image(settings: Settings) -> modal.Image:
    """Base install, then settings and code."""
    return with_code(with_packages(modal.Image.from_registry(BASE), "slim"), settings)
