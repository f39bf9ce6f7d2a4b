"""Random histories: after every step the table in PostgreSQL answers, refuses and holds what the one in memory does."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from inference.errors import Refusal
from inference.queues.video_jobs.job import JobRow
from tests.queues.video_jobs.subjects import MemorySubject, SqlSubject, uuid

TOLERANCE_S = 20

attempt = st.sampled_from([uuid(number) for number in range(1001, 1005)])
key = st.sampled_from(["one", "two"])
progress = st.none() | st.fixed_dictionaries({"stages_total": st.integers(1, 9), "segments_total": st.integers(1, 60)})


def comparable(row: JobRow) -> dict[str, Any]:
    """A row without what no two tables agree on: moments, and what an application's columns cut off."""
    return row.model_dump(exclude={"silent_s"}) | {"error": row.error and row.error[:40]}


class JobsMachine(RuleBasedStateMachine):
    """Does the same to both tables."""

    jobs = Bundle("jobs")

    def __init__(self, sql: SqlSubject) -> None:
        super().__init__()
        sql.wipe()
        self.sql, self.memory = sql, MemorySubject()
        self.added = 0

    def both(self, verb: str, *arguments: Any, **named: Any) -> None:
        """Calls a verb of both and compares what they say."""
        said, expected = (self.say(subject, verb, *arguments, **named) for subject in (self.sql, self.memory))
        assert said == expected, verb

    def say(self, subject: Any, verb: str, *arguments: Any, **named: Any) -> Any:
        """A verb's answer, or how it was refused."""
        try:
            answer = getattr(subject.store, verb)(*arguments, **named)
        except Refusal as refusal:
            return type(refusal), str(refusal)
        return comparable(answer) if isinstance(answer, JobRow) else answer

    @rule(target=jobs, provider=st.sampled_from([None, "wan_local", "veo3.1"]))
    def add(self, provider):
        """A new job at the end of the line."""
        self.added += 1
        job_id = uuid(self.added)
        self.both("add", job_id, {"photo": "a.jpg", "provider": provider})
        return job_id

    @rule(attempt=attempt)
    def acquire(self, attempt):
        """Somebody takes the next."""
        self.both("acquire", attempt, "w")

    @rule(job=jobs | st.just(uuid(99)), attempt=attempt, any_kind=st.booleans())
    def acquire_given(self, job, attempt, any_kind):
        """Somebody takes a certain one, or would like to."""
        self.both("acquire_given", job, attempt, "w", any_kind=any_kind)

    @rule(waiting_s=st.sampled_from([0, 600]))
    def sweep(self, waiting_s):
        """Somebody looks after the dead."""
        said, expected = (each.store.sweep(waiting_s) for each in (self.sql, self.memory))
        unordered = [{name: sorted(ids) for name, ids in each} for each in (said, expected)]
        assert unordered[0] == unordered[1]

    @rule()
    def backlog(self):
        """Somebody asks how much work there is."""
        self.both("backlog")

    @rule(job=jobs)
    def expire(self, job):
        """The holder goes silent."""
        for subject in (self.sql, self.memory):
            subject.expire(job)

    @rule(job=jobs, attempt=attempt, said=progress)
    def beat(self, job, attempt, said):
        """Somebody says that it is alive."""
        self.both("beat", job, attempt, said)

    @rule(job=jobs, attempt=attempt)
    def look(self, job, attempt):
        """Somebody asks whether it is still wanted."""
        self.both("look", job, attempt)

    @rule(job=jobs, attempt=attempt, key=key)
    def complete(self, job, attempt, key):
        """Somebody completes."""
        self.both("complete", job, attempt, key)

    @rule(job=jobs, attempt=attempt)
    def fail(self, job, attempt):
        """Somebody gives up."""
        self.both("fail", job, attempt, "no")

    @rule(job=jobs, attempt=attempt)
    def release(self, job, attempt):
        """Somebody lets go."""
        self.both("release", job, attempt)

    @rule(job=jobs, verb=st.sampled_from(["get", "cancel"]))
    def person(self, job, verb):
        """A person looks or acts."""
        self.both(verb, job)

    @invariant()
    def rows_are_equal(self):
        """Row by row, and who was heard of when."""
        for job_id in self.memory.store.rows:
            row, expected = self.sql.store.get(job_id), self.memory.store.get(job_id)
            assert comparable(row) == comparable(expected)
            assert (row.silent_s is None) == (expected.silent_s is None)
            assert row.silent_s is None or abs(row.silent_s - expected.silent_s) < TOLERANCE_S


def test_the_table_does_what_the_one_in_memory_does(sql):
    """Any history of acquires, beats, deaths, ends and people gives the same answers and the same rows."""
    run_state_machine_as_test(
        lambda: JobsMachine(sql),
        settings=settings(
            max_examples=50,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
