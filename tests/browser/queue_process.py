"""A queue server as a process, with a port that it keeps when it is started again, and a worker that a test plays."""

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx

from inference.media.video import VideoWriter
from inference.server.rows.store import Store
from tests.browser.photos import jpeg, landscape
from tests.support.processes import Process, environment, until

START_S = 30
CLIP = (256, 144)  # pixels
CLIP_FPS = 24
CLIP_S = 1


class QueueProcess:
    """`i2v serve`, or `i2v up` with a worker of its own, on a folder and a port that stay the same."""

    def __init__(self, folder: Path, command: str = "serve", key: str | None = None, **settings: object) -> None:
        self.data_dir = folder / "data"
        self._folder, self._command = folder, command
        self._settings = {"I2V_DATA_DIR": self.data_dir, "POLL_INTERVAL": 0.1, "TEMP_DIR": folder / "temp"} | settings
        self.key = key
        self.http = httpx.Client(timeout=20)  # one, since each reads certificates when it is made
        self._port = 0
        self._runs = 0
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.kill()
        self.http.close()

    def start(self, key: str | None = None) -> None:
        """Starts it, or starts it again, with another key if one is given; returns once it listens."""
        self.key = key or self.key
        env = environment(**self._settings, **({"WORKER_API_KEY": self.key} if self.key else {}))
        name = f"{self._command}-{self._runs}"
        arguments = (self._command, "--port", str(self._port), "--verbose")
        self._runs += 1
        self._process = process = Process(self._folder, name, *arguments, env=env)

        def port() -> int | None:
            assert process.exit_code is None, process.stderr.read_text()
            return next((it["port"] for it in process.events("the queue is open")), None)

        self._port = until(port, START_S, "the queue is open")

    def kill(self) -> None:
        """SIGKILL, as the end of a machine."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self._process is not None
        self._process.send(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def host(self) -> str:
        """The name:port that it is asked by."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://{self.host}"

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """One call to its API, on a connection of its own; the data of the answer."""
        headers = {"Connection": "close"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        answer = self.http.request(method, f"{self.url}/api/{path}", headers=headers, **options)
        assert answer.is_success, answer.text
        return answer.json()["data"]

    def submit(
        self,
        photo: bytes | None = None,
        *,
        name: str = "photo.jpg",
        prompt: str = "",
        seconds: float = 0.5,
        group: str | None = None,
    ) -> str:
        """Adds a task; its id."""
        form = {"prompt": prompt, "seconds": str(seconds)} | ({"group": group} if group else {})
        made = self.ask("POST", "tasks", data=form, files={"photo": (name, photo or jpeg(0, 120, 80))})
        return made["items"][0]["id"]

    def task(self, item_id: str) -> dict[str, Any]:
        """A task, as apps see it."""
        return self.ask("GET", f"tasks/{item_id}")

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks, newest first."""
        return self.ask("GET", "tasks", params={"limit": 200})["items"]

    def clear(self) -> None:
        """Deletes every task, for the test that comes next."""
        while groups := self.ask("GET", "groups", params={"limit": 200})["groups"]:
            for group in groups:
                self.ask("DELETE", f"groups/{group['id']}")

    @contextmanager
    def rows(self) -> Iterator[Store]:
        """Its rows, opened beside it: a server hears of what is changed here only when it looks."""
        store = Store(f"sqlite:///{self.data_dir / 'queue.db'}")
        try:
            yield store
        finally:
            store.close()


class PlayedWorker:
    """A worker whose every word the test says, over the worker API."""

    def __init__(self, queue: QueueProcess, name: str = "studio-1") -> None:
        self._queue = queue
        self._name = name

    def take(self, item_id: str) -> "PlayedLease":
        """Leases one task."""
        worker_id = f"{self._name}.{item_id[-8:]}"
        asked = {"worker_id": worker_id, "lease_duration_seconds": 600, "item_id": item_id}
        task = self._queue.ask("POST", "worker/next-task", json=asked)
        assert task is not None, "the task does not wait"
        return PlayedLease(self._queue, worker_id, item_id)

    def make(self, item_id: str, kind: int = 0, **said: Any) -> None:
        """Takes a task and completes it."""
        self.take(item_id).complete(kind, **said)


class PlayedLease:
    """A task that is being worked on."""

    def __init__(self, queue: QueueProcess, worker_id: str, item_id: str) -> None:
        self._queue = queue
        self._mine = {"worker_id": worker_id, "item_id": item_id}

    def beat(self, stage: str, fraction: float) -> dict[str, Any]:
        """Tells how far it is."""
        progress = {"stage": stage, "fraction": fraction}
        return self._queue.ask("POST", "worker/heartbeat", json=self._mine | {"progress": progress})

    def complete(self, kind: int = 0, **said: Any) -> None:
        """Stores a clip and reports it."""
        asked = {"operation": "upload", "video_item_id": self._mine["item_id"], "file_extension": "mp4"}
        put = self._queue.ask("POST", "worker/presign", json=asked)
        headers = {"content-type": "video/mp4", "connection": "close"}
        self._queue.http.put(put["url"], content=clip(kind), headers=headers).raise_for_status()
        report = {"status": "completed", "video_storage_path": put["storage_path"]} | said
        self._queue.ask("POST", "worker/report", json=self._mine | report)

    def fail(self, message: str) -> None:
        """Reports that nothing comes of it."""
        self._queue.ask("POST", "worker/report", json=self._mine | {"status": "failed", "error_message": message})


@cache
def clip(kind: int = 0) -> bytes:
    """A second of a camera that glides over a landscape."""
    import numpy as np

    width, height = CLIP
    wide = np.asarray(landscape(kind, width * 5 // 4, height))
    frames = CLIP_S * CLIP_FPS
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, width=width, height=height, fps=CLIP_FPS) as writer:
            for number in range(frames):
                left = (wide.shape[1] - width) * number // (frames - 1)
                writer.write(np.ascontiguousarray(wide[:, left : left + width]))
        return path.read_bytes()


def no_photo() -> bytes:
    """A file that calls itself a photo and is none."""
    return io.BytesIO(b"this is a shopping list\n" * 40).getvalue()
