"""Every SQL statement on the table of jobs, named and described.

The conditions of a write are in its own WHERE, so it does not depend on what was read before. Each such condition has
its own line and is marked `# fence`; a test removes them one by one and expects the suite to fail each time.

What has to be decided by what a person said meanwhile is decided inside the statement: a job whose cancellation came
first ends `canceled`, whatever its holder wanted to end it as.
"""

from typing import Any

from sqlalchemy import (
    Double,
    Integer,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.sql.expression import ColumnElement

from inference.providers import DEFAULT, PROVIDERS, WorkerType
from inference.queues.item import CRASHED, DONE, LOST, MAX_CRASHES, MAX_LOST
from inference.queues.video_jobs.job import STATUSES
from inference.sql.statement import Statement, constant

QUEUED, PROCESSING, COMPLETED, FAILED, CANCELED = map(constant, STATUSES)
ZERO, ONE = constant(0), constant(1)
FALSE: ColumnElement[bool] = literal_column("FALSE")

CLOCK: ColumnElement[Any] = func.clock_timestamp()
"""The database's time. Not now(): that is when the transaction began, before it waited for a lock."""

# A subquery is evaluated once a statement; the bare clock would be evaluated for every row.
NOW = select(func.clock_timestamp()).scalar_subquery()

ATTEMPT = bindparam("attempt_id", type_=Text)


def _ago(seconds: ColumnElement[Any]) -> ColumnElement[Any]:
    return NOW - func.make_interval(0, 0, 0, 0, 0, 0, seconds)


class Statements:
    """The statements on one table, in which a holder is dead after `stale_s` without a beat.

    `table`: as `schema.described` has it. Jobs are handed to workers of `worker_type` alone, if given.
    """

    def __init__(self, table: Table, stale_s: float, worker_type: WorkerType | None = None) -> None:
        self._table = table
        c = self._c = table.c
        the_job = c.id == bindparam("job_id", type_=c.id.type)
        long_ago = _ago(cast(constant(str(stale_s)), Double))
        self._is_stale = and_(
            c.status == PROCESSING,
            or_(c.lease_beat_at.is_(None), c.lease_beat_at <= long_ago),
        )
        self._was_last = case(
            (c.beaten, self._number("crashes") + ONE >= constant(MAX_CRASHES)),
            else_=self._number("losses") + ONE >= constant(MAX_LOST),
        )
        row = (
            *(column.label(column.key) for column in c if column.key not in {"lease_beat_at", "dispatched_at"}),
            cast(func.extract("epoch", NOW - c.lease_beat_at), Double).label("silent_s"),
        )
        held = [
            the_job,
            c.attempt_id == cast(ATTEMPT, c.attempt_id.type),  # fence
            c.status == PROCESSING,  # fence
        ]
        may_be_acquired = [
            c.status.in_([QUEUED, PROCESSING]),
            or_(c.status == QUEUED, self._is_stale),  # fence
            c.cancel_requested.is_not(true()),  # fence
            or_(c.status == QUEUED, not_(self._was_last)),  # fence
        ]
        in_line = (
            may_be_acquired if worker_type is None else [*may_be_acquired, self._wanted() == constant(worker_type)]
        )

        # -------------------------------------------------------- sweeping

        beyond_acquiring = [
            # As the index of what may have to be ended has it: every acquire looks for these, however many jobs wait.
            or_(c.status == PROCESSING, and_(c.cancel_requested, c.status == QUEUED)),
            or_(c.status == QUEUED, self._is_stale),  # fence
            or_(c.cancel_requested, and_(c.status == PROCESSING, self._was_last)),  # fence
        ]
        swept = self._skipping_locked(beyond_acquiring, "swept")
        end = (
            update(table)
            .where(c.id == swept.c.id)
            .values(
                status=self._status(case((c.cancel_requested, CANCELED), else_=FAILED)),
                lease_beat_at=null(),
                error=case(
                    (c.cancel_requested, c.error),
                    (c.beaten, self._cut("error", constant(CRASHED))),
                    else_=self._cut("error", constant(LOST)),
                ),
                **self._counted(and_(c.status == PROCESSING, c.cancel_requested.is_not(true()))),
                updated_at=CLOCK,
            )
        )
        self.end_swept = Statement(
            "end_swept",
            "Ends what nobody may acquire again: canceled while nobody worked on it, or its last holder is dead.",
            end.returning(c.id.label("id"), c.status.label("status")),
        )
        abandoned = self._skipping_locked(
            [
                self._is_stale,  # fence
                c.cancel_requested.is_not(true()),  # fence
                not_(self._was_last),  # fence
            ],
            "abandoned",
        )
        self.requeue = Statement(
            "requeue",
            "Puts jobs with a dead holder back in their places in the line.",
            update(table)
            .where(c.id == abandoned.c.id)
            .values(
                status=self._status(QUEUED),
                attempt_id=null(),
                lease_beat_at=null(),
                **self._counted(true()),
                updated_at=CLOCK,
            )
            .returning(c.id.label("id")),
        )

        # -------------------------------------------------------- acquiring

        taken: dict[str, Any] = {
            "status": self._status(PROCESSING),
            "attempt_id": cast(ATTEMPT, c.attempt_id.type),
            "worker": self._cut("worker", bindparam("worker", type_=Text)),
            "lease_beat_at": CLOCK,
            "beaten": FALSE,
            "attempts": self._number("attempts") + ONE,
            **self._counted(c.status == PROCESSING),
            "progress": null(),
            "error": null(),
            "updated_at": CLOCK,
        }
        chosen = self._skipping_locked(in_line, "chosen", first=True)
        self.acquire_next = Statement(
            "acquire_next",
            "Hands the oldest job that waits, or whose holder is dead, to a new attempt; and sweeps.",
            update(table)
            .where(c.id == chosen.c.id)
            .values(**taken)
            .returning(*row)
            # In one round trip. No job is in both parts, and neither waits for a row that somebody else has locked.
            .add_cte(end.cte("ended")),
        )
        # Whoever comes second waits for the first one's write, and then finds a condition that is not met any more.
        self.acquire_given = Statement(
            "acquire_given",
            "Hands one job to a new attempt, if it waits or its holder is dead.",
            update(table).where(the_job, *may_be_acquired).values(**taken).returning(*row),
        )
        self.acquire_given_in_line = Statement(
            "acquire_given_in_line",
            "The same, if the job is for this kind of worker.",
            update(table).where(the_job, *in_line).values(**taken).returning(*row),
        )
        self.backlog = Statement(
            "backlog",
            "How many jobs could be acquired now.",
            select(func.count().label("waiting")).select_from(table).where(*in_line),
        )

        # -------------------------------------------------------- a holder's writes

        told = cast(bindparam("progress", type_=Text), c.progress.type)
        self.beat = Statement(
            "beat",
            "The holder is alive; keeps the progress it told, and says whether somebody wants it to stop.",
            update(table)
            .where(*held)
            .values(
                lease_beat_at=CLOCK,
                beaten=true(),
                losses=ZERO,
                progress=func.coalesce(told, c.progress),
                updated_at=CLOCK,
            )
            .returning(c.cancel_requested.label("cancel_requested")),
        )
        self.look = Statement(
            "look",
            "Whether the holder still holds the job, and whether somebody wants it to stop. Writes nothing.",
            select(c.cancel_requested.label("cancel_requested")).where(*held),
        )
        # attempt_id stays with a job that has ended, so that a report that is repeated is recognised.
        ended = {"lease_beat_at": null(), "updated_at": CLOCK}
        status = c.status.label("status")
        self.complete = Statement(
            "complete",
            "The holder's video is in the bucket: ends the job and its lease.",
            update(table)
            .where(*held)
            .values(
                status=self._status(case((c.cancel_requested, CANCELED), else_=COMPLETED)),
                artifact_key=case(
                    (c.cancel_requested, c.artifact_key),
                    else_=bindparam("artifact_key", type_=Text),
                ),
                progress=case((c.cancel_requested, c.progress), else_=self._all_done()),
                **ended,
            )
            .returning(status),
        )
        self.fail = Statement(
            "fail",
            "The holder gives up for good: ends the job and its lease.",
            update(table)
            .where(*held)
            .values(
                status=self._status(case((c.cancel_requested, CANCELED), else_=FAILED)),
                error=case((c.cancel_requested, c.error), else_=self._cut("error", bindparam("message", type_=Text))),
                **ended,
            )
            .returning(status),
        )
        self.release = Statement(
            "release",
            "The holder lets go: the job is free at once, and nothing is counted. One that was canceled ends.",
            update(table)
            .where(*held)
            .values(
                status=self._status(case((c.cancel_requested, CANCELED), else_=QUEUED)),
                attempt_id=case((c.cancel_requested, c.attempt_id)),
                **ended,
            )
            .returning(status),
        )

        # -------------------------------------------------------- an application's writes

        self.add = Statement(
            "add",
            "Adds a job that waits, unless there is one of that id.",
            upsert(table)
            .values(
                id=bindparam("job_id", type_=c.id.type),
                status=self._status(QUEUED),
                input=cast(bindparam("input", type_=Text), c.input.type),
                created_at=CLOCK,
                updated_at=CLOCK,
                **self._defaults(),
            )
            .on_conflict_do_nothing(index_elements=[c.id])
            .returning(c.id.label("id")),
        )
        self.cancel = Statement(
            "cancel",
            "Ends a job that nobody works on; asks the holder of one that is worked on.",
            update(table)
            .where(
                the_job,
                c.status.in_([QUEUED, PROCESSING]),  # fence
            )
            .values(
                status=case((or_(c.status == QUEUED, self._is_stale), self._status(CANCELED)), else_=c.status),
                cancel_requested=true(),
                updated_at=CLOCK,
            )
            .returning(*row),
        )

        # -------------------------------------------------------- reads

        self.get = Statement("get", "One job.", select(*row).where(the_job))
        self.waiting = Statement(
            "waiting",
            "Jobs that have waited for some time, the oldest first.",
            select(c.id.label("id"))
            .where(c.status == QUEUED, c.created_at <= _ago(bindparam("age_s", type_=Double)))
            .order_by(c.created_at, c.id)
            .limit(bindparam("limit", type_=Integer)),
        )
        self.check = Statement("check", "Proves that the table can be read.", select(ONE).select_from(table).limit(ONE))

    def _status(self, word: ColumnElement[Any]) -> ColumnElement[Any]:
        # An application's statuses may be an enum, to which PostgreSQL converts no text by itself.
        return cast(word, self._c.status.type)

    def _cut(self, name: str, said: ColumnElement[Any]) -> ColumnElement[Any]:
        """Text for people, no longer than a column of an application takes: an explicit cast cuts it."""
        return cast(said, self._c[name].type)

    def _skipping_locked(self, where: list[Any], name: str, *, first: bool = False) -> Any:
        """Ids of jobs that nobody else writes to in this moment, locked: all of them, or the oldest one."""
        found = select(self._c.id.label("id")).where(*where).with_for_update(skip_locked=True)
        if first:
            found = found.order_by(self._c.created_at, self._c.id).limit(ONE)
        # MATERIALIZED, or PostgreSQL may run it again for a row that has changed meanwhile.
        return found.cte(name).prefix_with("MATERIALIZED")

    def _counted(self, counts: ColumnElement[bool]) -> dict[str, ColumnElement[Any]]:
        """The counters that a dead holder increments, if `counts`."""
        c = self._c
        return {
            "crashes": self._number("crashes") + case((and_(counts, c.beaten), ONE), else_=ZERO),
            "losses": self._number("losses") + case((and_(counts, c.beaten.is_not(true())), ONE), else_=ZERO),
        }

    def _number(self, name: str) -> ColumnElement[int]:
        """A counter, which an application may have left at NULL."""
        return func.coalesce(self._c[name], ZERO)

    def _defaults(self) -> dict[str, ColumnElement[Any]]:
        """Columns of an application may be without defaults of their own."""
        zeros = dict.fromkeys(("attempts", "crashes", "losses"), ZERO)
        return {**zeros, "beaten": FALSE, "cancel_requested": FALSE}

    def _all_done(self) -> ColumnElement[Any]:
        """The progress of a job that is complete, from what its holder said last; NULL where that is nothing."""
        said = cast(self._c.progress, JSONB)
        done = func.jsonb_build_object(
            constant("stage"),
            constant(DONE.stage),
            constant("stage_index"),
            said.op("->")(constant("stages_total")),
            constant("stages_completed"),
            said.op("->")(constant("stages_total")),
            constant("segments_done"),
            said.op("->")(constant("segments_total")),
            constant("fraction"),
            ONE,
        )
        return cast(said.op("||")(done), self._c.progress.type)

    def _wanted(self) -> ColumnElement[str]:
        """The kind of worker that a job's provider means: `providers.provider_of`, as SQL."""
        hint = cast(self._c.input, JSONB)["provider"].astext
        named = [
            (hint.in_([constant(model) for model in provider.models]), constant(provider.worker_type))
            for provider in PROVIDERS
            if provider is not DEFAULT
        ]
        return case(*named, else_=constant(DEFAULT.worker_type))
