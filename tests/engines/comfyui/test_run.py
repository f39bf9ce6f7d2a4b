"""One run at a ComfyUI that misbehaves: lost messages and answers, restarts, other people's prompts, cancelling."""

import json
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import structlog

from inference.engines.base import Job
from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.engine import ComfyEngine
from inference.engines.comfyui.progress import RunProgress
from inference.engines.comfyui.run import Run
from inference.engines.turns import EngineTurns
from inference.errors import (
    CancelRequested,
    EngineFailed,
    EngineHung,
    I2VError,
    InvalidRequest,
    PartsMissing,
    ProviderUnavailable,
)
from inference.progress.stages import Progress, StageTracker, plan
from inference.task import GenerationRequest
from tests.engines.comfyui.graphs import still, wan
from tests.engines.contract import landscape
from tests.support.comfy_server import (
    BROKEN,
    BROKEN_AFTER,
    LOST_AFTER,
    LOST_BEFORE,
    PATIENCE_S,
    ComfyServer,
    Fault,
)

HALF_AFTER = Fault(200, carried_out=True, body=b'{"prompt_i')
CASES = Path(__file__).parents[2] / "cases" / "comfy"

# On trio, httpx may leave the body of a request that was cancelled half read; the collector says so at some later time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*ByteStream:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    """Both event loops."""
    return request.param


class Task:
    """A workflow task at an engine: `await task.run()`, or `async with task.running()` while it is looked at."""

    def __init__(self, comfy: ComfyServer, tmp_path: Path, *, patience_s: float = PATIENCE_S) -> None:
        self.engine = ComfyEngine(comfy.url, patience_s=patience_s)
        self.photo, self.folder = landscape(tmp_path / "input-0.jpg"), tmp_path / "lease"
        self.folder.mkdir(exist_ok=True)
        self.heard: list[Progress] = []
        self.job = Job(StageTracker(plan(self.engine.stages), sink=self.heard.append))
        self.outcome: object = None
        self.scope: anyio.CancelScope | None = None

    async def run(self, workflow=None, **more):
        """Generates; every video counts as right when it is there."""
        request = GenerationRequest(duration_s=5, workflow=workflow or wan(), **more)
        video = await self.engine.generate(request, {"x.png": self.photo}, self.folder, self.job)
        assert video.path.is_file()
        return video

    @asynccontextmanager
    async def running(self, workflow=None, **more):
        """Generates beside the block; afterwards `outcome` is the video or the error, None where it was cancelled."""
        self.scope = anyio.CancelScope()

        async def go() -> None:
            with self.scope:
                try:
                    self.outcome = await self.run(workflow, **more)
                except I2VError as error:
                    self.outcome = error

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(go)
            yield


@pytest.fixture
def task(comfy, tmp_path) -> Task:
    """A task that is about to run."""
    return Task(comfy, tmp_path)


async def until(comfy: ComfyServer, condition) -> None:
    """Waits for something to be the case at the server, whose thread is not ours."""
    await anyio.to_thread.run_sync(comfy.until, condition)


def is_running(comfy: ComfyServer, node: str = "6"):
    """Whether our prompt stands at a node."""
    return lambda: comfy.ours and any(m["data"].get("node") == node for m in comfy.ours[-1].sent)


# The websocket.


@pytest.mark.anyio
@pytest.mark.parametrize("silently", [False, True], ids=["cut", "silent"])
async def test_a_socket_that_drops_after_any_message(silently, comfy):
    """Each message once is the last that is heard; every run ends, was sent once, and reports to its end."""
    graph = wan(steps=1) | {"4": {"class_type": "EmptyImage", "inputs": still()["1"]["inputs"]}}

    async def run() -> list[Progress]:
        heard: list[Progress] = []
        comfy._cache.clear()
        job = Job(StageTracker({"queue": 1, "workflow": 9}, sink=heard.append))
        async with ComfyApi(comfy.url, patience_s=PATIENCE_S) as api:
            each = Run(api, job, graph, RunProgress(graph, {}), of_task=True, stages=("queue", "workflow"))
            assert list(await each.outputs()) == ["9"]
        return heard

    await run()
    messages = len(comfy.ours[0].sent)
    assert messages > 25
    comfy.drop_silently = silently
    for after in range(1, messages + 1):
        comfy.drop_after = [after]
        heard = await run()
        assert len(comfy.ours) == after + 1
        assert heard[-1].done == heard[-1].total == 9
        assert [each.done for each in heard] == sorted(each.done for each in heard)


@pytest.mark.anyio
async def test_a_socket_that_drops_after_every_message(comfy, task):
    """It is opened again and again, with pauses, and the run ends all the same."""
    comfy.drop_every = True
    await task.run()
    assert comfy.sockets_opened > 20
    assert len(comfy.ours) == 1


@pytest.mark.anyio
async def test_no_socket_at_all(comfy, task, monkeypatch):
    """Some proxies let none through. The history says how it ended, and the queue that it runs."""
    monkeypatch.setattr(Run, "socket_s", 0.05)
    comfy.refuse_sockets = True
    await task.run()
    assert {each.stage for each in task.heard} >= {"queue", "workflow", "fetch"}


@pytest.mark.anyio
async def test_a_reconnected_socket_goes_on_with_its_run(comfy, task):
    """The same client's id: messages of a run that goes on are heard again."""
    comfy.hold("KSampler")
    comfy.hold("VAEDecode")
    comfy.drop_after = [4]
    async with task.running():
        await until(comfy, lambda: comfy.sockets_opened == 2 and is_running(comfy)())
        comfy.release("KSampler")
        await until(comfy, lambda: any(0 < each.detail.get("current_node_progress", 0) < 100 for each in task.heard))
        comfy.release()
    assert task.outcome.path.is_file()


@pytest.mark.anyio
async def test_a_history_that_comes_late(comfy, task):
    """`execution_success` is sent before the history has the run."""
    comfy.history_late = 5
    await task.run()
    assert comfy.ours[0].state == "done"


# Answers that are lost.


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fault", [LOST_BEFORE, LOST_AFTER, BROKEN, BROKEN_AFTER, Fault(502), Fault(524, carried_out=True), HALF_AFTER]
)
async def test_a_lost_answer_to_a_prompt(fault, comfy, task):
    """It is looked for before it is sent again: one run, whether it was carried out or not."""
    comfy.faults["POST /prompt"].append(fault)
    await task.run()
    assert len(comfy.ours) == 1
    assert comfy.asked("POST /prompt") == (1 if fault.carried_out else 2)


@pytest.mark.anyio
async def test_a_lost_answer_of_a_run_that_has_ended(comfy, task, monkeypatch):
    """By the time somebody looks, it is in the history and not in the queue any more."""
    monkeypatch.setattr(Run, "look_s", 0.2)
    comfy.faults["POST /prompt"].append(LOST_AFTER)
    comfy.faults["GET /history"].append(LOST_BEFORE)
    await task.run(still("SaveAnimatedPNG", fps=8.0, compress_level=1))
    assert len(comfy.ours) == 1


@pytest.mark.anyio
async def test_a_prompt_that_is_never_taken(comfy, task):
    """Three tries; then the attempt has failed, and nothing is left there."""
    comfy.faults["POST /prompt"].extend([BROKEN] * 3)
    with pytest.raises(EngineFailed, match="did not take the workflow in 3 tries"):
        await task.run()
    assert comfy.ours == []


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["POST /upload/image", "GET /history", "GET /queue", "GET /view"])
async def test_any_other_request_that_fails_is_repeated(what, comfy, task):
    """Lost, answered with 500, by a gateway or by half: none of these does harm when it is sent again."""
    comfy.faults[what].extend([LOST_BEFORE, LOST_AFTER, BROKEN, Fault(503)])
    if what != "GET /view":
        comfy.faults[what].append(HALF_AFTER)
    await task.run()
    assert len(comfy.ours) == 1
    assert len(comfy.uploads) == 1


@pytest.mark.anyio
async def test_a_server_that_answers_500_for_ever(comfy, task):
    """It is there, so that waiting is no use."""
    comfy.faults["GET /history"].extend([BROKEN] * 100)
    with pytest.raises(EngineFailed, match="500"):
        await task.run()


@pytest.mark.anyio
async def test_a_server_that_is_not_there_yet(comfy, task):
    """It is waited for, and said so in one line."""
    await anyio.to_thread.run_sync(comfy.stop)
    with structlog.testing.capture_logs() as lines:
        async with task.running():
            while not any(line["event"] == "comfyui_does_not_answer" for line in lines):
                await anyio.sleep(0.005)
            await anyio.to_thread.run_sync(comfy.start)
    assert task.outcome.path.is_file()
    assert [line["event"] for line in lines].count("comfyui_does_not_answer") == 1
    assert any(line["event"] == "comfyui_is_back" for line in lines)


# Restarts.


@pytest.mark.anyio
async def test_a_restart_in_mid_run(comfy, task, tmp_path):
    """The prompt is gone with the queue and the history: this attempt failed, and the next one has a new prompt."""
    comfy.hold("KSampler")
    async with task.running():
        await until(comfy, is_running(comfy))
        await anyio.to_thread.run_sync(comfy.restart)
    assert isinstance(task.outcome, EngineFailed)
    assert "restarted" in str(task.outcome)
    await Task(comfy, tmp_path).run()
    assert [prompt.state for prompt in comfy.ours] == ["lost", "done"]


@pytest.mark.anyio
async def test_a_server_that_goes_away_for_good(comfy, tmp_path):
    """It is waited for as long as was set; that the prompt may still run there is said."""
    task = Task(comfy, tmp_path, patience_s=0.1)
    comfy.hold("KSampler")
    with structlog.testing.capture_logs() as lines:
        async with task.running():
            await until(comfy, is_running(comfy))
            await anyio.to_thread.run_sync(comfy.stop)
    assert isinstance(task.outcome, ProviderUnavailable)
    assert "comfyui_may_still_run" in [line["event"] for line in lines]


# Other people's prompts.


@pytest.mark.anyio
async def test_a_full_queue(comfy, task):
    """Ours waits behind the others'; what they report is not taken for ours."""
    theirs = comfy.occupy(3)
    async with task.running():
        await until(comfy, lambda: comfy.ours and comfy.asked(f"GET /history/{comfy.ours[0].id}") > 2)
        assert {each.stage for each in task.heard} == {"prepare", "queue"}
        comfy.release()
    assert task.outcome.path.is_file()
    assert [prompt.state for prompt in theirs] == ["done"] * 3


@pytest.mark.anyio
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
async def test_cancelled_while_it_waits(is_old, comfy, task):
    """Our prompt is taken out of the queue; the one that runs and those beside ours are left alone."""
    comfy.is_old = is_old
    theirs = comfy.occupy(2)
    with structlog.testing.capture_logs() as lines:
        async with task.running():
            await until(comfy, lambda: comfy.ours and comfy.asked(f"GET /history/{comfy.ours[0].id}"))
            task.scope.cancel()
    assert [prompt.state for prompt in comfy.ours] == ["deleted"]
    assert comfy.asked("POST /interrupt") == 0
    assert "comfyui_stopped" in [line["event"] for line in lines]
    comfy.release()
    await until(comfy, lambda: all(prompt.state == "done" for prompt in theirs))


@pytest.mark.anyio
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
async def test_cancelled_while_it_runs(is_old, comfy, task):
    """Our run is interrupted, and the next one in the queue goes on to its end."""
    comfy.is_old = is_old
    comfy.hold("KSampler")
    async with task.running():
        await until(comfy, is_running(comfy))
        theirs = comfy._accept("theirs", still(), "somebody-else", ["2"])
        task.scope.cancel()
    assert comfy.ours[0].state == "interrupted"
    await until(comfy, lambda: theirs.state == "done")


@pytest.mark.anyio
async def test_a_person_cancels(comfy, task):
    """The job says so, and the engine raises its reason within a look."""
    comfy.hold("KSampler")
    async with task.running():
        await until(comfy, is_running(comfy))
        task.job.cancel(CancelRequested("a person cancelled"))
    assert isinstance(task.outcome, CancelRequested)
    assert comfy.ours[0].state == "interrupted"


@pytest.mark.anyio
async def test_cancelled_while_the_answer_is_awaited(comfy, task, monkeypatch):
    """The prompt may have arrived or not. It is looked for, and taken away where it is."""
    monkeypatch.setattr(Run, "lost_s", 30.0)
    comfy.occupy(1)
    comfy.faults["POST /prompt"].append(LOST_AFTER)
    comfy.faults["GET /history"].append(LOST_BEFORE)
    async with task.running():
        await until(comfy, lambda: comfy.ours)
        task.scope.cancel()
    assert comfy.ours[0].state == "deleted"


@pytest.mark.anyio
async def test_the_limit_of_an_attempt_interrupts_it(comfy, tmp_path):
    """A run without end is stopped there as well, not only given up here."""
    request = GenerationRequest(duration_s=5, workflow=wan())
    comfy.hold("KSampler")
    limit_s = 0.2
    while not any(prompt.state == "interrupted" for prompt in comfy.ours):  # a busy machine may not get so far at first
        task, limit_s = Task(comfy, tmp_path), 2 * limit_s
        with pytest.raises(EngineHung):
            await EngineTurns(task.engine, limit_s=limit_s).generate(
                request, {"x.png": task.photo}, task.folder, task.job
            )
    assert {prompt.state for prompt in comfy.ours} <= {"interrupted", "deleted"}


@pytest.mark.anyio
async def test_a_run_that_cannot_be_stopped_is_told(comfy, task, monkeypatch):
    """A node that looks for no interruption goes on; cancelling does not wait for it."""
    monkeypatch.setattr(Run, "stop_s", 0.1)
    comfy.hold("KSampler")
    comfy.faults["POST /interrupt"].extend([Fault(200)] * 1000)
    with structlog.testing.capture_logs() as lines:
        async with task.running():
            await until(comfy, is_running(comfy))
            task.scope.cancel()
    (told,) = [line for line in lines if line["event"] == "comfyui_may_still_run"]
    assert told["prompt_id"] == comfy.ours[0].id


@pytest.mark.anyio
async def test_somebody_interrupts_it(comfy, task):
    """In ComfyUI's own page. Nothing is wrong with the task, so it may be tried again."""
    comfy.hold("KSampler")
    async with task.running():
        await until(comfy, is_running(comfy))
        comfy._interrupt = True
    assert isinstance(task.outcome, EngineFailed)
    assert "interrupted" in str(task.outcome)


@pytest.mark.anyio
async def test_somebody_clears_the_queue(comfy, task):
    """A prompt that was taken away is as one that a restart forgot."""
    comfy.occupy(1)
    async with task.running():
        await until(comfy, lambda: comfy.ours)
        comfy._waiting.clear()
    assert isinstance(task.outcome, EngineFailed)


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [None, LOST_BEFORE, LOST_AFTER])
async def test_a_server_that_makes_ids_of_its_own(fault, comfy, task):
    """Before 2025-08. A prompt whose answer was lost is known by its client's id as long as it is in the queue."""
    comfy.is_old = True
    comfy.hold("KSampler")
    if fault:
        comfy.faults["POST /prompt"].append(fault)
    async with task.running():
        await until(comfy, is_running(comfy))
        await until(comfy, lambda: comfy.asked(f"GET /history/{comfy.ours[0].id}"))  # by now it knows the id
        comfy.release()
    assert task.outcome.path.is_file()
    assert len(comfy.ours) == 1


# Progress.


@pytest.mark.anyio
async def test_weights_of_nodes(comfy, task):
    """A node with a weight counts as much; others count one. Details name nodes by id, and percents."""
    comfy.hold("VAEDecode")
    async with task.running(node_weights={"6": 92.0}):
        await until(comfy, lambda: task.heard and task.heard[-1].detail.get("current_node") == "7")
        half = task.heard[-1]
        comfy.release()
    assert half.done == pytest.approx(97)
    assert half.total == pytest.approx(100)
    assert half.detail == {
        "completed_nodes": 6,
        "total_nodes": 9,
        "current_node": "7",
        "current_node_progress": 0.0,
    }
    sampling = [each.detail["current_node_progress"] for each in task.heard if each.detail.get("current_node") == "6"]
    assert {33.3, 66.7} <= set(sampling)


@pytest.mark.anyio
async def test_a_cached_run_ends_too(comfy):
    """The same graph a second time: nothing runs, the files of the first are named, and everything counts as done."""
    graph, ends = still("SaveAnimatedPNG", fps=8.0, compress_level=1), []
    for _ in range(2):
        heard: list[Progress] = []
        job = Job(StageTracker({"queue": 1, "workflow": 9}, sink=heard.append))
        async with ComfyApi(comfy.url, patience_s=PATIENCE_S) as api:
            run = Run(api, job, graph, RunProgress(graph, {}), of_task=True, stages=("queue", "workflow"))
            ends.append(await run.outputs())
        assert heard[-1].detail["completed_nodes"] == 2
    assert ends[0] == ends[1]
    assert not any(message["type"] == "progress_state" for message in comfy.ours[1].sent)


# Every recording, through the engine.

ENDS = {
    "bad_class": (PartsMissing, "NoSuchNode"),
    "interrupt": (EngineFailed, "interrupted"),
    "load_save": (InvalidRequest, "it made 1 image"),
    "missing_ckpt": (PartsMissing, r"x\.safetensors"),
    "no_outputs": (InvalidRequest, "no output node"),
    "runtime_error": (InvalidRequest, "avcodec_open2"),
    "savevideo": (None, 9),
    "webm": (None, 9),
}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("name", ENDS)
async def test_recordings(name, comfy, task):
    """Each ends as it did in reality, in our words."""
    workflow = json.loads((CASES / f"{name}.json").read_text())["workflow"]
    text = json.dumps(workflow).replace("in.png", "x.png")
    error, said = ENDS[name]
    if name == "interrupt":
        comfy.hold("SaveAnimatedPNG")
    if name == "missing_ckpt":
        comfy.models["checkpoints"] = []
    async with task.running(json.loads(text)):
        if name == "interrupt":
            await until(comfy, is_running(comfy, "2"))
            comfy._interrupt = True
    if error is None:
        assert task.outcome.frames == said
    else:
        assert type(task.outcome) is error
        with pytest.raises(error, match=said):
            raise task.outcome
