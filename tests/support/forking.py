"""Processes of `i2v` without the second that each takes to import what it needs: one has done so, and is forked.

What comes out is a process like any other: in a session of its own, with its own environment, folder and files, and it
ends as Python ends. Only its start is not the one of the installed script, which other tests run, and it has modules
that its command may not need.

Run as a script, this file is the process that is forked. It takes one request a message on the socket in its argument.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STATUS = struct.Struct("i")
"""An exit code, or a signal as a negative number, as subprocess has it."""

MAX_REQUEST_BYTES = 100_000
FIRST_FILE = 3  # after stdin, stdout and stderr


class Forked:
    """A child of the forking process, with the part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # a pipe on which its exit code comes

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after so many seconds."""
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("i2v", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone; one that has ended is left in peace."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, limit_s: float) -> None:
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

    def __init__(self, env: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                env=dict(env),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, command: Sequence[str], cwd: Path, env: Mapping[str, str], out: int, err: int) -> Forked:
        """Runs `i2v` with this command line, its output in open files."""
        request = json.dumps({"command": [str(word) for word in command], "cwd": str(cwd), "env": dict(env)}).encode()
        assert len(request) <= MAX_REQUEST_BYTES
        status, theirs = os.pipe()
        try:
            socket.send_fds(self._socket, [request], [out, err, theirs])
        finally:
            os.close(theirs)
        told = self._socket.recv(STATUS.size)
        assert told, "the process that forks is gone"
        return Forked(*STATUS.unpack(told), status)

    def close(self) -> None:
        """Ends it; what it has started goes on."""
        self._socket.close()
        self._popen.wait(10)


def fork_on_request(requests: socket.socket) -> list[str] | None:
    """Forks for each request: returns the command line in the child, and None in the parent when nobody asks any more.

    Exit codes are passed on as they come.
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
                return None
            asked = json.loads(raw)
            pid = os.fork()
            if pid == 0:
                become(asked, files)
                return asked["command"]
            for file in files[:2]:
                os.close(file)
            children[os.pidfd_open(pid)] = pid, files[2]
            requests.sendall(STATUS.pack(pid))


def become(asked: dict, files: list[int]) -> None:
    """What the kernel and Python do when a program starts."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    os.closerange(FIRST_FILE, os.sysconf("SC_OPEN_MAX"))


def main() -> None:
    """Imports what `i2v` needs, then forks."""
    for name in ("inference.commands.main", "inference.build", "inference.server.serve", "inference.push.app"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a child's collector does not touch, and so copy, what all of them share
    requests = socket.socket(fileno=int(sys.argv[1]))
    command = fork_on_request(requests)
    if command is not None:
        requests.detach()
        sys.argv = command
        sys.exit(sys.modules["inference.commands.main"].main())


if __name__ == "__main__":
    main()
