"""How fast the store leases: `python -m tests.bench.store`, on SQLite and PostgreSQL, with 1 and 8 workers.

A cycle is lease + heartbeat + complete, each durable before it is answered: three commits. The disk is measured
beside it, since that is what they wait for; on a RAM disk what is left is the store's own time. Prints a table and
writes results/store.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from inference.server.rows.store import NewItem, NewPhoto, Store
from tests.support import postgres

RESULTS = Path(__file__).parent / "results" / "store.json"
TARGET_CYCLES_S = 1000
TARGET_CLAIM_P99_MS = 10


def sync_us(folder: Path, tries: int = 200) -> float:
    """Median microseconds that writing 4 KiB durably takes there."""
    took = []
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(tries):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - began) * 1e6)
    return statistics.median(took)


def measure(url: str, workers: int, backlog: int, cycles: int) -> dict[str, float]:
    """Cycles a second and how long a claim takes, with threads of one process."""
    store = Store(url)
    store.add(NewPhoto(store.group(), "photo.jpg"), [NewItem() for _ in range(backlog)])
    claims_ms: list[float] = []
    together = threading.Barrier(workers + 1)

    def work(worker_id: str) -> None:
        together.wait()
        for _ in range(cycles // workers):
            began = time.perf_counter()
            item = store.lease(worker_id, 600)
            claims_ms.append((time.perf_counter() - began) * 1e3)
            assert item is not None
            store.heartbeat(item.id, worker_id, 300)
            store.complete(item.id, worker_id, "videos/x.mp4")

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(workers)]
    for thread in threads:
        thread.start()
    together.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began
    store.close()
    claims_ms.sort()
    return {
        "cycles_per_s": round(len(claims_ms) / took_s),
        "claim_p50_ms": round(statistics.median(claims_ms), 2),
        "claim_p99_ms": round(claims_ms[int(len(claims_ms) * 0.99)], 2),
    }


def main() -> None:
    """Measures, prints, writes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--backlog", type=int, default=20_000)
    options.add_argument("--cycles", type=int, default=4_000)
    options.add_argument("--folders", type=Path, nargs="+", default=[Path(tempfile.gettempdir()), Path("/dev/shm")])
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'database':<12}{'on':<10}{'sync us':>8}{'workers':>9}{'cycles/s':>10}{'p50 ms':>8}{'p99 ms':>8}{'load':>7}"
    )
    with ExitStack() as stack:
        servers = {folder: stack.enter_context(postgres.server(folder)) for folder in given.folders}
        for database, folder in [(kind, folder) for kind in ("sqlite", "postgresql") for folder in given.folders]:
            for workers in (1, 8):
                with ExitStack() as inner:
                    if database == "sqlite":
                        fresh = inner.enter_context(tempfile.TemporaryDirectory(dir=folder))
                        url = f"sqlite:///{fresh}/queue.db"
                    else:
                        url = inner.enter_context(postgres.database(servers[folder]))
                    row: dict[str, Any] = {"database": database, "folder": str(folder), "workers": workers}
                    row |= {"sync_us": round(sync_us(folder)), "load_before": round(os.getloadavg()[0], 1)}
                    row |= measure(url, workers, given.backlog, given.cycles)
                    rows.append(row)
                    print(
                        f"{database:<12}{folder!s:<10}{row['sync_us']:>8}{workers:>9}{row['cycles_per_s']:>10}"
                        f"{row['claim_p50_ms']:>8}{row['claim_p99_ms']:>8}{row['load_before']:>7}"
                    )
    met = all(row["cycles_per_s"] >= TARGET_CYCLES_S and row["claim_p99_ms"] < TARGET_CLAIM_P99_MS for row in rows)
    print(f"target: {TARGET_CYCLES_S} cycles/s and p99 below {TARGET_CLAIM_P99_MS} ms: {'met' if met else 'not met'}")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    RESULTS.parent.mkdir(exist_ok=True)
    report = {"machine": machine, "backlog": given.backlog, "cycles": given.cycles, "target_met": met, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
