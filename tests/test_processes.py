"""Real processes on real sockets: killed, paused, stopped, restarted, and cut off. The ledger has to be exact."""

import os
import signal
import subprocess

import pytest

from tests.simulation import storm
from tests.support.processes import I2V, Process, Site, environment, until
from tests.support.proxy import Hold, Weather

BRIEF = {"LEASE_DURATION": 3, "I2V_LEASE_EXTENSION": 3}
"""For whoever is to lose its lease: the test waits it out."""


@pytest.fixture
def site(tmp_path):
    """A server with nothing to do yet."""
    with Site(tmp_path) as site:
        yield site
        site.show()


def completed(site, item_id, deadline_s=40):
    """The task, once it is done."""
    return until(lambda: (it := site.task(item_id))["status"] == "completed" and it, deadline_s, "the task is done")


def test_a_command_that_was_forked_is_like_one_that_was_started(tmp_path):
    """The same words and the same exit code, in its own folder, environment and session; so these tests are true."""
    command = ("render", "absent.jpg", "--engine", "preview")
    env = environment(TMPDIR=tmp_path)
    started = subprocess.run([I2V, *command], cwd=tmp_path, env=env, capture_output=True, check=False, timeout=60)
    forked = Process(tmp_path, "forked", *command, env=env)
    assert forked.wait() == started.returncode == 2
    assert (forked.stdout.read_bytes(), forked.stderr.read_bytes()) == (started.stdout, started.stderr)
    assert b"absent.jpg" in started.stderr
    running = Process(tmp_path, "running", "serve", "--port", "0", env=environment(I2V_DATA_DIR=tmp_path / "data"))
    its_session = os.getsid(running.pid)
    running.kill()
    assert its_session == running.pid
    assert running.exit_code == -signal.SIGKILL


def test_a_killed_worker_has_a_successor(site):
    """SIGKILL in the middle of a generation: the lease runs out, another worker completes the task, once."""
    [item_id] = site.submit(seconds=2)
    first = site.worker("first", **BRIEF)
    site.wait_for_holder(item_id, first)
    first.kill()
    site.worker("second")
    task = completed(site, item_id)
    assert task["worker_id"].startswith("second.")
    assert (task["crash_count"], task["retry_count"]) == (1, 0)
    site.close_books(tasks=1)


def test_a_paused_worker_writes_nothing(site):
    """SIGSTOP past the lease, then SIGCONT: it finds out by itself that its task went on without it."""
    [item_id] = site.submit(seconds=2)
    first = site.worker("first", **BRIEF)
    site.wait_for_holder(item_id, first)
    first.send(signal.SIGSTOP)
    site.worker("second")
    done = completed(site, item_id)
    first.send(signal.SIGCONT)
    until(lambda: first.events("lease_ended", status="lease_lost"), 15, "the paused worker let go")
    assert site.record.of("upload", "first") == site.record.of("report", "first") == []
    now = site.task(item_id)
    assert {name: now[name] for name in ("worker_id", "video_storage_path", "updated_at", "crash_count")} == {
        name: done[name] for name in ("worker_id", "video_storage_path", "updated_at", "crash_count")
    }
    assert now["crash_count"] == 1
    assert now["worker_id"].startswith("second.")
    site.close_books(tasks=1)


def test_a_report_that_arrives_late_is_refused(site):
    """Sent by the holder, held up on its way until the successor is done: 403, and the row stays the successor's."""
    [item_id] = site.submit()
    hold = Hold("report")
    first = site.worker("first", fault=hold, **BRIEF)
    assert hold.held.wait(20)
    first.send(signal.SIGSTOP)
    site.worker("second")
    done = completed(site, item_id)
    hold.let_go()
    until(lambda: site.record.of("report", "first"), 10, "the report went through")
    first.send(signal.SIGCONT)
    until(lambda: first.events("lease_ended", status="lease_lost"), 15, "the first worker let go")
    assert [it.status for it in site.record.of("report", "first")] == [403]
    assert site.task(item_id)["updated_at"] == done["updated_at"]
    books = site.close_books(tasks=1)
    # The books are no decoration: had it been accepted, or had the task ended twice, they would show it.
    [late] = site.record.of("report", "first")
    late.status = 200
    assert books.stale_writes() == [late]
    books.changes[item_id].append(books.changes[item_id][-1])
    with pytest.raises(AssertionError, match="ended 2 times"):
        books._check_history(books.rows[0])


@pytest.mark.parametrize(
    "arrives", ["before the successor's", pytest.param("after the successor's", marks=pytest.mark.slow)]
)
def test_an_upload_that_arrives_late_spoils_nothing(site, arrives):
    """A video of the holder before, held up on its way, neither replaces the successor's nor stands in its place."""
    [item_id] = site.submit()
    hold = Hold("upload")
    first = site.worker("first", fault=hold, **BRIEF)
    assert hold.held.wait(20)
    first.send(signal.SIGSTOP)
    second = site.worker("second")
    if arrives == "before the successor's":
        until(lambda: second.events("lease_started"), 20, "the second worker has it")
        hold.let_go()
    done = completed(site, item_id)
    hold.let_go()
    until(lambda: site.record.of("upload", "first"), 10, "the upload went through")
    first.send(signal.SIGCONT)
    until(lambda: first.events("lease_ended", status="lease_lost"), 15, "the first worker let go")
    [late] = site.record.of("upload", "first")
    assert late.accepted == (arrives == "before the successor's")
    assert late.path.endswith(done["video_storage_path"]) != late.accepted
    assert done["worker_id"].startswith("second.")
    assert site.record.of("report", "first") == []
    site.close_books(tasks=1)


@pytest.mark.slow
def test_a_stop_lets_short_work_finish(site):
    """SIGTERM and Ctrl-C: no new task, the running one is completed, exit 0; the rest waits, uncounted."""
    items = site.submit(3, seconds=1.5)
    workers = [site.worker(name, I2V_SHUTDOWN_GRACE=20) for name in ("terminated", "interrupted")]
    for worker, number in zip(workers, (signal.SIGTERM, signal.SIGINT), strict=True):
        until(lambda worker=worker: worker.events("stage", stage="render"), 20, "it renders")
        worker.send(number)
    assert [worker.wait(20) for worker in workers] == [0, 0]
    assert [len(worker.events("lease_ended", status="completed")) for worker in workers] == [1, 1]
    tasks = [site.task(item_id) for item_id in items]
    assert sorted(task["status"] for task in tasks) == ["completed", "completed", "pending"]
    assert {(task["crash_count"], task["retry_count"]) for task in tasks} == {(0, 0)}
    site.worker("next")
    until(site.has_ended, 20, "the rest is done")
    site.close_books(tasks=3)


def test_a_stop_hands_back_long_work(site):
    """After the grace time, or at once on a second Ctrl-C: exit 0, and the tasks wait again, uncounted."""
    items = site.submit(2, seconds=20)
    terminated = site.worker("terminated", I2V_SHUTDOWN_GRACE=0.5)
    interrupted = site.worker("interrupted", I2V_SHUTDOWN_GRACE=60)
    for worker, number in ((terminated, signal.SIGTERM), (interrupted, signal.SIGINT)):
        until(lambda worker=worker: worker.events("stage", stage="render"), 20, "it renders")
        worker.send(number)
    assert terminated.wait(8) == 0
    until(lambda: interrupted.events("stopping", signal="SIGINT"), 10, "it heard")
    assert interrupted.exit_code is None
    interrupted.send(signal.SIGINT)
    assert interrupted.wait(8) == 0
    for worker in (terminated, interrupted):
        assert len(worker.events("lease_ended", status="released")) == 1
    assert site.leftovers() == []
    for item_id in items:
        task = site.task(item_id)
        assert (task["status"], task["worker_id"]) == ("pending", None)
        assert (task["crash_count"], task["retry_count"]) == (0, 0)
        site.ask("POST", f"tasks/{item_id}/cancel")
    site.close_books(tasks=2, cancelled=2)


@pytest.mark.slow
def test_a_server_may_be_killed_under_its_workers(site):
    """SIGKILL and a restart on the same data, twice: workers wait for it, everything completes, nothing twice."""
    site.submit(6)
    for name in ("one", "two"):
        site.worker(name)
    for reports in (1, 3):
        until(lambda reports=reports: len(site.record.of("report")) >= reports, 30, "work goes on")
        site.server.kill()
        site.start_server()
    until(site.has_ended, 40, "everything is done")
    site.close_books(tasks=6)


@pytest.mark.slow
def test_lost_replies_lose_nothing(site):
    """Beats, presigns, uploads and reports get through and their answers do not, or they are lost themselves."""
    site.submit(4)
    calls = ("heartbeat", "presign", "upload", "report")
    for seed, name in enumerate(("one", "two", "three")):
        site.worker(name, Weather(seed, share=0.2, calls=calls))
    until(site.has_ended, 60, "everything is done")
    lost = {it.call for it in site.record.exchanges if it.fault}
    assert lost == set(calls)
    books = site.close_books(tasks=4)
    assert [row.crash_count for row in books.rows] == [0] * 4


@pytest.mark.slow  # the soak is `python -m tests.simulation.storm`
def test_a_storm_leaves_the_ledger_exact(tmp_path):
    """Kills, pauses, stops and restarts at random for a while; afterwards every task has ended once, and rightly."""
    books = storm.run(tmp_path, seconds=9, tasks=12, seed=4)
    assert sum(row.status == "completed" for row in books.rows) >= 9
    assert sum(row.crash_count for row in books.rows) >= 1  # otherwise it was no storm
