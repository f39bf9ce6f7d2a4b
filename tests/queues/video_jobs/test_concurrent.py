"""Many at once on one table, and a pooler in front of it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from inference.errors import NotHolder, QueueUnavailable
from inference.queues.video_jobs.store import JobStore, create
from tests.queues.video_jobs.subjects import STALE_S, uuid
from tests.support import pgbouncer

PHOTO = {"photo": "a.jpg"}
AT_ONCE = 16


def at_once(call):
    """What each of AT_ONCE threads gets that call it in the same moment."""
    together = threading.Barrier(AT_ONCE)

    def one(number):
        together.wait()
        return call(number)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(AT_ONCE)))


def test_sixteen_deliveries_of_one_job_are_one_attempt(sql):
    """Half of them ask for the job, half for the next one; again when the holder is dead: one heir, one crash."""
    job_id = uuid(1)
    sql.store.add(job_id, PHOTO)
    for crashes in (0, 1):

        def reach(number, crashes=crashes):
            attempt = uuid(1000 * (crashes + 1) + number)
            if number % 2:
                return sql.store.acquire(attempt, "w")
            return sql.store.acquire_given(job_id, attempt, "w")

        [job] = [job for job in at_once(reach) if job]
        assert (job.attempts, job.crashes) == (crashes + 1, crashes)
        assert sql.store.get(job_id).attempt_id == job.attempt_id
        sql.store.beat(job_id, job.attempt_id)
        sql.expire(job_id)


def test_nobody_shares_and_nothing_is_left(sql):
    """Sixteen threads empty a line of fifty."""
    for number in range(50):
        sql.store.add(uuid(number), PHOTO)

    def empty(worker):
        mine = []
        while job := sql.store.acquire(uuid(10_000 + 100 * worker + len(mine)), "w"):
            sql.store.beat(job.id, job.attempt_id)
            assert sql.store.complete(job.id, job.attempt_id, "key") == "completed"
            mine.append(job.id)
        return mine

    taken = [job_id for mine in at_once(empty) for job_id in mine]
    assert sorted(taken) == [uuid(number) for number in range(50)]


def test_a_cancel_and_an_end_at_once_make_one_end(sql):
    """Whoever is first decides, and both know it: a job that was told to be canceled is never complete."""
    for round_ in range(10):
        job_id, attempt = uuid(round_), uuid(1000 + round_)
        sql.store.add(job_id, PHOTO)
        sql.store.acquire_given(job_id, attempt, "w")

        def act(number, job_id=job_id, attempt=attempt):
            if number == 0:
                return sql.store.complete(job_id, attempt, "key")
            try:
                sql.store.cancel(job_id)
            except Exception as refused:  # noqa: BLE001 - compared below
                return type(refused).__name__
            return "cancel"

        end, *cancels = at_once(act)
        assert set(cancels) == ({"WrongState"} if end == "completed" else {"cancel"})
        assert sql.store.get(job_id).status == end


def test_sweeps_at_once_do_no_harm(sql):
    """While workers acquire: each dead holder is counted once."""
    ids = [uuid(number) for number in range(30)]
    for number, job_id in enumerate(ids):
        sql.store.add(job_id, PHOTO)
        sql.store.acquire_given(job_id, uuid(1000 + number), "w")
        sql.store.beat(job_id, uuid(1000 + number))
        if number % 3 == 0:
            sql.store.cancel(job_id)
        sql.expire(job_id)

    def act(number):
        return sql.store.acquire(uuid(5000 + number), "w") if number % 2 else sql.store.sweep()

    acquired = [each for each in at_once(act)[1::2] if each]
    sql.store.sweep()
    jobs = [sql.store.get(job_id) for job_id in ids]
    assert [job.status for job in jobs].count("canceled") == 10
    assert [job.status for job in jobs].count("processing") == len(acquired) == len({job.id for job in acquired})
    assert all(job.crashes == 1 for job in jobs if job.status != "canceled")


def test_it_works_behind_a_transaction_pooler(database_url):
    """Every call may get another connection of PostgreSQL's: nothing is prepared or set for longer than a call."""
    with pgbouncer.pooler(database_url) as url:
        create(url)
        with JobStore(url, stale_s=STALE_S) as store:
            for number in range(40):
                store.add(uuid(number), PHOTO)

            def work(worker):
                done = 0
                while job := store.acquire(uuid(10_000 + 100 * worker + done), "w"):
                    for _ in range(3):
                        assert store.beat(job.id, job.attempt_id, {"stage": "render"}) is False
                    assert store.complete(job.id, job.attempt_id, "key") == "completed"
                    done += 1
                return done

            assert sum(at_once(work)) == 40
            store.sweep()
            with pytest.raises(NotHolder):
                store.beat(uuid(1), uuid(2))


def test_a_server_that_hangs_up_costs_one_call(sql):
    """Which says that another try may help; and that one does, however many connections there were."""
    job_id, attempt = uuid(1), uuid(2)
    sql.store.add(job_id, PHOTO)
    sql.store.acquire_given(job_id, attempt, "w")
    with ExitStack() as several:
        for _ in range(3):
            several.enter_context(sql.store._database._connection())
    sql.admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(QueueUnavailable):
        sql.store.beat(job_id, attempt)
    assert sql.store.beat(job_id, attempt) is False


def test_a_database_that_is_away_is_no_mistake_of_the_settings():
    """Another try may help."""
    with pytest.raises(QueueUnavailable, match="not available"):
        JobStore("postgresql://nobody@127.0.0.1:1/none", stale_s=STALE_S)
