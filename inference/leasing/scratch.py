"""Temporary folders that do not outlive their process: removed at the end, or by the next worker after a SIGKILL."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference.errors import DiskFull

if sys.platform != "win32":
    import fcntl

PREFIX = "i2v-lease-"

MIN_FREE_BYTES = 200_000_000
"""Less is not worth beginning with: a photo of 50 MB and a clip of 60 s have to fit, and others write there too."""


@contextmanager
def scratch_folder(parent: Path | None = None, *, keep: bool = False) -> Iterator[Path]:
    """A folder for one lease. Raises DiskFull where none can be made; `keep` leaves it for a look.

    Its owner holds a lock on it for as long as it lives, which is how `sweep` knows the folders of the dead.
    """
    lock = None
    try:
        free_bytes = shutil.disk_usage(parent or tempfile.gettempdir()).free
        if free_bytes < MIN_FREE_BYTES:
            raise DiskFull(
                f"only {free_bytes / 1e6:.0f} MB are free for temporary files; free some, or set TEMP_DIR elsewhere"
            )
        # Under another name until it is locked, or a sweep could take it for one that is left over.
        new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        folder = new.with_name(new.name.removeprefix("."))
        lock = _lock(new)
        new.rename(folder)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        raise DiskFull(f"no temporary folder can be made: {error.strerror}; set TEMP_DIR to another place") from None
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def put(path: Path, data: bytes) -> None:
    """Writes a temporary file. Raises DiskFull."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise DiskFull(f"{len(data) / 1e6:.1f} MB cannot be written to {path.parent}: {error.strerror}") from None


def sweep(parent: Path | None = None) -> int:
    """Removes the folders that killed processes left in `parent`; returns how many."""
    removed = 0
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):  # not those still being made
        with suppress(OSError):  # somebody else's, or gone by now
            lock = _lock(folder)
            if lock is None:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed += 1
    return removed


def _lock(folder: Path) -> int | None:
    """Locks a folder for as long as the descriptor is open; None where somebody else has."""
    if sys.platform == "win32":
        return None  # no such locks: what killed processes leave stays until the system clears it
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
