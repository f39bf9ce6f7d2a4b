"""Progress by request: throttled, in order, and over when the job is."""

import anyio
import pytest

from inference.on_runpod.progress_posts import POST_LIMIT_S, ProgressPosts
from inference.progress.stages import Progress
from tests.support.virtual import virtual_time


def at(fraction):
    """A snapshot."""
    return Progress(stage="render", done=fraction, total=1, fraction=fraction)


class Listener:
    """Takes snapshots, each in `takes_s`."""

    def __init__(self, takes_s=0.0, error=None):
        self.takes_s, self.error = takes_s, error
        self.began, self.arrived = [], []

    async def __call__(self, snapshot):
        self.began.append(anyio.current_time())
        await anyio.sleep(self.takes_s)
        if self.error:
            raise self.error
        self.arrived.append((anyio.current_time(), snapshot["fraction"]))


async def run(snapshots, seconds, steps):
    """Reports `steps` snapshots evenly, then finishes."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(snapshots.run)
        for step in range(steps):
            snapshots.sink(at(step / steps))
            await anyio.sleep(seconds / steps)
        snapshots.finish()


@virtual_time
async def test_the_newest_every_two_seconds():
    """A hundred reports in ten seconds are five posts, each of them the newest there was."""
    listener = Listener()
    await run(ProgressPosts(listener), 10, 100)
    assert len(listener.arrived) == 5
    fractions = [fraction for _, fraction in listener.arrived]
    assert fractions == sorted(fractions)
    assert fractions[-1] >= 0.79
    assert all(later - sooner >= 2 for sooner, later in zip(listener.began, listener.began[1:], strict=False))


@virtual_time
async def test_the_end_waits_for_what_is_on_its_way():
    """So that nothing arrives after the result."""
    listener = Listener(takes_s=5)
    await run(ProgressPosts(listener), 1, 10)
    assert len(listener.began) == len(listener.arrived) == 1
    assert anyio.current_time() >= listener.arrived[0][0]


@virtual_time
async def test_a_listener_that_hangs_holds_the_result_up_for_seconds():
    """And not for ever."""
    listener = Listener(takes_s=3600)
    began = anyio.current_time()
    await run(ProgressPosts(listener), 1, 10)
    assert anyio.current_time() - began == pytest.approx(POST_LIMIT_S, abs=1)


@virtual_time
async def test_a_listener_that_fails_costs_a_snapshot():
    """Progress is not worth a video."""
    listener = Listener(error=RuntimeError("no"))
    await run(ProgressPosts(listener), 5, 10)
    assert len(listener.began) == 3


@virtual_time
async def test_nothing_new_is_not_posted():
    """One snapshot, one post, however long the stage takes."""
    listener = Listener()
    await run(ProgressPosts(listener), 60, 1)
    assert len(listener.arrived) == 1
