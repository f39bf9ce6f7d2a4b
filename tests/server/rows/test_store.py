"""One suite for every store: the one in memory, SQLite and PostgreSQL keep the same rules."""

import pytest

from inference.errors import ItemMissing, NotHolder, WrongState
from inference.queues.item import CRASHED, LOST, MAX_CRASHES, MAX_FAILURES, MAX_LOST, ItemProgress


def leased(subject, worker="w", lease_s=600):
    """An item in the hands of `worker`."""
    item = subject.add()
    assert subject.store.lease(worker, lease_s).id == item.id
    return item


def silence(subject, item, worker):
    """Its holder is heard of once more, and then no more."""
    subject.store.heartbeat(item.id, worker, 60)
    subject.expire(item.id)


def test_the_oldest_goes_first(subject):
    """Items are handed out in the order they were added, each once."""
    ids = [subject.add().id for _ in range(4)]
    assert [subject.store.lease(f"w{n}", 60).id for n in range(4)] == ids
    assert subject.store.lease("w4", 60) is None


def test_a_lease_is_counted_and_lasts(subject):
    """A lease has its holder, its length and its number."""
    item = leased(subject, "w", 120)
    row = subject.row(item.id)
    assert (row.status, row.worker_id, row.lease_seq, row.crash_count) == ("processing", "w", 1, 0)
    assert subject.remaining_s(row) == pytest.approx(120, abs=20)


def test_each_kind_of_worker_gets_its_kind_of_item(subject):
    """No hint, an empty one, Wan's own, and one that nobody knows wait for Wan; the other kind is passed over."""
    wan = [subject.add(inference_provider=hint).id for hint in (None, "", "wan_local", "comfyui")]
    runway = [subject.add(inference_provider=hint).id for hint in ("gen4_turbo", "veo3.1")]
    assert [subject.store.lease("r", 60, "runway").id for _ in runway] == runway
    assert subject.store.lease("r", 60, "runway") is None
    assert [subject.store.lease("w", 60, "wan").id for _ in wan] == wan


def test_a_given_item_goes_out_of_its_turn(subject):
    """That one and no other; not twice, not for the other kind of worker; one that is not there is missing."""
    oldest, given = subject.add(), subject.add()
    assert subject.store.lease("r", 60, "runway", given.id) is None
    again = subject.store.lease("w", 60, "wan", given.id)
    assert (again.id, again.worker_id, again.lease_seq) == (given.id, "w", 1)
    for kind in (None, "wan", "runway"):
        assert subject.store.lease("w2", 60, kind, given.id) is None
        with pytest.raises(ItemMissing, match="no task none"):
            subject.store.lease("w2", 60, kind, "none")
    assert subject.row(oldest.id).status == "pending"


def test_a_given_item_lives_by_the_same_rules(subject):
    """Of one that ran out a crash is counted; one that was cancelled or ran out too often ends, as for any lease."""
    cancelled, deadly = leased(subject), subject.add()
    subject.store.cancel(cancelled.id)
    subject.expire(cancelled.id)
    assert subject.store.lease("w", 60, None, cancelled.id) is None
    assert subject.row(cancelled.id).status == "cancelled"
    for crashes in range(MAX_CRASHES):
        assert subject.store.lease("w", 60, None, deadly.id).crash_count == crashes
        silence(subject, deadly, "w")
    assert subject.store.lease("w", 60, None, deadly.id) is None
    assert subject.row(deadly.id).error_message == CRASHED


def test_the_backlog_counts_what_could_be_leased(subject):
    """Waiting or run out, by kind. Items that nobody may lease again end where they are counted."""
    held, lapsed, cancelled = leased(subject), leased(subject), leased(subject)
    subject.expire(lapsed.id)
    subject.store.cancel(cancelled.id)
    subject.expire(cancelled.id)
    subject.add(inference_provider="veo3.1")
    assert [subject.store.backlog(kind) for kind in (None, "wan", "runway")] == [2, 1, 1]
    assert subject.row(held.id).status == "processing"
    assert subject.row(cancelled.id).status == "cancelled"


def test_a_lease_that_ran_out_goes_to_another(subject):
    """It keeps its place in the line, counts a crash, and locks its old holder out."""
    item = leased(subject, "w1")
    subject.add()
    silence(subject, item, "w1")
    again = subject.store.lease("w2", 60)
    assert (again.id, again.worker_id, again.lease_seq, again.crash_count) == (item.id, "w2", 2, 1)
    with pytest.raises(NotHolder):
        subject.store.heartbeat(item.id, "w1", 60)


def test_a_lease_that_has_not_run_out_stays(subject):
    """Nobody else gets an item that is held."""
    leased(subject)
    assert subject.store.lease("w2", 60) is None


def test_a_late_heartbeat_still_counts(subject):
    """A lease that ran out is its holder's until somebody else takes it."""
    item = leased(subject, "w")
    subject.expire(item.id)
    subject.store.heartbeat(item.id, "w", 60)
    assert subject.store.lease("w2", 60) is None


def test_workers_that_go_silent_end_the_item(subject):
    """An item whose leases ran out MAX_CRASHES times is failed, whoever looks first."""
    item = subject.add()
    for n in range(MAX_CRASHES):
        assert subject.store.lease(f"w{n}", 60).crash_count == n
        silence(subject, item, f"w{n}")
    assert subject.store.lease("w", 60) is None
    row = subject.row(item.id)  # the lease has swept; nobody read in between
    assert (row.status, row.error_message, row.crash_count) == ("failed", CRASHED, MAX_CRASHES)
    assert (row.worker_id, row.leased_until) == (None, None)


def test_a_lease_that_reached_no_worker_says_nothing_of_the_item(subject):
    """While a platform has no GPU for anybody leases run out on their way: that is no crash, however often."""
    item = subject.add()
    for n in range(2 * MAX_CRASHES):
        assert subject.store.lease(f"w{n}", 60).crash_count == 0
        subject.expire(item.id)
        assert subject.store.backlog() == 1
    for n in range(MAX_CRASHES - 1):
        assert subject.store.lease("w", 60).crash_count == n
        silence(subject, item, "w")
    for _ in range(MAX_CRASHES):  # the renewals of one lease say nothing of the next
        assert subject.store.lease("w", 60).crash_count == MAX_CRASHES - 1
        subject.expire(item.id)
    assert subject.store.get(item.id).status == "processing"
    subject.store.lease("w", 60)
    silence(subject, item, "w")
    assert subject.store.get(item.id).status == "failed"


def test_workers_that_never_come_end_the_item_at_last(subject):
    """Whoever waits for it is told why, and can have it tried as often again."""
    item = subject.add()
    for _ in range(2):
        for n in range(MAX_LOST):
            assert subject.store.lease("w", 60).lost_count == n
            subject.expire(item.id)
        assert subject.store.lease("w", 60) is None
        row = subject.row(item.id)
        assert (row.status, row.error_message) == ("failed", LOST)
        assert (row.crash_count, row.lost_count) == (0, MAX_LOST)
        assert subject.store.retry(item.id).lost_count == 0
    subject.store.lease("w", 60)
    subject.expire(item.id)
    assert subject.store.lease("w", 60).lost_count == 1
    assert subject.store.heartbeat(item.id, "w", 60).lost_count == 0  # somebody came


def test_reading_ends_what_ran_out(subject):
    """Whoever asks is told how it ended, although no worker came by."""
    item = leased(subject)
    subject.store.cancel(item.id)
    subject.expire(item.id)
    assert subject.store.get(item.id).status == "cancelled"


def test_a_cancelled_item_that_ran_out_is_not_leased(subject):
    """Nobody wants it any more: it ends, and the next in the line is handed out."""
    item, following = leased(subject), subject.add()
    subject.store.cancel(item.id)
    subject.expire(item.id)
    assert subject.store.lease("w2", 60).id == following.id
    assert subject.row(item.id).status == "cancelled"


def test_a_lease_does_not_sweep_what_may_go_on(subject):
    """Items that are held, or ran out for the first time, are left as they are by a look."""
    held, lapsed = leased(subject, "w1"), leased(subject, "w2")
    subject.store.cancel(held.id)
    subject.expire(lapsed.id)
    assert subject.store.get(held.id).status == "processing"
    assert subject.store.get(lapsed.id).status == "processing"


def test_failures_are_counted_until_there_are_enough(subject):
    """A failed item waits for a person; its count says how often."""
    item = leased(subject)
    failed = subject.store.fail(item.id, "w", "no")
    assert (failed.status, failed.retry_count, failed.error_message) == ("failed", 1, "no")
    assert subject.store.lease("w2", 60) is None


def test_an_item_that_failed_too_often_is_not_handed_out(sql):
    """Even if something else than this store put it back in the line."""
    item = sql.add()
    sql.run("UPDATE video_items SET retry_count = :n WHERE id = :id", n=MAX_FAILURES, id=item.id)
    assert sql.store.lease("w", 60) is None
    assert (sql.store.lease("w", 60, None, item.id), sql.store.backlog()) == (None, 0)
    sql.run("UPDATE video_items SET retry_count = :n WHERE id = :id", n=MAX_FAILURES - 1, id=item.id)
    assert sql.store.backlog() == 1
    assert sql.store.lease("w", 60).id == item.id


@pytest.mark.parametrize("verb", ["heartbeat", "release", "complete", "fail"])
def test_only_the_holder_writes(subject, verb):
    """Another worker, another lease of the same worker, and a holder after the end are all refused."""
    item = leased(subject, "w")
    write = {
        "heartbeat": lambda worker, seq: subject.store.heartbeat(item.id, worker, 60, None, seq),
        "release": lambda worker, seq: subject.store.heartbeat(item.id, worker, 1, None, seq),
        "complete": lambda worker, seq: subject.store.complete(item.id, worker, "v", {}, seq),
        "fail": lambda worker, seq: subject.store.fail(item.id, worker, "no", seq),
    }[verb]
    before = subject.row(item.id)
    for worker, seq in (("other", None), ("other", 1), ("w", 2), ("w", 0)):
        with pytest.raises(NotHolder, match="the task is processing and not held by"):
            write(worker, seq)
    assert subject.row(item.id) == before
    write("w", 1)
    if verb == "heartbeat":
        subject.store.cancel(item.id)
        subject.store.heartbeat(item.id, "w", 1)
    ended = subject.row(item.id)
    with pytest.raises(NotHolder):
        write("other", None)
    with pytest.raises(NotHolder):
        subject.store.heartbeat(item.id, "w", 60)
    assert subject.row(item.id) == ended


def test_an_end_is_final(subject):
    """A completed item is not failed, a failed one not completed, and neither completed elsewhere."""
    done, failed = leased(subject, "w1"), leased(subject, "w2")
    subject.store.complete(done.id, "w1", "v")
    subject.store.fail(failed.id, "w2", "no")
    for write in (
        lambda: subject.store.fail(done.id, "w1", "no"),
        lambda: subject.store.complete(done.id, "w1", "elsewhere"),
        lambda: subject.store.complete(failed.id, "w2", "v"),
    ):
        with pytest.raises(NotHolder):
            write()
    assert subject.row(done.id).video_storage_path == "v"
    assert subject.row(failed.id).status == "failed"


def test_a_repeated_end_is_one_end(subject):
    """The same report twice changes nothing the second time and is accepted."""
    done, failed = leased(subject, "w1"), leased(subject, "w2")
    first = subject.store.complete(done.id, "w1", "v", {"runway_task_id": "r"})
    assert subject.store.complete(done.id, "w1", "v", {"runway_task_id": "r"}) == first
    assert first.external_ids == {"runway_task_id": "r"}
    assert subject.store.fail(failed.id, "w2", "no").retry_count == 1
    assert subject.store.fail(failed.id, "w2", "no").retry_count == 1


def test_a_release_hands_back(subject):
    """At once, with no failure and no crash counted."""
    item = leased(subject)
    subject.store.heartbeat(item.id, "w", 1)
    again = subject.store.lease("w2", 60)
    assert (again.id, again.retry_count, again.crash_count, again.lease_seq) == (item.id, 0, 0, 2)


@pytest.mark.parametrize(
    "told,kept",
    [([("a", 0.5), ("b", 0.25)], ("b", 0.5)), ([("a", 0.25), ("a", 0.5)], ("a", 0.5)), ([("a", 1.0)], ("a", 0.99))],
)
def test_progress_never_falls_and_is_whole_at_the_end_alone(subject, told, kept):
    """A worker may count anew, or count 1 before its report was accepted; nobody is shown either."""
    item = leased(subject)
    for stage, fraction in told:
        seen = subject.store.heartbeat(item.id, "w", 60, ItemProgress(stage=stage, fraction=fraction)).progress
    assert (seen.stage, seen.fraction) == kept
    done = subject.store.complete(item.id, "w", "v")
    assert done.progress == subject.row(item.id).progress == ItemProgress(stage="done", fraction=1)


def test_a_task_that_said_nothing_is_done_all_the_same(subject):
    """Whatever its holder said last, or did not; and one that failed stays where it was."""
    silent, failed = leased(subject), leased(subject)
    assert subject.store.complete(silent.id, "w", "v").progress.fraction == 1
    subject.store.heartbeat(failed.id, "w", 60, ItemProgress(stage="a", fraction=0.5))
    assert subject.store.fail(failed.id, "w", "no").progress == ItemProgress(stage="a", fraction=0.5)


def refused_end(subject, item):
    """A report for an item that was cancelled."""
    subject.store.cancel(item.id)
    with pytest.raises(NotHolder):
        subject.store.complete(item.id, "w", "v")


def gives_up(subject, item):
    """Its workers go silent until nobody may have it any more."""
    for _ in range(MAX_CRASHES):
        subject.store.lease("w", 60, None, item.id)
        silence(subject, item, "w")
    subject.store.get(item.id)


WAYS_TO_END = {
    "completed": lambda it, item: it.store.complete(item.id, "w", "v"),
    "failed": lambda it, item: it.store.fail(item.id, "w", "no"),
    "cancelled, then released": lambda it, item: (it.store.cancel(item.id), it.store.heartbeat(item.id, "w", 1)),
    "cancelled, then reported": refused_end,
    "cancelled, then run out": lambda it, item: (it.store.cancel(item.id), it.expire(item.id), it.store.get(item.id)),
    "run out, then cancelled": lambda it, item: (it.expire(item.id), it.store.cancel(item.id)),
    "run out too often": gives_up,
}
"""Every way in which an item that `w` holds can end."""


@pytest.mark.parametrize("end", WAYS_TO_END.values(), ids=WAYS_TO_END)
def test_it_is_known_when_an_item_was_worked_on(subject, end):
    """From its last lease to its end, whatever ended it; while it waits or is worked on it has no end."""
    item = subject.add()
    assert (item.started_at, item.ended_at) == (None, None)
    held = subject.store.lease("w", 600)
    assert held.started_at == pytest.approx(held.updated_at, abs=1)
    assert held.ended_at is None
    subject.store.heartbeat(item.id, "w", 600)
    assert subject.row(item.id).started_at == held.started_at
    end(subject, item)
    ended = subject.row(item.id)
    assert ended.status in ("completed", "failed", "cancelled")
    assert ended.started_at <= ended.ended_at == pytest.approx(ended.updated_at, abs=1)


def test_one_that_was_never_worked_on_has_an_end_alone(subject):
    """It was cancelled while it waited."""
    cancelled = subject.store.cancel(subject.add().id)
    assert cancelled.started_at is None
    assert cancelled.ended_at == pytest.approx(cancelled.updated_at, abs=1)


def test_what_is_stopped_or_handed_back_has_not_ended(subject):
    """A holder that was asked to stop works still; what was handed back waits."""
    asked, back = leased(subject), leased(subject)
    assert subject.store.cancel(asked.id).ended_at is None
    assert subject.store.heartbeat(back.id, "w", 1).ended_at is None


def test_a_retry_begins_anew(subject):
    """Nothing is left of when the try before began and ended."""
    item = leased(subject)
    subject.store.fail(item.id, "w", "no")
    again = subject.store.retry(item.id)
    assert (again.started_at, again.ended_at, again.progress, again.cost_usd) == (None, None, None, None)
    assert subject.store.lease("w", 60).ended_at is None


@pytest.mark.parametrize("cost_usd", [None, 0.0, 0.25])
def test_what_a_video_cost_is_kept(subject, cost_usd):
    """Unknown is not nothing; a report that is repeated with another price changes nothing."""
    item = leased(subject)
    assert subject.store.complete(item.id, "w", "v", cost_usd=cost_usd).cost_usd == cost_usd
    assert subject.store.complete(item.id, "w", "v", cost_usd=7).cost_usd == cost_usd
    assert subject.row(item.id).cost_usd == cost_usd


def test_progress_stays_until_the_next_lease(subject):
    """A beat without progress keeps what the last one said; a new lease starts over."""
    item = leased(subject)
    said = ItemProgress(stage="denoise", fraction=0.5)
    assert subject.store.heartbeat(item.id, "w", 60, said).progress == said
    assert subject.store.heartbeat(item.id, "w", 60).progress == said
    subject.expire(item.id)
    assert subject.store.lease("w2", 60).progress is None


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_cancelled_task_ends_cancelled(subject, end):
    """The holder is told at its next beat; whatever it reports, the task is cancelled and not its any more."""
    item = leased(subject)
    assert subject.store.cancel(item.id).status == "processing"
    assert subject.store.heartbeat(item.id, "w", 60).cancel_requested
    with pytest.raises(NotHolder, match="the task was cancelled"):
        subject.store.complete(item.id, "w", "v") if end == "complete" else subject.store.fail(item.id, "w", "no")
    row = subject.row(item.id)
    assert (row.status, row.video_storage_path, row.error_message, row.retry_count) == ("cancelled", None, None, 0)


def test_a_strangers_report_does_not_end_a_cancelled_task(subject):
    """Only its holder can."""
    item = leased(subject)
    subject.store.cancel(item.id)
    for write in (
        lambda: subject.store.complete(item.id, "other", "v"),
        lambda: subject.store.fail(item.id, "w", "no", 7),
    ):
        with pytest.raises(NotHolder, match="not held by"):
            write()
    assert subject.row(item.id).status == "processing"


def test_a_refused_end_does_not_cancel(sql):
    """Between an end that was refused and this, the worker may have got the task anew: nobody cancelled that."""
    item = leased(sql)
    sql.store._end_if_cancelled({"item_id": item.id, "worker_id": "w", "lease_seq": None})
    assert sql.row(item.id).status == "processing"


def test_a_person_cancels(subject):
    """What waits ends at once; asking twice is asking once; what ended stays."""
    waiting, done = subject.add(), None
    assert subject.store.cancel(waiting.id).status == "cancelled"
    assert subject.store.cancel(waiting.id).status == "cancelled"
    done = leased(subject)
    subject.store.complete(done.id, "w", "v")
    with pytest.raises(WrongState, match="the task is completed: there is nothing to cancel"):
        subject.store.cancel(done.id)
    assert not subject.row(done.id).cancel_requested


def test_a_person_cancels_what_ran_out(subject):
    """Nobody is there to be asked, so it ends at once."""
    item = leased(subject)
    subject.expire(item.id)
    cancelled = subject.store.cancel(item.id)
    assert cancelled.status == "cancelled"
    assert subject.store.lease("other", 60) is None


def test_a_person_retries(subject):
    """A failed or cancelled item waits again, with a clean slate; any other is left alone."""
    item = leased(subject)
    for refused in (item.id, subject.add().id):
        with pytest.raises(WrongState, match="only a failed or cancelled one can be retried"):
            subject.store.retry(refused)
    assert subject.row(item.id).status == "processing"
    subject.store.fail(item.id, "w", "no")
    again = subject.store.retry(item.id)
    assert (again.status, again.worker_id, again.retry_count, again.error_message) == ("pending", None, 0, None)
    assert subject.store.lease("w2", 60).id == item.id


def test_what_is_not_there_is_missing(subject):
    """Every verb says so."""
    for verb in (
        lambda: subject.store.get("none"),
        lambda: subject.store.heartbeat("none", "w", 60),
        lambda: subject.store.heartbeat("none", "w", 1),
        lambda: subject.store.complete("none", "w", "v"),
        lambda: subject.store.fail("none", "w", "no"),
        lambda: subject.store.cancel("none"),
        lambda: subject.store.retry("none"),
    ):
        with pytest.raises(ItemMissing, match="no task none"):
            verb()
