"""The process of a command: signals, error messages and exit codes."""

import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress

import anyio
import structlog
from anyio.abc import TaskStatus

from inference import liveness, terminal
from inference.errors import EngineHung, I2VError, SettingsError
from inference.leasing.polling import Worker

log = structlog.get_logger(__name__)

WRONG_SETTINGS = 78
"""EX_CONFIG of sysexits.h: a supervisor that starts commands again when they fail leaves these to a person."""


def run(
    main: Callable[[], Awaitable[None]], *, cancel_on_signal: bool = True, stopped_exit_code: int | None = None
) -> None:
    """Runs a command's program. SIGINT and SIGTERM cancel it, so that it can clean up, unless it handles them itself.

    A program that was stopped exits with `stopped_exit_code` or, as in shells, with 128 plus the signal's number. One
    that handles signals itself is ended by them at once until it does: nothing is leased yet.
    """
    stopped_by: list[int] = []
    if not cancel_on_signal:
        # asyncio's own handler of SIGINT cancels the main task once. That leaves a server open that was just starting.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def listening() -> None:
        async with anyio.create_task_group() as tasks:
            if cancel_on_signal:
                # Before the program, which imports for a second before it first awaits anything.
                await tasks.start(_cancel_on_signal, tasks.cancel_scope, stopped_by)
            await main()
            tasks.cancel_scope.cancel()

    anyio.run(listening)
    if stopped_by:
        sys.exit(128 + stopped_by[0] if stopped_exit_code is None else stopped_exit_code)


def settle() -> None:
    """For a program that has loaded what it needs, and serves from now on.

    All that exists by now is left out of the collection of garbage. There are some 150,000 objects of libraries, and
    looking at all of them again took a quarter of a second, in which nobody is answered and no event is sent.
    """
    gc.freeze()


async def _cancel_on_signal(
    scope: anyio.CancelScope, stopped_by: list[int], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            stopped_by.append(number)
            scope.cancel()


async def drain_on_signal(
    worker: Worker, grace_s: float, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Drains a worker on the first SIGINT or SIGTERM, and stops it at once on the second. Runs until cancelled."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name, grace_s=grace_s)
            terminal.tell(f"Finishing for up to {grace_s:g} s, then handing tasks back; again to hand back now.")
            worker.stop()
            break
        async for _ in signals:
            worker.stop_now()


TURN_S = 1.0
"""How often a loop shows that it turns."""


async def show_life(worker_id: str, is_stuck: Callable[[], bool], supervisor: str | None = None) -> None:
    """Shows that this loop turns, for `i2v health` and a supervisor, as long as the worker is not stuck. Never returns.

    `supervisor`: the socket of systemd's watchdog, NOTIFY_SOCKET, which takes a dead worker for one that hangs.
    """
    with ExitStack() as held:
        sign = None
        watchdog = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) if supervisor else None
        try:
            sign = held.enter_context(liveness.shown(worker_id))
        except OSError as error:
            _tell_no_sign(error)
        if watchdog is not None:
            watchdog.setblocking(False)  # a supervisor that reads nothing stops no loop
        while True:
            if not is_stuck():
                if sign is not None:
                    try:
                        sign.touch()
                    except OSError as error:  # a sign that grows old would get a healthy worker ended
                        sign.withdraw()
                        sign = None
                        _tell_no_sign(error)
                if watchdog is not None and supervisor is not None:
                    with suppress(OSError):  # a supervisor that is busy, or being replaced, hears the next one
                        watchdog.sendto(b"WATCHDOG=1", f"\0{supervisor[1:]}" if supervisor[0] == "@" else supervisor)
            await anyio.sleep(TURN_S)


def _tell_no_sign(error: OSError) -> None:
    log.warning("no_sign_of_life", error=str(error), folder=str(liveness.folder()))


async def drain_calls_on_signal(drain: Callable[[float], Coroutine[object, object, None]], grace_s: float) -> None:
    """Drains a server of calls on the first SIGINT or SIGTERM, and stops it at once on the second."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            async for number in signals:
                log.info("stopping", signal=signal.Signals(number).name, grace_s=grace_s)
                terminal.tell(f"Finishing for up to {grace_s:g} s, then handing jobs back; again to hand back now.")
                tasks.start_soon(drain, grace_s)
                break
            async for _ in signals:
                tasks.start_soon(drain, 0.0)


@contextmanager
def told_errors(*, verbose: bool, wrong_settings: int = 1) -> Iterator[None]:
    """Ends the process with one line for each of our errors; tracebacks are for bugs, and for `verbose`.

    The exit code is 1, or `wrong_settings` for a SettingsError.
    """
    try:
        yield
    except Exception as raised:
        error = _only(raised)
        if isinstance(error, BrokenPipeError):
            # The reader of our output has ended (`i2v tasks | head`), so the rest of the buffer is discarded.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if verbose:
            terminal.exception()
        if not isinstance(error, I2VError):
            raise
        terminal.error(str(error))
        if isinstance(error, EngineHung):  # the thread that hangs would keep the process from ending
            sys.stderr.flush()
            os._exit(1)
        sys.exit(wrong_settings if isinstance(error, SettingsError) else 1)


def _only(error: BaseException) -> BaseException:
    """The error inside the exception groups of task groups, if it is the only one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
