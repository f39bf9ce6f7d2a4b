"""GmAnimato's queue under trio's virtual clock: the real adapter, runner and worker on a network that misbehaves.

`python -m tests.simulation.gmanimato --seeds 10000` runs as many as wanted; `--seed 42` replays one and prints its log.

One seed makes one world: the application of `tests/support`, whose webhook keeps no order and fences nothing; workers
with the real Worker, Runner and GmAnimatoQueue; a network that loses requests and answers, delays them, lets some
arrive after their sender has given up, and answers as gateways do; addresses of the webhook that lead nowhere;
processes that are stopped, killed and started again. `check` then reads the application's log for broken promises.
No threads run in here: the autojumping clock does not wait for them.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.abc
import httpx

from inference.errors import I2VError, InvalidPhoto, InvalidTask, StorageUnavailable
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.queues.gmanimato import GmAnimatoQueue
from inference.queues.gmanimato_wire import LOCAL, VIDEO_ID
from inference.task import Lease
from inference.transfer.storage import Storage
from tests.simulation.leases import Broken, Generation, SimulatedEngine, quiet
from tests.support.gmanimato_app import DATABASE_DOWN, GATEWAY_DOWN, Answer, Application
from tests.support.virtual import run_virtual

URL = "http://127.0.0.1:5173"
TERMINAL = ("completed", "failed")

LATE_S = 2.5
"""How long after its sender gave up a request may still be carried out. Nothing in the protocol bounds it; the adapter
waits for `SETTLE_S`, and what comes later than that would undo the end of a job."""

SETTLE_S = 24 * 3600.0
"""How long a world may take to hand out everything once nothing goes wrong any more."""


@dataclass
class Weather:
    """How badly the network behaves: probabilities for each request, and seconds."""

    refused: float = 0.0  # nobody listens, so nothing is sent
    lost: float = 0.0  # the connection breaks before the request arrives
    reply_lost: float = 0.0  # it breaks after it was carried out
    late: float = 0.0  # it breaks, or a gateway answers, and the request is carried out after that
    hangs: float = 0.0  # no answer ever comes; carried out in one case of two
    failing: float = 0.0  # the application answers 500, or a gateway 502
    delay_s: float = 0.0  # up to this long each way

    def fate(self, pick: random.Random) -> str:
        """What becomes of one request."""
        chance = pick.random()
        for name in ("refused", "lost", "reply_lost", "late", "hangs", "failing"):
            chance -= getattr(self, name)
            if chance < 0:
                return name
        return "fine"


@dataclass
class Network(httpx.AsyncBaseTransport):
    """One process's way to the application."""

    app: Application
    weather: Weather
    random: random.Random
    beside: anyio.abc.TaskGroup  # where late requests travel, however their sender fares
    dead: bool = False  # the process was killed: nothing leaves it

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        await request.aread()
        if self.dead:
            await anyio.sleep_forever()
        await self._travel()
        fate = self.weather.fate(self.random)
        if request.url.scheme == "https" or request.url.port != 5173 or fate == "refused":
            raise httpx.ConnectError("nobody listens")
        match fate:
            case "lost":
                raise httpx.ReadError("broken")
            case "late":
                self.beside.start_soon(self._late, request)
                if self.random.random() < 0.5:
                    raise httpx.ReadError("broken")
                return _response(Answer(504, {"Content-Type": "text/html"}, b"<h1>Gateway Timeout</h1>"))
            case "hangs":
                if self.random.random() < 0.5:
                    self._carry_out(request)
                await anyio.sleep_forever()
            case "failing":
                fault = self.random.choice([DATABASE_DOWN, GATEWAY_DOWN])
                return _response(fault.answer or Answer(500, {}, b""))
        answer = self._carry_out(request)
        await self._travel()
        if fate == "reply_lost":
            raise httpx.ReadError("broken")
        return _response(answer)

    async def _late(self, request: httpx.Request) -> None:
        await anyio.sleep(self.random.uniform(0, LATE_S))
        self._carry_out(request)

    def _carry_out(self, request: httpx.Request) -> Answer:
        return self.app.handle(request.method, request.url.path, request.headers, request.content, origin=URL)[1]

    async def _travel(self) -> None:
        await anyio.sleep(self.random.uniform(0, self.weather.delay_s))


def _response(answer: Answer) -> httpx.Response:
    return httpx.Response(answer.status, headers=answer.headers, content=answer.body)


@dataclass
class Process:
    """One worker, and what it took."""

    name: str
    network: Network
    queue: "SimulatedQueue"
    worker: Worker
    ended_by: str = ""  # stop, stop now, kill, or gave up

    def end(self, fate: str) -> None:
        """Notes how it ended; the first time counts."""
        self.ended_by = self.ended_by or fate


class SimulatedQueue(GmAnimatoQueue):
    """The real adapter, without its threads, and with photos that are not fetched."""

    def __init__(self, world: "World", name: str, network: Network) -> None:
        super().__init__(URL, world.app.secret, worker_id=name, storage=Storage(transport=network), transport=network)
        self._world = world
        self.taken: set[str] = set()  # videos
        self.malformed: set[str] = set()

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """See TaskQueue."""
        try:
            lease = await super().lease(item_id)
        except InvalidTask as error:
            self.malformed.add(str(error.item_id).removeprefix(LOCAL))
            raise
        if lease is not None:
            self.taken.add(lease.task.extras[VIDEO_ID])
        return lease

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:  # noqa: ARG002
        """See TaskQueue."""
        await anyio.sleep(1)
        chance = self._world.random.random()
        if chance < self._world.trouble:
            raise self._world.random.choice([InvalidPhoto("no photo"), StorageUnavailable("the storage is away")])
        return {}

    async def _content_of(self, path: Path) -> bytes:
        return path.read_bytes()  # noqa: ASYNC240 - no threads in here


class World:
    """Everything one seed stands for."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = pick = random.Random(seed)
        self.folder = folder
        self.app = Application(clock=anyio.current_time, origin=URL)
        self.app.callbacks = pick.choice(["right", "right", "absent", "https", "given"])
        self.app.callback_url = "http://127.0.0.1:9/elsewhere"
        self.names = (f"w{number}" for number in itertools.count())
        self.clip_s = pick.choice([0.5, 3.0, 40.0, 150.0])
        self.policy = Policy(attempt_limit_s=4 * self.clip_s + 10)
        self.calm = pick.random() < 0.25
        badness = 0.0 if self.calm else pick.choice([0.01, 0.05, 0.15])
        self.weather = Weather(*(badness * pick.random() for _ in range(6)), delay_s=pick.choice([0.0, 0.1, 1.0, 3.0]))
        self.trouble = 0.0 if self.calm else pick.choice([0.0, 0.1])
        self.generations: list[Generation] = []
        self.processes: list[Process] = []

    async def run(self) -> None:
        """Storms first, then fair weather until everything was handed out and has ended."""
        async with anyio.create_task_group() as self.beside:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._people)
                for _ in range(self.random.randint(1, 3)):
                    tasks.start_soon(self._machine)
                await anyio.sleep(self.random.uniform(100, 1500))
                for process in self.processes:
                    process.end("kill")
                    process.network.dead = True
                tasks.cancel_scope.cancel()
            await self._drain()

    async def _drain(self) -> None:
        self.trouble = 0.0
        with anyio.move_on_after(SETTLE_S):
            process = self._process(Weather())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(process.worker.run)
                while any(job.status == "in_queue" for job in self.app.jobs.values()):
                    await anyio.sleep(20)
                process.worker.stop()
            await anyio.sleep(60)
            return
        raise Broken(f"not handed out within {SETTLE_S / 3600:g} h")

    def _process(self, weather: Weather) -> Process:
        name, pick = next(self.names), self.random
        network = Network(self.app, weather, random.Random(pick.random()), self.beside)
        queue = SimulatedQueue(self, name, network)
        engine = SimulatedEngine(
            name, self.clip_s, self.generations, fails=self.trouble, is_lost=self.trouble / 3, hangs=self.trouble / 3
        )
        runner = Runner(queue, engine, policy=self.policy, temp_dir=self.folder)
        grace_s = pick.choice([0.0, 8.0, 400.0])
        worker = Worker(queue, runner, concurrency=pick.choice([1, 1, 2]), poll_interval_s=5, grace_s=grace_s)
        self.processes.append(Process(name, network, queue, worker))
        return self.processes[-1]

    async def _people(self) -> None:
        """Jobs arrive, in bursts; some are malformed, and some cannot be prepared by the application."""
        pick = self.random
        for number in range(pick.randint(2, 9)):
            kind = pick.random()
            fields = {"workflow": None} if kind < 0.1 else {}
            error = "Error: Failed to fetch image: 403" if kind > 0.93 else None
            self.app.add(b"photo", error=error, video_id=f"video-{number}", **fields)
            if pick.random() < 0.5:
                await anyio.sleep(pick.uniform(0, 200))

    async def _machine(self) -> None:
        """One box: a worker process that is stopped, killed, cut off, and started again."""
        pick = self.random
        while True:
            process = self._process(self.weather)
            async with anyio.create_task_group() as tasks:

                async def run(process: Process = process) -> None:
                    try:
                        await process.worker.run()
                    except I2VError:
                        process.end("gave up")  # the next loop is its supervisor

                tasks.start_soon(run)
                await anyio.sleep(pick.uniform(30, 900))
                fate = pick.choice(["stop", "stop now"] if self.calm else ["stop", "stop now", "kill", "cut off"])
                if fate == "cut off":
                    process.network.weather = Weather(refused=0.5, hangs=0.5)
                    await anyio.sleep(pick.uniform(10, 240))
                    process.network.weather = self.weather
                    await anyio.sleep(pick.uniform(0, 200))
                    fate = "stop"
                process.end(fate)
                if fate == "kill":
                    process.network.dead = True
                    tasks.cancel_scope.cancel()
                elif fate == "stop now":
                    process.worker.stop_now()
                else:
                    process.worker.stop()
            await anyio.sleep(pick.uniform(0, 60))


def check(world: World) -> None:
    """Reads the application's log for broken promises."""
    holders: dict[str, Process] = {}
    for process in world.processes:
        for video_id in process.queue.taken | process.queue.malformed:
            if video_id in holders:
                raise Broken(f"{video_id} was taken twice")
            holders[video_id] = process
    for job in world.app.jobs.values():
        check_end(world, job.id, holders.get(job.id))
    left = list(world.folder.iterdir())
    if left:
        raise Broken(f"temporary files were left behind: {left}")


def check_end(world: World, video_id: str, holder: Process | None) -> None:
    """One end, in the same words each time; nothing after it; none left out by a worker that could speak."""
    job, ends = world.app.jobs[video_id], world.app.finals(video_id)
    if any(end.body != ends[0].body for end in ends):
        raise Broken(f"{video_id} ended in two ways: {[end.body for end in ends]}")
    undone = [call for call in world.app.after_the_end(video_id) if not call.is_final]
    if undone:
        raise Broken(f"{video_id} had ended, and then came {undone[0].body}")
    if world.calm and len(ends) > 1:
        raise Broken(f"{video_id} was ended {len(ends)} times, though no answer was lost")
    if ends and job.status != ends[0].body["status"]:
        raise Broken(f"{video_id} is {job.status}, though its end said {ends[0].body['status']}")
    if holder is not None and not ends and not may_be_silent(world, video_id, holder):
        raise Broken(f"{video_id} was taken by {holder.name}, which was not killed, and never ended")
    if job.status == "completed":
        assert holder is not None
        key = (job.final_url or "").removeprefix(f"{URL}/media/")
        if world.app.objects[key].decode() != f" by {holder.name}":
            raise Broken(f"{video_id} has the video of another")


def may_be_silent(world: World, video_id: str, holder: Process) -> bool:
    """Whether the worker that took a job has an excuse for never ending it.

    It was killed; or it was stopped, or the job is malformed, and what it sent in the few seconds that it has then was
    lost.
    """
    if holder.ended_by == "kill":
        return True
    is_brief = holder.ended_by in ("stop", "stop now") or video_id in holder.queue.malformed
    return not world.calm and is_brief and not any(call.is_final for call in world.app.webhooks(video_id))


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
        for call in simulate(arguments.seed).app.asked:
            print(f"{call.at_s:9.1f} {call.method} {call.path} {call.status} {str(call.body)[:100]}")
        return
    started = time.monotonic()
    broken, ends, calls = 0, {}, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            world = simulate(seed)
        except Broken as error:
            broken += 1
            print(error, file=sys.stderr)
            if arguments.stop:
                break
            continue
        calls += len(world.app.asked)
        for job in world.app.jobs.values():
            ends[job.status] = ends.get(job.status, 0) + 1
    print(f"{arguments.seeds} seeds in {time.monotonic() - started:.1f} s: {calls} calls, jobs ended {ends}")
    print(f"broken promises: {broken}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
