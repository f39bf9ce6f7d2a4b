"""The fleet under trio's virtual clock: hours of leases, faults and restarts in milliseconds, replayable by seed.

`python -m tests.simulation.leases --seeds 10000` runs as many as wanted; `--seed 42` replays one and prints its log.

One seed makes one world: a MemoryStore, workers with the real Worker and Runner on faulty connections, a simulated
engine, people who cancel, processes that die and come back, outages. When the storms are over, the world is given
time to settle, and `check` reads the store's log for broken promises. No threads run in here: the autojumping clock
does not wait for them.
"""

import argparse
import io
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import structlog
import trio
from PIL import Image

from inference.engines.base import Job
from inference.errors import (
    EngineFailed,
    EngineLost,
    I2VError,
    InvalidRequest,
    QueueFailed,
    QueueRefused,
    Refusal,
)
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.queues.item import Item
from inference.task import GenerationRequest, Lease, Video
from inference.testing.memory_queue import Faults, MemoryQueue
from inference.testing.memory_store import Event, MemoryStore
from tests.support.virtual import run_virtual

TERMINAL = ("completed", "failed", "cancelled")
SETTLE_S = 24 * 3600.0
"""How long a world may take to finish everything once nothing goes wrong any more."""


def photo_bytes() -> bytes:
    """The smallest photo that is one."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = photo_bytes()


class Broken(AssertionError):
    """A promise was broken; says which, and the seed that shows it."""


@dataclass(frozen=True)
class Generation:
    """One stretch of engine time, that is, of money."""

    worker: str
    item_id: str
    started_at: float
    ended_at: float


@dataclass(frozen=True)
class Upload:
    """One request that must not come from a worker without a lease: to store a video, or to report it."""

    worker_id: str
    item_id: str
    at_s: float


@dataclass
class SimulatedEngine:
    """Spends virtual time on a request whose prompt is the item's id; fails as told."""

    worker: str
    seconds: float
    ledger: list[Generation]
    fails: float = 0.0
    is_lost: float = 0.0
    hangs: float = 0.0
    pause: Callable[[], None] = lambda: None
    name: str = "simulated"
    stages: dict[str, float] = field(default_factory=lambda: {"render": 1.0})

    async def check(self):
        """See Engine."""

    async def generate(self, request: GenerationRequest, inputs: dict[str, Path], folder: Path, job: Job) -> Video:  # noqa: ARG002
        """See Engine."""
        started_at = anyio.current_time()
        paused_at = None
        try:
            chance = random.random()
            if request.prompt.startswith("bad"):
                raise InvalidRequest("this request is outside what the engine can do")
            for step in range(4):
                await anyio.sleep(self.seconds / 4)
                job.raise_if_cancelled()
                job.report("render", step + 1, 4)
            if chance < self.hangs:
                await anyio.sleep_forever()
            elif chance < self.hangs + self.fails:
                raise EngineFailed("a passing failure")
            elif chance < self.hangs + self.fails + self.is_lost:
                raise EngineLost("the device is gone")
            path = folder / "video.mp4"
            path.write_text(f"{request.prompt} by {self.worker}")
            paused_at = anyio.current_time()
            self.pause()
            return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=path.stat().st_size)
        finally:
            self.ledger.append(Generation(self.worker, request.prompt, started_at, paused_at or anyio.current_time()))


@dataclass
class MortalQueue(MemoryQueue):
    """A connection that goes silent when its process dies."""

    dead: bool = False
    pause: Callable[[], None] = lambda: None
    uploads: list[Upload] = field(default_factory=list)

    def _curse(self, lease: Lease, call: str) -> None:
        """Some tasks meet a call that never works for them: the queue is there, and has a bug."""
        if lease.task.item_id.startswith(f"no-{call}"):
            number = int(lease.task.item_id.rsplit("-", 1)[1])
            raise (QueueRefused if number % 2 else QueueFailed)(f"{call} never works for this task")

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """See TaskQueue."""
        self._curse(lease, "fetch")
        inputs = await MemoryQueue.fetch_inputs(self, lease, folder)
        self.pause()
        return inputs

    async def deliver(self, lease: Lease, video: Video) -> str:
        """See TaskQueue."""
        self._curse(lease, "deliver")
        self.uploads.append(Upload(lease.worker_id, lease.task.item_id, anyio.current_time()))
        path = await MemoryQueue.deliver(self, lease, video)
        self.pause()
        return path

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """See TaskQueue."""
        self._curse(lease, "complete")
        self.uploads.append(Upload(lease.worker_id, lease.task.item_id, anyio.current_time()))
        await MemoryQueue.complete(self, lease, storage_path, video)

    async def _call(self, operation):
        if self.dead:
            await anyio.sleep_forever()
        return await MemoryQueue._call(self, operation)


class World:
    """Everything one seed stands for."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.clock = trio.lowlevel.current_clock()
        self.folder = folder
        pick = self.random
        self.store = MemoryStore(clock=anyio.current_time, counts_repeated_failures=pick.random() < 0.5)
        self.generations: list[Generation] = []
        self.names = (f"w{number}" for number in itertools.count())
        self.lease_s = pick.choice([30.0, 60.0, 300.0])
        self.clip_s = pick.choice([3.0, 40.0, 150.0, 400.0])
        self.policy = Policy(
            heartbeat_interval_s=pick.choice([10.0, 30.0, 120.0]), attempt_limit_s=4 * self.clip_s + 10
        )
        calm = pick.random() < 0.25  # a quarter of the worlds have nothing but overtaken leases
        weather = 0.0 if calm else pick.choice([0.0, 0.03, 0.15])
        self.faults = Faults(
            lose_request=weather * pick.random(),
            lose_reply=weather * pick.random(),
            answer_500=weather * pick.random(),
            stall=weather * pick.random(),
            double_lease=pick.choice([0.0, 0.3]),
            delay_s=pick.choice([0.0, 0.1, 1.0]),
        )
        self.calm = calm
        self.pauses = 0.0 if calm else pick.choice([0.0, 0.1])
        self.engine_trouble = 0.0 if calm else pick.choice([0.0, 0.1])
        self.connections: list[MortalQueue] = []
        self.stopped: list[tuple[float, float]] = []  # the clock is one for all, so a pause stops every machine

    async def run(self) -> None:
        """Storms first, then fair weather until everything has ended."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._people)
            for _ in range(self.random.randint(1, 3)):
                tasks.start_soon(self._machine)
            await anyio.sleep(self.random.uniform(300, 3000))
            tasks.cancel_scope.cancel()
        self.engine_trouble = self.pauses = 0.0
        with anyio.move_on_after(SETTLE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._supervised)
                while any(self.store.get(item_id).status not in TERMINAL for item_id in self.store.items):
                    await anyio.sleep(60)
                tasks.cancel_scope.cancel()
                return
        raise Broken(f"unfinished after {SETTLE_S / 3600:g} h: {self.unfinished()}")

    async def _supervised(self) -> None:
        """A worker in fair weather, started again whenever it gives up."""
        while True:
            try:
                await self._worker(Faults()).run()
            except I2VError:
                await anyio.sleep(10)

    def unfinished(self) -> list[Item]:
        """Items without an end."""
        return [item for item in self.store.items.values() if item.status not in TERMINAL]

    def _worker(self, faults: Faults) -> Worker:
        name, pick = next(self.names), self.random
        queue = MortalQueue(
            store=self.store,
            worker_id=name,
            lease_s=self.lease_s,
            extension_s=self.lease_s,
            faults=faults,
            random=random.Random(pick.random()),
            pause=self._pause,
        )
        self.connections.append(queue)
        trouble = self.engine_trouble
        engine = SimulatedEngine(name, self.clip_s, self.generations, trouble, trouble / 3, trouble / 3, self._pause)
        runner = Runner(queue, engine, policy=self.policy, temp_dir=self.folder)
        return Worker(queue, runner, concurrency=pick.choice([1, 2, 3]), poll_interval_s=20, grace_s=8)

    def _pause(self) -> None:
        """The process is stopped past its lease (SIGSTOP, a frozen VM): time passes, and no task of it runs."""
        if self.random.random() < self.pauses:
            began_at = anyio.current_time()
            self.clock.jump(self.random.uniform(0.5, 1.5) * self.lease_s)
            self.stopped.append((began_at, anyio.current_time()))

    def allowance(self, until: float) -> float:
        """When something due at `until` can be noticed at the earliest: nobody notices while everything stands."""
        for began_at, ended_at in self.stopped:
            if began_at <= until < ended_at:
                until = ended_at
        return until

    async def _people(self) -> None:
        """Photos arrive, in bursts; now and then somebody changes their mind."""
        pick = self.random
        for number in range(pick.randint(2, 9)):
            kind = pick.random()
            name = "bad" if kind < 0.1 else "item"
            if kind > 0.93:
                name = f"no-{pick.choice(['fetch', 'deliver', 'complete'])}"
            item_id = f"{name}-{number}"
            body = b"not a photo" if 0.1 <= kind < 0.15 else PHOTO
            self.store.add(body, id=item_id, prompt=item_id)
            if pick.random() < 0.5:
                await anyio.sleep(pick.uniform(0, 200))
            if pick.random() < 0.2:
                try:
                    self.store.cancel(pick.choice(list(self.store.items)))
                except Refusal:
                    continue  # it had ended already

    async def _machine(self) -> None:
        """One box: a worker process that is stopped, killed, cut off, and started again."""
        pick = self.random
        while True:
            worker, queue = self._worker(self.faults), self.connections[-1]
            async with anyio.create_task_group() as process:

                async def run(worker: Worker = worker) -> None:
                    try:
                        await worker.run()
                    except I2VError:
                        return  # it gave up on its machine; the next loop is its supervisor

                process.start_soon(run)
                await anyio.sleep(pick.uniform(50, 1500))
                fate = "stop" if self.calm else pick.choice(["stop", "stop now", "kill", "cut off", "cut off"])
                if fate == "cut off":
                    queue.faults = Faults(lose_request=1)
                    await anyio.sleep(pick.uniform(10, 3 * self.lease_s))
                    queue.faults = self.faults
                    await anyio.sleep(pick.uniform(0, 200))
                if fate == "kill":
                    queue.dead = True
                    process.cancel_scope.cancel()
                elif fate == "stop now":
                    worker.stop_now()
                else:
                    worker.stop()
            await anyio.sleep(pick.uniform(0, 60))


def check(world: World) -> None:
    """Reads the log for broken promises. Trusts nothing that the store concluded by itself."""
    for item in world.store.items.values():
        events = [event for event in world.store.log if event.item_id == item.id]
        check_one_end(item, events, calm=world.calm)
        check_fenced(events)
        check_content(world, item)
        check_spent(world, item)
    for generation in world.generations:
        check_paid_for(world, generation)
        check_cancelled(world, generation)
    check_engines(world)
    check_uploads(world)
    left = list(world.folder.iterdir())
    if left:
        raise Broken(f"temporary files were left behind: {left}")


def check_one_end(item: Item, events: list[Event], *, calm: bool) -> None:
    """A task ends once, nothing touches it afterwards, and no worker that could speak left it in silence."""
    ends = [number for number, event in enumerate(events) if event.status in TERMINAL]
    if item.status not in TERMINAL or not ends:
        raise Broken(f"{item.id} never ended: {item.status}")
    if calm and item.crash_count + item.lost_count:
        raise Broken(f"a lease of {item.id} was left to run out, though every worker could have handed it back")
    later = [event for event in events[ends[0] + 1 :] if event.accepted]
    if later:
        raise Broken(f"{item.id} ended {events[ends[0]].status}, and then {later[0].verb} was accepted")


def check_fenced(events: list[Event]) -> None:
    """Only the latest lease writes."""
    holder = None
    for event in events:
        if event.verb == "lease":
            holder = event.worker_id
        elif event.verb in ("heartbeat", "complete", "fail", "release") and event.accepted:
            if event.worker_id != holder:
                raise Broken(f"{event.verb} by {event.worker_id} was accepted, but {holder} holds {event.item_id}")
            holder = None if event.verb == "release" else holder
        elif event.verb in ("cancel", "sweep") and event.status in TERMINAL:
            holder = None


def check_content(world: World, item: Item) -> None:
    """The video that was reported is the one that the reporting worker made for this task."""
    if item.status != "completed":
        return
    content = world.store.objects.get(item.video_storage_path, b"").decode()
    expected = f"{item.id} by {item.worker_id.split('.')[0]}"
    if content != expected:
        raise Broken(f"{item.id} delivers {content!r}, expected {expected!r}")


def check_spent(world: World, item: Item) -> None:
    """No task is generated over and over: every time is counted as a failure or a crash, or was a stop's doing."""
    runs = sum(generation.item_id == item.id for generation in world.generations)
    if runs > 40:
        raise Broken(f"{item.id} was generated {runs} times")


def check_paid_for(world: World, generation: Generation) -> None:
    """Engine time is spent only under a confirmed lease, and not past it."""
    leases: dict[str, list[Event]] = {}
    for event in world.store.log:
        ours = event.item_id == generation.item_id and (event.worker_id or "").split(".")[0] == generation.worker
        if ours and event.accepted and event.verb in ("lease", "heartbeat") and event.at_s <= generation.ended_at:
            leases.setdefault(event.worker_id, []).append(event)
    covered = 0.0
    for worker_id, events in leases.items():
        beats = [event for event in events if event.verb == "heartbeat" and event.at_s <= generation.started_at]
        if not beats:
            continue
        until = max(event.at_s for event in events) + world.lease_s
        taken_over = [
            event.at_s
            for event in world.store.log
            if event.item_id == generation.item_id
            and event.verb == "lease"
            and event.worker_id != worker_id
            and event.at_s > events[0].at_s
        ]
        if world.calm and taken_over:
            # Nobody lost a message, so an overtaken worker has to notice by its second beat at the latest when
            # the other one came in right behind it (the real server's race).
            travel_s = 4 * world.faults.delay_s + 1
            if taken_over[0] - events[0].at_s <= world.faults.double_lease_pause_s + travel_s:
                until = min(until, taken_over[0] + Policy().second_beat_s + travel_s)
        covered = max(covered, until)
    if generation.ended_at > world.allowance(covered):
        raise Broken(f"{generation} was not covered by a confirmed lease: {leases}")


def check_engines(world: World) -> None:
    """An engine serves one lease at a time, and none for longer than the limit of an attempt."""
    last_end: dict[str, float] = {}
    for generation in sorted(world.generations, key=lambda each: each.started_at):
        if generation.started_at < last_end.get(generation.worker, 0.0):
            raise Broken(f"{generation} began while the engine was busy")
        if generation.ended_at > world.allowance(generation.started_at + world.policy.attempt_limit_s) + 1:
            raise Broken(f"{generation} went on past its limit")
        last_end[generation.worker] = generation.ended_at


def check_uploads(world: World) -> None:
    """No upload and no report is sent by a worker whose lease has run out."""
    for upload in (each for connection in world.connections for each in connection.uploads):
        renewed_at = max(
            event.at_s
            for event in world.store.log
            if event.worker_id == upload.worker_id
            and event.verb in ("lease", "heartbeat")
            and event.accepted
            and event.at_s <= upload.at_s
        )
        if upload.at_s > renewed_at + world.lease_s:
            raise Broken(f"{upload} came after the lease of {renewed_at} had run out")


def check_cancelled(world: World, generation: Generation) -> None:
    """A cancelled task stops costing money by the next beat, where no message was lost."""
    asked_at = [
        event.at_s
        for event in world.store.log
        if event.item_id == generation.item_id and event.verb == "cancel" and event.status == "processing"
    ]
    patience_s = world.policy.heartbeat_interval_s + 4 * world.faults.delay_s + 1
    if world.calm and asked_at and generation.ended_at > max(asked_at[0], generation.started_at) + patience_s:
        raise Broken(f"{generation} went on after the task was cancelled at {asked_at[0]}")


def simulate(seed: int) -> World:
    """Builds and runs the world of one seed and checks it. Raises Broken; the same seed does the same again."""
    folder = Path(tempfile.mkdtemp(prefix="i2v-simulation-"))
    worlds: list[World] = []

    async def main() -> None:
        worlds.append(World(seed, folder))
        await worlds[0].run()

    try:
        run_virtual(main, seed=seed)
        check(worlds[0])
    except BaseExceptionGroup as group:
        raise Broken(f"seed {seed}: {group.exceptions}") from group
    except Broken as broken:
        raise Broken(f"seed {seed}: {broken}") from broken
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return worlds[0]


def quiet() -> None:
    """Warnings are what a simulation is made of; nobody reads millions of them."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=500, help="how many seeds to run (default 500)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--stop", action="store_true", help="stop at the first broken promise")
    parser.add_argument("--seed", type=int, help="replay this one, with its log")
    arguments = parser.parse_args()
    quiet()
    if arguments.seed is not None:
        world = simulate(arguments.seed)
        for event in world.store.log:
            print(event)
        return
    started = time.monotonic()
    broken, ends, leases = [], {}, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            world = simulate(seed)
        except Broken as error:
            broken.append(str(error))
            print(error, file=sys.stderr)
            if arguments.stop:
                break
            continue
        leases += sum(event.verb == "lease" for event in world.store.log)
        for item in world.store.items.values():
            ends[item.status] = ends.get(item.status, 0) + 1
    print(f"{arguments.seeds} seeds in {time.monotonic() - started:.1f} s: {leases} leases, tasks ended {ends}")
    print(f"broken promises: {len(broken)}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
