"""Decoding in processes of its own: what a photo costs is bounded, and what stops a caller stops the work."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from inference.errors import InvalidPhoto, MachineFault
from inference.media import child_process as module
from inference.media.photo import load, measure, open_photo, verify
from tests.media.elsewhere import die, fail, leave, meet, process_id, threads_with_numpy, work
from tests.media.hostile import many_scans
from tests.server.harness import config, running_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def slow_photo(tmp_path):
    """A photo within every limit on its header that takes seconds to decode."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(many_scans(9999, 195))
    return path


def test_a_call_runs_elsewhere_and_the_next_one_there_too():
    """Starting a process for each photo would cost 0.4 s of a core."""
    first = process_id()
    assert first != os.getpid()
    assert process_id() == first


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux does")
def test_numpy_starts_no_threads_there(monkeypatch):
    """It has one for each core otherwise: on 64 cores, with a container's limit, the process crashed before a photo."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    module.stop()
    assert threads_with_numpy() == 1


def test_a_relative_path_is_the_callers(tmp_path, monkeypatch):
    """Wherever the process was started, which works for a caller that has moved on."""
    process_id()
    (tmp_path / "photo.jpg").write_bytes(many_scans(64, 10))
    monkeypatch.chdir(tmp_path)
    assert verify(Path("photo.jpg")).width == 64


def test_calls_at_once_have_a_process_each(tmp_path):
    """None waits for another."""
    threads = [threading.Thread(target=meet, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_raised_comes_back():
    """As the function raised it."""
    with pytest.raises(InvalidPhoto, match=r"^not a photo$"):
        fail("not a photo")
    assert process_id() != os.getpid()


def test_a_photo_is_at_fault_for_what_it_costs(slow_photo):
    """The limit is on processor time, so a busy machine condemns nobody's photo; it is the same for every reader."""
    for read, arguments in [(verify, ()), (load, ((640, 360),))]:
        with pytest.raises(InvalidPhoto, match=r"takes more than 0\.2 s of processor time"):
            module._Children().call(read, (slow_photo, *arguments), {}, cpu_limit_s=0.2)


def test_hundreds_of_scans_are_refused_before_any_is_decoded(tmp_path):
    """266 KB that take half a minute of a shared core; 4 MB of the same take half an hour."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(many_scans(9999, 500))
    for read in (measure, verify, open_photo):
        started = time.process_time()
        with pytest.raises(InvalidPhoto, match="more than 200 scans"):
            unwrap(read)(path)
        assert time.process_time() - started < 1


def test_scans_count_as_often_as_they_are_decoded(tmp_path):
    """One without its end is decoded several times, to see whether more of it is missing."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(many_scans(64, 50)[:-2])
    assert verify(path).width == 64
    path.write_bytes(many_scans(64, 51)[:-2])
    with pytest.raises(InvalidPhoto, match="51 scans without its end"):
        verify(path)


@pytest.mark.parametrize("number", sorted(module.CRASHES))
def test_a_crash_of_a_decoder_is_the_photos_fault(number):
    """It would crash every worker that took the task; this one goes on."""
    with pytest.raises(InvalidPhoto, match=signal.Signals(number).name):
        die(number)
    assert process_id() != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_being_killed_is_not_the_photos_fault(number):
    """By a kernel without memory, by a shutdown."""
    with pytest.raises(MachineFault, match=signal.Signals(number).name):
        die(number)
    assert process_id() != os.getpid()


def test_an_interpreter_that_ends_is_not_the_photos_fault():
    """Whatever became of it."""
    with pytest.raises(MachineFault, match="exit code 3"):
        leave(3)


def test_a_machine_without_a_process_to_spare_hands_back(monkeypatch):
    """Nothing to execute, no memory, too many processes: another machine can read the photo."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MachineFault, match=os.strerror(errno.ENOENT)):
        module._Children().call(process_id, (), {})


def test_one_that_was_killed_while_it_waited_is_replaced():
    """The next photo does not pay for it."""
    waiting = process_id()
    os.kill(waiting, signal.SIGKILL)
    os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
    assert process_id() != waiting


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_caller_does_not_wait(slow_photo, backend):
    """A cancel, a lost lease, SIGTERM: the child is killed, though its thread cannot be."""

    async def main() -> None:
        with anyio.move_on_after(0.3) as scope:
            await anyio.to_thread.run_sync(verify, slow_photo)
        assert scope.cancelled_caught
        assert anyio.current_time() - scope.deadline < 1

    anyio.run(main, backend=backend)


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Some call is under way, and ends with the context because it was stopped."""
    begun, raised = folder / "begun", []
    os.mkfifo(begun)

    def call() -> None:
        try:
            work(begun)
        except MachineFault as error:
            raised.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    begun.open().close()
    yield
    thread.join(60)
    assert "SIGKILL" in raised[0]


def test_a_process_that_ends_takes_them_along(tmp_path):
    """Calls under way are told; later ones start anew."""
    with working(tmp_path):
        module.stop()
    assert process_id() != os.getpid()


def test_a_server_that_stops_takes_them_along(tmp_path):
    """Its requests have been waited for by then; their threads would keep the process from ending."""
    with working(tmp_path), running_server(config(tmp_path)):
        pass


def test_one_whose_parent_was_killed_ends_as_well():
    """A worker killed outright kills nobody: what waits for a call sees that the other side is gone."""
    program = """
import os, signal
from tests.media.elsewhere import process_id
assert process_id() != os.getpid()
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Both write to one pipe for errors, which ends when the last of them does.
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=ROOT, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, b"")
