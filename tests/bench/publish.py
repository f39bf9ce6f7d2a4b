"""What it costs to say how far a task is: `python -m tests.bench.publish`. Microseconds an event, as the caller waits.

Against a real Redis on this machine. The peer is redis-py's own XADD of the same text, one call an event.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from inference.progress.events import ProgressEvent, as_json
from inference.progress.hub import MemoryHub
from inference.progress.redis import FIELD, PREFIX, RedisHub
from inference.progress.tracker import ProgressTracker
from tests.support.redis_server import redis_server

RESULTS = Path(__file__).parent / "results" / "publish.json"
EVENTS = 2000
ROUNDS = 5


def event(number: int) -> ProgressEvent:
    """One of forty tasks of a project."""
    return ProgressEvent(
        project_id="film",
        task_name=f"task-{number % 40}",
        progress=0.35,
        progress_percent=35,
        status="processing",
        message="clip 3 of 10",
        metadata={"stage": "generate_videos", "eta_s": 12.5, "lease": 1, "sequence": number},
    )


def cost_us(say: Callable[[ProgressEvent], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median over rounds of the mean of each, and the longest single call, in microseconds."""
    means, longest = [], 0.0
    for turn in range(rounds):
        events = [event(turn * EVENTS + number) for number in range(EVENTS)]
        began = last = time.perf_counter()
        for each in events:
            say(each)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        means.append((last - began) / EVENTS * 1e6)
    return statistics.median(means), longest * 1e6


def main() -> None:
    """Prints a table and writes results/publish.json."""
    rows: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as server:
        rows["redis-py, XADD alone"] = cost_us(lambda each: server.client.xadd(f"{PREFIX}peer", {FIELD: as_json(each)}))
        with closing(RedisHub(server.url, interval_s=0)) as hub:
            rows["RedisHub, Redis is there"] = cost_us(hub.publish)
        with closing(RedisHub(server.url, interval_s=0, in_background=True)) as hub:
            rows["RedisHub in the background"] = cost_us(hub.publish, rounds=1)
        with closing(RedisHub(server.url)) as hub:
            rows["RedisHub, most of it too soon to tell"] = cost_us(hub.publish)
            tracker = ProgressTracker(None, "film", "director", hub=hub)
            rows["ProgressTracker.update, the same"] = cost_us(lambda each: tracker.update(each.progress))
        with closing(MemoryHub(interval_s=0)) as hub:
            rows["MemoryHub"] = cost_us(hub.publish)
        away = RedisHub(server.url, interval_s=0)
        server.kill()
        rows["RedisHub, Redis is away"] = cost_us(away.publish)
        server.start()
        frozen = RedisHub(server.url, interval_s=0)
        frozen.publish(event(0))
        server.freeze()
        rows["RedisHub, Redis answers nothing"] = cost_us(frozen.publish)
        server.thaw()
        away.close()
        frozen.close()
    peer = rows["redis-py, XADD alone"][0]
    for name, (mean, longest) in rows.items():
        print(f"{name:40} {mean:8.1f} µs   {mean / peer:5.2f} of the peer   longest {longest / 1e3:9.2f} ms")
    found = {name: {"mean_us": round(mean, 1), "longest_us": round(longest)} for name, (mean, longest) in rows.items()}
    RESULTS.write_text(json.dumps({"machine": platform.platform(), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
