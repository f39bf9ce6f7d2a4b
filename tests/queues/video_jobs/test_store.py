"""The table's rules, in memory, in our own table, and in one that an application had already."""

import pytest

from inference.errors import ItemMissing, NotHolder, WrongState
from inference.queues.item import CRASHED, LOST, MAX_LOST
from tests.queues.video_jobs.subjects import STALE_S, THEIRS, uuid

PHOTO = {"photo": "a.jpg"}
JOB, OTHER = uuid(1), uuid(2)
A, B, C, D = (uuid(number) for number in range(100, 104))


def told(subject, message):
    """As much of a message as the table takes."""
    return message[:40] if getattr(subject, "names", None) is THEIRS else message


def test_a_whole_life(subject):
    """Added once, acquired once, heard of, complete."""
    store = subject.store
    assert store.add(JOB, PHOTO)
    assert not store.add(JOB, {"photo": "other.jpg"})
    assert store.backlog() == 1
    job = store.acquire(A, "w")
    assert (job.id, job.status, job.input, job.attempt_id, job.worker) == (JOB, "processing", PHOTO, A, "w")
    assert (job.attempts, job.beaten, job.silent_s < 5) == (1, False, True)
    assert store.backlog() == 0
    assert store.acquire(B, "w") is None
    assert store.beat(JOB, A, {"stages_total": 5, "segments_total": 2}) is False
    assert store.look(JOB, A) is False
    assert store.get(JOB).beaten
    assert store.complete(JOB, A, "key") == "completed"
    job = store.get(JOB)
    assert (job.status, job.artifact_key, job.attempt_id, job.silent_s) == ("completed", "key", A, None)
    assert job.progress == {
        "stage": "done",
        "stage_index": 5,
        "stages_total": 5,
        "stages_completed": 5,
        "segments_total": 2,
        "segments_done": 2,
        "fraction": 1,
    }
    assert store.backlog() == 0


def test_the_oldest_is_next_and_a_given_one_is_out_of_turn(subject):
    """And nobody gets it twice."""
    ids = [uuid(number) for number in (3, 1, 2)]
    for job_id in ids:
        subject.store.add(job_id, PHOTO)
    assert subject.store.acquire_given(ids[2], A, "w").id == ids[2]
    assert subject.store.acquire_given(ids[2], B, "w") is None
    assert [subject.store.acquire(attempt, "w").id for attempt in (B, C)] == ids[:2]


def test_a_live_holder_is_left_alone_and_a_dead_one_is_not(subject):
    """The line is drawn at STALE_S without a beat."""
    subject.store.add(JOB, PHOTO)
    subject.store.acquire(A, "w")
    subject.store.beat(JOB, A)
    subject.expire(JOB, STALE_S - 5)
    assert subject.store.acquire(B, "w") is None
    assert subject.store.acquire_given(JOB, B, "w") is None
    assert subject.store.backlog() == 0
    assert subject.store.sweep().requeued == ()
    subject.expire(JOB, STALE_S + 5)
    assert subject.store.backlog() == 1
    job = subject.store.acquire_given(JOB, B, "w")
    assert (job.attempt_id, job.crashes, job.losses, job.attempts) == (B, 1, 0, 2)


def test_an_acquire_ends_no_job_that_may_be_acquired_again(subject):
    """Several holders are dead: whoever takes one of their jobs leaves the others to the next."""
    ids = [uuid(number) for number in (10, 11, 12)]
    for job_id in ids:
        subject.store.add(job_id, PHOTO)
        subject.store.acquire_given(job_id, uuid(99), "w")
        subject.store.beat(job_id, uuid(99))
        subject.expire(job_id)
    taken = [subject.store.acquire(uuid(number), "w") for number in (20, 21, 22)]
    assert [job.id for job in taken] == ids
    assert subject.store.acquire(uuid(23), "w") is None


def test_who_was_overtaken_changes_nothing(subject):
    """Whatever it tries is refused, and the row stays as it is."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    subject.expire(JOB)
    store.acquire(B, "w")
    store.beat(JOB, B, {"stage": "render"})
    before = store.get(JOB).model_copy(update={"silent_s": None})
    for late in (
        lambda: store.beat(JOB, A, {"stage": "late"}),
        lambda: store.look(JOB, A),
        lambda: store.complete(JOB, A, "late"),
        lambda: store.fail(JOB, A, "late"),
        lambda: store.release(JOB, A),
    ):
        with pytest.raises(NotHolder):
            late()
    assert store.get(JOB).model_copy(update={"silent_s": None}) == before


def test_nothing_is_written_after_the_end(subject):
    """Not even by who ended it, unless it is the same end again."""
    store = subject.store
    ends = {"complete": "key", "fail": "no"}
    for number, (verb, said) in enumerate(ends.items(), 10):
        job_id, attempt = uuid(number), uuid(number + 100)
        store.add(job_id, PHOTO)
        store.acquire_given(job_id, attempt, "w")
        first = getattr(store, verb)(job_id, attempt, said)
        ended = store.get(job_id)
        assert getattr(store, verb)(job_id, attempt, said) == first
        for late in (store.beat, store.look, store.release):
            with pytest.raises(NotHolder):
                late(job_id, attempt)
        with pytest.raises(NotHolder):
            store.complete(job_id, attempt, "another")
        with pytest.raises(NotHolder):
            getattr(store, verb)(job_id, B, said)
        other = next(each for each in ends if each != verb)
        with pytest.raises(NotHolder):
            getattr(store, other)(job_id, attempt, said)
        assert store.get(job_id) == ended
    assert store.acquire(C, "w") is None


def test_a_released_job_is_free_at_once(subject):
    """Uncounted, and its former holder is out."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    store.beat(JOB, A)
    assert store.release(JOB, A) == "queued"
    with pytest.raises(NotHolder):
        store.beat(JOB, A)
    job = store.acquire(B, "w")
    assert (job.attempts, job.crashes, job.losses, job.beaten) == (2, 0, 0, False)


@pytest.mark.parametrize(
    "end", [lambda s: s.complete(JOB, A, "key"), lambda s: s.fail(JOB, A, "no"), lambda s: s.release(JOB, A)]
)
def test_a_cancel_that_came_first_wins(subject, end):
    """Inside the statement that ends the job, at the last stage as well; and the end can be repeated."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    assert store.cancel(JOB).status == "processing"
    assert store.beat(JOB, A) is True
    assert store.look(JOB, A) is True
    assert end(store) == "canceled"
    assert end(store) == "canceled"
    job = store.get(JOB)
    assert (job.status, job.artifact_key, job.error, job.attempt_id) == ("canceled", None, None, A)
    assert store.cancel(JOB).status == "canceled"
    assert store.acquire_given(JOB, B, "w") is None


def test_a_cancel_that_came_last_is_refused(subject):
    """What has ended has ended."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    store.complete(JOB, A, "key")
    with pytest.raises(WrongState, match="completed"):
        store.cancel(JOB)
    assert not store.get(JOB).cancel_requested
    with pytest.raises(ItemMissing):
        store.cancel(OTHER)


def test_what_nobody_works_on_is_canceled_at_once(subject):
    """A job in the line, and one whose holder is dead."""
    store = subject.store
    for job_id in (JOB, OTHER):
        store.add(job_id, PHOTO)
    store.acquire_given(OTHER, A, "w")
    subject.expire(OTHER)
    assert [store.cancel(job_id).status for job_id in (JOB, OTHER)] == ["canceled", "canceled"]
    assert store.acquire(B, "w") is None
    assert store.complete(OTHER, A, "key") == "canceled"  # which its holder is told, if it comes back
    assert store.get(OTHER).artifact_key is None


def test_a_cancel_keeps_no_dead_holder_alive(subject):
    """However often it is asked for: liveness is what the holder says. Then nobody acquires the job."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    subject.expire(JOB, STALE_S - 100)
    for _ in range(15):
        store.cancel(JOB)
    assert store.get(JOB).silent_s >= STALE_S - 101
    subject.expire(JOB)
    assert store.acquire_given(JOB, B, "w") is None
    assert store.get(JOB).status == "canceled"


def test_the_third_dead_holder_is_the_last(subject):
    """It may be the job that kills them. Whoever looks for work next ends it."""
    store = subject.store
    store.add(JOB, PHOTO)
    for attempt in (A, B, C):
        assert store.acquire(attempt, "w").id == JOB
        store.beat(JOB, attempt)
        subject.expire(JOB)
    assert store.backlog() == 0
    assert store.acquire(D, "w") is None
    job = store.get(JOB)
    assert (job.status, job.error, job.crashes) == ("failed", told(subject, CRASHED), 3)


def test_the_third_dead_holder_is_the_last_for_who_asks_for_the_job(subject):
    """As above; and a sweep says so."""
    store = subject.store
    for job_id in (JOB, OTHER):
        store.add(job_id, PHOTO)
        for attempt in (A, B, C):
            store.acquire_given(job_id, attempt, "w")
            store.beat(job_id, attempt)
            subject.expire(job_id)
    assert store.acquire_given(JOB, D, "w") is None
    assert {store.get(job_id).status for job_id in (JOB, OTHER)} == {"failed"}
    assert store.sweep().failed == ()


def test_a_holder_that_was_never_heard_of_says_nothing_about_the_job(subject):
    """Only after a hundred in a row is somebody told; one beat, and they count from zero."""
    store = subject.store
    store.add(JOB, PHOTO)
    for _ in range(5):
        store.acquire(A, "w")
        subject.expire(JOB)
    job = store.acquire(B, "w")
    assert (job.crashes, job.losses) == (0, 5)
    store.beat(JOB, B)
    assert store.get(JOB).losses == 0
    store.release(JOB, B)
    for number in range(MAX_LOST):
        assert store.acquire(C, "w").losses == number
        subject.expire(JOB)
    assert store.acquire(D, "w") is None
    job = store.get(JOB)
    assert (job.status, job.error, job.losses) == ("failed", told(subject, LOST), MAX_LOST)


def test_a_sweep_frees_what_the_dead_hold_and_lists_what_waits(subject):
    """And leaves alone what is held, what has ended, and what is new."""
    store = subject.store
    dead, held, old, new, doomed, last = (uuid(number) for number in range(20, 26))
    for job_id in (dead, held, old, new, doomed, last):
        store.add(job_id, PHOTO)
    subject.age(old, 700)
    for job_id in (dead, held, doomed):
        store.acquire_given(job_id, A, "w")
        store.beat(job_id, A, {"stage": "render"})
    for attempt in (A, B, C):
        store.acquire_given(last, attempt, "w")
        store.beat(last, attempt)
        subject.expire(last)
    store.cancel(doomed)
    for job_id in (dead, doomed):
        subject.expire(job_id)
    swept = store.sweep(600)
    assert swept.requeued == (dead,)
    assert swept.canceled == (doomed,)
    assert swept.failed == (last,)
    assert swept.waiting == (old,)
    job = store.get(dead)
    assert (job.status, job.attempt_id, job.silent_s, job.crashes) == ("queued", None, None, 1)
    with pytest.raises(NotHolder):
        store.beat(dead, A)
    assert store.get(held).status == "processing"
    assert store.sweep(600).requeued == ()
    subject.age(dead, 800)
    assert store.sweep(600).waiting == (dead, old)


def test_a_holder_that_is_alive_is_left_to_end_the_job_itself(subject):
    """Whether it was asked to stop, or is the last that may try: no sweep ends what somebody works on."""
    store = subject.store
    store.add(JOB, PHOTO)
    store.acquire(A, "w")
    store.cancel(JOB)
    store.add(OTHER, PHOTO)
    for attempt in (B, C, D):
        store.acquire_given(OTHER, attempt, "w")
        store.beat(OTHER, attempt)
        if attempt != D:
            subject.expire(OTHER)
    swept = store.sweep()
    assert (swept.requeued, swept.canceled, swept.failed) == ((), (), ())
    assert store.acquire(uuid(99), "w") is None
    assert [store.get(job_id).status for job_id in (JOB, OTHER)] == ["processing", "processing"]
    assert store.complete(OTHER, D, "key") == "completed"
    assert store.release(JOB, A) == "canceled"


def test_a_job_that_is_not_there(subject):
    """Nobody can do anything with it."""
    for verb, arguments in (
        ("get", ()),
        ("acquire_given", (A, "w")),
        ("beat", (A,)),
        ("look", (A,)),
        ("complete", (A, "key")),
        ("fail", (A, "no")),
        ("release", (A,)),
    ):
        with pytest.raises(ItemMissing, match="no task"):
            getattr(subject.store, verb)(OTHER, *arguments)


@pytest.mark.parametrize("kind", ["wan", "runway"])
def test_each_kind_of_worker_gets_its_jobs(make, kind):
    """By the provider that the input names; whoever asks for a job gets it in any case, if it says so."""
    subject = make(kind)
    for_wan, for_runway, for_any = (uuid(number) for number in (1, 2, 3))
    subject.store.add(for_wan, {**PHOTO, "provider": "wan_local"})
    subject.store.add(for_runway, {**PHOTO, "provider": "veo3.1"})
    subject.store.add(for_any, {**PHOTO, "provider": None})
    mine, others = ([for_wan, for_any], for_runway) if kind == "wan" else ([for_runway], for_wan)
    assert subject.store.backlog() == len(mine)
    assert subject.store.acquire_given(others, A, "w") is None
    assert [subject.store.acquire(uuid(1000 + number), "w").id for number in range(len(mine))] == mine
    assert subject.store.acquire(B, "w") is None
    assert subject.store.acquire_given(others, A, "w", any_kind=True).id == others
