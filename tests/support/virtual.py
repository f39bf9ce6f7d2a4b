"""Tests in virtual time: async test functions that sleep for hours and take milliseconds."""

import functools
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import anyio
import trio
import trio.testing

from inference.progress import stages as progress


def run_virtual(main: Callable[[], Awaitable[object]], *, seed: int = 0) -> object:
    """Runs `main` under trio with a clock that jumps to the next deadline whenever everything waits."""
    random.seed(seed)
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio._core._run._r.seed(seed)
    clock = trio.testing.MockClock(autojump_threshold=0)
    real_time, progress.time = progress.time, SimpleNamespace(monotonic=anyio.current_time)  # of stages
    try:
        return anyio.run(main, backend="trio", backend_options={"clock": clock})
    finally:
        progress.time = real_time


def virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Makes a plain test of an async one. No threads in it: the clock would not wait for them."""

    @functools.wraps(test)
    def wrapper(*args: object, **kwargs: object) -> None:
        run_virtual(lambda: test(*args, **kwargs))

    return wrapper
