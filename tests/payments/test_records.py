"""Records: one of two who race is first, and what was written is there, in every store."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from inference.errors import RecordsUnavailable
from inference.payments.records import MemoryRecords, SqliteRecords
from tests.support.disk import small_disk

ROOT = Path(__file__).parents[2]

RACER = """
import sys
import anyio
from pathlib import Path
from inference.payments.records import SqliteRecords

async def main():
    records = SqliteRecords(Path(sys.argv[1]))
    sys.stdin.readline()
    print([await records.add(f"key-{number}", sys.argv[2]) for number in range(60)])

anyio.run(main)
"""

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Both event loops."""
    return request.param


@pytest.fixture(params=["memory", "sqlite"])
def records(request, tmp_path):
    """Empty records in every store there is."""
    return MemoryRecords() if request.param == "memory" else SqliteRecords(tmp_path / "new" / "records.db")


async def test_what_was_written_is_there(records):
    """The last one counts; what is removed is gone, also twice."""
    assert await records.get("a") is None
    assert await records.all() == {}
    await records.put("a", "1")
    await records.put("a", "2")
    await records.put("b/ü", "line\nand line")
    assert await records.get("a") == "2"
    assert await records.all() == {"a": "2", "b/ü": "line\nand line"}
    await records.remove("a")
    await records.remove("a")
    assert await records.all() == {"b/ü": "line\nand line"}


async def test_the_first_to_add_is_told_so(records):
    """The second is told, too, and changes nothing; once it is removed there is a first again."""
    assert await records.add("a", "mine") is True
    assert await records.add("a", "yours") is False
    assert await records.get("a") == "mine"
    await records.remove("a")
    assert await records.add("a", "yours") is True


async def test_one_of_many_who_race_is_first(records):
    """Within one process."""
    told = []

    async def add(number):
        told.append((await records.add("a", str(number)), str(number)))

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(add, number)
    assert [name for won, name in told if won] == [await records.get("a")]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_of_two_processes_is_first(tmp_path):
    """For each key one, and the file says the same."""
    path = tmp_path / "records.db"
    command = [sys.executable, "-c", RACER, str(path)]
    racers = [
        subprocess.Popen([*command, name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        for name in ("a", "b")
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    first, second = [[word == "True" for word in racer.communicate()[0].strip("[]\n").split(", ")] for racer in racers]
    assert len(first) == 60
    assert all(one != other for one, other in zip(first, second, strict=True))
    kept = await SqliteRecords(path).all()
    assert [kept[f"key-{number}"] == "a" for number in range(60)] == first


async def test_what_outlives_its_process_is_there(tmp_path):
    """Another connection, as after a restart."""
    await SqliteRecords(tmp_path / "records.db").put("a", "1")
    assert await SqliteRecords(tmp_path / "records.db").get("a") == "1"


async def test_a_cancelled_write_is_whole_or_not_there(tmp_path):
    """And one that began is finished before the cancellation is felt."""
    records = SqliteRecords(tmp_path / "records.db")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await records.put("a", "1")
    assert await records.get("a") in (None, "1")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"no database at all, " * 100),
        lambda path: path.parent.rmdir() or path.parent.write_text("a file"),
    ],
)
async def test_a_file_that_cannot_be_used(tmp_path, spoil):
    """Is said in one line that names it, by every method."""
    path = tmp_path / "folder" / "records.db"
    path.parent.mkdir()
    spoil(path)
    records = SqliteRecords(path)
    for call in (records.add("a", "1"), records.put("a", "1"), records.get("a"), records.remove("a"), records.all()):
        with pytest.raises(RecordsUnavailable, match=r"records\.db cannot be used") as caught:
            await call
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_full_disk(tmp_path):
    """Nothing is written that was not said to be, and what was there stays."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        records = SqliteRecords(disk / "records.db")
        await records.put("a", "1")
        with pytest.raises(RecordsUnavailable, match="full"):
            await records.put("b", "x" * 100_000)
        assert await records.all() == {"a": "1"}
