"""What a lease costs does not grow with what has ended: the plans of its statements."""

import pytest

from inference.server.rows import statements
from inference.server.rows.store import NewItem, NewPhoto
from inference.sql.database import NO_SORTING

ENDED = 2000
WAITING = 20
KINDS = (None, "wan", "runway")


@pytest.fixture
def plan(sql):
    """Tells how the database would run a statement, with many items ended and few that wait."""
    sql.store.add(NewPhoto("group-1", "p"), [NewItem() for _ in range(ENDED)])
    sql.run("UPDATE video_items SET status = 'completed'")
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_item_is_found_by_its_id(plan, kind):
    """Nobody walks the line for it."""
    steps = plan(statements.lease(kind, given=True, sweep=False), worker_id="w", lease_s=60, item_id="none")
    assert "(id=?)" in steps or "id = 'none'" in steps
    assert "Seq Scan on video_items" not in steps
    assert "SCAN video_items" not in steps
