"""How busy a worker keeps its GPU while there is a backlog: this runner against a plain sequential loop.

    python -m tests.bench.fleet [--tasks 12] [--clip-seconds 8] [--round-trip-ms 100] [--mbit 100]

Both sides take the same tasks from the same embedded queue (a process of its own) through the same proxy, which
adds the round trip to every connection and request and limits the bandwidth. The engine takes a fixed time, as a GPU
does, and leaves a file as large as a real clip. The sequential loop is the documents' worker, without its flaws that
are not about order: it keeps its connection and does not load weights again for each clip.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import anyio
import httpx
import numpy as np
from PIL import Image

from inference import logs
from inference.build.queues import open_queue
from inference.build.workers import build_worker
from inference.engines.base import Job
from inference.server.client import QueueClient
from inference.settings import Settings
from inference.task import GenerationRequest, Video

CLIP_BYTES = 6_000_000  # a 5 s clip of 1280x704 at crf 18
KEY = "bench"


@dataclass
class Proxy:
    """A road between worker and queue: latency on every message, and a limit to the bandwidth."""

    upstream_port: int
    one_way_s: float
    bytes_per_s: float
    port: int = 0
    _ready: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Serves from a thread of its own until the process ends."""
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._ready.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self.one_way_s)  # the TCP handshake
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        await asyncio.gather(self._pipe(reader, up_writer), self._pipe(up_reader, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Chunks leave one_way_s after they came, at most at the line's speed, without waiting for each other.
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)

        async def deliver() -> None:
            free_at = 0.0
            while True:
                came_at, chunk = await line.get()
                free_at = max(free_at, came_at) + len(chunk) / self.bytes_per_s
                await asyncio.sleep(free_at + self.one_way_s - time.monotonic())
                if not chunk:
                    break
                writer.write(chunk)
                await writer.drain()
            writer.close()

        delivery = asyncio.create_task(deliver())
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                await line.put((time.monotonic(), chunk))
        await line.put((time.monotonic(), b""))
        with contextlib.suppress(ConnectionError):
            await delivery


@dataclass
class FixedEngine:
    """A GPU that takes the same time for every clip, and remembers when it was busy."""

    seconds: float
    busy: list[tuple[float, float]] = field(default_factory=list)
    name: str = "fixed"
    stages: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})

    async def check(self):
        """See Engine."""

    async def generate(self, request: GenerationRequest, inputs: dict[str, Path], folder: Path, job: Job) -> Video:  # noqa: ARG002
        """See Engine."""
        started_at = time.monotonic()
        await anyio.sleep(self.seconds)
        self.busy.append((started_at, time.monotonic()))
        path = folder / "clip.mp4"
        path.write_bytes(CLIP)
        return Video(path=path, width=1280, height=704, fps=24, frames=121, size_bytes=CLIP_BYTES)


CLIP = np.random.default_rng(0).bytes(CLIP_BYTES)


def sequential_loop(url: str, engine: FixedEngine, tasks: int) -> None:
    """The worker of the documents: poll, download, generate, upload, report, one after the other."""
    headers = {"Authorization": f"Worker {KEY}"}
    with httpx.Client(base_url=f"{url}/api/worker/", headers=headers, timeout=60) as queue, httpx.Client() as web:

        def ask(call: str, **body: object) -> dict[str, str]:
            answer = queue.post(call, json=body)
            answer.raise_for_status()
            return answer.json()["data"]

        for _ in range(tasks):
            task = ask("next-task", worker_id="sequential", lease_duration_seconds=600)
            mine = {"item_id": task["item_id"], "worker_id": "sequential"}
            ask("heartbeat", **mine, extend_seconds=300)
            web.get(ask("presign", operation="download", storage_path=task["photo_storage_path"])["url"])
            started_at = time.monotonic()
            time.sleep(engine.seconds)  # the GPU
            engine.busy.append((started_at, time.monotonic()))
            signed = ask("presign", operation="upload", video_item_id=task["item_id"], file_extension="mp4")
            web.put(signed["url"], content=CLIP, headers={"Content-Type": "video/mp4"}, timeout=60).raise_for_status()
            ask("report", **mine, status="completed", video_storage_path=signed["storage_path"])


async def this_runner(url: str, engine: FixedEngine, tasks: int, folder: Path) -> None:
    """Our worker, as `i2v work` runs it."""
    settings = Settings.isolated(api_url=url, api_key=KEY, worker_id="bench", temp_dir=folder)
    ended = 0

    def count(_: object) -> None:
        nonlocal ended
        ended += 1
        if ended == tasks:
            worker.stop()

    async with open_queue(settings) as queue:
        worker = build_worker(settings, queue, engine, on_outcome=count)
        await worker.run()


async def fill(url: str, photo: Path, tasks: int) -> None:
    """Puts the same tasks into the queue for either side."""
    async with QueueClient(url, KEY) as client:
        for _ in range(tasks):
            await client.submit(photo, "bench")


@contextlib.contextmanager
def queue_server(folder: Path) -> Iterator[int]:
    """`i2v serve` as a process of its own; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"I2V_DATA_DIR": str(folder), "WORKER_API_KEY": KEY, "I2V_LOG_LEVEL": "error"}
    command = [sys.executable, "-c", "from inference.commands.main import main; main()", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/healthz").is_success:
                    break
        yield port
    finally:
        server.terminate()
        server.wait()


def measure(engine: FixedEngine) -> dict[str, float]:
    """Busy share from the first generation's start to the last one's end, and clips per hour at that pace."""
    span_s = engine.busy[-1][1] - engine.busy[0][0]
    busy_s = sum(end - start for start, end in engine.busy)
    gaps = [after[0] - before[1] for before, after in zip(engine.busy, engine.busy[1:], strict=False)]
    return {
        "busy_fraction": busy_s / span_s,
        "clips_per_hour": 3600 * (len(engine.busy) - 1) / (engine.busy[-1][0] - engine.busy[0][0]),
        "mean_gap_ms": 1000 * sum(gaps) / len(gaps),
        "max_gap_ms": 1000 * max(gaps),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--clip-seconds", type=float, default=8.0, help="what the engine takes (default: 5B's target)")
    parser.add_argument("--round-trip-ms", type=float, default=100.0)
    parser.add_argument("--mbit", type=float, default=100.0, help="bandwidth of a connection, each way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fleet.json")
    arguments = parser.parse_args()
    logs.configure("error")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch, queue_server(Path(scratch) / "queue") as port:
        folder = Path(scratch)
        photo = folder / "photo.jpg"
        noise = np.random.default_rng(1).integers(0, 255, (1500, 2000, 3), np.uint8)
        Image.fromarray(noise).save(photo, quality=75)
        proxy = Proxy(port, arguments.round_trip_ms / 2000, arguments.mbit * 125_000)
        proxy.start()
        url = f"http://127.0.0.1:{proxy.port}"
        for name in ("sequential loop", "this runner"):
            anyio.run(fill, f"http://127.0.0.1:{port}", photo, arguments.tasks)
            engine = FixedEngine(arguments.clip_seconds)
            if name == "this runner":
                anyio.run(this_runner, url, engine, arguments.tasks, folder)
            else:
                sequential_loop(url, engine, arguments.tasks)
            results[name] = measure(engine)
        photo_bytes = photo.stat().st_size
    ratio = results["this runner"]["clips_per_hour"] / results["sequential loop"]["clips_per_hour"]
    print(f"{'':<16} {'busy':>7} {'clips/h':>8} {'mean gap':>9} {'max gap':>9}")
    for name, row in results.items():
        print(
            f"{name:<16} {row['busy_fraction']:>7.3f} {row['clips_per_hour']:>8.1f} "
            f"{row['mean_gap_ms']:>6.0f} ms {row['max_gap_ms']:>6.0f} ms"
        )
    print(f"ratio of clips per hour: {ratio:.3f}")
    conditions = {name: value for name, value in vars(arguments).items() if name != "out"} | {
        "photo_bytes": photo_bytes,
        "clip_bytes": CLIP_BYTES,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    record = {"at": datetime.now(UTC).isoformat(), "conditions": conditions, "results": results, "ratio": ratio}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
