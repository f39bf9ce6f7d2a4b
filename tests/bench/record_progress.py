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
import time
from pathlib import Path
from typing import Any

import anyio
import structlog

from inference.build.engines import load_engine
from inference.engines.base import Engine
from inference.engines.preview import PreviewEngine
from inference.engines.runway.engine import RunwayEngine
from inference.leasing.runner import Runner
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.progress.stages import Progress, Sink
from inference.settings import Settings
from inference.task import QUEUE_FPS, Lease
from inference.testing.memory_queue import Faults, MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.support.runway_server import RunwayServer

FOLDER = Path(__file__).parents[1] / "progress" / "recorded"
PHOTO = Path(__file__).parents[2] / "inference" / "assets" / "sample.jpg"
RUNS = 8
"""Of each kind. A queue's messages take up to 0.3 s each way."""

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
        begun = time.monotonic()

        def note(progress: Progress) -> None:
            at = round(time.monotonic() - begun, 3)
            if not run or progress.stage != run[-1][1] or at - run[-1][0] >= THINNED_S:
                run.append((at, progress.stage, round(progress.fraction, 5)))

        return note


async def record(engine: Engine, *, seconds: float, at_once: int = 1) -> list[Run]:
    """Runs of tasks alike: two leases more than the engine takes `at_once`."""
    store = MemoryStore()
    for number in range(RUNS):
        store.add(PHOTO.read_bytes(), id=f"item-{number}", frame_num=round(seconds * QUEUE_FPS) + 1)
    recorder = Recorder()
    queue = MemoryQueue(store, faults=Faults(delay_s=0.3))
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            queue,
            engine,
            temp_dir=Path(folder),
            sink=recorder.sink,
            ledger=Ledger(MemoryRecords()),
            at_once=at_once,
        )

        async def slot() -> None:
            while lease := await queue.lease():
                outcome = await runner.run(lease)
                assert outcome.status == "completed", outcome

        async with anyio.create_task_group() as tasks:
            for _ in range(at_once + 1):
                tasks.start_soon(slot)
    return list(recorder.runs.values())


async def preview() -> dict[str, list[Run]]:
    """Two lengths, one after the other, while another lease waits for its turn."""
    return {f"preview {seconds:g} s": await record(PreviewEngine(), seconds=seconds) for seconds in (4.0, 12.0)}


async def runway() -> dict[str, list[Run]]:
    """Three at once, of which two run; each takes another number of looks, twice a second."""
    die = random.Random(7)
    with RunwayServer(concurrency=2) as server:
        engine = RunwayEngine(server.key, base_url=server.url, trusted_origins=[server.url], poll_interval_s=0.5)
        make = server.create

        def create(body: Any) -> tuple[int, Any]:
            server.pending_looks, server.running_looks = die.randint(2, 12), die.randint(25, 50)
            return make(body)

        server.create = create
        return {"runway 5 s": await record(engine, seconds=5.0, at_once=3)}


async def wan() -> dict[str, list[Run]]:
    """The tiny checkpoint on a CPU: text, denoising and decoding as with the real one."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.isolated(engine="wan", wan_preset="tiny", weights_dir=Path(folder), wan_area_px=160 * 96)
        engine = await load_engine(settings)
        return {"wan tiny 5 s": await record(engine, seconds=5.0)}


RECORDINGS = {"preview": preview, "runway": runway, "wan": wan}


def main() -> None:
    """Records what is named, or everything."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or RECORDINGS:
        kinds = anyio.run(RECORDINGS[name])
        lines = (f"{json.dumps(kind)}: [\n" + ",\n".join(map(json.dumps, runs)) + "\n]" for kind, runs in kinds.items())
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        for kind, runs in kinds.items():
            print(kind, *(f"{run[-1][0]:.1f} s" for run in runs))


if __name__ == "__main__":
    main()
