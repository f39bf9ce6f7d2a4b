"""What is installed with an extra, asked for in words where it is missing."""

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
