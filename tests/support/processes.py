"""Real `i2v` processes: a queue server, workers, and what may happen to them."""

import atexit
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, Self, TypeVar

import httpx
import pytest
from PIL import Image

from inference.commands import main as cli
from tests.support import ledger
from tests.support.forking import Forker
from tests.support.proxy import Exchange, Fault, Proxy, Record

T = TypeVar("T")

I2V = Path(sysconfig.get_path("scripts")) / "i2v"
KEY = "key-of-the-process-tests"
POLL_S = 0.05
TEMP = "temp"
"""The temporary folder of all workers of a site, so that they clear away what killed ones left."""


def until(condition: Callable[[], T], deadline_s: float, what: str) -> T:
    """Asks again and again until the answer is true; returns it. Raises AssertionError after the deadline."""
    give_up_at = monotonic() + deadline_s
    pause = threading.Event()
    while not (answer := condition()):
        assert monotonic() < give_up_at, f"not within {deadline_s:g} s: {what}"
        pause.wait(POLL_S)
    return answer


def environment(**settings: object) -> dict[str, str]:
    """What a process needs to run, and nothing of the test's own settings."""
    wanted = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "OMP_NUM_THREADS")  # the last two: see conftest.py
    kept = {name: os.environ[name] for name in wanted if name in os.environ}
    return kept | {name: str(value) for name, value in settings.items()}


def i2v_here(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, typed: str = "", **settings: object
) -> subprocess.CompletedProcess[str]:
    """Runs an `i2v` command to its end within this process, in a folder: a process of its own takes a second of a core.

    For whatever is not about processes. No setting of the machine is there; TMPDIR counts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["i2v", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setenv("COLUMNS", "80")
        for name, value in settings.items():
            patch.setenv(name, str(value))
        patch.setattr(tempfile, "tempdir", None)  # it is looked up again
        patch.setattr("inference.process.settle", lambda: None)  # this process does not serve from now on
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)


@cache
def forker(*modules: str, **settings: str) -> Forker:
    """What starts processes that need these modules, for as long as this process."""
    started = Forker(modules, environment(**settings))
    atexit.register(started.close)
    return started


NEEDED = (
    "inference.commands.main",
    "inference.commands.demo",
    "inference.commands.doctor",
    "inference.commands.work",
    "inference.engines.preview",
    "inference.media.film",
    "inference.queues.lifeisshort",
    "inference.server.serve",
    "inference.push.app",
)
"""By commands that go on, such as `i2v serve`, `i2v work` and `i2v push`."""


class Process:
    """An `i2v` command in a session of its own, its output in files. See forking.py for how it starts."""

    def __init__(self, folder: Path, name: str, *arguments: str, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.stdout, self.stderr = folder / f"{name}.out", folder / f"{name}.err"
        with self.stdout.open("ab") as out, self.stderr.open("ab") as err:
            self._popen = forker(*NEEDED).start([I2V, *arguments], folder, env, out.fileno(), err.fileno())
        self.pid = self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def send(self, number: signal.Signals) -> None:
        """A signal to this process alone."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, whatever state it is in, and the end of it."""
        self._popen.kill()
        self._popen.wait(10)

    def wait(self, deadline_s: float = 15) -> int:
        """Its exit code."""
        until(lambda: self.exit_code is not None, deadline_s, f"{self.name} ended")
        return self.exit_code

    def logs(self) -> list[dict[str, Any]]:
        """Its log lines; the last may not be whole when it was killed."""
        found = []
        for line in self.stderr.read_text(errors="replace").splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                found.append(parsed)
        return found

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """Log lines of one kind."""
        return [it for it in self.logs() if it.get("event") == event and fields.items() <= it.items()]

    def zombies(self) -> list[int]:
        """Children that ended and that it did not wait for."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
            except OSError:  # gone meanwhile
                continue
            if state == "Z" and int(parent) == self.pid:
                found.append(int(stat.parent.name))
        return found


class Worker(Process):
    """`i2v work` behind a proxy of its own."""

    def __init__(self, folder: Path, name: str, url: str, **settings: object) -> None:
        defaults = {
            "VERCEL_API_URL": url,
            "WORKER_API_KEY": KEY,
            "WORKER_ID": name,
            "POLL_INTERVAL": 0.1,
            "LEASE_DURATION": 8,  # long enough for a busy machine
            "I2V_LEASE_EXTENSION": 8,
            "HEARTBEAT_INTERVAL": 1,
            "I2V_CONCURRENCY": 1,
            "TEMP_DIR": folder / TEMP,
        }
        super().__init__(folder, name, "work", env=environment(**(defaults | settings)))


class Site:
    """One server with its data, the workers it has, and the books."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.record = Record()
        self.workers: list[Worker] = []
        self._proxies = ExitStack()
        self._servers: list[Process] = []
        self._port = 0

    def __enter__(self) -> Self:
        self.start_server()
        ledger.install(self.data_dir / "queue.db")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in (*self.workers, *self._servers):
            process.kill()
        self._proxies.close()
        if kind is not None:
            self.show()

    def show(self) -> None:
        """What everybody said last: for a test that failed."""
        for process in (*self.workers, *self._servers):
            print(f"── {process.name}\n{process.stderr.read_text(errors='replace')[-6000:]}")

    # ------------------------------------------------------------ the server

    def start_server(self) -> None:
        """On the same data, and on the same port as before."""
        env = environment(I2V_DATA_DIR=self.data_dir, WORKER_API_KEY=KEY)
        server = Process(
            self.folder, f"server-{len(self._servers)}", "serve", "--port", str(self._port), "--verbose", env=env
        )
        self._servers.append(server)

        def port() -> int | None:
            assert server.exit_code is None, server.stderr.read_text()
            return next((it["port"] for it in server.events("the queue is open")), None)

        self._port = until(port, 20, "the server is open")

    @property
    def server(self) -> Process:
        """The one that runs."""
        return self._servers[-1]

    @property
    def url(self) -> str:
        """The server itself, around the proxies."""
        return f"http://127.0.0.1:{self._port}"

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """One call to the API for apps; a new connection each, since servers come and go here."""
        headers = {"Authorization": f"Worker {KEY}", "Connection": "close"}
        answer = httpx.request(method, f"{self.url}/api/{path}", headers=headers, timeout=20, **options)
        assert answer.is_success, answer.text
        return answer.json()["data"]

    def submit(self, count: int = 1, seconds: float = 0.5) -> list[str]:
        """Ids of new tasks."""
        form = {"prompt": "zoom in", "seconds": str(seconds), "count": str(count)}
        data = self.ask("POST", "tasks", data=form, files={"photo": ("photo.jpg", jpeg())})
        return [item["id"] for item in data["items"]]

    def task(self, item_id: str) -> dict[str, Any]:
        """One task, as apps see it."""
        return self.ask("GET", f"tasks/{item_id}")

    def has_ended(self) -> bool:
        """Whether no task is left to do."""
        groups = self.ask("GET", "groups", params={"limit": 200})["groups"]  # counted in one statement
        return not any(group["status"] in ("pending", "processing") for group in groups)

    # ------------------------------------------------------------ workers

    def worker(self, name: str, fault: Callable[[Exchange], Fault | None] | None = None, **settings: object) -> Worker:
        """A new worker, started and not waited for."""
        proxy = self._proxies.enter_context(Proxy(self._port, name, self.record, fault))
        self.workers.append(Worker(self.folder, name, proxy.url, **settings))
        return self.workers[-1]

    def wait_for_holder(self, item_id: str, worker: Worker, stage: str = "render") -> None:
        """Until a worker is at a stage of a task."""
        until(lambda: worker.events("stage", item_id=item_id, stage=stage), 20, f"{worker.name} is at {stage}")

    def stop_workers(self) -> None:
        """SIGTERM for all, as a host that goes down would send it: they must all say good-bye."""
        running = [worker for worker in self.workers if worker.exit_code is None]
        for worker in running:
            worker.send(signal.SIGTERM)
        assert {worker.name: worker.wait() for worker in running} == {worker.name: 0 for worker in running}

    def close_books(self, *, tasks: int, **allowed: Any) -> ledger.Ledger:
        """When all is done: stops everybody, then checks the ledger and that nothing is left behind."""
        for worker in self.workers:
            assert worker.exit_code is not None or worker.zombies() == []
        self.stop_workers()
        self.server.send(signal.SIGTERM)
        assert self.server.wait() == 0
        until(lambda: not self.processes(), 10, f"nothing of this site runs any more, but {self.processes()}")
        assert self.leftovers() == []
        books = ledger.Ledger(self.data_dir, self.record)
        books.check(tasks=tasks, **allowed)
        books.check_no_orphans()
        believed = ledger.completions([line for worker in self.workers for line in worker.logs()])
        assert {item_id: times for item_id, times in believed.items() if times > 1} == {}
        return books

    def leftovers(self) -> list[Path]:
        """What is in the temporary folder of the workers."""
        return sorted((self.folder / TEMP).rglob("*"))

    def processes(self) -> list[str]:
        """Processes, ffmpeg above all, that work on files of this site."""
        found = []
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = cmdline.read_bytes()
            except OSError:  # gone meanwhile
                continue
            if os.fsencode(self.folder) in command and int(cmdline.parent.name) != os.getpid():
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
        return found


def jpeg() -> bytes:
    """A small photo: quick to send, not quick to render, since every video has the same size."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "JPEG")
    return file.getvalue()
