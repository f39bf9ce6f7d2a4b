"""Temporary folders that do not outlive their process: removed at the end, or by the next worker after a SIGKILL."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference import private
from inference.errors import DiskFull, write_error

PREFIX = "i2v-lease-"

MIN_FREE_BYTES = 200_000_000
"""Work begins only with this much room: a photo of 50 MB and a clip of 60 s have to fit, and other processes write to
the same disk."""


def require_room(parent: Path | None = None) -> None:
    """Raises DiskFull where work could not begin, NotWritable where that cannot be known."""
    try:
        free_bytes = shutil.disk_usage(parent or tempfile.gettempdir()).free
    except OSError as error:
        told = f"the temporary folder cannot be looked at: {error.strerror}; set TEMP_DIR to another place"
        raise write_error(error, told) from None
    if free_bytes < MIN_FREE_BYTES:
        raise DiskFull(
            f"only {free_bytes / 1e6:.0f} MB are free for temporary files; free some, or set TEMP_DIR elsewhere"
        )


@contextmanager
def scratch_folder(parent: Path | None = None, *, keep: bool = False) -> Iterator[Path]:
    """A folder for one lease, removed afterwards unless `keep`. Raises DiskFull, NotWritable where none can be made.

    The process holds a lock on the folder for as long as it lives, so `sweep` can tell which folders are left over.
    """
    lock = None
    try:
        require_room(parent)
        # The folder gets its final name only once it is locked, or a sweep could take it for a left-over one.
        new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        folder = new.with_name(new.name.removeprefix("."))
        with suppress(OSError):  # there are no locks, so no sweep removes it
            lock = private.hold(new)
        new.rename(folder)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        told = f"no temporary folder can be made: {error.strerror}; set TEMP_DIR to another place"
        raise write_error(error, told) from None
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def put(path: Path, data: bytes) -> None:
    """Writes a temporary file. Raises DiskFull, NotWritable."""
    try:
        path.write_bytes(data)
    except OSError as error:
        told = f"{len(data) / 1e6:.1f} MB cannot be written to {path.parent}: {error.strerror}"
        raise write_error(error, told) from None


def sweep(parent: Path | None = None) -> int:
    """Removes the folders that killed processes left in `parent`; returns how many."""
    removed = 0
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):  # folders still being made begin with a dot
        with suppress(OSError):  # the folder belongs to another user, or was removed meanwhile
            lock = private.hold(folder)
            if lock is None:  # in use; or on Windows, where left-over folders stay until the system clears them
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed += 1
    return removed
