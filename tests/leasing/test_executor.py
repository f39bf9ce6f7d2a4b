"""The executor: work in tasks that no caller's end cuts short, faults that add up, and an end that hands back."""

import anyio
import pytest

from inference.engines.turns import EngineTurns
from inference.errors import DiskFull, EngineFailed, EngineLost, InvalidRequest, WeightsError
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW, Executor
from inference.leasing.runner import Runner
from inference.leasing.taking import RELEASE_LIMIT_S
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import SleepyEngine
from tests.simulation.leases import PHOTO
from tests.support.virtual import virtual_time


class Box:
    """An executor, and a queue with tasks for it. `async with` serves it."""

    def __init__(self, folder, *errors, strict=False):
        self.store = MemoryStore(clock=anyio.current_time)
        self.queue = MemoryQueue(store=self.store, worker_id="box")
        self.engine = SleepyEngine(seconds=10, errors=list(errors))
        self.executor = Executor(EngineTurns(self.engine, strict=strict))
        self.runner = Runner(self.queue, self.executor.turns, temp_dir=folder)

    async def __aenter__(self):
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self.executor.serve)
        return self

    async def __aexit__(self, *error):
        await self.executor.close()
        return await self._group.__aexit__(*error)

    async def lease(self):
        """Runs one more task; says how it ended."""
        self.store.add(PHOTO)
        return (await self.executor.run_lease(self.runner, await self.queue.lease())).status


@pytest.fixture
def box(tmp_path):
    """A factory: boxes have to be made inside of virtual time."""
    return lambda *errors, **options: Box(tmp_path, *errors, **options)


@virtual_time
async def test_faults_of_leases_and_direct_requests_add_up(box):
    """They are one machine's."""
    it = box(*[EngineFailed("no")] * 3, DiskFull("full"))
    assert await it.lease() == "failed"
    it.executor.faulted("a direct request")
    assert not it.executor.broken
    assert await it.lease() == "released"
    assert it.executor.broken
    assert "3 tasks in a row ended badly here: full" in str(it.executor.fault)


@virtual_time
async def test_only_a_video_starts_the_count_anew(box):
    """A task that is wrong itself says nothing of the machine, neither good nor bad."""
    it = box(DiskFull("full"), InvalidRequest("too long"), DiskFull("full"), None, DiskFull("full"), DiskFull("full"))
    ended = [await it.lease() for _ in range(6)]
    assert ended == ["released", "failed", "released", "completed", "released", "released"]
    assert it.executor.faults_in_a_row == MAX_FAULTS_IN_A_ROW - 1
    assert not it.executor.broken


@virtual_time
async def test_a_broken_executor_spends_nothing_on_a_lease(box):
    """It goes back to whoever can; the first reason is the one that is told."""
    it = box()
    it.executor.give_up(WeightsError("damaged"))
    it.executor.give_up(EngineLost("something else"))
    assert await it.lease() == "released"
    assert [item.status for item in it.store.items.values()] == ["pending"]
    assert (it.engine.runs, str(it.executor.fault)) == (0, "damaged")


@pytest.mark.parametrize("strict", [True, False])
@virtual_time
async def test_whether_a_lost_engine_is_asked_again_is_for_its_turns_to_say(box, strict):
    """Where another worker takes this one's place at once, it is not."""
    it = box(EngineLost("the GPU is gone"), strict=strict)
    assert await it.lease() == "released"
    assert it.executor.broken is strict


@virtual_time
async def test_a_cancelled_caller_waits_for_the_end_or_lets_go(box):
    """The work goes on to its own end in either case."""
    async with box() as it:
        for lets_go in (False, True):
            ended = anyio.Event()

            async def work(ended=ended):
                try:
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(3)
                    ended.set()

            began_at = anyio.current_time()
            with anyio.move_on_after(1):
                await it.executor.run(work, lets_go=lets_go)
            assert anyio.current_time() - began_at == (1 if lets_go else 4)
            await ended.wait()


@virtual_time
async def test_a_stop_gives_time_and_then_cancels(box):
    """What is done in time is done; `stopping` is there to be looked at meanwhile; the rest ends."""
    async with box() as it:
        done = []

        async def work(name, seconds):
            await anyio.sleep(seconds)
            done.append(name)

        async with anyio.create_task_group() as calls:
            calls.start_soon(it.executor.run, lambda: work("short", 5))
            calls.start_soon(it.executor.run, lambda: work("long", 500))
            await anyio.sleep(1)
            calls.start_soon(it.executor.stop, 10)
            await anyio.sleep(1)
            assert it.executor.stopping.is_set()
        assert done == ["short"]
        assert anyio.current_time() == 11
        began_at = anyio.current_time()
        await it.executor.stop(10)  # nothing runs: nothing is waited for
        assert anyio.current_time() == began_at


@virtual_time
async def test_a_stop_does_not_wait_for_ever(box):
    """What cannot be cancelled is left behind after as long as handing back may take."""
    async with box() as it:

        async def work():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(100)

        async with anyio.create_task_group() as calls:
            calls.start_soon(it.executor.run, work)
            await anyio.sleep(1)
            await it.executor.stop(10)
            assert anyio.current_time() == 11 + RELEASE_LIMIT_S


@virtual_time
async def test_what_comes_after_the_end_is_told_so(box):
    """And nothing of it begins."""
    async with box() as it:
        pass
    with pytest.raises(EngineLost, match="stopping"):
        await it.executor.run(it.lease)
    assert not it.store.items
