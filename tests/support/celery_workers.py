"""Celery's workers as real processes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import environment, until

ROOT = Path(__file__).parent.parent.parent


APP = "tests.support.celery_app"


class Worker:
    """`celery worker` in a process of its own, its output in a file."""

    def __init__(self, folder: Path, name: str, *options: str, url: str, module: str = APP, at: Path = ROOT):
        self.name = name
        self.output = folder / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", module, "worker", "-n", f"{name}@here", "--loglevel", "info"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        env = environment(TEST_REDIS_URL=url, REDIS_URL=url, PYTHONPATH=ROOT, NO_COLOR=1)
        with self.output.open("wb") as output:
            self._popen = subprocess.Popen([*command, *quiet, *options], cwd=at, env=env, stdout=output, stderr=output)

    def wait_until_ready(self) -> None:
        """It takes tasks."""
        until(lambda: f"{self.name}@here ready" in self.said(), 30, f"{self.name} is ready: {self.said()}")

    def said(self) -> str:
        """All of its output."""
        return self.output.read_text(errors="replace")

    def ask_to_stop(self) -> None:
        """A warm shutdown begins."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Waits for its end; its exit code."""
        self.ask_to_stop()
        try:
            return self._popen.wait(20)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait(10)


@contextmanager
def workers(*started: Worker) -> Iterator[None]:
    """They take tasks; stopped at the end."""
    try:
        for worker in started:
            worker.wait_until_ready()
        yield
    finally:
        for worker in started:
            worker.ask_to_stop()
        for worker in started:
            worker.stop()
