"""What the gate lets through: not too much, nothing stale, and never backwards."""

import itertools
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from inference.progress.events import CompletionEvent, ErrorEvent, ProgressEvent, is_terminal, percent
from inference.progress.gate import FORGET_S, INTERVAL_S, LATE_S, Gate


class Desk:
    """A gate on a clock that stands still until it is told to go on, and what it lets through."""

    def __init__(self, **options) -> None:
        self.now = 1000.0
        self.sent = []
        self.gate = Gate(self.sent.append, clock=lambda: self.now, **options)

    def wait(self, seconds: float) -> None:
        """As the thread of the gate does: what is due is sent when it is due."""
        self.now += seconds
        self.gate.send_due()

    @property
    def messages(self) -> list[str]:
        """What was let through, in words."""
        return [getattr(event, "message", event.type) for event in self.sent]


@pytest.fixture
def desk():
    """A gate on a clock of its own."""
    desk = Desk()
    yield desk
    desk.gate.close()


def progress(fraction: float, message: str = "", *, task: str = "director", status="processing", **marks):
    """A progress event; `marks` are lease and sequence."""
    return ProgressEvent(
        project_id="film",
        task_name=task,
        progress=fraction,
        progress_percent=percent(fraction),
        status=status,
        message=message,
        metadata=marks,
    )


def completion(**result):
    """The end of the task of `progress`."""
    return CompletionEvent(project_id="film", task_name="director", result=result)


def error(**details):
    """The same task, ended badly."""
    return ErrorEvent(project_id="film", task_name="director", error="no credits", details=details)


def test_the_newest_of_what_comes_too_soon_is_sent_when_the_time_is_over(desk):
    """The first at once; of the others none is lost but for a newer one."""
    for number in range(5):
        desk.gate.offer(progress(number / 10, str(number)))
    assert desk.messages == ["0"]
    desk.wait(INTERVAL_S - 0.01)
    assert desk.messages == ["0"]
    desk.wait(0.01)
    assert desk.messages == ["0", "4"]
    desk.gate.offer(progress(0.5, "5"))
    assert desk.messages == ["0", "4"]
    desk.wait(INTERVAL_S)
    assert desk.messages == ["0", "4", "5"]


def test_tasks_do_not_hold_each_other_up(desk):
    """Each has its own half second, and so has the same name in another project."""
    desk.gate.offer(progress(0.1, "one"))
    desk.gate.offer(progress(0.1, "another", task="writer"))
    desk.gate.offer(progress(0.1, "a third").model_copy(update={"project_id": "another"}))
    assert desk.messages == ["one", "another", "a third"]


def test_an_end_is_sent_at_once_and_what_waits_is_dropped(desk):
    """Nothing that came before the end is told after it."""
    desk.gate.offer(progress(0.1, "one"))
    desk.gate.offer(progress(0.2, "two"))
    desk.gate.offer(completion())
    desk.wait(10)
    assert desk.messages == ["one", "completion"]


def test_what_waits_for_a_task_is_not_sent_early_because_something_else_was_due(desk):
    """A call that was planned for an event which was dropped since does not let another one through before its time."""
    desk.gate.offer(progress(0.1, "one", lease=1))
    desk.gate.offer(progress(0.2, "dropped", lease=1))
    desk.now += 0.4
    desk.gate.offer(completion())
    desk.now += 0.1
    desk.gate.offer(progress(0.0, "two", lease=2))  # half a second after the first: at once
    desk.gate.offer(progress(0.1, "three", lease=2))
    desk.wait(0)
    assert desk.messages == ["one", "completion", "two"]
    desk.wait(INTERVAL_S)
    assert desk.messages == ["one", "completion", "two", "three"]


@pytest.mark.parametrize(
    "said, passed",
    [
        ([progress(0.1, "new", lease=2), progress(0.9, "old", lease=1)], ["new"]),
        ([progress(0.1, "1", lease=1), progress(0.0, "again", lease=2)], ["1", "again"]),
        ([progress(0.1, "2", sequence=2), progress(0.2, "1", sequence=1), progress(0.3, "2", sequence=2)], ["2"]),
        ([progress(0.1, "5", lease=1, sequence=5), completion(lease=1, sequence=1)], ["5", "completion"]),
        ([progress(0.1, "a", lease=1, sequence=9), progress(0.0, "b", lease=2, sequence=1)], ["a", "b"]),
        ([progress(0.1, "new", lease=2), completion(lease=1)], ["new"]),
        ([progress(0.1, "new", lease=2), error(lease=1)], ["new"]),
        ([progress(0.1, "1", lease=1), completion(), progress(0.2, "late", lease=1)], ["1", "completion"]),
        ([progress(0.1, "1"), completion(), progress(0.2, "late")], ["1", "completion"]),
        ([completion(), progress(0.2, "again", lease=1)], ["completion", "again"]),
        ([progress(0.5, "1", lease=1), completion(), progress(0, "waits", lease=1, status="pending"),
          progress(0.1, "again", lease=2)], ["1", "completion", "waits", "again"]),
        ([progress(0.1, "1", lease="x"), progress(0.2, "2", lease=True)], ["1", "2"]),
    ],
)  # fmt: skip
def test_what_is_stale_is_dropped(said, passed):
    """What an earlier try says, what was overtaken on the way, and what comes after the end."""
    desk = Desk(interval_s=0)
    for event in said:
        desk.gate.offer(event)
    assert desk.messages == passed
    desk.gate.close()


def test_a_task_without_leases_may_begin_again_a_while_after_its_end():
    """Within ten seconds, progress is a late word of the try that ended; afterwards it is a new try, from 0 on."""
    desk = Desk(interval_s=0)
    desk.gate.offer(progress(0.9, lease=1))
    desk.gate.offer(completion())
    desk.now += LATE_S - 0.1
    desk.gate.offer(progress(0.95, "late"))
    assert len(desk.sent) == 2
    desk.now += 0.1
    desk.gate.offer(progress(0.95, "of the lease that ended", lease=1))
    desk.gate.offer(progress(0.05, "again"))
    assert (desk.sent[-1].message, desk.sent[-1].progress_percent) == ("again", 5)
    desk.gate.close()


LEASES = st.integers(1, 3)
SAID = st.one_of(
    st.builds(progress, st.floats(0, 1), lease=LEASES, sequence=st.one_of(st.none(), st.integers(1, 9))),
    st.builds(completion, lease=LEASES),
)


@given(st.lists(st.tuples(SAID, st.floats(0, 1))))
def test_whatever_is_said_percent_never_falls_within_a_lease_and_is_100_only_at_its_end(said):
    """Nor is anything told of an earlier lease, or after an end, or twice within half a second."""
    desk = Desk()
    told = []  # when, and what
    desk.gate._send = lambda event: told.append((desk.now, event))
    for event, pause_s in said:
        desk.gate.offer(event)
        desk.wait(pause_s)
    desk.wait(INTERVAL_S)
    marks = [(event.result["lease"], 2.0) if is_terminal(event) else
             (event.metadata["lease"], event.progress) for _, event in told]  # fmt: skip
    assert marks == sorted(marks)
    going_on = [(at, event) for at, event in told if not is_terminal(event)]
    assert all(event.progress_percent == percent(event.progress) <= 99 for _, event in going_on)
    assert all(later[0] - earlier[0] >= INTERVAL_S - 1e-6 for earlier, later in itertools.pairwise(going_on))
    newest = max((event.result["lease"] for event, _ in said if is_terminal(event)), default=0)
    if newest == 3:  # nothing is later: its end has to be told
        assert 3 in {event.result["lease"] for _, event in told if is_terminal(event)}
    desk.gate.close()


def test_a_thread_sends_what_waits():
    """Without anybody calling; and it is gone once the gate is closed."""
    sent, two = [], threading.Event()

    def send(event):
        sent.append(event.message)
        if len(sent) == 2:
            two.set()

    gate = Gate(send, interval_s=0.05)
    gate.offer(progress(0.1, "one"))
    assert gate._thread is None
    gate.offer(progress(0.2, "two"))
    thread = gate._thread
    assert thread.daemon
    assert two.wait(5)
    assert sent == ["one", "two"]
    gate.close()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_sends_what_waits_and_then_nothing(desk):
    """The last word of a task whose process ends is told."""
    desk.gate.offer(progress(0.1, "one"))
    desk.gate.offer(progress(0.2, "two"))
    desk.gate.close()
    desk.gate.offer(completion())
    assert desk.messages == ["one", "two"]


def test_who_cannot_send_is_a_line_in_the_log():
    """The next event is tried as ever. What is aimed at the work that reports goes through to it."""

    class SoftTimeLimitExceeded(Exception):
        """As Celery raises it, in the midst of anything."""

    errors = [OSError("away"), SoftTimeLimitExceeded()]

    def send(event):
        if errors:
            raise errors.pop(0)
        sent.append(event)

    sent = []
    gate = Gate(send, interval_s=0)
    with capture_logs() as logs:
        gate.offer(progress(0.1))
    assert [(line["event"], line["task_name"]) for line in logs] == [("progress could not be told", "director")]
    with pytest.raises(SoftTimeLimitExceeded):
        gate.offer(progress(0.2))
    gate.offer(progress(0.3))
    assert len(sent) == 1
    gate.close()


def test_tasks_that_nobody_hears_of_are_forgotten(desk):
    """A process that runs for months knows today's."""
    desk.gate.offer(progress(0.5, task="old"))
    desk.now += FORGET_S - 1
    desk.gate.offer(progress(0.5, task="new"))
    desk.now += FORGET_S / 2
    desk.gate.offer(progress(0.6, task="new"))
    assert [task for _, task in desk.gate._tasks] == ["new"]


FORK = """
import os
from inference.progress.events import ProgressEvent
from inference.progress.gate import Gate

gate = Gate(lambda event: print(event.message, flush=True), interval_s=0)
event = ProgressEvent(project_id="a", task_name="b", progress=0, progress_percent=0, status="", message="told")
with gate._lock:
    child = os.fork()
    if child == 0:
        gate.offer(event)
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_a_gate_of_its_own():
    """Locks and the thread stay behind: here a lock is held while the process forks, as by another thread of it."""
    ran = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout == "told\n"


def test_nothing_comes_after_the_end_whatever_threads_say():
    """Threads of a task that go on for a while, and the thread of the gate, while the task ends."""
    sent = []
    gate = Gate(sent.append, interval_s=0.001)

    def report():
        for number in range(300):
            gate.offer(progress(number / 300, lease=1))

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.offer(completion(lease=1))
    for thread in threads:
        thread.join()
    gate.close()
    assert [is_terminal(event) for event in sent] == [False] * (len(sent) - 1) + [True]
