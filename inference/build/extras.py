"""What is installed with an extra: asked for in words where it is missing, imported at less cost where it is large."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from inference.errors import SettingsError


@contextmanager
def needing_extra(extra: str, what: str) -> Iterator[None]:
    """Says what to install where an import in the block fails. Raises SettingsError."""
    try:
        yield
    except ImportError as error:
        raise SettingsError(f"{what} needs an extra: pip install 'serverless-i2v[{extra}]' ({error})") from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the collection of garbage while the block imports large libraries, once in the life of a process.

    What torch and diffusers make then, some 600,000 objects, stays as long as the process does. Looking at it again and
    again took a seventh of the time of their import. Afterwards all that exists is left out of collections for good, or
    the next one would look at it after all.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
