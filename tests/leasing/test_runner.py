"""One lease: every way it can end, each with what the queue is told. The storms are in tests/simulation/."""

import itertools
import threading
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
import trio
from structlog.testing import capture_logs

from inference.engines.base import Job, run_in_thread
from inference.errors import (
    AccountError,
    AddressRefused,
    CancelRequested,
    DiskFull,
    EncodeFailed,
    EngineFailed,
    EngineLost,
    I2VError,
    InvalidRequest,
    LeaseLost,
    ProviderUnavailable,
    QueueAuthError,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
    SettingsError,
    StorageAway,
    StorageUnavailable,
)
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.task import Video
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.support.virtual import virtual_time


@dataclass
class ScriptedQueue(MemoryQueue):
    """A connection whose next calls of a method raise what is scripted, and which remembers what was called."""

    script: dict[str, list[I2VError | None]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    beats_at: list[float] = field(default_factory=list)

    async def _turn(self, name: str) -> None:
        self.calls.append(name)
        errors = self.script.get(name, [])
        error = errors.pop(0) if errors else None
        if error:
            raise error

    async def heartbeat(self, lease, progress=None):
        """See TaskQueue."""
        self.beats_at.append(anyio.current_time())
        await self._turn("heartbeat")
        await MemoryQueue.heartbeat(self, lease, progress)

    async def fetch_inputs(self, lease, folder):
        """See TaskQueue."""
        await self._turn("fetch_inputs")
        return await MemoryQueue.fetch_inputs(self, lease, folder)

    async def deliver(self, lease, video):
        """See TaskQueue."""
        await self._turn("deliver")
        return await MemoryQueue.deliver(self, lease, video)

    async def complete(self, lease, storage_path, video):
        """See TaskQueue."""
        await self._turn("complete")
        await MemoryQueue.complete(self, lease, storage_path, video)

    async def fail(self, lease, message):
        """See TaskQueue."""
        await self._turn("fail")
        await MemoryQueue.fail(self, lease, message)

    async def release(self, lease, reason=None):
        """See TaskQueue."""
        await self._turn("release")
        await MemoryQueue.release(self, lease, reason)


@dataclass
class SleepyEngine:
    """Takes `seconds`, then makes a file or raises the next of `errors`."""

    seconds: float = 10
    errors: list[Exception | None] = field(default_factory=list)
    runs: int = 0
    name: str = "sleepy"
    stages: dict[str, float] = field(default_factory=lambda: {"sleep": 1.0})

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):  # noqa: ARG002
        """See Engine."""
        self.runs += 1
        job.report("sleep", 1, 2)
        await anyio.sleep(self.seconds)
        job.raise_if_cancelled()
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error
        path = folder / "video.mp4"
        path.write_bytes(b"frames")
        return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=6)


@dataclass
class Scene:
    """One task in a store, leased, and the runner for it."""

    photo: bytes
    folder: Path
    engine: SleepyEngine = field(default_factory=SleepyEngine)
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self):
        self.store = MemoryStore(clock=anyio.current_time)
        self.queue = ScriptedQueue(store=self.store, worker_id="me")
        self.item = self.store.add(self.photo, "a prompt")
        self.runner = Runner(self.queue, self.engine, policy=self.policy, temp_dir=self.folder)

    async def run(self):
        """Leases the task and runs it."""
        self.lease = await self.queue.lease()
        return await self.runner.run(self.lease)

    @property
    def now(self):
        """The item as the store sees it."""
        return self.store.get(self.item.id)

    def is_clean(self):
        """Nothing is left in the temporary folder."""
        return list(self.folder.iterdir()) == []


@pytest.fixture
def scene(photo_bytes, tmp_path):
    """A factory: scenes have to be made inside of virtual time."""
    return lambda **given: Scene(photo_bytes, tmp_path, **given)


@pytest.mark.parametrize("hint, told", [("comfyui", ["comfyui"]), ("wan_local", []), (None, [])])
@virtual_time
async def test_a_hint_that_is_not_known_is_told(scene, hint, told):
    """The engine that is there makes the video; whoever hoped for another can find out why."""
    it = scene()
    it.store.items[it.item.id] = it.item.model_copy(update={"inference_provider": hint})
    with capture_logs() as logs:
        outcome = await it.run()
    assert outcome.status == "completed"
    assert [line["provider"] for line in logs if line["event"] == "unknown_provider"] == told


@virtual_time
async def test_a_lease_in_order(scene):
    """Beat before anything else, then fetch, generate, deliver, complete; the outcome says it all."""
    it = scene()
    outcome = await it.run()
    assert outcome.status == "completed"
    assert [call for call in it.queue.calls if call != "heartbeat"] == ["fetch_inputs", "deliver", "complete"]
    assert it.queue.calls[0] == "heartbeat"
    assert it.store.objects[outcome.storage_path] == b"frames"
    assert (it.now.status, it.now.video_storage_path) == ("completed", outcome.storage_path)
    assert list(outcome.stage_seconds) == ["download", "wait", "sleep", "upload", "report"]
    assert it.is_clean()


@pytest.mark.parametrize("own_usd, told_usd", [(None, 0.05), (0.25, 0.25), (0.0, 0.0)])
@virtual_time
async def test_a_video_costs_the_time_that_it_kept_the_engine(scene, own_usd, told_usd):
    """All tries of its turn, and no wait for it; the price that a provider named stays. It is there before delivery."""
    delivered = []

    class Priced(SleepyEngine):
        async def generate(self, *given):
            video = await super().generate(*given)
            return video.model_copy(update={"cost_usd": own_usd})

    it = scene(engine=Priced(seconds=20, errors=[EngineFailed("once")]), policy=Policy(retry_wait_s=0))
    runner = Runner(it.queue, it.engine, policy=it.policy, temp_dir=it.folder, usd_per_s=0.00125)

    async def complete(lease, path, video):
        delivered.append(video.cost_usd)
        await MemoryQueue.complete(it.queue, lease, path, video)

    it.queue.complete = complete
    lease = await it.queue.lease()
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:

            async def busy():
                async with runner.turns.taken():
                    await anyio.sleep(100)

            tasks.start_soon(busy)
            await anyio.sleep(1)
            outcome = await runner.run(lease)
    assert (outcome.status, it.engine.runs) == ("completed", 2)
    assert outcome.video.cost_usd == pytest.approx(told_usd, abs=0.00125)  # up to a second between the tries
    assert delivered == [outcome.video.cost_usd]
    assert [line["cost_usd"] for line in logs if line["event"] == "lease_ended"] == delivered


@virtual_time
async def test_beats_come_first_soon_and_then_regularly(scene):
    """The second beat comes within seconds, since an overtaking update can land after the first."""
    it = scene(engine=SleepyEngine(seconds=500))
    await it.run()
    gaps = [after - before for before, after in zip(it.queue.beats_at, it.queue.beats_at[1:], strict=False)]
    assert it.queue.beats_at[0] == 0
    assert gaps == [4, 120, 120, 120, 120]


@virtual_time
async def test_a_lease_lost_before_the_start_costs_nothing(scene):
    """The first beat finds out, and the engine never runs."""
    it = scene()
    lease = await it.queue.lease()
    it.store.assign(it.now, "somebody.else", 600)
    outcome = await it.runner.run(lease)
    assert outcome.status == "lease_lost"
    assert it.engine.runs == 0
    assert set(it.queue.calls) == {"heartbeat"}


@virtual_time
async def test_a_machine_that_never_reaches_the_queue_may_be_at_fault(scene):
    """Where no beat was answered; the one that was overtaken, or heard before the queue went away, is not."""
    it = scene()
    lease = await it.queue.lease()

    async def heartbeat(*_):
        raise QueueUnavailable("no route to host")

    it.queue.heartbeat = heartbeat
    outcome = await it.runner.run(lease)
    assert (outcome.status, outcome.machine_at_fault, it.engine.runs) == ("lease_lost", True, 0)


@virtual_time
async def test_a_queue_that_understands_no_heartbeats_fails_no_task(scene):
    """They say nothing of the task; this worker may be too old or too new for the queue."""
    it = scene()
    it.queue.script["heartbeat"] = [QueueRefused("400 malformed")] * 1000
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault) == ("released", True)
    assert (it.now.status, it.now.retry_count, it.engine.runs) == ("pending", 0, 0)


@virtual_time
async def test_a_process_that_was_paused_spends_nothing(scene):
    """It asks its own clock right before it pays: nobody could have told it yet."""
    spent = []

    class Frozen(SleepyEngine):
        async def check(self):
            """See Engine."""

        async def generate(self, request, inputs, folder, job):  # noqa: ARG002
            job.raise_if_lease_ended()
            trio.lowlevel.current_clock().jump(250)
            job.raise_if_lease_ended()
            spent.append(request)

    it = scene(engine=Frozen())
    assert (await it.run()).status == "lease_lost"
    assert spent == []


@virtual_time
async def test_an_overtaken_lease_stops_the_engine_and_writes_nothing(scene):
    """The beat that is refused ends the generation there and then."""
    it = scene(engine=SleepyEngine(seconds=1000))
    lease = await it.queue.lease()
    async with anyio.create_task_group() as tasks:

        async def overtake():
            await anyio.sleep(60)
            it.store.assign(it.now, "somebody.else", 600)

        tasks.start_soon(overtake)
        outcome = await it.runner.run(lease)
        assert anyio.current_time() == 124  # the beat after the overtaking one
    assert outcome.status == "lease_lost"
    assert {"deliver", "complete", "fail", "release"}.isdisjoint(it.queue.calls)
    assert it.now.worker_id == "somebody.else"
    assert it.is_clean()


@virtual_time
async def test_work_stops_at_two_thirds_of_an_unrenewed_lease(scene):
    """With the queue away, the last renewal counts from before it was sent, and work ends in time."""
    it = scene(engine=SleepyEngine(seconds=10_000))
    it.queue.script["heartbeat"] = [None, *[QueueUnavailable("away")] * 1000]
    outcome = await it.run()
    assert outcome.status == "lease_lost"
    assert anyio.current_time() == pytest.approx(200)  # two thirds of 300 s


@virtual_time
async def test_the_deadline_counts_from_before_the_beat_was_sent(scene):
    """An answer that took its time does not make the lease longer."""
    it = scene(engine=SleepyEngine(seconds=10_000))
    slow = it.queue.heartbeat

    async def answers_late(lease, progress=None):
        await slow(lease, progress)
        await anyio.sleep(14)
        it.queue.script["heartbeat"] = [QueueUnavailable("away")] * 1000

    it.queue.heartbeat = answers_late
    lease = await it.queue.lease()
    await it.runner.run(lease)
    assert anyio.current_time() == pytest.approx(200)


@virtual_time
async def test_a_queue_that_is_away_is_waited_for(scene):
    """Presigning and completing go on being tried for as long as the lease lives; the video is made once."""
    it = scene()
    it.queue.script["fetch_inputs"] = [QueueUnavailable("away")] * 8
    it.queue.script["complete"] = [QueueUnavailable("away")] * 8
    outcome = await it.run()
    assert outcome.status == "completed"
    assert it.engine.runs == 1


@virtual_time
async def test_a_report_outlives_the_work_but_not_the_lease(scene):
    """Once the video is delivered, the report is tried until the lease itself ends, with no beat answered."""
    it = scene()
    it.queue.script["complete"] = [QueueUnavailable("away")] * 1000
    it.queue.script["heartbeat"] = [None, None, *[QueueUnavailable("away")] * 1000]
    outcome = await it.run()
    assert outcome.status == "lease_lost"
    assert anyio.current_time() == pytest.approx(304)  # the second beat was sent at 4 s


@pytest.mark.parametrize("stage", ["fetch_inputs", "deliver"])
def test_storage_is_tried_three_times_five_seconds_apart(scene, stage):
    """The documents' table; then the task fails, with the reason."""

    @virtual_time
    async def check():
        it = scene()
        it.queue.script[stage] = [StorageUnavailable("storage answered 503")] * 2
        assert (await it.run()).status == "completed"
        it = scene()
        it.queue.script[stage] = [StorageUnavailable("storage answered 503")] * 3
        began_at = anyio.current_time()
        outcome = await it.run()
        assert (outcome.status, outcome.error) == ("failed", "storage answered 503")
        assert it.now.error_message == "storage answered 503"
        assert it.queue.calls.count(stage) == 3
        assert 10 <= anyio.current_time() - began_at - (10 if stage == "deliver" else 0) <= 12

    check()


@pytest.mark.parametrize(
    "error, runs, suspect",
    [
        (EngineFailed("out of memory"), 3, True),
        (EncodeFailed("ffmpeg ended badly"), 1, True),
        (InvalidRequest("too long"), 1, False),
    ],
)
def test_engine_errors_are_retried_by_cause(scene, error, runs, suspect):
    """A passing failure gets another try here; what another try cannot cure is reported at once.

    Only where the task is certainly to blame, this machine is not suspected.
    """

    @virtual_time
    async def check():
        it = scene(engine=SleepyEngine(errors=[error] * 3))
        outcome = await it.run()
        assert (outcome.status, outcome.error, outcome.machine_at_fault) == ("failed", str(error), suspect)
        assert it.engine.runs == runs
        assert (it.now.status, it.now.retry_count) == ("failed", 1)

    check()


@pytest.mark.parametrize("error", [DiskFull("no space left"), EngineLost("GPU gone"), QueueAuthError("bad key")])
def test_a_machine_at_fault_hands_the_task_back(scene, error):
    """It is not the task's failure: no retry is counted, and another worker can have it at once."""

    @virtual_time
    async def check():
        it = scene(engine=SleepyEngine(errors=[error]))
        outcome = await it.run()
        assert (outcome.status, outcome.machine_at_fault) == ("released", True)
        assert (it.now.status, it.now.retry_count, it.now.crash_count) == ("pending", 0, 0)

    check()


@virtual_time
async def test_an_unexpected_error_fails_the_task_and_blames_the_machine(scene):
    """A bug is reported, not swallowed, and the worker can count it."""
    it = scene(engine=SleepyEngine(errors=[TypeError("int is not a photo")]))
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault) == ("failed", True)
    assert "TypeError: int is not a photo" in it.now.error_message
    assert it.is_clean()


@virtual_time
async def test_a_broken_photo_fails_the_task_before_the_engine(photo_bytes, tmp_path):
    """No engine second is spent on bytes that do not decode."""
    it = Scene(photo_bytes[: len(photo_bytes) // 2], tmp_path)
    outcome = await it.run()
    assert outcome.status == "failed"
    assert it.engine.runs == 0


@virtual_time
async def test_a_hung_engine_is_a_failed_one(scene):
    """The hard limit of an attempt stands beside the heartbeat, which goes on all the time."""
    it = scene(engine=SleepyEngine(seconds=float("inf")), policy=Policy(attempt_limit_s=900))
    outcome = await it.run()
    assert outcome.status == "failed"
    assert "no video within 900 s" in it.now.error_message
    assert it.engine.runs == 1


@virtual_time
async def test_a_cancelled_task_stops_at_the_next_beat(scene):
    """The engine stops, nothing is delivered, the item ends cancelled."""
    it = scene(engine=SleepyEngine(seconds=1000))
    async with anyio.create_task_group() as tasks:

        async def change_of_mind():
            await anyio.sleep(30)
            it.store.cancel(it.item.id)

        tasks.start_soon(change_of_mind)
        outcome = await it.run()
    assert outcome.status == "cancelled"
    assert anyio.current_time() == 124
    assert it.now.status == "cancelled"
    assert "deliver" not in it.queue.calls


@virtual_time
async def test_a_failure_whose_answer_was_lost_is_asked_about(scene):
    """The report landed, its answer did not: the next beat says so, and it is not sent again."""
    it = scene(engine=SleepyEngine(errors=[EncodeFailed("broken")]))
    landed = it.queue.fail

    async def lands_without_an_answer(lease, message):
        await landed(lease, message)
        raise QueueUnavailable("the reply was lost")

    it.queue.fail = lands_without_an_answer
    outcome = await it.run()
    assert (outcome.status, it.now.retry_count) == ("failed", 1)
    assert it.queue.calls.count("fail") == 1


@virtual_time
async def test_a_queue_that_says_it_cannot_is_asked_a_few_times(scene):
    """An answer is no outage: while beats are answered, three tries are enough to know that it is this task."""
    for call in ("fetch_inputs", "deliver"):
        it = scene()
        it.queue.script[call] = [QueueFailed("500")] * 2
        assert (await it.run()).status == "completed"
        it = scene()
        it.queue.script[call] = [QueueFailed("500")] * 1000
        began_at = anyio.current_time()
        outcome = await it.run()
        assert (outcome.status, outcome.machine_at_fault) == ("failed", True)
        assert it.queue.calls.count(call) == 3
        assert anyio.current_time() - began_at < 30


@virtual_time
async def test_a_queue_that_cannot_even_answer_beats_is_waited_for(scene):
    """Its answers say nothing of this task then: the clip is delivered when the outage is over."""
    it = scene()
    beat = it.queue.heartbeat

    async def heartbeat(lease, progress=None):
        if 5 < anyio.current_time() < 100:
            raise QueueFailed("500 no database")
        await beat(lease, progress)

    deliver = it.queue.deliver

    async def delivering(lease, video):
        if anyio.current_time() < 100:
            raise QueueFailed("500 no database")
        return await deliver(lease, video)

    it.queue.heartbeat, it.queue.deliver = heartbeat, delivering
    assert (await it.run()).status == "completed"
    assert it.engine.runs == 1


@virtual_time
async def test_a_report_outlasts_answers_too(scene):
    """Only the word is missing, and whoever is given the task next would spend everything again."""
    for call, error, end in (("complete", None, "completed"), ("fail", EncodeFailed("broken"), "failed")):
        it = scene(engine=SleepyEngine(errors=[error]))
        it.queue.script[call] = [QueueFailed("500 no database")] * 8
        assert ((await it.run()).status, it.now.status) == (end, end)


@virtual_time
async def test_a_machine_that_hears_the_queue_say_500_is_not_at_fault(scene):
    """It can reach the queue; the database behind that is away."""
    it = scene()
    it.queue.script["heartbeat"] = [QueueFailed("500 no database")] * 1000
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault) == ("lease_lost", False)


@pytest.mark.parametrize(
    "error, advice, suspect",
    [
        (AddressRefused("set I2V_ALLOW_PRIVATE_ADDRESSES"), "stop", True),
        (SettingsError("I2V_X: no"), "stop", True),
        (QueueAuthError("set WORKER_API_KEY"), "stop", True),
        (AccountError("no credits"), "wait", False),
        (StorageAway("no URL for anything"), "wait", False),
        (EngineLost("GPU gone"), None, True),
    ],
)
def test_what_is_nobodys_task_goes_back_and_tells_the_worker_what_to_do(scene, error, advice, suspect):
    """Settings: stop. A provider's outage: wait, and no machine is to blame. Never a failed task."""

    @virtual_time
    async def check():
        it = scene()
        it.queue.script["fetch_inputs"] = [error] * 3
        outcome = await it.run()
        assert (outcome.status, outcome.worker_should, outcome.machine_at_fault) == ("released", advice, suspect)
        assert (it.now.status, it.now.retry_count) == ("pending", 0)
        assert outcome.error == str(error)

    check()


@pytest.mark.parametrize("call", ["fetch_inputs", "deliver", "complete"])
@pytest.mark.parametrize("error", [QueueRefused("400 malformed"), QueueUnavailable("502")])
def test_a_call_that_fails_for_this_task_alone_ends_it(scene, call, error):
    """Beats are answered, one call never works: the task fails, counted, instead of going round for ever."""

    @virtual_time
    async def check():
        it = scene()
        it.queue.script[call] = [error] * 1000
        outcome = await it.run()
        assert (outcome.status, outcome.machine_at_fault) == ("failed", True)
        assert (it.now.status, it.now.error_message) == ("failed", str(error))
        assert it.engine.runs <= 1
        assert anyio.current_time() < 3600

    check()


@virtual_time
async def test_an_end_that_cannot_be_reported_is_left_to_the_lease(scene):
    """Handing it back would have it paid for again and again, uncounted; a lease that runs out is counted."""
    it = scene(engine=SleepyEngine(errors=[EncodeFailed("broken")]))
    it.queue.script["fail"] = [QueueRefused("400 malformed")]
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault) == ("lease_lost", True)
    assert "broken (not reported: 400 malformed)" in outcome.error
    assert "release" not in it.queue.calls
    assert it.now.status == "processing"


@virtual_time
async def test_a_stop_during_the_report_of_a_failure_hands_back(scene):
    """Wherever the stop falls, the lease does not stay behind."""
    it = scene(engine=SleepyEngine(errors=[EncodeFailed("broken")]))
    it.queue.script["fail"] = [QueueUnavailable("500")] * 1000
    with anyio.move_on_after(30):
        await it.run()
    assert anyio.current_time() == 30
    assert it.now.status == "pending"


@virtual_time
async def test_a_failure_is_not_repeated_when_its_request_was_cut_off(scene):
    """The lease's end cuts a report off in mid-air: it may have landed, so it is asked about first."""
    it = scene(engine=SleepyEngine(errors=[EncodeFailed("broken")]))
    landed = it.queue.fail

    async def lands_and_hangs(lease, message):
        await landed(lease, message)
        await anyio.sleep_forever()

    it.queue.fail = lands_and_hangs
    outcome = await it.run()
    assert it.queue.calls.count("fail") == 1
    assert (outcome.status, it.now.status, it.now.retry_count) == ("lease_lost", "failed", 1)


@virtual_time
async def test_being_cancelled_hands_the_lease_back(scene):
    """Shutdown is cancellation: the task is free again before the process ends."""
    it = scene(engine=SleepyEngine(seconds=1000))
    with anyio.move_on_after(50):
        await it.run()
    assert it.now.status == "pending"
    assert it.is_clean()


@pytest.mark.anyio
async def test_the_lease_is_handed_back_before_the_engine_has_stopped(scene):
    """A long step of a blocking engine does not use up the time a container runtime leaves."""
    released = threading.Event()

    class LongStep(SleepyEngine):
        async def check(self):
            """See Engine."""

        async def generate(self, request, inputs, folder, job):  # noqa: ARG002
            return await run_in_thread(job, lambda: released.wait(20))

    it = scene(engine=LongStep())
    tell = it.queue.release

    async def release(lease, reason=None):
        await tell(lease, reason)
        released.set()

    it.queue.release = release
    with anyio.move_on_after(0.2):
        await it.run()
    assert released.is_set()
    assert it.now.status == "pending"
    assert not it.runner.turns.hung


@virtual_time
async def test_handing_back_does_not_hold_up_the_exit(scene):
    """A queue that is away at shutdown costs seconds, not the runtime's patience."""
    it = scene(engine=SleepyEngine(seconds=1000))
    it.queue.script["release"] = [QueueUnavailable("away")] * 1000
    with anyio.move_on_after(50):
        await it.run()
    assert anyio.current_time() <= 56


@virtual_time
async def test_leases_share_one_engine(scene):
    """The second lease downloads while the first generates, and generates while the first uploads."""
    it = scene(engine=SleepyEngine(seconds=100))
    it.store.add(it.photo, "another")
    leases = [await it.queue.lease(), await it.queue.lease()]
    async with anyio.create_task_group() as tasks:
        for lease in leases:
            tasks.start_soon(it.runner.run, lease)
    assert anyio.current_time() == 200
    assert it.queue.calls.count("fetch_inputs") == 2
    assert {item.status for item in it.store.items.values()} == {"completed"}


@pytest.mark.anyio
async def test_a_thread_that_does_not_obey_is_left_behind(scene):
    """A blocking engine that ignores its job is given up on, said to be hung, and never used again."""
    never = threading.Event()

    class Stuck(SleepyEngine):
        async def check(self):
            """See Engine."""

        async def generate(self, request, inputs, folder, job):  # noqa: ARG002
            self.runs += 1
            return await run_in_thread(job, never.wait, stop_grace_s=0.05)

    it = scene(engine=Stuck(), policy=Policy(attempt_limit_s=0.1))
    try:
        outcome = await it.run()
        assert (outcome.status, outcome.machine_at_fault) == ("failed", True)
        assert it.runner.turns.hung
        it.store.add(it.photo, "the next one")
        outcome = await it.runner.run(await it.queue.lease())
        assert (outcome.status, it.engine.runs) == ("released", 1)
    finally:
        never.set()


@pytest.mark.anyio
async def test_a_thread_that_obeys_is_waited_for(scene):
    """Its last step ends before the call does, so the engine is free when the lock is."""
    steps = []

    class Stepping(SleepyEngine):
        async def check(self):
            """See Engine."""

        async def generate(self, request, inputs, folder, job):  # noqa: ARG002
            def work():
                pause = threading.Event()
                for step in range(10_000):
                    steps.append(step)
                    job.raise_if_cancelled()
                    pause.wait(0.001)

            return await run_in_thread(job, work)

    it = scene(engine=Stepping(), policy=Policy(attempt_limit_s=0.1))
    outcome = await it.run()
    counted = len(steps)
    assert (outcome.status, it.runner.turns.hung) == ("failed", False)
    await anyio.lowlevel.checkpoint()
    assert len(steps) == counted < 10_000


def test_the_first_reason_to_cancel_stays():
    """A job that lost its lease does not turn into one that somebody cancelled."""
    job = Job()
    job.raise_if_cancelled()
    job.cancel(LeaseLost("first"))
    job.cancel(CancelRequested("second"))
    with pytest.raises(LeaseLost):
        job.raise_if_cancelled()


@virtual_time
async def test_what_cannot_be_handed_back_is_failed_with_the_reason(scene):
    """A queue that takes nothing back would keep the task for ever: it is told, and the worker still learns why."""
    it = scene(engine=SleepyEngine(errors=[EngineLost("the GPU is gone")]))
    it.queue.hands_back = False
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault) == ("failed", True)
    assert (it.now.status, it.now.error_message) == ("failed", "the GPU is gone")
    assert "release" not in it.queue.calls


@virtual_time
async def test_an_outage_that_cannot_be_handed_back_is_failed_and_waited_for(scene):
    """The machine is not at fault, and the next task would meet the same outage."""
    it = scene(engine=SleepyEngine(errors=[ProviderUnavailable("ComfyUI is away")]))
    it.queue.hands_back = False
    outcome = await it.run()
    assert (outcome.status, outcome.machine_at_fault, outcome.worker_should) == ("failed", False, "wait")


@virtual_time
async def test_a_queue_is_heard_of_as_often_as_it_asks(scene):
    """A lease may ask for beats far more often than this worker is set to send them."""
    it = scene(engine=SleepyEngine(seconds=21))
    it.lease = (await it.queue.lease()).model_copy(update={"beat_interval_s": 2.0})
    await it.runner.run(it.lease)
    assert it.queue.calls.count("heartbeat") >= 10


@virtual_time
@pytest.mark.parametrize("takes, beats", [(["progress"], 8), ([], 3)])
async def test_short_work_is_watched_closely(scene, takes, beats):
    """A clip of four seconds moves in a bar where the queue tells people of it. Other queues hear as often as ever."""
    it = scene(engine=SleepyEngine(seconds=4.1))
    lease = (await it.queue.lease()).model_copy(update={"beat_interval_s": 2.0})
    task = lease.task.model_copy(update={"extras": {"takes": takes}})
    await it.runner.run(lease.model_copy(update={"task": task}))
    assert it.queue.calls.count("heartbeat") == beats
    assert max(later - at for at, later in itertools.pairwise(it.queue.beats_at)) <= 2.0


@virtual_time
async def test_the_engine_is_told_what_the_queue_takes(scene):
    """Which formats of video; what the task brings as a workflow goes along."""
    asked = []

    class Asked(SleepyEngine):
        async def generate(self, request, inputs, folder, job):
            asked.append((request.video_formats, list(inputs)))
            return await SleepyEngine.generate(self, request, inputs, folder, job)

    it = scene(engine=Asked())
    it.queue.video_formats = ("mp4", "webm")
    await it.run()
    assert asked == [(("mp4", "webm"), ["photo"])]


@pytest.mark.parametrize(
    "error, ends",
    [
        (EngineFailed("the sampler broke down"), ["released", "failed"]),
        (RuntimeError("a bug"), ["released", "failed"]),
        (InvalidRequest("seconds: too many"), ["failed"]),
    ],
    ids=["may pass", "unexpected", "the task's"],
)
@virtual_time
async def test_a_queue_that_counts_tries_gets_back_what_may_pass(scene, error, ends):
    """Until its tries are over. What is the task's own fault is over at once."""
    outcomes = []
    for tries_left in (1, 0)[: len(ends)]:
        it = scene(engine=SleepyEngine(errors=[error] * 3))
        lease = (await it.queue.lease()).model_copy(update={"tries_left": tries_left})
        outcomes.append(await it.runner.run(lease))
    assert [outcome.status for outcome in outcomes] == ends
    assert [outcome.machine_at_fault for outcome in outcomes] == [not isinstance(error, InvalidRequest)] * len(ends)


@virtual_time
async def test_what_stages_took_before_says_how_long_they_take(scene):
    """Their share of the whole, and the time that is left; of the first lease nothing is known that is not a guess."""
    seen: list[list] = []

    class TwoStages(SleepyEngine):
        async def generate(self, request, inputs, folder, job):
            for stage, seconds in (("load", 30), ("paint", 10)):
                job.report(stage)
                await anyio.sleep(seconds / 2)
                job.report(stage, 1, 2)
                await anyio.sleep(seconds / 2)
            return await super().generate(request, inputs, folder, job)

    engine = TwoStages(seconds=2, stages={"load": 1, "paint": 9, "sleep": 1})
    it = scene(engine=engine)
    slow = {"fetch_inputs": 5, "deliver": 5, "complete": 1}  # seconds of other stages, which have to be known as well
    for name, seconds in slow.items():
        method = getattr(it.queue, name)

        async def slowly(*given, method=method, seconds=seconds):
            await anyio.sleep(seconds)
            return await method(*given)

        setattr(it.queue, name, slowly)
    runner = Runner(it.queue, engine, temp_dir=it.folder, sink=lambda _: seen.append([]) or seen[-1].append)
    for _ in range(5):
        it.store.add(it.photo, "a prompt")
    for _ in range(5):
        assert (await runner.run(await it.queue.lease())).status == "completed"
    first = {(it.stage, it.done): it for it in seen[0]}
    last = {(it.stage, it.done): it for it in seen[-1]}
    assert first["load", 0].eta_s is None
    assert first["load", 1].fraction < 0.1  # as the engine's own weights have it
    assert last["load", 1].fraction == pytest.approx((5 + 15) / 53, abs=0.02)
    assert last["load", 0].eta_s == pytest.approx(30 + 10 + 2 + 5 + 1, abs=1)
    assert last["paint", 1].eta_s == pytest.approx(5 + 2 + 5 + 1, abs=2)
    assert last["done", 1].eta_s is None
