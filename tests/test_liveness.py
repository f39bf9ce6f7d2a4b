"""Signs of life: of real workers that are idle, busy, paused and killed, and what is read from the files."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import anyio
import anyio.lowlevel
import pytest
import structlog

from inference import liveness, private, process
from tests.support.disk import small_disk
from tests.support.processes import Site, i2v_here, until


@pytest.fixture
def signs(monkeypatch, tmp_path):
    """The folder of this test's own workers."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return liveness.folder()


def names():
    """Of the workers that are seen."""
    return [it.worker_id for it in liveness.workers()]


def test_a_worker_is_seen_for_as_long_as_it_lives(signs):
    """By its name; several of one name are several."""
    assert liveness.faults(None, 60) == [f"no worker runs here: there is no sign in {signs}"]
    with liveness.shown("w1"):
        with liveness.shown("w2"), liveness.shown("w2"):
            assert names() == ["w1", "w2", "w2"]
            assert liveness.faults(None, 60) == liveness.faults("w2", 60) == []
        assert liveness.faults("w2", 60) == [f"no worker w2 runs here: there is no sign in {signs}"]
        assert {it.pid for it in liveness.workers()} == {os.getpid()}
    assert not signs.exists()


def test_one_that_does_not_turn_is_named(signs):
    """And only that one. Another touch, and it is well again."""
    with liveness.shown("w1") as first, liveness.shown("w2"):
        [path] = signs.glob("w1.*")
        os.utime(path, (0, path.stat().st_mtime - 100))
        [fault] = liveness.faults(None, 60)
        assert fault.startswith(
            f"worker w1 (process {os.getpid()}) hangs: its loop has not turned for 100 s, the limit"
        )
        assert liveness.faults("w2", 60) == []
        first.touch()
        assert liveness.faults(None, 60) == []


def test_what_killed_workers_left_counts_for_nothing(signs):
    """Not even fresh, and the next worker clears it away; one that is just being made stays."""
    with liveness.shown("w1"):
        [held] = signs.iterdir()
        left, new = signs / "w2.x.alive", signs / ".w3.x.alive"
        for path in (left, new):
            path.write_text(held.read_text().replace("w1", "w2"))
        assert names() == ["w1"]
        with liveness.shown("w4"):
            assert not left.exists()
            assert new.exists()
            assert names() == ["w1", "w4"]


@pytest.mark.anyio
async def test_a_file_that_is_gone_is_missed(signs, monkeypatch):
    """As /tmp is cleared away: a worker goes on, says so once, and the check says what it does not find."""
    monkeypatch.setattr(process, "TURN_S", 0.01)
    with structlog.testing.capture_logs() as logged:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.show_life, "w1", lambda: False)
            await anyio.sleep(0.05)
            [path] = signs.iterdir()
            path.unlink()
            await anyio.sleep(0.1)
            assert names() == []
            tasks.cancel_scope.cancel()
    assert [line["event"] for line in logged] == ["no_sign_of_life"]
    assert not signs.exists()


@pytest.mark.anyio
async def test_a_sign_that_cannot_be_touched_is_none(tmp_path, monkeypatch):
    """A disk that takes no more would make it grow old, and `--end` end a worker that is well."""
    monkeypatch.setattr(process, "TURN_S", 0.01)
    with small_disk(tmp_path / "disk", "100k") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.show_life, "w1", lambda: False)
            await anyio.sleep(0.05)
            assert names() == ["w1"]
            await anyio.run_process(["mount", "-o", "remount,ro", str(disk)])
            await anyio.sleep(0.1)
            assert names() == []
            assert liveness.faults(None, 60)[0].startswith("no worker runs here")
            tasks.cancel_scope.cancel()


def test_a_full_disk_hides_no_worker(tmp_path, monkeypatch):
    """The check writes nothing, neither to find the folder nor in it."""
    with small_disk(tmp_path / "disk", "100k") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        with liveness.shown("w1"):
            with suppress(OSError):
                (disk / "much").write_bytes(bytes(200_000))
            program = [sys.executable, "-m", "inference.commands.health", "w1"]
            ran = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
            assert (ran.returncode, ran.stderr) == (0, "")


def test_a_place_without_locks_has_no_signs(signs, monkeypatch):
    """One there would outlive its worker, and `--end` end whatever has its number by then."""

    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(private.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available"), liveness.shown("w1"):
        pass
    assert list(signs.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_used(signs, tmp_path):
    """Its name is known to everybody, and the temporary folder is everybody's. Nor is what is said there believed."""
    (tmp_path / "elsewhere").mkdir()
    signs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError), liveness.shown("w1"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
    signs.unlink()
    with liveness.shown("w1"):
        signs.rename(tmp_path / "theirs")
        signs.symlink_to(tmp_path / "theirs")
        assert names() == []
        signs.unlink()
        (tmp_path / "theirs").rename(signs)
        assert names() == ["w1"]


def test_a_worker_of_another_container_is_not_here(signs):
    """Containers that share the folder have numbers of processes of their own: that of one there is another's here."""
    with liveness.shown("w1"):
        [path] = signs.iterdir()
        said = json.loads(path.read_text())
        assert said["pid_namespace"].startswith("pid:[")
        path.write_text(json.dumps(said | {"pid_namespace": "pid:[1]"}))
        os.utime(path, (0, 0))
        assert liveness.faults("w1", 60)[0].startswith("no worker w1 runs here")
        liveness.end_hung(None, 60, pause_s=0)  # or this test would end here


def test_one_that_turns_at_the_second_look_is_not_ended(signs):
    """Whatever the clock says: the machine slept, or its clock is set, before the first look or after it."""
    with liveness.shown("slept") as slept, liveness.shown("set"):
        paths = {path.name.split(".")[0]: path for path in signs.iterdir()}
        os.utime(paths["slept"], (0, 0))
        between = threading.Timer(0.1, lambda: (slept.touch(), os.utime(paths["set"], (0, 0))))
        between.start()
        liveness.end_hung(None, 60, pause_s=0.3)  # or this test would end here
        between.join()
        assert [fault.split()[1] for fault in liveness.faults(None, 60)] == ["set"]


@pytest.mark.anyio
@pytest.mark.parametrize("abstract", [False, True])
async def test_a_supervisor_hears_of_a_loop_that_turns_and_of_no_other(signs, tmp_path, monkeypatch, abstract):
    """As systemd listens: a datagram socket, in a folder or with an abstract name."""
    monkeypatch.setattr(process, "TURN_S", 0.01)
    name = f"@i2v-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    stuck = False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name[1:]}" if abstract else name)
        listener.setblocking(False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.show_life, "w1", lambda: stuck, name)
            with anyio.fail_after(5):
                await anyio.wait_readable(listener)
            assert listener.recv(100) == b"WATCHDOG=1"
            stuck = True
            [path] = signs.iterdir()
            await anyio.sleep(0.05)
            while True:  # what was said before
                try:
                    listener.recv(100)
                except BlockingIOError:
                    break
            touched_at = path.stat().st_mtime_ns
            with anyio.move_on_after(0.1) as waited:
                await anyio.wait_readable(listener)
            assert waited.cancelled_caught
            assert path.stat().st_mtime_ns == touched_at
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.usefixtures("signs")
async def test_a_supervisor_that_reads_nothing_stops_no_loop(tmp_path, monkeypatch):
    """What it is told waits in a queue of some datagrams, and the next one would wait for room in it."""
    monkeypatch.setattr(process, "TURN_S", 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        turns = 0

        def is_stuck():
            nonlocal turns
            turns += 1
            return False

        with anyio.move_on_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(process.show_life, "w1", is_stuck, str(tmp_path / "notify"))
                while turns < 1000:  # more than net.unix.max_dgram_qlen is anywhere
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
    assert turns >= 1000


@pytest.mark.anyio
async def test_a_worker_without_a_place_for_its_sign_works_on(signs):
    """One warning; tasks matter more."""
    signs.write_text("no folder")
    with anyio.move_on_after(0.1) as waited:
        await process.show_life("w1", lambda: False)
    assert waited.cancelled_caught


def test_the_check_imports_little():
    """It runs every half a minute on each box."""
    heavy = {"pydantic", "httpx", "anyio", "rich.console", "structlog", "numpy", "PIL", "inference.settings"}
    program = f"import sys, inference.commands.health; print(*({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []


def test_of_real_workers(tmp_path, capsys, monkeypatch):
    """Idle and busy they live; one that is paused hangs, is named, and ended if asked; one that was killed is gone."""

    def check(*arguments):
        return i2v_here(capsys, tmp_path, "health", *arguments, TMPDIR=tmp_path)

    def lives(*arguments):
        return check(*arguments).returncode == 0

    with Site(tmp_path / "site") as site:
        assert check().returncode == 1
        first, second = (site.worker(name, TMPDIR=tmp_path) for name in ("first", "second"))
        until(lambda: lives("first") and lives("second"), 20, "both have started")
        until(lambda: first.events("idle") and second.events("idle"), 20, "both have asked")
        told = check("--within", "30")
        assert [line.split()[1] for line in told.stdout.splitlines()] == ["first", "second"]
        assert told.stderr == ""
        assert lives()

        second.send(signal.SIGSTOP)
        [item_id] = site.submit(seconds=20)
        site.wait_for_holder(item_id, first)
        until(lambda: not lives("--within", "2"), 20, "the paused one is missed")
        told = check("--within", "2")
        assert "i2v: worker second (process " in told.stderr
        assert "hangs: its loop has not turned for" in told.stderr
        assert lives("first", "--within", "10")
        assert first.events("lease_ended") == []  # it renders all the time
        second.send(signal.SIGCONT)
        until(lambda: lives("second", "--within", "2"), 20, "it goes on")
        second.send(signal.SIGSTOP)
        until(lambda: not lives("--within", "2"), 20, "it is missed again")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        liveness.end_hung(None, 2, pause_s=0)
        assert second.wait() == -signal.SIGABRT
        assert lives("--within", "10", "--end")  # the other was left alone
        first.kill()
        assert check("first").stderr.startswith("i2v: no worker first runs here: ")
        site.stop_workers()
        assert not lives()
