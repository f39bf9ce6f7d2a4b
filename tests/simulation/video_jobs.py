"""Pushed jobs under trio's virtual clock: hours of deliveries, dead instances and sweeps in milliseconds, by seed.

`python -m tests.simulation.video_jobs --seeds 10000` runs as many as wanted; `--seed 42` replays one and prints its
log.

One seed makes one world: a table in memory, which `tests/queues/video_jobs` holds to the one in PostgreSQL; instances
that run the real VideoJobsQueue and Runner over faulty connections, and are killed, stopped and paused; deliveries that
ask them for jobs and stop asking long before a dead holder counts as one; a sweep; and people who cancel. When the
storms are over, the world is given time to settle, and `check` reads the log for broken promises. No threads run in
here: the autojumping clock does not wait for them.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import trio

from inference.errors import I2VError, InvalidTask, QueueUnavailable, Refusal, StorageUnavailable
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.queues.video_jobs.queue import VideoJobsQueue
from inference.task import Lease
from inference.testing.memory_jobs import Event, MemoryJobs
from inference.testing.memory_queue import Faults
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from tests.simulation.leases import PHOTO, Broken, Generation, SimulatedEngine, quiet
from tests.support.virtual import run_virtual

ENDS = ("completed", "failed", "canceled")
SETTLE_S = 24 * 3600.0
"""How long a world may take to finish everything once nothing goes wrong any more."""

NOWHERE = Bucket("https://bucket.invalid", "videos", "key", "secret")


class FaultyQueue(VideoJobsQueue):
    """One instance's connection to a table and a bucket, both in memory. It goes silent when its process dies."""

    def __init__(self, world: "World", name: str, faults: Faults) -> None:
        super().__init__(world.jobs, worker_id=name, storage=Storage(), bucket=NOWHERE)
        self.world, self.faults, self.dead = world, faults, False
        self.random = random.Random(world.random.random())

    async def _lease_of(self, job):
        self.world.holders[job.attempt_id] = self._worker_id
        return await super()._lease_of(job)

    async def fetch_inputs(self, lease, folder):
        """See TaskQueue."""
        await self._travel(StorageUnavailable)
        found = {}
        for number, name in enumerate(lease.task.inputs):
            found[name] = folder / f"{number}.jpg"
            found[name].write_bytes(PHOTO)
        self.world.pause()
        return found

    async def get(self, key, target):
        """See VideoJobsQueue."""
        await self._travel(StorageUnavailable)
        if key not in self.world.objects:
            return False
        target.write_bytes(self.world.objects[key])
        return True

    async def put(self, key, path):
        """See VideoJobsQueue."""
        body = path.read_bytes()
        await self._travel(StorageUnavailable)
        self.world.store(key, body)
        self.world.pause()
        await self._travel(StorageUnavailable, back=True)

    async def _in_thread(self, call, *arguments):
        """A call to the database: it is carried out, or not, and its answer comes, or not."""
        await self._travel(QueueUnavailable)
        result = call(*arguments)
        await self._travel(QueueUnavailable, back=True)
        return result

    async def _travel(self, error: type[I2VError], *, back: bool = False) -> None:
        if self.dead:
            await anyio.sleep_forever()
        lost = self.faults.lose_reply if back else self.faults.lose_request
        await anyio.sleep(self.random.uniform(0, self.faults.delay_s))
        if self.random.random() < lost:
            await anyio.sleep(self.faults.timeout_s)
            raise error("the reply was lost" if back else "the request was lost")
        if self.dead:
            await anyio.sleep_forever()


@dataclass
class Instance:
    """One process that can be asked for a job; it works on one at a time."""

    name: str
    queue: FaultyQueue
    runner: Runner
    is_busy: bool = False
    is_gone: bool = False
    process: anyio.CancelScope = field(default_factory=anyio.CancelScope)  # what it is doing


class World:
    """Everything one seed stands for."""

    def __init__(self, seed: int, folder: Path) -> None:
        pick = self.random = random.Random(seed)
        self.clock = trio.lowlevel.current_clock()
        self.folder = folder
        self.stale_s = pick.choice([60.0, 120.0, 480.0])
        self.jobs = MemoryJobs(anyio.current_time, stale_s=self.stale_s)
        self.objects: dict[str, bytes] = {}
        self.overwritten: list[str] = []
        self.holders: dict[str, str] = {}  # instances, by attempt
        self.generations: list[Generation] = []
        self.clip_s = pick.choice([3.0, 40.0, 150.0, 600.0])
        self.policy = Policy(attempt_limit_s=4 * self.clip_s + 10)
        self.calm = pick.random() < 0.25
        weather = 0.0 if self.calm else pick.choice([0.0, 0.03, 0.15])
        self.faults = Faults(
            lose_request=weather * pick.random(),
            lose_reply=weather * pick.random(),
            delay_s=pick.choice([0.0, 0.1, 1.0]),
        )
        self.pauses = 0.0 if self.calm else pick.choice([0.0, 0.1])
        self.trouble = 0.0 if self.calm else pick.choice([0.0, 0.1])
        self.names = (f"i{number}" for number in itertools.count())
        self.instances: list[Instance] = []
        self.connections: list[FaultyQueue] = []
        self.stopped: list[tuple[float, float]] = []  # the clock is one for all, so a pause stops every instance
        self.is_over = False

    def store(self, key: str, body: bytes) -> None:
        """An upload; whether one was replaced is looked at in the end."""
        if key in self.objects and "/attempts/" in key:
            self.overwritten.append(key)
        self.objects[key] = body

    def pause(self) -> None:
        """The process is stopped past its lease (SIGSTOP, a frozen VM): time passes, and no task of it runs."""
        if self.random.random() < self.pauses:
            began_at = anyio.current_time()
            self.clock.jump(self.random.uniform(0.5, 1.5) * self.stale_s)
            self.stopped.append((began_at, anyio.current_time()))

    async def run(self) -> None:
        """Storms first, then fair weather until everything has ended."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._people, tasks)
            tasks.start_soon(self._sweeps, tasks)
            for _ in range(self.random.randint(1, 3)):
                tasks.start_soon(self._machine)
            await anyio.sleep(self.random.uniform(300, 3000))
            tasks.cancel_scope.cancel()
        self.trouble = self.pauses = 0.0
        self.is_over = True
        with anyio.move_on_after(SETTLE_S):
            async with anyio.create_task_group() as tasks:
                self._start()
                tasks.start_soon(self._sweeps, tasks)
                while any(job.status not in ENDS for job in self.jobs.rows.values()):
                    await anyio.sleep(60)
                tasks.cancel_scope.cancel()
                return
        left = [job for job in self.jobs.rows.values() if job.status not in ENDS]
        raise Broken(f"unfinished after {SETTLE_S / 3600:g} h: {left}")

    def _start(self) -> Instance:
        name = next(self.names)
        queue = FaultyQueue(self, name, Faults() if self.is_over else self.faults)
        engine = SimulatedEngine(
            name, self.clip_s, self.generations, self.trouble, self.trouble / 3, self.trouble / 3, self.pause
        )
        instance = Instance(name, queue, Runner(queue, engine, policy=self.policy, temp_dir=self.folder))
        self.instances = [each for each in self.instances if not each.is_gone] + [instance]
        self.connections.append(queue)
        return instance

    async def _machine(self) -> None:
        """One instance after the other, each stopped or killed in the end, whatever it is doing."""
        pick = self.random
        while True:
            instance = self._start()
            await anyio.sleep(pick.uniform(50, 1500))
            instance.is_gone = True
            instance.queue.dead = not self.calm and pick.random() < 0.5  # killed; else it hands back
            instance.process.cancel()
            await anyio.sleep(pick.uniform(0, 60))

    async def _deliver(self, job_id: str) -> None:
        """One delivery: an instance is asked for a job, again after 503, until the caller's patience ends."""
        give_up_at = anyio.current_time() + self.random.uniform(30, 300)
        while anyio.current_time() < give_up_at:
            free = [each for each in self.instances if not each.is_busy and not each.is_gone]
            if free and await self._ask(self.random.choice(free), job_id):
                return
            await anyio.sleep(self.random.uniform(1, 30))

    async def _ask(self, instance: Instance, job_id: str) -> bool:
        """Whether the job has ended, so that nobody need ask again."""
        instance.is_busy, instance.process = True, anyio.CancelScope()
        try:
            with instance.process:
                # As `leasing.taking` has it: an abandoned request may still acquire a job, which nobody would work on.
                with anyio.CancelScope(shield=True), anyio.fail_after(30):
                    found = await instance.queue.acquire(job_id)
                if not isinstance(found, Lease):
                    return found.has_ended
                return (await instance.runner.run(found)).status in ("completed", "failed", "cancelled")
        except InvalidTask:
            return True
        except (I2VError, TimeoutError):
            return False
        finally:
            instance.is_busy = False
        return False

    async def _sweeps(self, tasks: anyio.abc.TaskGroup) -> None:
        """Every minute: what waits for long, and what the dead held, is asked for again."""
        while True:
            await anyio.sleep(60)
            swept = self.jobs.sweep(300)
            for job_id in dict.fromkeys((*swept.requeued, *swept.waiting)):
                tasks.start_soon(self._deliver, job_id)

    async def _people(self, tasks: anyio.abc.TaskGroup) -> None:
        """Jobs are added, and mostly asked for; now and then somebody changes their mind."""
        pick = self.random
        for number in range(pick.randint(2, 9)):
            kind = pick.random()
            job_id = f"{'bad' if kind < 0.1 else 'job'}-{number}"
            content = {"photo": 7} if 0.1 <= kind < 0.15 else {"photo": "a.jpg", "prompt": job_id}
            self.jobs.add(job_id, content)
            if pick.random() < 0.8:  # else whoever added it was killed before it had asked
                for _ in range(pick.choice([1, 1, 2])):
                    tasks.start_soon(self._deliver, job_id)
            if pick.random() < 0.5:
                await anyio.sleep(pick.uniform(0, 200))
            if pick.random() < 0.25:
                try:
                    self.jobs.cancel(pick.choice(list(self.jobs.rows)))
                except Refusal:
                    continue  # it had ended already


def check(world: World) -> None:
    """Reads the log for broken promises. Trusts nothing that the table concluded by itself."""
    for job in world.jobs.rows.values():
        events = [event for event in world.jobs.log if event.job_id == job.id]
        check_one_end(job.id, job.status, events)
        check_fenced(job.id, events)
        if any(event.verb == "cancel" for event in events) and job.status != "canceled":
            raise Broken(f"{job.id} was cancelled before its end, and ended {job.status}")
        if job.status == "completed":
            check_content(world, job.id, job.attempt_id, job.artifact_key)
        if world.calm and job.crashes + job.losses:
            raise Broken(f"a holder of {job.id} was left to die, though every one could have handed it back")
    for generation in world.generations:
        check_covered(world, generation)
    if world.overwritten:
        raise Broken(f"videos were replaced: {world.overwritten}")
    if left := list(world.folder.iterdir()):
        raise Broken(f"temporary files were left behind: {left}")


def check_one_end(job_id: str, status: str, events: list[Event]) -> None:
    """A job ends once, and nothing touches it afterwards."""
    ends = [number for number, event in enumerate(events) if event.status in ENDS and event.accepted]
    if status not in ENDS or not ends:
        raise Broken(f"{job_id} never ended: {status}")
    if later := [event for event in events[ends[0] + 1 :] if event.accepted]:
        raise Broken(f"{job_id} ended {events[ends[0]].status}, and then {later[0].verb} was accepted")


def check_fenced(job_id: str, events: list[Event]) -> None:
    """Only the latest attempt writes, and no attempt is made twice."""
    holder, seen = None, set()
    for event in events:
        if not event.accepted:
            continue
        if event.verb == "acquire":
            if event.attempt_id in seen:
                raise Broken(f"attempt {event.attempt_id} of {job_id} was made twice")
            holder = event.attempt_id
            seen.add(holder)
        elif event.verb in ("beat", "complete", "fail", "release"):
            if event.attempt_id != holder:
                raise Broken(f"{event.verb} by {event.attempt_id} was accepted, but {holder} holds {job_id}")
            holder = holder if event.verb == "beat" else None
        elif event.verb in ("requeue", "sweep"):
            holder = None


def check_content(world: World, job_id: str, attempt_id: str | None, key: str | None) -> None:
    """The video that was reported is the one that this attempt made for this job, where the contract says."""
    if not (key or "").startswith(f"video-jobs/{job_id}/attempts/{attempt_id}/final"):
        raise Broken(f"{job_id} of attempt {attempt_id} lies at {key}")
    made_by = world.jobs.rows[job_id].worker
    if world.objects[key] != f"{job_id} by {made_by}".encode():
        raise Broken(f"{job_id} delivers {world.objects[key]!r}, and {made_by} reported it")


def check_covered(world: World, generation: Generation) -> None:
    """Engine time is spent only under a lease that was confirmed, and not past it."""
    mine = [
        event
        for event in world.jobs.log
        if event.verb == "beat"
        and event.accepted
        and event.job_id == generation.item_id
        and event.at_s <= generation.ended_at
        and world.holders.get(event.attempt_id) == generation.worker
    ]
    until = max((event.at_s for event in mine), default=0.0) + world.stale_s
    for began_at, ended_at in world.stopped:
        if began_at <= until < ended_at:
            until = ended_at
    if not mine or generation.ended_at > until:
        raise Broken(f"{generation} was not covered by a confirmed lease: {mine}")


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
        for event in simulate(arguments.seed).jobs.log:
            print(event)
        return
    started, broken, ends, attempts = time.monotonic(), [], {}, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            world = simulate(seed)
        except Broken as error:
            broken.append(str(error))
            print(error, file=sys.stderr)
            if arguments.stop:
                break
            continue
        for job in world.jobs.rows.values():
            ends[job.status] = ends.get(job.status, 0) + 1
            attempts += job.attempts
    print(f"{arguments.seeds} seeds in {time.monotonic() - started:.1f} s: {attempts} attempts, jobs ended {ends}")
    print(f"broken promises: {len(broken)}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
