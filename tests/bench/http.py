"""How fast the embedded server answers workers: `python -m tests.bench.http`, SQLite on a RAM disk and on this disk.

A cycle is what a worker asks of a short task: next-task, two heartbeats with progress, and a report of failure. Workers
are threads of this process with a kept connection each; the server is `i2v serve`, a process of its own whose CPU time
is counted. On a busy machine compare CPU times, and requests a second only of runs that alternate. Prints a table.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from inference.server.rows.store import NewItem, NewPhoto, Store

KEY = "bench"
REQUESTS = 4
"""Of a cycle."""


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """Asks over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port)
        self._connection.connect()
        # Headers and body are two packets, of which the second would wait for an acknowledgement of the first.
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, route: str, **body: Any) -> Any:
        """The data of an answer."""
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        self._connection.request("POST", f"/api/worker/{route}", json.dumps(body), headers)
        said = json.loads(self._connection.getresponse().read())
        assert said["success"], said
        return said["data"]

    def cycle(self, worker_id: str) -> float:
        """Milliseconds that its claim took."""
        began = time.perf_counter()
        item_id = self.ask("next-task", worker_id=worker_id)["item_id"]
        claim_ms = (time.perf_counter() - began) * 1e3
        held = {"item_id": item_id, "worker_id": worker_id}
        for fraction in (0.2, 0.6):
            self.ask("heartbeat", **held, extend_seconds=300, progress={"stage": "denoise", "fraction": fraction})
        self.ask("report", **held, status="failed", error_message="x")
        return claim_ms


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, int]]:
    """`i2v serve` with its data in a folder; yields its port and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"I2V_DATA_DIR": str(folder), "WORKER_API_KEY": KEY, "I2V_LOG_LEVEL": "error"}
    command = [sys.executable, "-c", "from inference.commands.main import main; main()", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up_at = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, workers: int, cycles: int) -> dict[str, float]:
    """Requests a second, the server's CPU time for each, and how long the slowest hundredth of claims take."""
    store = Store(f"sqlite:///{folder}/queue.db")
    store.add(NewPhoto(store.group(), "photo.jpg"), [NewItem() for _ in range(cycles + 50)])
    store.close()
    claims_ms: list[float] = []
    with server(folder) as (port, pid):
        first = Worker(port)
        for number in range(20):
            first.cycle(f"first.{number}")
        together = threading.Barrier(workers + 1)

        def work(name: str) -> None:
            worker = Worker(port)
            together.wait()
            claims_ms.extend(worker.cycle(f"{name}.{number}") for number in range(cycles // workers))

        threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(workers)]
        for thread in threads:
            thread.start()
        together.wait()
        began, began_cpu_s = time.perf_counter(), cpu_s(pid)
        for thread in threads:
            thread.join()
        took_s, took_cpu_s = time.perf_counter() - began, cpu_s(pid) - began_cpu_s
    claims_ms.sort()
    return {
        "requests_per_s": REQUESTS * len(claims_ms) / took_s,
        "cpu_us": took_cpu_s * 1e6 / (REQUESTS * len(claims_ms)),
        "claim_p50_ms": claims_ms[len(claims_ms) // 2],
        "claim_p99_ms": claims_ms[int(len(claims_ms) * 0.99)],
    }


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cycles", type=int, default=400)
    options.add_argument("--folders", type=Path, nargs="+", default=[Path("/dev/shm"), Path(tempfile.gettempdir())])
    given = options.parse_args()
    print(f"{'on':<10}{'workers':>8}{'requests/s':>12}{'CPU us':>8}{'p50 ms':>8}{'p99 ms':>8}{'load':>7}")
    for folder in given.folders:
        for workers in (1, 8):
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                load = os.getloadavg()[0]
                row = measure(Path(fresh), workers, given.cycles)
            print(
                f"{folder!s:<10}{workers:>8}{row['requests_per_s']:>12.0f}{row['cpu_us']:>8.0f}"
                f"{row['claim_p50_ms']:>8.1f}{row['claim_p99_ms']:>8.1f}{load:>7.1f}"
            )


if __name__ == "__main__":
    main()
