"""What really happened to each task: written by the database itself, read when all is over.

A trigger notes every change of a task's row in the order of the commits, so the ledger knows nothing of the code that
it checks. What workers said comes from the proxies: who sent it, and what the queue answered.
"""

import hashlib
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from inference.media.video import probe
from inference.queues.item import CRASHED, MAX_CRASHES
from inference.server.config import ServerConfig
from inference.server.objects import INCOMING, UNLOCKED_S, ObjectStore
from inference.server.store import Store
from inference.server.tidy import sweep
from tests.proxy import Exchange, Record

ENDS = {"completed", "failed", "cancelled"}

INSTALL = """
CREATE TABLE IF NOT EXISTS ledger (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, item_id, was, became, old_holder, holder, old_lease_seq, lease_seq,
    leased_until, updated_at, video_storage_path
);
CREATE TRIGGER IF NOT EXISTS note AFTER UPDATE ON video_items BEGIN
    INSERT INTO ledger (item_id, was, became, old_holder, holder, old_lease_seq, lease_seq, leased_until, updated_at,
        video_storage_path)
    VALUES (new.id, old.status, new.status, old.worker_id, new.worker_id, old.lease_seq, new.lease_seq,
        new.leased_until, new.updated_at, new.video_storage_path);
END;
"""


@dataclass(frozen=True)
class Change:
    """One write to one task, in the order of the commits."""

    was: str
    became: str
    old_holder: str | None
    holder: str | None
    old_lease_seq: int
    lease_seq: int
    leased_until: float | None
    updated_at: float
    video_storage_path: str | None


@dataclass(frozen=True)
class Row:
    """A task at the end."""

    id: str
    status: str
    worker_id: str | None
    lease_seq: int
    retry_count: int
    crash_count: int
    lost_count: int
    error_message: str | None
    video_storage_path: str | None


def install(database: Path) -> None:
    """From here on every change of a task is noted. The tables have to be there."""
    with _opened(database) as connection:
        connection.executescript(INSTALL)


class Ledger:
    """The books of one server, open to be checked."""

    def __init__(self, data_dir: Path, record: Record) -> None:
        self._data_dir = data_dir
        self._objects = data_dir / "objects"
        self._record = record
        with _opened(data_dir / "queue.db") as connection:
            wanted = ", ".join(Row.__dataclass_fields__)
            self.rows = [Row(*row) for row in connection.execute(f"SELECT {wanted} FROM video_items ORDER BY id")]
            wanted = ", ".join(Change.__dataclass_fields__)
            self.changes: dict[str, list[Change]] = defaultdict(list)
            for item_id, *values in connection.execute(f"SELECT item_id, {wanted} FROM ledger ORDER BY seq"):
                self.changes[item_id].append(Change(*values))
        self._reports: dict[str, list[Exchange]] = defaultdict(list)
        for it in record.of("report"):
            self._reports[it.body["item_id"]].append(it)

    def check(self, *, tasks: int, cancelled: int = 0, may_crash_out: bool = False) -> None:
        """Every promise about the tasks, as assertions."""
        assert len(self.rows) == tasks
        assert sum(row.status == "cancelled" for row in self.rows) == cancelled
        for row in self.rows:
            self._check_history(row)
            assert row.retry_count == 0, f"{row} failed for no fault of its own"
            if may_crash_out and row.status == "failed":
                assert (row.error_message, row.crash_count) == (CRASHED, MAX_CRASHES)
            elif row.status != "cancelled":
                assert row.status == "completed", f"{row}: {self.changes[row.id]}"
                self._check_video(row)
        assert self.stale_writes() == []
        self._check_objects()

    def check_no_orphans(self) -> None:
        """Once its processes have ended, one round of the server's sweep leaves what a row names, and nothing else."""
        for left in (self._objects / INCOMING).iterdir():
            os.utime(left, (time.time() - 2 * UNLOCKED_S,) * 2)  # nobody writes there any more; a minute shows it
        config = ServerConfig(f"sqlite:///{self._data_dir / 'queue.db'}", self._objects)
        store = Store(config.database_url)
        try:
            sum(sweep(store, ObjectStore(self._objects), config, stale_s=-1))
        finally:
            store.close()
        with _opened(self._data_dir / "queue.db") as connection:
            photos = {path for (path,) in connection.execute("SELECT storage_path FROM photos")}
        named = photos | {row.video_storage_path for row in self.rows if row.video_storage_path}
        there = {path.relative_to(self._objects).as_posix() for path in self._objects.rglob("*") if path.is_file()}
        assert there == named

    def stale_writes(self) -> list[Exchange]:
        """Writes that the queue accepted from somebody who did not hold the task. There must be none."""
        return [it for it in self._writes() if not self._was_holder(it)]

    def _writes(self) -> list[Exchange]:
        said = self._record.of("heartbeat") + self._record.of("report")
        return [it for it in said if it.accepted and not it.body["worker_id"].endswith(".check")]

    def _was_holder(self, said: Exchange) -> bool:
        """A beat is found by the time it was answered with; a report by the end it made."""
        changes = self.changes[said.body["item_id"]]
        if said.call == "report":
            ends = [it for it in changes if it.was not in ENDS and it.became in ENDS]
            return [it.old_holder for it in ends] == [said.body["worker_id"]]
        until = datetime.fromisoformat(said.answer["data"]["leased_until"]).astimezone(UTC).timestamp()
        found = [it for it in changes if abs((it.leased_until or it.updated_at) - until) < 0.0015]
        assert found, f"an accepted heartbeat left no trace: {said}"
        return said.body["worker_id"] in {it.old_holder for it in found}

    @staticmethod
    def _lapses(changes: list[Change]) -> tuple[int, int]:
        """How many leases ran out and went to another: of workers that were heard of, and since then of others."""
        crashes = lost = 0
        until, renewed = None, False
        for it in changes:
            if it.lease_seq != it.old_lease_seq:
                crashes += it.was == "processing" and renewed
                lost += it.was == "processing" and not renewed
                renewed = False
            elif it.was == it.became == "processing" and it.leased_until != until:
                renewed, lost = True, 0
            until = it.leased_until
        return crashes, lost

    def _check_history(self, row: Row) -> None:
        changes = self.changes[row.id]
        ends = [index for index, it in enumerate(changes) if it.became in ENDS and it.was not in ENDS]
        assert len(ends) == 1, f"{row} ended {len(ends)} times"
        assert ends[0] == len(changes) - 1, f"{row} changed after its end"
        end = changes[-1]
        assert (end.became, end.lease_seq) == (row.status, row.lease_seq)
        if row.status == "completed":
            assert (end.was, end.old_holder) == ("processing", row.worker_id), "somebody else completed it"
        leases = [it for it in changes if it.lease_seq != it.old_lease_seq]
        assert [it.lease_seq for it in leases] == list(range(1, row.lease_seq + 1))
        assert len({it.holder for it in leases}) == len(leases), "two leases under one worker_id"
        crashes, lost = self._lapses(changes)
        assert (row.crash_count, row.lost_count) == (crashes + (row.error_message == CRASHED), lost)

    def _check_video(self, row: Row) -> None:
        """The reported object is there, plays, and is what its completer uploaded."""
        path = self._objects / row.video_storage_path
        info = probe(path)
        assert (info.codec, info.pix_fmt, info.faststart) == ("h264", "yuv420p", True)
        assert (info.color_range, info.color_space) == ("tv", "bt709")
        # A reply to the completer may have been lost with its queue; a success that was heard names the row's video.
        reports = [it for it in self._reports[row.id] if it.accepted]
        assert {(it.body["worker_id"], it.body["video_storage_path"]) for it in reports} <= {
            (row.worker_id, row.video_storage_path)
        }

    def _check_objects(self) -> None:
        """No object was written twice; each is what its one accepted upload sent, or was swept as nobody's."""
        named = {row.video_storage_path for row in self.rows}
        sent: dict[str, list[str]] = defaultdict(list)
        for upload in self._record.of("upload"):
            if upload.accepted:
                sent[upload.path.partition("/group-photos/")[2]].append(upload.digest)
        for name, digests in sent.items():
            assert len(digests) == 1, f"{name} was stored {len(digests)} times"
            path = self._objects / name
            assert path.exists() or name not in named, f"{name} is gone"
            assert not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() == digests[0]


def completions(logs: Collection[dict]) -> dict[str, int]:
    """How often workers believe to have completed each task, by their logs."""
    found: dict[str, int] = defaultdict(int)
    for line in logs:
        if line.get("event") == "lease_ended" and line.get("status") == "completed":
            found[line["item_id"]] += 1
    return found


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database, timeout=10)) as connection:
        yield connection
