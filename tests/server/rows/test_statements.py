"""What a lease costs does not grow with what has ended: the plans of its statements."""

import re

import pytest
from sqlalchemy.schema import CreateIndex

from inference.queues.item import ItemProgress
from inference.server.rows import schema, statements
from inference.server.rows.store import NewItem, NewPhoto
from inference.sql.database import NO_SORTING

ENDED = 2048
WAITING = 20
KINDS = (None, "wan", "runway")


def multiply(sql, number: int) -> None:
    """Makes so many of each item, a power of two."""
    others = ", ".join(column.name for column in schema.video_items.columns if column.name != "id")
    for doubled in range(number.bit_length() - 1):
        sql.run(f"INSERT INTO video_items (id, {others}) SELECT id || '-{doubled}', {others} FROM video_items")


@pytest.fixture
def plan(sql):
    """Tells how the database would run a statement, with many items ended and few that wait."""
    sql.add()
    sql.run(f"UPDATE video_items SET status = 'completed', ended_at = {sql.now} - 7 * 86400")
    multiply(sql, ENDED)
    sql.store.add(
        NewPhoto("group-1", "p"), [NewItem(inference_provider=hint) for hint in (None, "veo3") * (WAITING // 2)]
    )
    if sql.dialect == "postgresql":  # which looks at its tables by itself; SQLite does not
        sql.run("ANALYZE")
    database = sql.store._database

    def explain(statement: statements.Statement, **parameters: object) -> str:
        compiled = statement.sql.compile(dialect=database._engine.dialect)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        verb = "EXPLAIN" if sql.dialect == "postgresql" else "EXPLAIN QUERY PLAN"
        with database.transaction() as transaction:
            if sql.dialect == "postgresql":
                transaction._connection.execute(NO_SORTING)
            rows = transaction._connection.execute(f"{verb} {compiled}", {**constants, **parameters}).fetchall()
        return "".join(f"{row[-1]}\n" for row in rows)

    return explain


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_is_found_along_the_line(sql, plan, kind):
    """By the partial index, which holds nothing that has ended; there is no look at the whole table."""
    lease = statements.lease(kind, given=False, sweep=sql.dialect == "postgresql")
    for steps in (plan(lease, worker_id="w", lease_s=60), plan(statements.backlog(kind))):
        assert "video_items_line" in steps
        assert "Seq Scan on video_items" not in steps
        assert "SCAN video_items\n" not in steps


@pytest.mark.parametrize("status", ["ongoing", "ended"])
def test_pages_of_a_status_walk_past_no_other(plan, status):
    """Few failed ones among very many completed are found at once, and so is what waits."""
    listed = statements.list_items(status=status, group=False, before=False)
    steps = plan(listed, status="failed" if status == "ended" else "pending", limit=50)
    assert ("video_items_ended" if status == "ended" else "video_items_line") in steps


def test_numbers_of_today_look_at_today_alone(plan):
    """And what is ongoing is found without what has ended."""
    for statement in (statements.LATELY, statements.LAST_COMPLETED):
        steps = plan(statement, limit=50)
        assert "video_items_completed" in steps
        assert "Seq Scan on video_items" not in steps
        assert "SCAN video_items\n" not in steps
    assert "video_items_line" in plan(statements.IN_LINE, limit=50)


def test_beats_write_to_no_index(sql):
    """On PostgreSQL a beat that changes an indexed column, or one of an index's condition, writes to every index."""
    beaten = {"leased_until", "renewed", "lost_count", "progress_stage", "progress_fraction", "updated_at"}
    for index in schema.video_items.indexes:
        named = {column for column in beaten if column in str(CreateIndex(index).compile(dialect=sql._admin.dialect))}
        assert named == set(), index.name


@pytest.mark.parametrize("chars", [20, 1800])
@pytest.mark.parametrize("sql", ["postgresql"], indirect=True)
def test_postgresql_writes_beats_beside_what_they_replace(sql, chars):
    """In its words they are heap-only tuples. The longest rows, too, which fill a page with four of them."""
    tasks, beats = 8, 20
    sql.store.add(NewPhoto("group-1", "p"), [NewItem("p" * chars) for _ in range(4 * tasks)])
    held = [sql.store.lease("w", 60) for _ in range(tasks)]

    def written() -> tuple[int, int]:
        with sql.store._database._connection() as connection:  # which tells what it did once a second, unless asked
            connection.execute("SELECT pg_stat_force_next_flush()")
            columns = "n_tup_upd, n_tup_hot_upd"
            return connection.execute(
                f"SELECT {columns} FROM pg_stat_user_tables WHERE relname = 'video_items'"
            ).fetchone()

    written()
    before = written()
    for number in range(beats):
        for item in held:
            sql.store.heartbeat(item.id, "w", 60, ItemProgress(stage="denoise", fraction=number / beats))
    written()
    assert [after - was for after, was in zip(written(), before, strict=True)] == [tasks * beats, tasks * beats]


@pytest.mark.parametrize("leased", [3, 400])
@pytest.mark.parametrize("known", [True, False], ids=["statistics", "none"])
def test_leases_that_ran_out_are_found_among_what_is_worked_on(sql, leased, known):
    """However many of thousands wait; and whether or not PostgreSQL has counted them."""
    sql.add()
    multiply(sql, 8192)
    sql.run(
        f"UPDATE video_items SET status = 'processing', leased_until = {sql.now} + 60 "
        f"WHERE id IN (SELECT id FROM video_items ORDER BY id LIMIT {leased})"
    )
    if known:
        sql.run("ANALYZE")
    database = sql.store._database
    verb = "EXPLAIN (ANALYZE, COSTS OFF)" if sql.dialect == "postgresql" else "EXPLAIN QUERY PLAN"
    for statement in (statements.ANY_TO_SWEEP, statements.SWEEP):
        text, own = database._text(statement)
        with database._connection() as connection:
            steps = "\n".join(str(row[-1]) for row in connection.execute(f"{verb} {text}", own).fetchall())
        assert "video_items_processing" in steps, steps
        assert "SCAN video_items\n" not in steps, steps
        assert all(int(rows) <= leased for rows in re.findall(r"Rows Removed by Filter: (\d+)", steps)), steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_item_is_found_by_its_id(plan, kind):
    """Nobody walks the line for it."""
    steps = plan(statements.lease(kind, given=True, sweep=False), worker_id="w", lease_s=60, item_id="none")
    assert "(id=?)" in steps or "id = 'none'" in steps
    assert "Seq Scan on video_items" not in steps
    assert "SCAN video_items" not in steps
