"""Spans of leases and stages, as OpenTelemetry's own SDK collects them."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from inference.engines.base import run_in_thread
from inference.errors import EngineLost, InvalidRequest
from inference.leasing.runner import Runner
from inference.progress.stages import Progress
from inference.progress.tracing import Tracing
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import SleepyEngine
from tests.support.virtual import run_virtual, virtual_time

ROOT = Path(__file__).parents[2]


class Spans:
    """A provider of an application, and what it has collected."""

    def __init__(self, *processors: SpanProcessor) -> None:
        self.provider = TracerProvider()
        self._kept = InMemorySpanExporter()
        for processor in (*processors, SimpleSpanProcessor(self._kept)):
            self.provider.add_span_processor(processor)

    def __getitem__(self, name):
        """The only span of a name."""
        [found] = [span for span in self._kept.get_finished_spans() if span.name == name]
        return found

    @property
    def names(self):
        """Of all spans, as they ended."""
        return [span.name for span in self._kept.get_finished_spans()]


class Threaded(SleepyEngine):
    """Reports its stages from a thread, as engines do, and calls a library that makes spans of its own."""

    def __init__(self, provider):
        super().__init__(seconds=0, stages={"load": 1, "paint": 9})
        self._tracer = provider.get_tracer("a library")

    async def generate(self, request, inputs, folder, job):
        """See Engine."""

        def work():
            for stage in ("load", "paint", "paint"):
                job.report(stage)
                with self._tracer.start_as_current_span(f"library.{stage}.{job.cancelled_by}"):
                    pass

        await run_in_thread(job, work)
        self._tracer.start_span("GET").end()
        return await super().generate(request, inputs, folder, job)


def run_one(photo_bytes, engine, provider, **given):
    """An async function that runs one task to its outcome."""

    async def main():
        store = MemoryStore(clock=anyio.current_time)
        queue = MemoryQueue(store=store, worker_id="me")
        item = store.add(photo_bytes, "a prompt")
        outcome = await Runner(queue, engine, tracing=Tracing(provider), **given).run(await queue.lease())
        return item, outcome

    return main


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_lease_and_its_stages(photo_bytes, backend):
    """One span for the lease, a child for each stage in order; what libraries do meanwhile lies inside of it."""
    spans = Spans()
    main = run_one(photo_bytes, Threaded(spans.provider), spans.provider, usd_per_s=0.5)
    item, outcome = anyio.run(main, backend=backend)
    assert outcome.status == "completed"
    stages = ["download", "wait", "load", "paint", "sleep", "upload", "report"]
    assert [name for name in spans.names if name.startswith("i2v.stage.")] == [f"i2v.stage.{name}" for name in stages]
    lease = spans["i2v.lease"]
    assert spans.names[-1] == "i2v.lease"
    assert lease.parent is None
    assert {spans[name].parent.span_id for name in spans.names if name.startswith("i2v.stage.")} == {
        lease.context.span_id
    }
    assert spans["GET"].parent.span_id == spans["library.load.None"].parent.span_id == lease.context.span_id
    assert spans["i2v.stage.load"].end_time <= spans["i2v.stage.paint"].start_time
    assert lease.start_time <= spans["i2v.stage.download"].start_time
    assert spans["i2v.stage.report"].end_time <= lease.end_time
    said = dict(lease.attributes)
    assert said.pop("i2v.seconds") == pytest.approx(sum(outcome.stage_seconds.values()), abs=0.01)
    assert said.pop("i2v.cost_usd") == outcome.video.cost_usd > 0
    assert said == {
        "i2v.item_id": item.id,
        "i2v.group_id": item.group_id,
        "i2v.engine": "sleepy",
        "i2v.duration_s": 5,
        "i2v.outcome": "completed",
    }
    assert lease.status.is_unset
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize(
    "error, outcome, told",
    [(InvalidRequest("too rude"), "failed", "too rude"), (EngineLost("gone"), "released", "gone")],
)
def test_an_error_is_the_status_of_the_span(photo_bytes, error, outcome, told):
    """With its text, under the virtual clock as well; the stage it happened in has ended."""
    spans = Spans()
    run_virtual(run_one(photo_bytes, SleepyEngine(errors=[error]), spans.provider))
    lease = spans["i2v.lease"]
    assert (lease.status.status_code, lease.status.description) == (trace.StatusCode.ERROR, told)
    assert lease.attributes["i2v.outcome"] == outcome
    assert lease.attributes["i2v.seconds"] == 10
    assert spans.names == ["i2v.stage.download", "i2v.stage.wait", "i2v.stage.sleep", "i2v.lease"]


@virtual_time
async def test_a_worker_that_is_stopped_is_no_error(photo_bytes):
    """Its spans end with it, and what comes later from a thread opens none."""
    spans, sinks = Spans(), []
    store = MemoryStore(clock=anyio.current_time)
    queue = MemoryQueue(store=store, worker_id="me")
    store.add(photo_bytes, "a prompt")
    tracing = Tracing(spans.provider)
    make, tracing.span = tracing.span, lambda lease, engine: sinks.append(make(lease, engine)) or sinks[0]
    with anyio.move_on_after(5):
        await Runner(queue, SleepyEngine(), tracing=tracing).run(await queue.lease())
    sinks[0].sink(Progress(stage="decode", done=1, total=2, fraction=0.5))
    assert spans.names == ["i2v.stage.download", "i2v.stage.wait", "i2v.stage.sleep", "i2v.lease"]
    assert spans["i2v.lease"].status.is_unset
    assert spans["i2v.lease"].attributes["i2v.outcome"] == "released"


class Broken(SpanProcessor):
    """A processor that raises at every turn."""

    def on_start(self, span, parent_context=None):  # noqa: ARG002
        """Raises."""
        raise OSError("no collector")

    def on_end(self, span):  # noqa: ARG002
        """Raises."""
        raise OSError("no collector")


def test_a_broken_processor_costs_log_lines(photo_bytes):
    """And never the task."""
    spans = Spans(Broken())
    with capture_logs() as logs:
        _, outcome = run_virtual(run_one(photo_bytes, SleepyEngine(), spans.provider))
    assert outcome.status == "completed"
    assert {line["error"] for line in logs if line["event"] == "span_lost"} == {"OSError: no collector"}


@pytest.mark.parametrize("package", ["missing", "there, and no SDK"])
def test_who_wants_no_spans_gets_none(tmp_path, photo_bytes, package):
    """A lease runs all the same; and the command line does not wait for the import."""
    (tmp_path / "photo.jpg").write_bytes(photo_bytes)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ONE_LEASE, package, tmp_path / "photo.jpg"], check=True, cwd=ROOT
    )


ONE_LEASE = """
import pathlib, sys
if sys.argv[1] == "missing": sys.modules["opentelemetry"] = None
import anyio
import inference.commands.work
from inference.engines.preview import PreviewEngine
from inference.leasing.runner import Runner
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore

assert not sys.modules.get("opentelemetry")
store = MemoryStore(clock=anyio.current_time)

async def main():
    store.add(pathlib.Path(sys.argv[2]).read_bytes(), "pan left", frame_num=13)
    queue = MemoryQueue(store=store, worker_id="me")
    return await Runner(queue, PreviewEngine()).run(await queue.lease())

outcome = anyio.run(main)
assert outcome.status == "completed", outcome
assert bool(sys.modules.get("opentelemetry")) == (sys.argv[1] != "missing")
"""
