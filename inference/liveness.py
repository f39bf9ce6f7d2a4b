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

SECOND_LOOK_S = 10.0
"""A worker that looks as if it hung is ended only if its loop does not turn once within this time, either. A clock that
was set, or a machine that slept, looks like a silence at first."""

SUFFIX = ".alive"


def folder() -> Path:
    """Where the signs are: in TMPDIR, or in /tmp."""
    if sys.platform == "win32":
        return Path(tempfile.gettempdir()) / "i2v-workers"
    # `tempfile` would write there to find out, and name another place than the worker's once the disk is full.
    given = os.environ.get("TMPDIR", "")
    return Path(given if os.path.isdir(given) else "/tmp").absolute() / f"i2v-workers-{os.getuid()}"  # noqa: PTH112, S108


class Sign:
    """The sign of one worker that lives."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self._path, self._lock = path, lock

    def touch(self) -> None:
        """Says that the loop turned just now. Raises OSError, also where somebody removed the file."""
        os.utime(self._path)

    def withdraw(self) -> None:
        """Shows no worker any more."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)  # a file that could not be removed counts for nothing without its lock
            self._lock = None
        with suppress(OSError):  # others are there
            self._path.parent.rmdir()


@contextmanager
def shown(worker_id: str) -> Iterator[Sign]:
    """The sign of this process's worker for the length of a block; clears away those of workers that are gone.

    Raises OSError where none can be made, where the folder belongs to another user, or has no locks.
    """
    try:
        sign = _made(worker_id)
    except FileNotFoundError:  # a worker that ended took the folder along just now
        sign = _made(worker_id)
    try:
        yield sign
    finally:
        sign.withdraw()


def _made(worker_id: str) -> Sign:
    """A new sign. Raises OSError."""
    signs = folder()
    private.make_folder(signs, f"*{SUFFIX}")
    if not _is_ours(signs):
        raise PermissionError(f"{signs} belongs to another user")
    _clear_away(signs)
    descriptor, name = tempfile.mkstemp(prefix=f".{worker_id.strip('.')}.", suffix=SUFFIX, dir=signs)
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"worker_id": worker_id, "pid": os.getpid(), "pid_namespace": _pid_namespace()}, file)
        # It gets its name only once it is locked, or another worker could take it for one that was left.
        lock = private.hold(new)
        return Sign(new.rename(new.with_name(new.name.removeprefix("."))), lock)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _is_ours(signs: Path) -> bool:
    """Whether the folder is this user's. Its name is known to everybody, and the temporary folder is everybody's."""
    return sys.platform == "win32" or (not signs.is_symlink() and signs.stat().st_uid == os.getuid())


def _pid_namespace() -> str:
    """Where numbers of processes mean the same: a container has numbers of its own. Empty where Linux does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path, but a name such as pid:[4026531836]
    except OSError:
        return ""


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
    sign: Path
    turned_ns: int  # when its loop turned, by the clock of the machine
    silent_s: float  # since then


def workers(worker_id: str | None = None) -> list[Seen]:
    """Every worker of this user that runs on this box, or in this container, by name; or only those of one name."""
    found = []
    try:
        signs = [*folder().glob(f"[!.]*{SUFFIX}")] if _is_ours(folder()) else []
    except OSError:  # there is no folder
        signs = []
    for path in signs:
        try:
            lock = private.hold(path, shared=True)
            if lock is not None:  # nobody holds it: its worker was killed
                os.close(lock)
                continue
            said = json.loads(path.read_text())
            whose, pid, namespace = said["worker_id"], said["pid"], said["pid_namespace"]
            turned_ns = path.stat().st_mtime_ns
        except (OSError, ValueError, KeyError):  # it ended meanwhile, or is of another version
            continue
        # Containers may share the folder. The number of a process in one is that of another process in the next.
        if namespace == _pid_namespace() and worker_id in {None, whose}:
            silent_s = max(0.0, (time.time_ns() - turned_ns) / 1e9)
            found.append(Seen(whose, pid, path, turned_ns, silent_s))
    return sorted(found, key=lambda it: (it.worker_id, it.pid))


def faults(worker_id: str | None, limit_s: float) -> list[str]:
    """What is wrong, a line each; none where the worker of that name, or every one here, turned within the limit."""
    here = workers(worker_id)
    if not here:
        return [f"no worker{'' if worker_id is None else f' {worker_id}'} runs here: there is no sign in {folder()}"]
    return [
        f"worker {it.worker_id} (process {it.pid}) hangs: its loop has not turned for {it.silent_s:.0f} s, "
        f"the limit is {limit_s:g} s"
        for it in here
        if it.silent_s > limit_s
    ]


def end_hung(worker_id: str | None, limit_s: float, *, pause_s: float = SECOND_LOOK_S) -> None:
    """Ends the workers that hang now, and whose loop does not turn once within a pause.

    By SIGABRT, at which a Python that has its fault handler enabled tells what each of its threads was doing.
    """
    if sys.platform == "win32":  # without locks, a sign may be that of a worker that is gone, and its number another's
        return
    silent = {it.sign: it.turned_ns for it in workers(worker_id) if it.silent_s > limit_s}
    time.sleep(pause_s)
    for it in workers(worker_id):
        if silent.get(it.sign) == it.turned_ns:
            with suppress(ProcessLookupError):
                os.kill(it.pid, signal.SIGABRT)
                os.kill(it.pid, signal.SIGCONT)  # one that is stopped does not end before it goes on
