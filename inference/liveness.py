"""Signs of life of the workers on this box: a file each, which the worker's own loop touches, and what they show.

The files are in a folder of this user below the system's temporary one, whatever a worker's settings are, so that
`i2v health` finds them without reading settings; and they are locked for as long as their worker lives, so that what
a killed one left counts for nothing. No thread of its own touches them: it would go on when the loop does not.

This module is what a health check runs every 30 s on each box, so it imports little.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from inference import private

LIMIT_S = 60.0
"""A worker whose loop did not turn for so long hangs. It turns every second, whatever its tasks are doing; what keeps
it longer than some seconds, such as a machine that swaps, is no state to take tasks in."""

SUFFIX = ".alive"


def folder() -> Path:
    """Where the signs are: TMPDIR, or the system's temporary folder."""
    name = "i2v-workers" if sys.platform == "win32" else f"i2v-workers-{os.getuid()}"
    return Path(tempfile.gettempdir()) / name


class Sign:
    """The sign of one worker that lives."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def touch(self) -> None:
        """Says that the loop turned just now. A file that somebody removed is not made again, and is missed."""
        with suppress(OSError):
            os.utime(self._path)


@contextmanager
def shown(worker_id: str) -> Iterator[Sign]:
    """The sign of this process's worker for the length of a block; clears away those of workers that are gone.

    Raises OSError where none can be made, or where the folder belongs to another user.
    """
    try:
        path, lock = _made(worker_id)
    except FileNotFoundError:  # a worker that ended took the folder along just now
        path, lock = _made(worker_id)
    try:
        yield Sign(path)
    finally:
        path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
        with suppress(OSError):  # others are there
            path.parent.rmdir()


def _made(worker_id: str) -> tuple[Path, int | None]:
    """A new sign, and its lock. Raises OSError."""
    signs = folder()
    private.make_folder(signs, f"*{SUFFIX}")
    if sys.platform != "win32" and (signs.is_symlink() or signs.stat().st_uid != os.getuid()):
        raise PermissionError(f"{signs} belongs to another user")
    _clear_away(signs)
    descriptor, name = tempfile.mkstemp(prefix=f".{worker_id.strip('.')}.", suffix=SUFFIX, dir=signs)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"worker_id": worker_id, "pid": os.getpid()}, file)
    new = Path(name)
    # It gets its name only once it is locked, or another worker could take it for one that was left.
    lock = private.hold(new)
    return new.rename(new.with_name(new.name.removeprefix("."))), lock


def _clear_away(signs: Path) -> None:
    """Removes the signs of workers that are gone."""
    for left in signs.glob(f"[!.]*{SUFFIX}"):  # those that are being made begin with a dot
        with suppress(OSError):
            lock = private.hold(left)
            if lock is not None:
                left.unlink()
                os.close(lock)


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker that runs here."""

    worker_id: str
    pid: int
    silent_s: float  # since its loop turned


def workers() -> list[Seen]:
    """Every worker of this user that runs on this box, by name."""
    found = []
    for path in folder().glob(f"[!.]*{SUFFIX}"):
        try:
            lock = private.hold(path, shared=True)
            if lock is not None:  # nobody holds it: its worker was killed
                os.close(lock)
                continue
            said = json.loads(path.read_text())
            silent_s = max(0.0, time.time() - path.stat().st_mtime)
        except (OSError, ValueError):  # it ended meanwhile
            continue
        found.append(Seen(str(said["worker_id"]), int(said["pid"]), silent_s))
    return sorted(found, key=lambda it: (it.worker_id, it.pid))


def faults(worker_id: str | None, limit_s: float) -> list[str]:
    """What is wrong, a line each; none where the worker of that name, or every one here, turned within the limit."""
    here = [it for it in workers() if worker_id in {None, it.worker_id}]
    if not here:
        return [f"no worker{'' if worker_id is None else f' {worker_id}'} runs here: there is no sign in {folder()}"]
    return [
        f"worker {it.worker_id} (process {it.pid}) hangs: its loop has not turned for {it.silent_s:.0f} s, "
        f"the limit is {limit_s:g} s"
        for it in here
        if it.silent_s > limit_s
    ]


def end_hung(worker_id: str | None, limit_s: float, *, pause_s: float = 3.0) -> None:
    """Ends the workers that hang now and still do after a pause: a clock that was set looks like a silence at first.

    By SIGABRT, at which a Python that has its fault handler enabled tells what each of its threads was doing.
    """
    time.sleep(pause_s)
    for it in workers():
        if worker_id in {None, it.worker_id} and it.silent_s > limit_s:
            with suppress(ProcessLookupError):
                os.kill(it.pid, signal.SIGABRT)
                if sys.platform != "win32":
                    os.kill(it.pid, signal.SIGCONT)  # one that is stopped does not end before it goes on
