"""What a worker says of its tasks, and of all of them at its end."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inference.commands import work_log
from inference.commands.work_log import WorkLog
from inference.progress.stages import Progress
from inference.task import Outcome, Video
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore

pytestmark = pytest.mark.anyio

CLIP = Video(path=Path("clip.mp4"), width=16, height=16, fps=16, frames=16, size_bytes=6, cost_usd=0.05)


async def test_a_worker_from_its_first_task_to_its_last(monkeypatch):
    """A line for each stage, one in half a minute of a long one, and what became of all; a stop leaves no outcome."""
    now = [100.0]
    monkeypatch.setattr(work_log.time, "monotonic", lambda: now[0])
    store = MemoryStore()
    for _ in range(3):
        store.add(b"", group_id="g")
    queue = MemoryQueue(store)
    with capture_logs() as logs:
        it = WorkLog()
        assert it.is_empty
        sinks = [it.sink(await queue.lease()) for _ in range(3)]
        for at_s, stage, fraction in (
            (100, "load", 0),
            (101, "render", 0.1),
            (110, "render", 0.2),
            (140, "render", 0.5),
        ):
            now[0] = float(at_s)
            sinks[0](Progress(stage=stage, done=0, total=1, fraction=fraction, eta_s=60.4))
        it.ended(Outcome(status="completed", item_id="1", video=CLIP))
        it.ended(Outcome(status="failed", item_id="2", error="no photo"))
        now[0] = 220.0
        it.close()
    assert not it.is_empty
    told = [(line["event"], line.get("stage"), line.get("percent"), line.get("left_s")) for line in logs[:-1]]
    assert told == [("stage", "load", 0, None), ("stage", "render", 10, None), ("progress", "render", 50, 60)]
    expected = {"event": "worker_stopped", "done": 1, "failed": 1, "handed_back": 1, "cost_usd": 0.05, "uptime_s": 120}
    assert logs[-1] == {"log_level": "info", **expected}
