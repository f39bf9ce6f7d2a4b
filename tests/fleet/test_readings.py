"""What containers tell the next tick, over records that every one of them shares."""

import anyio
import pytest

from inference.fleet.readings import DECISIONS_KEPT, NUMBERS_KEPT, PoolRecord, Readings
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.payments.records import MemoryRecords, SqliteRecords

pytestmark = pytest.mark.anyio


class Clock:
    """Wall-clock time that a test moves."""

    now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """Seconds since 1970."""
    return Clock()


@pytest.fixture
def records():
    """One store for all readings of a test."""
    return MemoryRecords()


@pytest.fixture
def readings(records, clock):
    """The readings as one process sees them."""
    return Readings(records, clock=clock)


async def test_nothing_is_known_at_first(readings):
    """Of no pool, and no queue was ever seen empty: time is counted from the first look."""
    assert await readings.pool("gpu") == PoolRecord()
    assert await readings.decisions() == []
    assert await readings.undry_s() == 0


async def test_seconds_per_clip_are_a_running_mean(readings):
    """The first clip counts in full, a later one for three tenths, and pools do not mix."""
    await readings.worked("gpu", 10.0)
    await readings.worked("gpu", 20.0)
    await readings.worked("runway", 99.0)
    known = await readings.pool("gpu")
    assert (known.clip_s, known.clips) == (13.0, 2)


async def test_a_few_faults_in_a_row_are_a_failing_pool(readings):
    """One that worked in between starts the count anew."""
    for _ in range(MAX_FAULTS_IN_A_ROW - 1):
        await readings.faulted("gpu", "no")
    await readings.worked("gpu", 10.0)
    for number in range(MAX_FAULTS_IN_A_ROW):
        assert (await readings.pool("gpu")).failing is None, number
        await readings.faulted("gpu", "no memory")
    assert (await readings.pool("gpu")).failing == "no memory"
    assert (await readings.pool("runway")).failing is None


async def test_a_certain_fault_counts_at_once(readings, clock):
    """Damaged weights need no second opinion; a sign of life ends it, and what was measured stays."""
    await readings.worked("gpu", 10.0)
    await readings.faulted("gpu", "no weights", certain=True)
    assert (await readings.pool("gpu")).failing == "no weights"
    clock.now += 700
    assert readings.since_s((await readings.pool("gpu")).failing_at) == 700
    await readings.tried("gpu")
    assert readings.since_s((await readings.pool("gpu")).failing_at) == 0
    await readings.worked("gpu")
    known = await readings.pool("gpu")
    assert (known.failing, known.faults, known.clip_s, known.clips) == (None, 0, 10.0, 1)


async def test_the_time_since_the_queue_was_empty(readings, records, clock):
    """Whoever sees it empty tells all others; a clock that is behind does not make it negative."""
    await readings.dry()
    clock.now += 90
    assert await Readings(records, clock=clock).undry_s() == 90
    clock.now -= 200
    assert await readings.undry_s() == 0
    assert readings.since_s(clock.now + 5) == 0


async def test_the_last_decisions_are_kept(readings, clock):
    """For whoever asks; the oldest are forgotten."""
    for number in range(DECISIONS_KEPT + 5):
        clock.now += 60
        await readings.decided(f"tick {number}")
    kept = await readings.decisions()
    assert len(kept) == DECISIONS_KEPT
    assert kept[-1] == (clock.now, f"tick {DECISIONS_KEPT + 4}")


async def test_a_record_of_another_version_is_measured_anew(readings, records):
    """A deploy over a running fleet must not stop its ticks."""
    for text in ('{"clips": 3, "colour": "blue"}', "not JSON"):
        await records.put("board/gpu/1", text)
        assert await readings.pool("gpu") == PoolRecord()
    await readings.worked("gpu", 10.0)
    assert (await readings.pool("gpu")).clips == 1
    await records.put("board/dry", "yesterday")
    await records.put("board/decisions/1", "none")
    assert await readings.undry_s() == 0
    assert await readings.decisions() == []


async def test_fleets_that_share_records_have_boards_of_their_own(clock):
    """One that fails says nothing of another."""
    records = MemoryRecords()
    one, other, plain = (Readings(records, fleet=name, clock=clock) for name in ("ep1", "ep2", None))
    await one.faulted("gpu", "no weights", certain=True)
    await one.decided("sent 1")
    assert [(await readings.pool("gpu")).failing for readings in (one, other, plain)] == ["no weights", None, None]
    assert [len(await readings.decisions()) for readings in (one, other, plain)] == [1, 0, 0]


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_containers_that_write_at_the_same_time_lose_nothing(tmp_path, clock, kind):
    """Each clip counts, each fault and each decision, whoever reads and writes in between."""
    records = MemoryRecords() if kind == "memory" else SqliteRecords(tmp_path / "records.db")
    boards = [Readings(records, clock=clock) for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for number in range(12):
            readings = boards[number % len(boards)]
            tasks.start_soon(readings.worked, "gpu", 10.0)
            tasks.start_soon(readings.faulted, "runway", "no")
            tasks.start_soon(readings.decided, f"tick {number}")
    assert (await boards[0].pool("gpu")).clips == 12
    assert (await boards[1].pool("runway")).faults == 12
    assert {what for _, what in await boards[2].decisions()} == {f"tick {number}" for number in range(12)}


async def test_a_writer_that_was_overtaken_takes_nothing_back(readings, records):
    """Which number is the newest is said after it is there, and maybe late: what follows is found all the same."""
    for _ in range(5):
        await readings.worked("gpu", 10.0)
    await records.put("board/gpu/newest", "2")
    assert (await readings.pool("gpu")).clips == 5
    await readings.worked("gpu", 10.0)
    assert (await readings.pool("gpu")).clips == 6


async def test_what_is_old_is_removed(readings, records):
    """The store of a fleet that runs for years does not grow."""
    for _ in range(3 * NUMBERS_KEPT):
        await readings.worked("gpu", 10.0)
    assert (await readings.pool("gpu")).clips == 3 * NUMBERS_KEPT
    assert len(await records.all()) == NUMBERS_KEPT + 1
