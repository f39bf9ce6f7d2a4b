"""The table is made, or completed, and never changed; one that does not fit is refused in words."""

import json
import re

import psycopg
import pytest

from inference.errors import ItemMissing, QueueRefused, SettingsError
from inference.queues.video_jobs.schema import RULES, Names
from inference.queues.video_jobs.store import JobStore, create
from inference.sql.database import NO_SORTING
from tests.queues.video_jobs.subjects import THEIR_TABLE, THEIRS, SqlSubject, uuid

COLUMNS = """
    SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns
    WHERE table_schema || '.' || table_name = %s ORDER BY ordinal_position
"""


def run(url, *statements):
    """Runs SQL as the application would; returns the rows of the last statement."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def columns(url, table):
    """Of a table, in order."""
    with psycopg.connect(url) as connection:
        return connection.execute(COLUMNS, [table]).fetchall()


def test_an_empty_database_gets_a_table_once(database_url):
    """And says what was made."""
    with pytest.raises(SettingsError, match="no table video_jobs: run `i2v push migrate`"):
        JobStore(database_url, stale_s=480)
    assert create(database_url) == ["table video_jobs"]
    before = columns(database_url, "public.video_jobs")
    assert create(database_url) == []
    assert columns(database_url, "public.video_jobs") == before
    assert [name for name, *_ in before] == list(RULES)
    JobStore(database_url, stale_s=480).close()


def test_an_applications_table_is_completed_and_otherwise_left_alone(database_url):
    """Its columns, their types and defaults, and its rows stay; a second time nothing is made."""
    run(database_url, THEIR_TABLE, f"INSERT INTO app.jobs (job_id, payload) VALUES ('{uuid(1)}', '{{}}')")
    before = columns(database_url, "app.jobs")
    with pytest.raises(SettingsError, match=r"the table app\.jobs lacks lease_beat_at, beaten, .*: run `i2v push migr"):
        JobStore(database_url, THEIRS, stale_s=480)
    assert columns(database_url, "app.jobs") == before
    made = create(database_url, THEIRS)
    assert made[0] == "column lease_beat_at of app.jobs"
    assert len(made) == len(RULES) - len(THEIRS.columns) - len(["error", "worker"])
    assert columns(database_url, "app.jobs")[: len(before)] == before
    assert create(database_url, THEIRS) == []
    with JobStore(database_url, THEIRS, stale_s=480) as store:
        job = store.get(uuid(1))
        assert (job.status, job.attempts, job.cancel_requested) == ("draft", 0, False)
        assert store.acquire_given(uuid(1), uuid(2), "w") is None  # a draft waits for nobody
    assert run(database_url, "SELECT customer, tries, cancel FROM app.jobs") == [("somebody", None, None)]


def test_columns_of_the_application_stay_as_they_are_while_a_job_runs(sql):
    """Whatever they are called: each write names its own columns alone."""
    sql.admin.execute(f"ALTER TABLE {sql.names.table} ADD COLUMN IF NOT EXISTS colour text DEFAULT 'teal'")
    job, attempt = uuid(1), uuid(2)
    sql.store.add(job, {"photo": "a.jpg"})
    sql.store.acquire(attempt, "w")
    sql.store.beat(job, attempt, {"stage": "render"})
    sql.store.complete(job, attempt, "key")
    sql.store.sweep()
    [(colour,)] = sql.admin.execute(f"SELECT colour FROM {sql.names.table}").fetchall()
    assert colour == "teal"


@pytest.mark.parametrize(
    "change, told",
    [
        ("DROP COLUMN input", "has no column input: say in I2V_JOBS_COLUMNS what it is called there"),
        ("DROP COLUMN id", "has no column id: say in I2V_JOBS_COLUMNS"),
        ("DROP COLUMN lease_beat_at", "lacks lease_beat_at: run `i2v push migrate`, which adds columns"),
        (
            "ALTER COLUMN lease_beat_at TYPE timestamp",
            "does not fit: lease_beat_at is timestamp without time zone and has to be timestamp with time zone",
        ),
        ("ALTER COLUMN input TYPE text", "input is text and has to be jsonb or json"),
        ("ALTER COLUMN error TYPE varchar(20)", None),
        ("ADD COLUMN extra point", None),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_words(database_url, change, told):
    """By who opens it, and by the migration, which would not repair it."""
    create(database_url)
    run(database_url, f"ALTER TABLE video_jobs {change}")
    if told is None:
        JobStore(database_url, stale_s=480).close()
        return
    before = columns(database_url, "public.video_jobs")
    with pytest.raises(SettingsError) as refused:
        JobStore(database_url, stale_s=480)
    assert told in str(refused.value)
    if "migrate" not in told:
        with pytest.raises(SettingsError) as refused:
            create(database_url)
        assert told in str(refused.value)
        assert columns(database_url, "public.video_jobs") == before


def test_every_wrong_column_is_named_at_once(database_url):
    """And an enum that lacks a status of ours."""
    run(
        database_url,
        "CREATE TYPE state AS ENUM ('queued', 'processing', 'completed', 'failed', 'cancelled')",
        "CREATE TABLE video_jobs (id point, status state, input jsonb, attempts text)",
    )
    with pytest.raises(SettingsError) as refused:
        create(database_url)
    assert str(refused.value) == (
        "the table video_jobs does not fit: id is point and has to be text or character varying or uuid or bigint or "
        "integer; "
        "status has no value canceled; attempts is text and has to be integer or bigint or smallint; "
        "id is no primary key, nor otherwise unique"
    )


@pytest.mark.parametrize(
    "rule, told",
    [
        ("status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')", "does not allow canceled"),
        ("status IN ('queued', 'processing', 'done', 'failed', 'canceled')", "does not allow completed"),
        ("status IN ('draft', 'queued', 'processing', 'completed', 'failed', 'canceled')", None),
        ("length(status) < 20", None),
        ("status <> '' OR input IS NULL", None),
    ],
)
def test_a_rule_that_forbids_a_status_is_told_before_any_job_meets_it(database_url, rule, told):
    """Found out later, it would keep a job from its end, and every sweep from the others."""
    run(database_url, f"CREATE TABLE video_jobs (id text PRIMARY KEY, status text CHECK ({rule}), input jsonb)")
    if told is None:
        create(database_url)
        return
    before = columns(database_url, "public.video_jobs")
    with pytest.raises(SettingsError, match=f"a CHECK of status {told}"):
        create(database_url)
    assert columns(database_url, "public.video_jobs") == before


@pytest.mark.parametrize("kind, largest", [("bigint", 2**63 - 1), ("integer", 2**31 - 1)])
def test_a_table_that_numbers_its_jobs(database_url, kind, largest):
    """As many applications do. What is no such number is no job."""
    run(
        database_url,
        f"CREATE TABLE video_jobs (id {kind} GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, status text, input jsonb)",
    )
    create(database_url)
    run(database_url, """INSERT INTO video_jobs (status, input) VALUES ('queued', '{"photo": "a.jpg"}')""")
    with JobStore(database_url, stale_s=480) as store:
        assert store.acquire(uuid(1), "w").id == "1"
        assert store.acquire_given("1", uuid(2), "w") is None
        assert store.complete("1", uuid(1), "key") == "completed"
        assert store.add(str(largest), {"photo": "a.jpg"})
        assert store.acquire_given(str(largest), uuid(3), "w").id == str(largest)
        for unknown in ("2", "01", "1.0", "x", "", str(largest + 1), "-0", "\u0661"):
            with pytest.raises(ItemMissing):
                store.get(unknown)
            with pytest.raises(ItemMissing):
                store.acquire_given(unknown, uuid(4), "w")


def plan_of(sql, name, how="COSTS ON"):
    """How PostgreSQL carries a statement out."""
    text, own = sql.store._database._text(getattr(sql.store._sql, name))
    values = {"attempt_id": uuid(1), "worker": "w", "age_s": 600, "limit": 100, **own}
    steps = psycopg.ClientCursor(sql.admin).execute(f"EXPLAIN ({how}) {text}", values).fetchall()
    return "\n".join(step for (step,) in steps)


def test_what_has_ended_costs_nothing(sql):
    """The line is found along its index, which holds nothing that has ended, by whoever looks for work."""
    sql.admin.execute(
        f"INSERT INTO {sql.names.table} ({sql.names.column('id')}, {sql.names.column('input')}, "
        f"{sql.names.column('status')}) "
        f"SELECT {'gen_random_uuid()' if sql.names is THEIRS else 'n::text'}, '{{}}', 'completed' "
        "FROM generate_series(1, 5000) AS n"
    )
    for number in range(20):
        sql.store.add(uuid(number), {"photo": "a.jpg"})
    sql.admin.execute(f"ANALYZE {sql.names.table}")
    for name, index in {
        "acquire_next": "line",
        "backlog": "line",
        "end_swept": "open",
        "requeue": "open",
        "waiting": "line",
    }.items():
        plan = plan_of(sql, name)
        assert f"{sql.names.bare}_i2v_{index}" in plan, f"{name}:\n{plan}"


@pytest.mark.parametrize("known", [True, False], ids=["statistics", "none"])
def test_what_waits_costs_nothing(sql, known):
    """A job is taken from the front of the line, and what has to be ended is found, without reading all that waits."""
    column = sql.names.column
    sql.admin.execute(
        f"INSERT INTO {sql.names.table} ({column('id')}, {column('input')}, {column('status')}) "
        f"SELECT {'gen_random_uuid()' if sql.names is THEIRS else 'n::text'}, '{{}}', 'queued' "
        "FROM generate_series(1, 5000) AS n"
    )
    if known:
        sql.admin.execute(f"ANALYZE {sql.names.table}")
    sql.admin.execute(NO_SORTING.replace("LOCAL", "SESSION"))  # as `acquire` has it
    try:
        plan = plan_of(sql, "acquire_next", "ANALYZE, COSTS OFF, TIMING OFF")
    finally:
        sql.admin.execute("RESET enable_sort")
    read = [float(rows) for rows in re.findall(r"rows=([0-9.]+)", plan)]
    assert max(read) <= 1, plan
    assert "Sort" not in plan, plan


@pytest.mark.parametrize("chars", [20, 1500])
def test_beats_are_written_beside_what_they_replace(database_url, chars):
    """No index changes with them, and in a table of ours there is room for the longest rows, too."""
    create(database_url)
    subject = SqlSubject(database_url)
    jobs, beats = 8, 20
    for number in range(4 * jobs):
        subject.store.add(uuid(number), {"photo": "a.jpg", "prompt": "p" * chars})
    held = [subject.store.acquire(uuid(100 + number), "w").id for number in range(jobs)]

    def written():
        with subject.store._database._connection() as connection:  # which tells what it did when asked
            connection.execute("SELECT pg_stat_force_next_flush()")
            columns = "n_tup_upd, n_tup_hot_upd"
            return connection.execute(
                f"SELECT {columns} FROM pg_stat_user_tables WHERE relname = 'video_jobs'"
            ).fetchone()

    written()
    before = written()
    for number in range(beats):
        for place, job_id in enumerate(held):
            subject.store.beat(job_id, uuid(100 + place), {"stage": "denoise", "fraction": number / beats})
    written()
    after = written()
    subject.close()
    assert [now - was for now, was in zip(after, before, strict=True)] == [jobs * beats, jobs * beats]


def test_what_a_database_does_not_allow_is_told_as_it_says_it(database_url):
    """A schema that is not there; as it would be a user that may not make tables."""
    with pytest.raises(SettingsError, match=r'app\.jobs could not be made or completed: schema "app" does not exist'):
        create(database_url, THEIRS)


def test_who_may_not_write_is_told_so(database_url):
    """At the start, and not at the first job."""
    create(database_url)
    run(
        database_url,
        "DROP ROLE IF EXISTS reader",
        "CREATE ROLE reader LOGIN",
        "GRANT SELECT ON video_jobs TO reader",
    )
    url = database_url.replace("postgres:@", "reader@").replace("postgres@", "reader@")
    assert "reader" in url
    try:
        with pytest.raises(SettingsError, match="may not write to video_jobs: GRANT SELECT, INSERT, UPDATE"):
            JobStore(url, stale_s=480)
    finally:
        run(database_url, "DROP OWNED BY reader", "DROP ROLE reader")


@pytest.mark.parametrize(
    "table, names, told",
    [
        ("video jobs", {}, "I2V_JOBS_TABLE: 'video jobs' is no name"),
        ("a.b.c", {}, "I2V_JOBS_TABLE"),
        ('x"; DROP TABLE y; --', {}, "I2V_JOBS_TABLE"),
        ("jobs", {"colour": "x"}, "I2V_JOBS_COLUMNS: no column colour; there are id, status"),
        ("jobs", {"id": "a b"}, "I2V_JOBS_COLUMNS: id: 'a b' is no name"),
        ("jobs", {"id": "status"}, "I2V_JOBS_COLUMNS: status: stands for two columns"),
    ],
)
def test_names_that_cannot_be_are_refused(table, names, told):
    """Before any of them is part of a statement."""
    with pytest.raises(SettingsError) as refused:
        Names(table, names)
    assert told in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite:///jobs.db", "mysql://host/db", "video_jobs"])
def test_nothing_but_a_postgresql_will_do(url):
    """There is no fallback."""
    for opened in (lambda: JobStore(url, stale_s=480), lambda: create(url)):
        with pytest.raises(SettingsError, match="has to be a PostgreSQL"):
            opened()


def test_a_rule_of_the_application_that_refuses_a_write_is_no_outage(database_url):
    """It is said what it was, and nobody tries for minutes."""
    create(database_url)
    run(database_url, "ALTER TABLE video_jobs ADD COLUMN owner text NOT NULL")
    with JobStore(database_url, stale_s=480) as store, pytest.raises(QueueRefused, match="owner"):
        store.add("a", {"photo": "a.jpg"})


def test_what_people_read_is_cut_to_what_a_column_takes(sql):
    """A long message ends the job all the same."""
    job, attempt = uuid(1), uuid(2)
    sql.store.add(job, {"photo": "a.jpg"})
    sql.store.acquire(attempt, "worker")
    assert sql.store.fail(job, attempt, "x" * 1000) == "failed"
    is_theirs = sql.names is THEIRS
    assert (len(sql.store.get(job).error), sql.store.get(job).worker) == (
        (40, "wor") if is_theirs else (1000, "worker")
    )


def test_what_people_look_at_is_json(sql):
    """An input and a progress are read by other programs."""
    job, attempt = uuid(1), uuid(2)
    sql.store.add(job, {"photo": "파도.jpg"})
    sql.store.acquire(attempt, "w")
    sql.store.beat(job, attempt, {"stage": "render"})
    assert sql.value(job, "input") == {"photo": "파도.jpg"}
    assert json.loads(json.dumps(sql.value(job, "progress"))) == {"stage": "render"}
