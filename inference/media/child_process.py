"""Processing of untrusted files, in child processes that can be killed.

A small photo can keep a decoder busy for hours, crash it, or ask for all memory, and a thread inside a decoder cannot
be stopped. A function marked `in_child_process` therefore runs in a child process: it blocks its caller as before,
and returns and raises the same things, but

- more than CPU_LIMIT_S of processor time, or a crash of the decoder, is InvalidPhoto: the photo is at fault. Processor
  time is counted and not wall-clock time, so that a good photo is not refused because the machine is busy;
- no answer for WALL_LIMIT_S, no memory, or a child killed from outside is MachineFault: another machine may read it;
- where the caller is a thread of anyio's and its call is cancelled, the child is killed at once.

A child is used again after each call that ended well: starting one costs 0.4 s of a core, a call 0.2 ms.
"""

import atexit
import functools
import inspect
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import anyio.from_thread

from inference.errors import InvalidPhoto, MachineFault

P = ParamSpec("P")
T = TypeVar("T")

CPU_LIMIT_S = 20.0
"""Processor time of one call. The slowest honest photos, 100 megapixels as PNG or progressive JPEG, take 3 to 5 s."""

WALL_LIMIT_S = 60.0
"""For delays that use no processor time: a disk that hangs, a paused process, too small a share of a core."""

POLL_S = 0.05
"""How often a waiting caller looks whether it was cancelled. An answer wakes it at once."""

MAX_IDLE = 2
"""Idle children that are kept for the next call, some 50 MB each: as many as photos are processed at once."""

# Signals that mean that a process has crashed. Any other signal was sent from outside.
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}


def in_child_process(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a module's function run in a child process, with arguments and result pickled.

    Pass paths as positional arguments: only those are made absolute. It raises InvalidPhoto and MachineFault as
    described above, besides its own errors. `inspect.unwrap` gives the function that runs in this process.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # The parent may change its working directory; a child keeps the one it was started in.
        absolute = [value.absolute() if isinstance(value, Path) else value for value in args]
        answer: T = _children.call(call, absolute, kwargs)
        return answer

    return call


def stop() -> None:
    """Kills every child, idle or busy, for a process that is about to end. Calls under way raise MachineFault."""
    _children.stop()


class _Child:
    """A process that answers one call after another."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        # Unlike multiprocessing, this does not import the parent's main module, which may load a model.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                    [sys.executable, "-W", "ignore", "-c", program],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # the terminal's Ctrl-C is for the parent to act on
                )
            except OSError as error:
                self._pipe.close()
                raise MachineFault(f"no process to decode the photo could be started: {error.strerror}") from error

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: object, cpu_limit_s: float) -> tuple[bool, Any]:
        """Whether the function returned, and what it returned or raised. Raises InvalidPhoto, MachineFault."""
        give_up_at = time.monotonic() + WALL_LIMIT_S
        try:
            self._pipe.send((cpu_limit_s, request))
            while not self._pipe.poll(POLL_S):
                raise_if_cancelled()
                if time.monotonic() > give_up_at:
                    raise MachineFault(f"this machine did not decode the photo within {WALL_LIMIT_S:g} s")
            answer: tuple[bool, Any] = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._end(cpu_limit_s) from None
        return answer

    def interrupt(self) -> None:
        """Kills the child during a call of another thread, which raises."""
        self._process.kill()  # does nothing to one that has ended

    def kill(self) -> None:
        """Kills the child and releases everything that belongs to it."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _end(self, cpu_limit_s: float) -> InvalidPhoto | MachineFault:
        """The error for a child that ended during a call."""
        code = self._process.wait()
        if -code == signal.SIGPROF:
            return InvalidPhoto(f"the photo takes more than {cpu_limit_s:g} s of processor time to decode")
        if -code in CRASHES:
            return InvalidPhoto(f"the photo crashes its decoder ({signal.Signals(-code).name})")
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return MachineFault(f"decoding the photo was stopped ({by}): this machine is out of memory or shutting down")


class _Children:
    """The child processes, idle and busy."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins with no children. Also called after a fork, or both processes would read each other's answers."""
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()

    def call(self, function: object, args: object, kwargs: object, *, cpu_limit_s: float = CPU_LIMIT_S) -> Any:
        child = self._take()
        try:
            returned, value = child.call((function, args, kwargs), cpu_limit_s)
        except BaseException:
            self._give_back(child, usable=False)
            raise
        self._give_back(child, usable=True)
        if returned:
            return value
        raise value

    def stop(self) -> None:
        with self._lock:
            for child in self._busy:
                child.interrupt()
            idle, self._idle = self._idle, []
        for child in idle:
            child.kill()

    def _take(self) -> _Child:
        with self._lock:
            child = self._idle.pop() if self._idle else None
            if child is None or not child.is_alive:
                child = _Child()
            self._busy.add(child)
        return child

    def _give_back(self, child: _Child, *, usable: bool) -> None:
        with self._lock:
            self._busy.discard(child)
            usable = usable and len(self._idle) < MAX_IDLE
            if usable:
                self._idle.append(child)
        if not usable:
            child.kill()


def serve(fd: int) -> None:
    """What a child does: answers calls on this descriptor until the other side closes it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # photos must not end up in core dumps
    # Or numpy starts a thread for each core, up to 64, when the first photo comes. Where so many may not be started, as
    # in a container with a limit, OpenBLAS crashes the process, and a good photo seems to crash its decoder.
    os.putenv("OPENBLAS_NUM_THREADS", "1")
    with Connection(fd) as pipe:
        while True:
            try:
                cpu_limit_s, (function, args, kwargs) = pipe.recv()
            except (EOFError, ConnectionError):
                return
            # The timer's signal kills this process, also when its parent no longer waits.
            signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
            try:
                answer = True, inspect.unwrap(function)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  the caller's to judge
                answer = False, error
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(answer)


def raise_if_cancelled() -> None:
    """Raises where the caller is a thread of anyio's whose call was cancelled."""
    try:
        anyio.from_thread.check_cancelled()
    except RuntimeError:  # not a thread of anyio, so the call cannot be cancelled
        return


_children = _Children()
atexit.register(stop)
os.register_at_fork(after_in_child=_children.forget)
