"""Signs of life: of real workers that are idle, busy, paused and killed, and what is read from the files."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

import anyio
import pytest

from inference import liveness, process
from tests.support.processes import Site, i2v_here, until


@pytest.fixture
def signs(monkeypatch, tmp_path):
    """The folder of this test's own workers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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
        left, new = signs / "w2.x.alive", signs / ".w3.x.alive"
        for path in (left, new):
            path.write_text(json.dumps({"worker_id": "w2", "pid": 1}))
        assert names() == ["w1"]
        with liveness.shown("w4"):
            assert not left.exists()
            assert new.exists()
            assert names() == ["w1", "w4"]


def test_a_file_that_is_gone_is_missed(signs):
    """As /tmp is cleared away: a worker goes on, and the check says what it does not find."""
    with liveness.shown("w1") as sign:
        [path] = signs.iterdir()
        path.unlink()
        sign.touch()
        assert names() == []


def test_a_folder_of_somebody_else_is_not_used(signs, tmp_path):
    """Its name is known to everybody, and the temporary folder is everybody's."""
    (tmp_path / "elsewhere").mkdir()
    signs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError), liveness.shown("w1"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


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
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        liveness.end_hung(None, 2, pause_s=0)
        assert second.wait() == -signal.SIGABRT
        assert lives("--within", "10", "--end")  # the other was left alone
        first.kill()
        assert check("first").stderr.startswith("i2v: no worker first runs here: ")
        site.stop_workers()
        assert not lives()
