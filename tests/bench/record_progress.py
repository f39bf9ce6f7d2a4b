"""Records how the progress of real runs went, for the test of what is said to be left of them.

    python -m tests.bench.record_progress [preview] [runway] [wan]

Each run goes through the Runner, as in a worker, and what its tracker says is written down with the time. The preview
engine renders clips of several lengths, two at a time, so that one waits for the other. Runway is the stand-in of the
tests: two of its tasks run at once, others are throttled, and it takes as many looks as a seeded die says. The tiny Wan
preset computes on the CPU. Written to tests/progress/recorded/, a file for each engine:

    {"kind of task": [[[seconds, stage, fraction], …] for each run]}
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import anyio

from inference.engines.base import Engine
from inference.engines.preview import PreviewEngine
from inference.engines.runway.engine import RunwayEngine
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.progress.stages import Progress, Sink
from inference.settings import Settings
from inference.task import Lease
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.support.runway_server import RunwayServer

FOLDER = Path(__file__).parents[1] / "progress" / "recorded"
PHOTO = Path(__file__).parents[2] / "inference" / "assets" / "sample.jpg"
THINNED_S = 0.05
"""Updates of one stage that follow each other more closely are left out."""

Run = list[tuple[float, str, float]]


class Recorder:
    """Makes the sinks of leases, and keeps what they hear."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}

    def sink(self, lease: Lease) -> Sink:
        """As Runner asks for it."""
        run = self.runs[lease.task.item_id] = []
        begun = anyio.current_time()

        def note(progress: Progress) -> None:
            at = round(clock() - begun, 3)
            if not run or progress.stage != run[-1][1] or at - run[-1][0] >= THINNED_S or progress.fraction == 1:
                run.append((at, progress.stage, round(progress.fraction, 5)))

        clock = anyio.lowlevel.current_token().native_token.time
        return note


async def record(engine: Engine, *, seconds: float, runs: int, at_once: int, provider: str | None = None) -> list[Run]:
    """Runs of tasks alike, `at_once` leases at a time."""
    store = MemoryStore()
    for number in range(runs):
        store.add(f"item-{number}", photo=PHOTO.read_bytes(), duration_s=seconds, provider=provider)
    recorder = Recorder()
    queue = MemoryQueue(store)
    ledger = Ledger(MemoryRecords(), budget_usd=1000)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(queue, engine, policy=Policy(), ledger=ledger, temp_dir=Path(folder), sink=recorder.sink)

        async def slot() -> None:
            while lease := await queue.lease():
                outcome = await runner.run(lease)
                assert outcome.status == "completed", outcome

        async with anyio.create_task_group() as tasks:
            for _ in range(at_once):
                tasks.start_soon(slot)
    return list(recorder.runs.values())
