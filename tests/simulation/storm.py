"""A storm over real processes: workers and server are killed, paused and stopped at random, then the weather clears.

With `--cut`, proxies between workers and server lose that share of requests and replies as well. `pytest -m slow` has a
short storm. A soak, an hour of two cores:

    python -m tests.simulation.storm --tasks 2000 --seconds 3000 --pause 6 --cut 0.02 --seed 7
"""

import argparse
import random
import signal
import tempfile
import threading
from pathlib import Path
from time import monotonic

from tests.support.ledger import Ledger
from tests.support.processes import Site, Worker, until
from tests.support.proxy import Weather

WORKERS = 3
MEAN_PAUSE_S = 0.4
CALLS = ("next-task", "heartbeat", "presign", "upload", "download", "report")
PHOTO_OF = 20
"""Tasks that are made of one photo at the most: what one request may ask for."""


class Storm:
    """What happens to one site. The same seed does the same things; when they hit is up to the machine."""

    def __init__(self, site: Site, seed: int, *, mean_pause_s: float, cut: float) -> None:
        self._site = site
        self._dice = random.Random(seed)
        self._mean_pause_s, self._cut = mean_pause_s, cut
        self._afloat = [self._launch() for _ in range(WORKERS)]
        self._paused: set[Worker] = set()
        self.blows: list[str] = []

    def rage(self, seconds: float) -> None:
        """A blow every now and then, for so long or until there is nothing left to do."""
        over_at = monotonic() + seconds
        pause = threading.Event()
        while monotonic() < over_at and not self._site.has_ended():
            pause.wait(self._dice.expovariate(1 / self._mean_pause_s))
            self._blow()

    def clear(self) -> None:
        """Everybody runs who should, and goes on running."""
        for worker in self._paused:
            worker.send(signal.SIGCONT)
        self._paused.clear()

    def _blow(self) -> None:
        place = self._dice.randrange(WORKERS)
        worker = self._afloat[place]
        blow = self._dice.choices(("kill", "pause", "stop", "server"), weights=(4, 4, 2, 1))[0]
        self.blows.append(blow)
        if worker in self._paused and blow != "server":  # whatever it is, it lands on somebody awake
            worker.send(signal.SIGCONT)
            self._paused.remove(worker)
        match blow:
            case "kill":
                worker.kill()
                self._afloat[place] = self._launch()
            case "pause":
                worker.send(signal.SIGSTOP)
                self._paused.add(worker)
            case "stop":
                # Too early in its start there is nobody who could say good-bye, and nothing to say it about.
                if worker.events("worker_started"):
                    worker.send(signal.SIGTERM)
                    self._afloat[place] = self._launch()
            case "server":
                self._site.server.kill()
                self._site.start_server()

    def _launch(self) -> Worker:
        number = len(self._site.workers)
        weather = Weather(number, share=self._cut, calls=CALLS) if self._cut else None
        return self._site.worker(f"w{number}", weather, LEASE_DURATION=3, I2V_LEASE_EXTENSION=3)


def submit(site: Site, tasks: int) -> None:
    """So many tasks, of as few photos as can be."""
    for begun in range(0, tasks, PHOTO_OF):
        site.submit(min(PHOTO_OF, tasks - begun))


def run(
    folder: Path, *, seconds: float, tasks: int, seed: int, mean_pause_s: float = MEAN_PAUSE_S, cut: float = 0.0
) -> Ledger:
    """A storm, fair weather until all is done, and the books, checked."""
    with Site(folder) as site:
        submit(site, tasks // 2)
        storm = Storm(site, seed, mean_pause_s=mean_pause_s, cut=cut)
        storm.rage(seconds / 2)
        submit(site, tasks - tasks // 2)
        storm.rage(seconds / 2)
        storm.clear()
        until(site.has_ended, 60 + 2 * tasks, "every task has ended")
        books = site.close_books(tasks=tasks, may_crash_out=True)
    counts = {blow: storm.blows.count(blow) for blow in sorted(set(storm.blows))}
    ends = {status: sum(row.status == status for row in books.rows) for status in ("completed", "failed")}
    crashes = sum(row.crash_count for row in books.rows)
    print(f"seed {seed}: {counts}; {ends}, {crashes} leases ran out, stale writes accepted {len(books.stale_writes())}")
    return books


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=MEAN_PAUSE_S, help="seconds between blows, on average")
    parser.add_argument("--cut", type=float, default=0.0, help="share of requests that lose themselves or their reply")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="i2v-storm-") as here:
        run(
            Path(here),
            seconds=given.seconds,
            tasks=given.tasks,
            seed=given.seed,
            mean_pause_s=given.pause,
            cut=given.cut,
        )
