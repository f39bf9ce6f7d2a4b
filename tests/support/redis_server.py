"""A real Redis on loopback, with a password, that can be killed and started again.

Debian's package is `redis-server`.
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from tests.support.processes import until

PASSWORD = "pass-word/of:redis"
"""With characters that a URL has to escape."""

PASSWORD_IN_URL = quote(PASSWORD, safe="")


class RedisServer:
    """One server in a folder of its own. With `keeps_data`, what it has said yes to outlives it."""

    def __init__(self, folder: Path, *, keeps_data: bool = False) -> None:
        self.folder = folder
        self._program = _program()
        self._keeps_data = keeps_data
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://:{PASSWORD_IN_URL}@127.0.0.1:{self.port}/0"
        self._running: subprocess.Popen | None = None
        self.client = redis.Redis(port=self.port, password=PASSWORD, decode_responses=True, socket_timeout=5)

    def start(self) -> None:
        """On the same port and the same folder as before."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "requirepass": PASSWORD,
            "dir": self.folder,
            "logfile": self.folder / "redis.log",
            "save": "",
            "appendonly": "yes" if self._keeps_data else "no",
            "appendfsync": "always",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._running = subprocess.Popen([self._program, *map(str, words)], stdin=subprocess.DEVNULL)
        until(self._answers, 10, "Redis answers")

    def kill(self) -> None:
        """SIGKILL, and the end of it."""
        self._running.kill()
        self._running.wait(10)

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, until `thaw`."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Goes on."""
        self._running.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """The end, whatever state it is in."""
        self.client.close()
        if self._running:
            self.kill()

    def events(self, project_id: str) -> list[str]:
        """What is in the stream of a project, as JSON."""
        return [fields["event"] for _, fields in self.client.xrange(f"i2v:progress:{project_id}")]

    def clients(self) -> int:
        """Connections, but for the one that asks."""
        return len(self.client.client_list()) - 1

    def _answers(self) -> bool:
        try:
            return self.client.ping()
        except redis.ConnectionError:  # not yet, or still loading
            return False


@contextmanager
def redis_server(folder: Path, *, keeps_data: bool = False) -> Iterator[RedisServer]:
    """A Redis that runs. Skips where there is none; fails where CI is set."""
    server = RedisServer(folder, keeps_data=keeps_data)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _program() -> str:
    program = shutil.which("redis-server", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "redis-server is not installed: no Redis to test against"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return program
