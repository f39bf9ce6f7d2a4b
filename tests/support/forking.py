"""Scripts in processes of their own, without the second of a core that each takes to import what it needs.

One process has imported that, and is forked. What comes out is like any other: in a session of its own, with its own
environment, folder and files, it runs the script and ends as Python ends. But modules are there that it did not ask
for, so whether a script asks for all that it needs is for tests that start it in the usual way.

Run as a script, this file is the process that is forked. Its arguments are a socket, on which each message is a
request, and the modules to import.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STATUS = struct.Struct("i")
"""An exit code, or a signal as a negative number, as subprocess has it."""

MAX_REQUEST_BYTES = 100_000
FIRST_FILE = 3  # after stdin, stdout and stderr


class Forked:
    """A process that was forked, with the part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # a pipe on which its exit code comes

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after so many seconds."""
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone; one that has ended is left in peace."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, limit_s: float | None) -> None:
        if self.returncode is None and select.select([self._status], [], [], limit_s)[0]:
            told = os.read(self._status, STATUS.size)
            assert told, "the process that forks is gone"
            [self.returncode] = STATUS.unpack(told)
            os.close(self._status)

    def __del__(self) -> None:
        if self.returncode is None:
            os.close(self._status)


class Forker:
    """The process that is forked. It ends with the one that started it."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str], *, python: str | Path = sys.executable) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [python, "-P", __file__, str(theirs.fileno()), *modules],
                env=dict(env),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, command: Sequence[object], cwd: Path, env: Mapping[str, str], out: int, err: int) -> Forked:
        """Runs a script, or `-m` and a module, with arguments, its output in open files."""
        settings = {name: str(value) for name, value in env.items()}
        request = json.dumps({"command": [str(word) for word in command], "cwd": str(cwd), "env": settings}).encode()
        assert len(request) <= MAX_REQUEST_BYTES
        status, theirs = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [request], [out, err, theirs])
                told = self._socket.recv(STATUS.size)
        finally:
            os.close(theirs)
        assert told, "the process that forks is gone"
        return Forked(*STATUS.unpack(told), status)

    def close(self) -> None:
        """Ends it; what it has started goes on."""
        self._socket.close()
        self._popen.wait(10)


def fork_on_request(requests: socket.socket) -> bool:
    """Forks for each request, and passes exit codes on as they come.

    Returns True in each child, and False in the parent when nobody is there any more who asks.
    """
    children: dict[int, tuple[int, int]] = {}  # by pidfd: the process, and where its exit code goes
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                pid, status = children.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):  # where nobody is interested any more
                    os.write(status, STATUS.pack(code))
                os.close(status)
                os.close(ready)
                continue
            raw, files, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
            if not raw:
                return False
            asked = json.loads(raw)
            pid = os.fork()
            if pid == 0:
                os.setsid()
                requests.sendall(STATUS.pack(os.getpid()))  # from here on it can be killed with its children
                become(asked, files)
                return True
            for file in files[:2]:
                os.close(file)
            children[os.pidfd_open(pid)] = pid, files[2]


def become(asked: dict, files: list[int]) -> None:
    """What the kernel and Python do when a script is started."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    os.closerange(FIRST_FILE, os.sysconf("SC_OPEN_MAX"))
    sys.stdout.reconfigure(line_buffering=True)  # about as `python -u` has it
    sys.argv = asked["command"]
    first = asked["cwd"] if sys.argv[0] == "-m" else str(Path(sys.argv[0]).parent)
    paths = asked["env"].get("PYTHONPATH", "")
    sys.path[:0] = [first, *filter(None, paths.split(os.pathsep))]


def main() -> None:
    """Imports, then forks."""
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a child's collector does not touch, and so copy, what all of them share
    requests = socket.socket(fileno=int(sys.argv[1]))
    if fork_on_request(requests):
        requests.detach()  # it is closed
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
