"""A day of a fleet: how soon tasks begin, how busy the GPUs are, and what it costs, against a GPU rented all day.

    python -m tests.bench.day [--volumes 40 400 2000] [--clip-seconds 12] [--seed 1]
    python -m tests.bench.day --calls     cron against calls of /wake, 2 to 8 containers, cold starts of 60 to 8 s

The real Dispatcher, WarmWorker, Runner and Worker run under the virtual clock; platform, engine and network are
simulated, and what they take is stated below. Nothing here is a measurement of Modal or of a GPU. Families upload 5
to 40 photos at once, seldom at night and mostly in the evening; every arm gets the same day.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio

from inference.fleet.containers import Sized
from inference.fleet.dispatch import Dispatcher
from inference.fleet.plan import Rules
from inference.fleet.readings import Readings
from inference.fleet.warm_worker import WarmWorker
from inference.leasing.polling import Worker
from inference.leasing.runner import Runner
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.testing.memory_queue import Faults, MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.simulation.fleet import Container, SimulatedPool, cron
from tests.simulation.leases import PHOTO, TERMINAL, SimulatedEngine, quiet
from tests.support.virtual import run_virtual

HOUR_S, DAY_S = 3600.0, 86_400.0

# What is assumed. Seconds.
CLIP_S = 12.0
"""A14B, 480p, 81 frames, 4 steps on one H100: the *target* of performance.md, measured by nobody yet."""

COLD_STARTS_S = (60.0, 20.0)
"""From a spawn to loaded weights. Unmeasured: a minute for 57 GB from an image's disk; 20 s with a snapshot."""

PHOTO_S, VIDEO_S, ONE_WAY_S = 0.5, 1.5, 0.2
"""To download a photo, to upload a clip; each message to the queue takes up to so long each way."""

CRON_OVERHEAD_S = 5.0
"""Billed around each tick: start, imports, and two seconds of scaledown."""

CALL_S = 5.0
"""From an upload to the tick that its call of /wake starts: the cold starts of two small containers, the web endpoint's
and the tick's. Unmeasured."""

ENDPOINT_S = 12.0
"""For which the endpoint's container is billed after each call: its start, and ten seconds of scaledown."""

GRID_CONTAINERS, GRID_COLD_STARTS_S = (2, 4, 8), (60.0, 20.0, 8.0)
"""8 s: a snapshot of a GPU's memory, which is said to be possible and was tried by nobody here."""

LINGER_S, POLL_S, CONTAINERS, INPUTS = 0.0, 5.0, 2, 2
"""The defaults of settings.py and fleet.py."""

# Prices in dollars, as price lists of 2026 quote them (seen 2026-11-21 in comparisons of May and June 2026, such as
# beam.cloud/blog/modal-pricing-explained; not at the vendors themselves). Without a region, preemptible.
H100_USD_S, CORE_USD_S, GIB_USD_S = 0.001097, 0.0000131, 0.00000222
GPU_USD_S = H100_USD_S + 4 * CORE_USD_S + 32 * GIB_USD_S  # what app.py asks for beside the GPU
CRON_USD_S = 0.25 * CORE_USD_S + 0.5 * GIB_USD_S
ENDPOINT_USD_S = 0.125 * CORE_USD_S + 0.25 * GIB_USD_S

RENTED_USD_H = {"low": 1.80, "list": 2.69, "high": 3.78}
"""One H100 by the hour: RunPod community from 1.80, RunPod secure SXM 2.69, Lambda SXM 3.78 (same sources)."""

# Uploads by hour of the day, relative: quiet nights, an evening peak.
WEIGHTS = [0.1] * 7 + [1.0] * 10 + [2.0] * 2 + [4.0] * 3 + [1.0, 0.3]


def arrivals(volume: int, seed: int) -> list[float]:
    """When each photo of a day appears, in order."""
    pick, times = random.Random(seed), []
    while len(times) < volume:
        hour = pick.choices(range(24), WEIGHTS)[0]
        began_at = HOUR_S * (hour + pick.random())
        photos = min(pick.randint(5, 40), volume - len(times))
        times += [began_at + number * pick.uniform(0.5, 1.5) for number in range(photos)]
    return sorted(time for time in times if time < DAY_S) + [DAY_S - 1] * sum(time >= DAY_S for time in times)


class Shop(MemoryStore):
    """A store that puts finished items away: looking through thousands of them at every poll is not the subject."""

    def __init__(self):
        super().__init__(clock=anyio.current_time)
        self.finished = 0

    def complete(self, item_id, *arguments, **options):
        """See MemoryStore."""
        item = super().complete(item_id, *arguments, **options)
        del self.items[item_id]
        self.finished += 1
        return item


class Line(MemoryQueue):
    """A connection on which everything takes its time."""

    async def fetch_inputs(self, lease, folder):
        """See TaskQueue."""
        await anyio.sleep(PHOTO_S)
        return await MemoryQueue.fetch_inputs(self, lease, folder)

    async def deliver(self, lease, video):
        """See TaskQueue."""
        await anyio.sleep(VIDEO_S)
        return await MemoryQueue.deliver(self, lease, video)


@dataclass
class Day:
    """One arm's day while it runs."""

    store: Shop
    folder: Path
    clip_s: float
    generations: list
    arrived: Callable = lambda: None  # called for each photo that appears

    def line(self, name, lease_s=600.0):
        """A connection to the queue."""
        return Line(self.store, worker_id=name, lease_s=lease_s, faults=Faults(delay_s=ONE_WAY_S))

    def runner(self, name):
        """A runner on an engine of its own, and its connection."""
        queue = self.line(name)
        return queue, Runner(queue, SimulatedEngine(name, self.clip_s, self.generations), temp_dir=self.folder)


@dataclass
class Arm:
    """One way to work: `start` runs beside the arrivals, and tells the spans for which GPUs were loaded and billed."""

    name: str
    work: Callable
    cold_start_s: float | None = None
    is_rented: bool = False


class Ticks:
    """The function `dispatch`: one tick at a time, by the cron and, where it is called, by /wake as well."""

    def __init__(self, tick, group):
        self._tick, self._group = tick, group
        self._free = anyio.Lock()
        self._asked = False
        self.took_s = []
        self.calls = []  # when

    def wake(self):
        """One call, which brings a tick unless one was asked for that has not begun (on_modal/ticks.py)."""
        self.calls.append(anyio.current_time())
        if not self._asked:
            self._asked = True
            self._group.start_soon(self._woken)

    async def _woken(self):
        await anyio.sleep(CALL_S)
        await self.tick()

    async def tick(self):
        """See Dispatcher."""
        async with self._free:
            self._asked = False
            began_at = anyio.current_time()
            try:
                return await self._tick()
            finally:
                self.took_s.append(anyio.current_time() - began_at)

    def usd(self):
        """What ticks and the endpoint cost."""
        open_s, until = 0.0, 0.0
        for at in self.calls:
            open_s += max(0.0, at + ENDPOINT_S - max(at, until))
            until = max(until, at + ENDPOINT_S)
        return sum(took_s + CRON_OVERHEAD_S for took_s in self.took_s) * CRON_USD_S + open_s * ENDPOINT_USD_S


def fleet(
    *, drain: bool, cold_start_s: float, linger_s: float = LINGER_S, containers: int = CONTAINERS, calls: bool = False
) -> Callable:
    """The cron and containers, as app.py wires them; with `calls`, every upload calls /wake."""

    async def work(day, group):
        records = MemoryRecords()

        def open_warm_worker(container: Container) -> WarmWorker:
            queue, runner = day.runner(container.name)
            drain_s = 12_600.0 if drain else 0.0
            return WarmWorker(
                "gpu", queue, runner, Readings(records), drain_s=drain_s, linger_s=linger_s, poll_interval_s=POLL_S
            )

        pool = SimulatedPool(
            group,
            open_warm_worker,
            name="gpu",
            max_containers=containers,
            inputs=INPUTS,
            cold_start_s=cold_start_s,
            scaledown_s=2.0 if drain else max(2.0, linger_s),
        )
        dispatcher = Dispatcher(
            {None: day.line("cron", 960)},
            {"gpu": (Sized(slots=containers * INPUTS, engines=containers), pool)},
            Readings(records),
            Ledger(records),
            Rules(),
            price_usd=lambda _task: None,  # there is no pool that takes money
        )
        ticks = Ticks(dispatcher.tick, group)
        group.start_soon(cron, ticks.tick)
        if calls:
            day.arrived = ticks.wake
        return lambda: {
            "loaded": [(each.warm_at, each.ended_at) for each in pool.history],
            "billed_s": sum(each.ended_at - each.began_at for each in pool.history),
            "containers": len(pool.history),
            "cron_usd": ticks.usd(),
            "is_idle": not pool.containers,
        }

    return work


def rented(loop: Callable) -> Callable:
    """A GPU that is there all day."""

    async def work(day, group):
        group.start_soon(loop, day)
        return lambda: {
            "loaded": [(0.0, float("inf"))],
            "billed_s": DAY_S,
            "containers": 1,
            "cron_usd": 0.0,
            "is_idle": True,
        }

    return work


def documented(reload_s: float) -> Callable:
    """The worker of the documents: poll, download, generate, upload, report, one after the other."""

    async def loop(day):
        queue = day.line("rented")
        while True:
            lease = await queue.lease()
            if lease is None:
                await anyio.sleep(POLL_S)
                continue
            await queue.heartbeat(lease)
            await queue.fetch_inputs(lease, day.folder)
            await anyio.sleep(reload_s)
            engine = SimulatedEngine("rented", day.clip_s, day.generations)
            video = await engine.generate(_Request(lease.task.prompt), {"photo": day.folder}, day.folder, _Job())
            await queue.complete(lease, await queue.deliver(lease, video), video)

    return loop


@dataclass
class _Request:
    prompt: str


class _Job:
    def report(self, *_):
        """See Job."""

    def raise_if_cancelled(self):
        """See Job."""


async def our_worker(day):
    """`i2v work` on the same box."""
    queue, runner = day.runner("rented")
    await Worker(queue, runner, poll_interval_s=POLL_S).run()


def live(arm: Arm, times: list[float], clip_s: float) -> dict:
    """One day of one arm: its row."""
    row = {}

    async def main():
        with tempfile.TemporaryDirectory(prefix="i2v-day-") as folder:
            day = Day(Shop(), Path(folder), clip_s, [])
            async with anyio.create_task_group() as group:
                books = await arm.work(day, group)
                for number, at in enumerate(times):
                    await anyio.sleep_until(at)
                    day.store.add(PHOTO, id=f"item-{number}", prompt=f"item-{number}")
                    day.arrived()
                await anyio.sleep_until(DAY_S)
                late = len(times) - day.store.finished
                while day.store.finished < len(times) or not books()["is_idle"]:
                    assert all(item.status not in TERMINAL for item in day.store.items.values())
                    await anyio.sleep(60)
                row.update(measure(day, books(), times, arm, late))
                group.cancel_scope.cancel()

    run_virtual(main)
    return row


def measure(day: Day, books: dict, times: list[float], arm: Arm, late: int) -> dict:
    """What a row says."""
    beats = {}
    for event in day.store.log:
        if event.verb == "heartbeat" and event.accepted:
            beats.setdefault(event.item_id, event.at_s)
    waits = sorted(beats[f"item-{number}"] - at for number, at in enumerate(times))
    begun = sorted(each.started_at for each in day.generations)
    changes = sorted([(at, 1) for at in times] + [(at, -1) for at in begun])
    spans, waiting = [], 0
    for (at, change), (until, _) in itertools.pairwise([*changes, (changes[-1][0], 0)]):
        waiting += change
        if waiting > 0 and until > at:
            spans.append((at, until))
    backlog_s = sum(until - at for at, until in spans)
    busy_s = overlap([(each.started_at, each.ended_at) for each in day.generations], spans)
    usd = DAY_S / HOUR_S * RENTED_USD_H["list"] if arm.is_rented else books["billed_s"] * GPU_USD_S + books["cron_usd"]
    return {
        "first_beat_p50_s": statistics.median(waits),
        "first_beat_p95_s": waits[int(0.95 * (len(waits) - 1))],
        "first_beat_max_s": waits[-1],
        "busy_under_backlog": busy_s / overlap(books["loaded"], spans),
        "clips_per_hour_under_backlog": HOUR_S * busy_s / day.clip_s / backlog_s,
        "billed_gpu_s": books["billed_s"],
        "containers": books["containers"],
        "generating_share_of_billed": len(times) * day.clip_s / books["billed_s"],
        "cron_usd": books["cron_usd"],
        "usd_a_day": usd,
        "usd_a_clip": usd / len(times),
        "unfinished_at_midnight": late,
    }


def overlap(these: list[tuple[float, float]], spans: list[tuple[float, float]]) -> float:
    """Seconds that intervals have in common with spans, each interval for itself."""
    return sum(max(0.0, min(end, until) - max(start, at)) for start, end in these for at, until in spans)


def break_even(points: list[tuple[int, float]], usd_a_day: float) -> float | None:
    """Clips a day at which a line through neighbouring (clips, dollars) reaches a price; None beyond them."""
    for (low, low_usd), (high, high_usd) in itertools.pairwise(points):
        if low_usd <= usd_a_day <= high_usd:
            return low + (high - low) * (usd_a_day - low_usd) / (high_usd - low_usd)
    return None


def show(rows: list[dict], *, header: bool = True) -> None:
    """The table."""
    if header:
        print(
            f"{'clips/day':>9} {'arm':<34} {'cold':>5} {'beat p50':>8} {'p95':>6} {'max':>6} {'busy':>6} "
            f"{'clips/h':>7} {'GPU s':>7} {'starts':>6} {'$/clip':>7} {'$/day':>7} {'late':>5}"
        )
    for row in rows:
        cold = f"{row['cold_start_s']:g} s" if row["cold_start_s"] else "-"
        print(
            f"{row['clips_a_day']:>9} {row['arm']:<34} {cold:>5} {row['first_beat_p50_s']:>6.0f} s "
            f"{row['first_beat_p95_s']:>4.0f} s {row['first_beat_max_s']:>4.0f} s {row['busy_under_backlog']:>6.3f} "
            f"{row['clips_per_hour_under_backlog']:>7.0f} {row['billed_gpu_s']:>7.0f} {row['containers']:>6.0f} "
            f"{row['usd_a_clip']:>7.4f} {row['usd_a_day']:>7.2f} {row['unfinished_at_midnight']:>5.0f}",
            flush=True,
        )


def compare_calls(volumes: list[int], clip_s: float, seeds: list[int], out: Path) -> None:
    """Cron against calls, by number of containers and cold start: the mean of several days each."""
    rows = []
    for volume, cold, containers, calls in itertools.product(
        volumes, GRID_COLD_STARTS_S, GRID_CONTAINERS, (False, True)
    ):
        arm = Arm(
            f"{'calls' if calls else 'cron'}, {containers} containers",
            fleet(drain=True, cold_start_s=cold, containers=containers, calls=calls),
            cold,
        )
        days = [live(arm, arrivals(volume, seed), clip_s) for seed in seeds]
        means = {name: statistics.mean(day[name] for day in days) for name in days[0]}
        rows.append({"clips_a_day": volume, "arm": arm.name, "cold_start_s": cold} | means)
        show(rows[-1:], header=len(rows) == 1)
    record = {"at": datetime.now(UTC).isoformat(), "clip_s": clip_s, "seeds": seeds, "call_s": CALL_S, "results": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, nargs="+", default=[40, 400, 2000], help="clips a day")
    parser.add_argument("--clip-seconds", type=float, default=CLIP_S, help="what the engine takes")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    parser.add_argument("--calls", action="store_true", help="compare the cron with calls, over three days each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "day.json")
    arguments = parser.parse_args()
    quiet()
    if arguments.calls:
        seeds = [arguments.seed + number for number in range(3)]
        out = arguments.out.with_name("day_calls.json")
        compare_calls(arguments.volumes, arguments.clip_seconds, seeds, out)
        return

    def run(arm: Arm, volume: int) -> dict:
        row = live(arm, arrivals(volume, arguments.seed), arguments.clip_seconds)
        return {"clips_a_day": volume, "arm": arm.name, "cold_start_s": arm.cold_start_s} | row

    arms = [Arm("cron only", fleet(drain=False, cold_start_s=cold, linger_s=20.0), cold) for cold in COLD_STARTS_S]
    kept = fleet(drain=False, cold_start_s=COLD_STARTS_S[0], linger_s=70.0)
    arms += [Arm("cron only, warm for 70 s", kept, COLD_STARTS_S[0])]
    arms += [Arm("cron, warm draining", fleet(drain=True, cold_start_s=cold), cold) for cold in COLD_STARTS_S]
    arms += [Arm("rented, documented, reloads", rented(documented(cold)), cold, True) for cold in COLD_STARTS_S]
    arms += [
        Arm("rented, documented, stays loaded", rented(documented(0.0)), None, True),
        Arm("rented, `i2v work`", rented(our_worker), None, True),
    ]
    rows = [run(arm, volume) for volume in arguments.volumes for arm in arms]
    show(rows)

    cold = COLD_STARTS_S[0]
    print("\nlinger, warm draining, 400 clips a day")
    lingers = []
    for linger_s in (0.0, 20.0, 60.0, 300.0):
        lingering = Arm(f"linger {linger_s:g} s", fleet(drain=True, cold_start_s=cold, linger_s=linger_s), cold)
        lingers.append(run(lingering, 400))
    show(lingers)

    draining = Arm("cron, warm draining", fleet(drain=True, cold_start_s=cold), cold)
    points = [(volume, run(draining, volume)["usd_a_day"]) for volume in (40, 400, 1000, 2000, 3000, 4000, 5000, 6000)]
    even = {name: break_even(points, 24 * usd) for name, usd in RENTED_USD_H.items()}
    print("\nbreak-even with a rented H100, clips a day:")
    for name, usd in RENTED_USD_H.items():
        print(f"  ${usd:.2f}/h ({name}): " + (f"{even[name]:.0f}" if even[name] else f"above {points[-1][0]}"))
    print(f"the cron itself: ${rows[0]['cron_usd']:.3f} a day")

    conditions = {
        "clip_s": arguments.clip_seconds,
        "seed": arguments.seed,
        "photo_s": PHOTO_S,
        "video_s": VIDEO_S,
        "one_way_s": ONE_WAY_S,
        "linger_s": LINGER_S,
        "containers": CONTAINERS,
        "gpu_usd_s": GPU_USD_S,
        "rented_usd_h": RENTED_USD_H,
        "cron_overhead_s": CRON_OVERHEAD_S,
        "python": platform.python_version(),
    }
    record = {
        "at": datetime.now(UTC).isoformat(),
        "conditions": conditions,
        "results": rows,
        "linger": lingers,
        "usd_a_day_by_volume": points,
        "break_even_clips_a_day": even,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
