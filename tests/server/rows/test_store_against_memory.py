"""Random histories: after every step the SQL store's answer, refusal and rows are those of the store in memory."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from inference.errors import Refusal
from inference.queues.item import Item, ItemProgress
from inference.server.rows.store import new_id
from tests.server.conftest import MemorySubject, SqlSubject

TIMES = {"created_at", "updated_at", "leased_until", "started_at", "ended_at"}
TOLERANCE_S = 20

worker = st.sampled_from(["w1", "w2", "w3"])
lease_s = st.sampled_from([60.0, 600.0, 3600.0])
extend_s = st.sampled_from([0.5, 1, 2, 300, 3600])
lane = st.sampled_from([None, "wan", "runway"])
lease_seq = st.sampled_from([None, None, None, 0, 1, 2, 3])
provider = st.sampled_from([None, "", "wan_local", "gen4_turbo"])
progress = st.none() | st.builds(ItemProgress, stage=st.sampled_from(["a", "b"]), fraction=st.floats(0, 1))


class StoreMachine(RuleBasedStateMachine):
    """Does the same to both stores."""

    items = Bundle("items")

    def __init__(self, sql: SqlSubject) -> None:
        super().__init__()
        sql.wipe()
        self.sql = sql
        self.memory = MemorySubject()

    def both(self, verb: str, *arguments: Any, **options: Any) -> None:
        """Calls a verb of both and compares what they say."""
        said, expected = (self.say(subject, verb, *arguments, **options) for subject in (self.sql, self.memory))
        assert said == expected, verb

    def say(self, subject, verb: str, *arguments: Any, **options: Any) -> Any:
        """A verb's answer, or how it was refused."""
        try:
            answer = getattr(subject.store, verb)(*arguments, **options)
        except Refusal as refusal:
            return type(refusal), str(refusal)
        return answer.model_dump(exclude=TIMES) if isinstance(answer, Item) else answer

    @rule(target=items, hint=provider, frame_num=st.sampled_from([None, 73, 121]))
    def add(self, hint, frame_num):
        """A new item at the end of the line."""
        fields = {"id": new_id(), "photo_id": new_id(), "inference_provider": hint, "frame_num": frame_num}
        self.memory.add(**fields)
        return self.sql.add(**fields).id

    @rule(worker=worker, length=lease_s, lane=lane)
    def lease(self, worker, length, lane):
        """Somebody takes the next."""
        self.both("lease", worker, length, lane)

    @rule(worker=worker, length=lease_s, lane=lane, item=items | st.just("none"))
    def lease_given(self, worker, length, lane, item):
        """Somebody takes a certain one, or would like to."""
        self.both("lease", worker, length, lane, item)

    @rule(lane=lane)
    def backlog(self, lane):
        """Somebody asks how much work there is."""
        self.both("backlog", lane)

    @rule(item=items)
    def expire(self, item):
        """Its worker goes silent."""
        if self.memory.row(item).status == "processing":
            self.memory.expire(item)
            self.sql.expire(item)

    @rule(item=items, worker=worker, length=extend_s, said=progress, seq=lease_seq)
    def heartbeat(self, item, worker, length, said, seq):
        """Somebody renews or releases."""
        self.both("heartbeat", item, worker, length, said, seq)

    @rule(
        item=items,
        worker=worker,
        path=st.sampled_from(["v1", "v2"]),
        task=st.booleans(),
        seq=lease_seq,
        cost=st.sampled_from([None, 0.0, 1.5]),
    )
    def complete(self, item, worker, path, *, task, seq, cost):
        """Somebody completes."""
        self.both("complete", item, worker, path, {"runway_task_id": "r"} if task else None, seq, cost_usd=cost)

    @rule(item=items, worker=worker, seq=lease_seq)
    def fail(self, item, worker, seq):
        """Somebody gives up."""
        self.both("fail", item, worker, "no", seq)

    @rule(item=items, verb=st.sampled_from(["get", "cancel", "retry"]))
    def person(self, item, verb):
        """A person looks or acts."""
        self.both(verb, item)

    @invariant()
    def rows_are_equal(self):
        """Row by row, without a look that would sweep."""
        for item_id, expected in self.memory.store.items.items():
            row = self.sql.row(item_id)
            assert row.model_dump(exclude=TIMES) == expected.model_dump(exclude=TIMES)
            for time in ("started_at", "ended_at"):
                assert (getattr(row, time) is None) == (getattr(expected, time) is None), time
            remaining_s, expected_s = self.sql.remaining_s(row), self.memory.remaining_s(expected)
            assert (remaining_s is None) == (expected_s is None)
            assert remaining_s is None or abs(remaining_s - expected_s) < TOLERANCE_S


def test_the_sql_store_does_what_the_one_in_memory_does(sql):
    """Any history of leases, beats, crashes, ends and people gives the same answers and the same rows."""
    run_state_machine_as_test(
        lambda: StoreMachine(sql),
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
