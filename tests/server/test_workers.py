"""Who was heard of: names without their leases, for a while, and never more than so many."""

import pytest

from inference.server import workers
from inference.server.workers import Workers, WorkerSeen, name_of


class Clock:
    """Time that moves when it is told to."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    """See Clock."""
    return Clock()


@pytest.fixture
def seen(clock):
    """Nobody was heard of."""
    return Workers(clock)


@pytest.mark.parametrize(
    "worker_id,name", [("host-1.3f2a", "host-1"), ("a.b.c", "a.b"), ("w", "w"), (".x", ".x"), ("w.", "w")]
)
def test_a_name_is_what_stays_of_a_worker_id(worker_id, name):
    """Each lease has a worker_id of its own."""
    assert name_of(worker_id) == name


def test_who_asks_and_works_is_seen(seen, clock):
    """The latest first, with the tasks that it has and the kind that it asks for."""
    seen.asked("one.1", "wan")
    seen.heard("one.1", "task-1")
    clock.now_s += 5
    seen.asked("two.1")
    seen.heard("one.2", "task-0")
    clock.now_s += 1
    seen.asked("two.2")
    assert seen.seen() == [
        WorkerSeen("two", None, 0, ()),
        WorkerSeen("one", "wan", 1, ("task-0", "task-1")),
    ]


def test_a_task_that_ended_or_went_to_another_is_nobodys(seen):
    """A worker has a task until its end, or until another is heard of with it."""
    for item in ("a", "b"):
        seen.heard("one.1", item)
    seen.ended("one.1", "a")
    seen.heard("two.1", "b")
    assert {it.name: it.item_ids for it in seen.seen()} == {"one": (), "two": ("b",)}


def test_who_falls_silent_is_forgotten(seen, clock):
    """After ten minutes; its tasks with it."""
    seen.heard("one.1", "a")
    clock.now_s += workers.FORGET_S - 1
    assert [it.heard_s_ago for it in seen.seen()] == [workers.FORGET_S - 1]
    clock.now_s += 1
    assert seen.seen() == []
    seen.asked("one.2")
    assert seen.seen() == [WorkerSeen("one", None, 0, ())]


def test_made_up_names_do_not_fill_the_memory(seen):
    """Those that were heard of last stay."""
    for number in range(workers.MAX_WORKERS + 50):
        seen.heard(f"name-{number}.1", f"task-{number}")
    assert len(seen.seen()) == workers.MAX_WORKERS
    assert seen.seen()[0].name == f"name-{workers.MAX_WORKERS + 49}"
    for number in range(workers.MAX_ITEMS + 50):
        seen.heard("one.1", f"task-{number}")
    [one, *_] = seen.seen()
    assert len(one.item_ids) == workers.MAX_ITEMS
