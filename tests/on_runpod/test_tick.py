"""What ticks find out of the jobs before them. Whole ticks, with real workers, are in tests/commands/test_runpod.py."""

from pathlib import Path

import anyio
import httpx
import pytest

from inference.errors import RecordsUnavailable
from inference.fleet.readings import Readings
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.on_runpod import api as runpod_api
from inference.on_runpod.api import RunPodApi, RunPodJob
from inference.on_runpod.tick import JOBS_KEPT, LOOK_S, SentJobs, fault
from inference.on_runpod.wire import answer_of, failure
from inference.on_runpod.worker import STOPPING
from inference.payments.records import MemoryRecords
from inference.task import Outcome, Video
from tests.support.virtual import virtual_time

pytestmark = pytest.mark.anyio

MADE = Outcome(
    status="completed",
    item_id="a1",
    video=Video(path=Path("a.mp4"), width=64, height=64, fps=24, frames=24, size_bytes=1),
    storage_path="videos/a1.mp4",
    stage_seconds={"download": 1.0, "wait": 30.0, "encode": 1.5, "denoise": 9.0, "upload": 2.0, "report": 0.1},
)


def ended(status, *, error="why", **said):
    """A task's end without a video."""
    return Outcome(status=status, item_id="a1", error=error, **said)


def failed(answer, job_id="j"):
    """A job as RunPod tells it whose worker gave an answer with an `error`."""
    said = dict(answer)
    return RunPodJob(id=job_id, status="FAILED", error=said.pop("error"), output=said, execution_ms=900)


def completed(output, job_id="j"):
    """A job that went well."""
    return RunPodJob(id=job_id, status="COMPLETED", output=output, execution_ms=9000)


def drained(*outcomes):
    """What a drain answers."""
    done = sum(outcome.status == "completed" for outcome in outcomes)
    return completed({"tasks": [answer_of(outcome) for outcome in outcomes], "completed": done})


@pytest.mark.parametrize(
    "job, why",
    [
        (failed(failure("VERCEL_API_URL is not set", retryable=False)), "VERCEL_API_URL is not set"),
        (failed(failure("this worker failed and is being replaced", retryable=True)), "this worker failed"),
        (failed(answer_of(ended("released", machine_at_fault=True, error="401: wrong key"))), "401: wrong key"),
        (failed(answer_of(ended("lease_lost", machine_at_fault=True, error="not renewed"))), "not renewed"),
        (failed(answer_of(ended("failed", machine_at_fault=True))), "why"),
        (failed(answer_of(ended("released", worker_should="wait", error="no storage"))), "no storage"),
        (failed(failure(STOPPING, retryable=True) | {"machine_at_fault": False}), None),
        (failed({"error": "no", "retryable": True, "item_id": "a1", "status": "cancelled"}), None),  # older workers
        (failed(answer_of(ended("failed"))), None),  # the photo was no photo
        (failed(answer_of(ended("lease_lost"))), None),  # it came too late
        (failed(answer_of(ended("cancelled"))), None),
        (RunPodJob(id="j", status="FAILED", error="exit code 1"), "exit code 1"),
        (RunPodJob(id="j", status="FAILED", error="exit code 1", output="text"), "exit code 1"),
        (RunPodJob(id="j", status="TIMED_OUT", execution_ms=61000), "after 61 s on a worker"),
        (RunPodJob(id="j", status="TIMED_OUT"), None),  # in the queue: there was no worker to blame
        (RunPodJob(id="j", status="CANCELLED"), None),
        (completed(answer_of(MADE)), None),
        (completed({"tasks": [], "completed": 0}), None),
        (drained(MADE, ended("released", machine_at_fault=True)), None),
        (drained(ended("failed"), ended("released", machine_at_fault=True, error="no room")), "no room"),
        (drained(ended("released", worker_should="wait", error="no storage")), "no storage"),
        (drained(ended("failed")), None),
        (completed(None), None),
        (completed({"tasks": "odd"}), None),
    ],
)
def test_whose_fault_it_was(job, why):
    """The endpoint's unless a worker had the task and says that it did its part."""
    found = fault(job)
    assert found == why if why is None else why in found


class Endpoint:
    """RunPod's answers about jobs, by id; how often each was asked for. `away`: ids that are not answered."""

    def __init__(self):
        self.jobs, self.asked, self.away = {}, [], set()

    async def __call__(self, request):
        job_id = request.url.path.rpartition("/")[2]
        self.asked.append(job_id)
        if job_id in self.away:
            await anyio.sleep(3600)
        if job_id not in self.jobs:
            return httpx.Response(404, json={"error": "job not found"})
        return httpx.Response(200, json=self.jobs[job_id].model_dump(mode="json"))

    def api(self):
        """A connection to it."""
        return RunPodApi("key", "https://api.example.com/v2", "ep1", transport=httpx.MockTransport(self))


async def judge(endpoint, records):
    """What the readings say of the pool after a tick's look."""
    readings = Readings(records)
    async with endpoint.api() as api:
        await SentJobs(api, records, "ep1").judge(readings)
    return await readings.pool("gpu")


async def send(endpoint, records, *ids):
    """A tick that sent jobs."""
    async with endpoint.api() as api:
        for job_id in ids:
            await SentJobs(api, records, "ep1").add(job_id)


async def test_jobs_that_fail_one_after_the_other_are_a_failing_pool():
    """With the last reason; one that makes a clip again ends that. Each job counts once."""
    endpoint, records = Endpoint(), MemoryRecords()
    ids = [f"j{n}" for n in range(MAX_FAULTS_IN_A_ROW)]
    await send(endpoint, records, *ids)
    endpoint.jobs |= {job_id: RunPodJob(id=job_id, status="IN_QUEUE") for job_id in ids}
    for n, job_id in enumerate(ids):
        assert (await judge(endpoint, records)).faults == n
        endpoint.jobs[job_id] = failed(failure(f"no weights {n}", retryable=True), job_id)
    known = await judge(endpoint, records)
    assert known.failing == f"job {ids[-1]}: no weights {MAX_FAULTS_IN_A_ROW - 1}"
    asked = len(endpoint.asked)
    assert await judge(endpoint, records) == known
    assert len(endpoint.asked) == asked
    await send(endpoint, records, "good")
    endpoint.jobs["good"] = completed(answer_of(MADE), "good")
    known = await judge(endpoint, records)
    assert (known.failing, known.faults, known.clips, known.clip_s) == (None, 0, 1, 10.5)


async def test_a_job_counts_once_whatever_cannot_be_written():
    """Rather not at all."""

    class Full(MemoryRecords):
        is_full = False

        async def put(self, key, value):
            if self.is_full:
                raise RecordsUnavailable("the disk is full")
            await super().put(key, value)

    endpoint, records = Endpoint(), Full()
    await send(endpoint, records, "j")
    endpoint.jobs["j"] = failed(failure("no", retryable=True))
    records.is_full = True
    with pytest.raises(RecordsUnavailable):
        await judge(endpoint, records)
    records.is_full = False
    assert (await judge(endpoint, records)).faults == 1


async def test_jobs_that_go_on_are_asked_for_again():
    """Those that RunPod has forgotten are not; nor are more than a list holds."""
    endpoint, records = Endpoint(), MemoryRecords()
    await send(endpoint, records, *(f"old{n}" for n in range(JOBS_KEPT)), "going", "waiting")
    endpoint.jobs |= {
        "going": RunPodJob(id="going", status="IN_PROGRESS"),
        "waiting": RunPodJob(id="waiting", status="IN_QUEUE"),
    }
    assert (await judge(endpoint, records)).faults == 0
    assert len(endpoint.asked) == JOBS_KEPT
    endpoint.asked.clear()
    await judge(endpoint, records)
    assert sorted(endpoint.asked) == ["going", "waiting"]


@virtual_time
async def test_an_endpoint_that_does_not_answer_holds_a_tick_up_for_seconds():
    """What was answered counts; the rest is asked next time."""
    endpoint, records = Endpoint(), MemoryRecords()
    await send(endpoint, records, "hangs", "fails")
    endpoint.jobs["fails"] = failed(failure("no", retryable=True), "fails")
    endpoint.away.add("hangs")
    began = anyio.current_time()
    assert (await judge(endpoint, records)).faults == 1
    assert anyio.current_time() - began == pytest.approx(LOOK_S, abs=0.1)
    endpoint.asked.clear()
    await judge(endpoint, records)
    assert endpoint.asked == ["hangs"]


async def test_a_key_that_is_not_accepted_is_for_the_tick_to_tell(monkeypatch):
    """Nothing is concluded of the workers."""
    monkeypatch.setattr(runpod_api, "MAX_PAUSE_S", 0.01)
    records = MemoryRecords()
    await send(Endpoint(), records, "j")

    async def refuses(_request):
        return httpx.Response(401)

    endpoint = Endpoint()
    endpoint.api = lambda: RunPodApi("k", "https://api.example.com/v2", "ep1", transport=httpx.MockTransport(refuses))
    assert (await judge(endpoint, records)).faults == 0
    await judge(found := Endpoint(), records)
    assert found.asked == ["j"]


async def test_a_job_that_cannot_be_written_down_is_sent_all_the_same():
    """What is not known of it later costs a reading."""

    class Full(MemoryRecords):
        async def put(self, key, value):  # noqa: ARG002
            raise RecordsUnavailable("the disk is full")

    await send(Endpoint(), Full(), "j")


async def test_records_of_another_version_are_none():
    """And the next job is written over them."""
    records = MemoryRecords({"runpod/ep1": "[1, {"})
    await send(endpoint := Endpoint(), records, "j")
    await judge(endpoint, records)
    assert endpoint.asked == ["j"]
