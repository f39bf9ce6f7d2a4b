"""One OpenTelemetry span for each lease, and inside of it one for each stage.

    i2v.lease                 i2v.item_id, i2v.group_id, i2v.engine, i2v.duration_s, then i2v.outcome, i2v.seconds,
    ├ i2v.stage.download      i2v.cost_usd; the status is an error where the task was neither made nor cancelled
    ├ i2v.stage.wait
    ├ …
    └ i2v.stage.report

Spans are made where the package `opentelemetry-api` is installed, which the extra `otel` brings. Where they go is said
by whoever starts the process: with `opentelemetry-instrument`, with Logfire, or with a `TracerProvider` of their own.
Without the package, or where nobody has said it, this module does nothing.

While a lease runs, its span is the current one, so that spans of instrumented libraries (httpx, for one) lie inside of
it. Stages change in threads of engines, so none of them ever is the current span.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import structlog

from inference.progress.stages import Progress
from inference.task import Lease, Outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

log = structlog.get_logger(__name__)

NAME = "serverless-i2v"
"""Of the instrumentation, as tracing tools show it."""

NO_ERROR = ("completed", "cancelled")
"""Outcomes that somebody wanted. A lease that was released because its worker was stopped is no error either: such an
outcome has no `error`."""

Attributes = Mapping[str, str | int | float]


class LeaseSpan:
    """The span of one lease. Nothing it does can fail the lease: what a span processor raises is a log line."""

    def __init__(self, tracer: "Tracer | None" = None, attributes: Attributes | None = None) -> None:
        """Without a tracer all that follows does nothing."""
        self._lock = threading.Lock()
        self._tracer = tracer
        self._span: Span | None = None
        self._inside: Context | None = None  # in which spans are children of this one
        self._stage: tuple[str, Span] | None = None
        with self._harmless():
            if tracer is not None:
                from opentelemetry import trace  # noqa: PLC0415 - an extra

                self._span = tracer.start_span("i2v.lease", attributes=attributes)
                self._inside = trace.set_span_in_context(self._span)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the current span for the length of the block."""
        if self._inside is None:
            yield
            return
        from opentelemetry import context  # noqa: PLC0415 - an extra

        token = context.attach(self._inside)
        try:
            yield
        finally:
            context.detach(token)

    def sink(self, progress: Progress) -> None:
        """Takes a snapshot, from any thread: another stage than before ends the span of that one."""
        with self._lock:
            if self._span is None or (self._stage is not None and self._stage[0] == progress.stage):
                return
            self._end_stage()
            if progress.stage != "done":  # told once the last stage is over
                with self._harmless():
                    assert self._tracer is not None  # noqa: S101 - there is a span
                    span = self._tracer.start_span(f"i2v.stage.{progress.stage}", context=self._inside)
                    self._stage = progress.stage, span

    def ended(self, outcome: Outcome) -> None:
        """The lease has ended like this. Snapshots that come later, from threads left behind, are ignored."""
        with self._lock:
            span, self._span = self._span, None
            if span is None:
                return
            self._end_stage()
            with self._harmless():
                span.set_attributes(_attributes_of(outcome))
                if outcome.error is not None and outcome.status not in NO_ERROR:
                    from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - an extra

                    span.set_status(Status(StatusCode.ERROR, outcome.error))
            with self._harmless():
                span.end()

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            with self._harmless():
                stage[1].end()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - processors and exporters are foreign, and may raise anything
            log.warning("span_lost", error=f"{type(error).__name__}: {error}")


class Tracing:
    """Makes the spans of leases."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        """`provider`: None for that of the process, also where that is set later."""
        self._tracer: Tracer | None = None
        with suppress(ImportError):
            from opentelemetry import trace  # noqa: PLC0415 - an extra

            self._tracer = trace.get_tracer(NAME, tracer_provider=provider)

    def span(self, lease: Lease, engine: str) -> LeaseSpan:
        """The span of a lease, which begins now."""
        task = lease.task
        attributes: dict[str, str | int | float] = {"i2v.item_id": task.item_id, "i2v.engine": engine}
        if task.group_id is not None:
            attributes["i2v.group_id"] = task.group_id
        if task.workflow is None:
            attributes["i2v.duration_s"] = sum(each.duration_s for each in task.segments) or task.duration_s
        return LeaseSpan(self._tracer, attributes)


def _attributes_of(outcome: Outcome) -> Attributes:
    found: dict[str, str | int | float] = {
        "i2v.outcome": outcome.status,
        "i2v.seconds": round(sum(outcome.stage_seconds.values()), 3),
    }
    if outcome.video is not None and outcome.video.cost_usd is not None:
        found["i2v.cost_usd"] = outcome.video.cost_usd
    return found
