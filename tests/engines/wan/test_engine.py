"""The engine: its contract, seeds, cancelling, failures at every stage, and that nothing is left behind."""

import gc
import os
import signal
import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import pytest
import structlog
import torch

from inference.engines.base import Job
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.faults import OutOfRoom, mapped
from inference.engines.wan.placement import Offload
from inference.engines.wan.presets import PRESETS, Schedule
from inference.errors import CancelRequested, EngineFailed, EngineLost, I2VError, MachineFault, SettingsError
from inference.media.video import probe
from inference.progress.stages import StageTracker
from inference.task import GenerationRequest
from tests.engines.contract import EngineContract, landscape
from tests.engines.wan.conftest import SMALL, make_engine, shared_models


def frames_of(video) -> torch.Tensor:
    """Every byte of every frame."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video.path)]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


class TestTI2V(EngineContract):
    """The suite every engine passes, in the 5B's shape."""

    request_ = SMALL

    def make(self):
        """Over models that all of them share: whatever one test left on them, the next would meet."""
        return make_engine("tiny")


class TestI2VA14B(TestTI2V):
    """The same in the A14B's; on one event loop, since what differs is below them."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Once."""
        return "asyncio"

    def make(self):
        """Two experts with their LoRAs."""
        return make_engine("tiny-a14b")


class Cancels:
    """A sink that cancels the job at one report, and remembers all."""

    def __init__(self, engine, at: int) -> None:
        self.heard = []
        self.at = at
        self.job = Job(StageTracker(engine.stages, sink=self))

    def __call__(self, progress) -> None:
        """As a tracker calls it."""
        self.heard.append((progress.stage, progress.done))
        if len(self.heard) == self.at:
            self.job.cancel(CancelRequested("enough"))


@pytest.mark.anyio
async def test_the_same_seed_gives_the_same_frames(engine, photo, folder):
    """Also 0, also after others; another seed gives others; the seed is in the value and in the file."""
    requests = [SMALL.model_copy(update={"seed": seed}) for seed in (0, 1, 0)]
    videos = []
    for number, request in enumerate(requests):
        own = folder / str(number)
        own.mkdir()
        videos.append(await engine.generate(request, {"photo": photo}, own, Job()))
    first, other, again = map(frames_of, videos)
    assert [video.seed for video in videos] == [0, 1, 0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert b"seed 1" in videos[1].path.read_bytes()
    assert b"not a generation" in videos[1].path.read_bytes()  # noise is labelled


@pytest.mark.anyio
async def test_a_drawn_seed_can_be_given_again(engine, photo, folder):
    """No seed asked for: one is drawn and reported, and makes the same clip."""
    drawn = await engine.generate(SMALL.model_copy(update={"seed": None}), {"photo": photo}, folder, Job())
    frames = frames_of(drawn)
    again = await engine.generate(SMALL.model_copy(update={"seed": drawn.seed}), {"photo": photo}, folder, Job())
    assert torch.equal(frames_of(again), frames)


@pytest.mark.anyio
async def test_cancel_is_obeyed_at_each_step(shape, photo, folder):
    """At every report there is, the next step does not happen, and nothing stays in the folder."""
    engine = make_engine(shape)
    whole = Cancels(engine, at=0)
    expected = frames_of(await engine.generate(SMALL, {"photo": photo}, folder, whole.job))
    (folder / "wan.mp4").unlink()
    forwards = []
    hooks = [
        expert._model.register_forward_pre_hook(lambda *_: forwards.append(1)) for expert in engine._models.experts
    ]
    try:
        for at, (stage, done) in enumerate(whole.heard[:-1], start=1):
            forwards.clear()
            cancels = Cancels(engine, at)
            with pytest.raises(CancelRequested, match="enough"):
                await engine.generate(SMALL, {"photo": photo}, folder, cancels.job)
            assert len(cancels.heard) <= at + 1
            assert len(forwards) == (
                done if stage == "denoise" else 0 if stage == "encode" else engine.preset.schedule.steps
            )
            assert list(folder.iterdir()) == []
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())), expected)


STAGES = {
    "text": (lambda models: models.text_encoder._model, 1),
    "photo": (lambda models: models.vae.encoder.mid_block, 1),
    "first step": (lambda models: models.experts[0]._model, 1),
    "last step": (lambda models: models.experts[-1]._model, 2),
    "first chunk": (lambda models: models.vae.decoder, 1),
    "third chunk": (lambda models: models.vae.decoder, 3),
}
ERRORS = [
    (lambda: RuntimeError("mat1 and mat2 shapes\ncannot be multiplied"), EngineFailed),
    (lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), EngineLost),
    (MemoryError, MachineFault),
]


@contextmanager
def failing(engine, stage, make_error, times=1):
    """Within the block, the stage's module raises when it is called for the n-th time, and `times` in all."""
    find, at = STAGES[stage]
    calls = []

    def fail(*_):
        calls.append(1)
        if at <= len(calls) < at + times:
            raise make_error()

    hook = find(engine._models).register_forward_pre_hook(fail)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.anyio
@pytest.mark.parametrize("number", range(len(STAGES)), ids=STAGES)
async def test_a_failure_at_any_stage_leaves_the_engine_as_new(shape, number, photo, folder):
    """The error is one of ours, of one line; no file stays; the next clip is what it would have been."""
    engine = make_engine(shape)
    request = SMALL.model_copy(update={"prompt": f"never seen {number}"})  # the text encoder has work to do
    expected = frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job()))
    (folder / "wan.mp4").unlink()
    make_error, kind = ERRORS[number % len(ERRORS)]
    with failing(engine, list(STAGES)[number], make_error), pytest.raises(kind) as caught:
        await engine.generate(request, {"photo": photo}, folder, Job())
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    assert torch.equal(frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())), expected)


@pytest.mark.anyio
async def test_a_killed_encoder_is_the_machines_fault(photo, folder):
    """Ffmpeg dies between two chunks: MachineFault, nothing left, and the next clip is fine."""
    engine = make_engine("tiny")

    def kill(*_):
        for pid in ffmpegs():
            os.kill(pid, signal.SIGKILL)

    hook = engine._models.vae.decoder.register_forward_pre_hook(kill)
    try:
        with pytest.raises(MachineFault, match="SIGKILL"):
            await engine.generate(SMALL, {"photo": photo}, folder, Job())
    finally:
        hook.remove()
    assert list(folder.iterdir()) == []
    await engine.generate(SMALL, {"photo": photo}, folder, Job())


@pytest.mark.anyio
async def test_an_encoder_that_stops_reading_does_not_hold_the_engine(photo, folder):
    """Ffmpeg is stopped, the clip is larger than its pipe: a cancel is obeyed all the same, and ffmpeg is gone."""
    engine = make_engine("tiny")
    pids = []

    def stop(*_):
        pids.extend(ffmpegs())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        job.cancel(CancelRequested("enough"))

    job = Job()
    decoder = engine._models.vae.decoder
    hook = decoder.register_forward_pre_hook(lambda *_: None if pids else stop())
    try:
        with pytest.raises(CancelRequested, match="enough"):
            await engine.generate(SMALL.model_copy(update={"max_area_px": 160 * 96}), {"photo": photo}, folder, job)
    finally:
        hook.remove()
    assert pids
    assert not ffmpegs()


def ffmpegs() -> list[int]:
    """The encoders that this process has started and not ended."""
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread or a child may end while it is looked at
            children = (thread / "children").read_text().split()
            found += [int(child) for child in children if "ffmpeg" in Path(f"/proc/{child}/cmdline").read_text()]
    return found


@pytest.mark.parametrize(
    "error, kind",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfRoom),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfRoom),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OutOfRoom),
        (RuntimeError("GET was unable to find an engine to execute this computation"), OutOfRoom),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"), MachineFault),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), EngineLost),
        (CancelRequested("enough"), CancelRequested),
        (ZeroDivisionError("x"), EngineFailed),
    ],
    ids=lambda each: str(each)[:30],
)
def test_every_error_is_one_of_ours(error, kind):
    """By what torch and the libraries below it say."""
    assert type(mapped(error)) is kind


def out_of_memory() -> Exception:
    """As the allocator says it."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.anyio
@pytest.mark.parametrize("stage", ["photo", "last step", "third chunk"])
async def test_out_of_memory_is_tried_once_more_with_more_offload(shape, stage, photo, folder):
    """The clip is made all the same, and the same; the engine stays more careful from then on."""
    expected = frames_of(await make_engine(shape).generate(SMALL, {"photo": photo}, folder, Job()))
    engine = make_engine(shape, offload=Offload.NONE)
    with structlog.testing.capture_logs() as logs, failing(engine, stage, out_of_memory):
        video = await engine.generate(SMALL, {"photo": photo}, folder, Job())
    assert torch.equal(frames_of(video), expected)
    assert engine._models.offload == Offload.TEXT
    assert [line["offload"] for line in logs if line["event"] == "out_of_memory"] == ["text"]


@pytest.mark.anyio
async def test_out_of_memory_for_good_is_a_failure_that_can_be_retried(photo, folder):
    """After the one retry: EngineFailed, which names the size; with nothing left to move, at once."""
    engine = make_engine("tiny", offload=Offload.MODELS)
    with failing(engine, "first step", out_of_memory, times=9) as calls:
        for tries in (2, 3):
            with pytest.raises(EngineFailed, match=r"96x32, 13 frames, offload blocks.*I2V_WAN_AREA") as caught:
                await engine.generate(SMALL, {"photo": photo}, folder, Job())
            assert len(calls) == tries
            assert caught.value.retryable
    assert list(folder.iterdir()) == []
    await engine.generate(SMALL, {"photo": photo}, folder, Job())


def live_tensors() -> int:
    """Tensors that somebody refers to, or that wait for the collector: those would hold GPU memory meanwhile."""
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.fixture
def no_collector():
    """Without Python's cycle collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.anyio
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("shape, requests", [("tiny", 20), ("tiny-a14b", 8)])
async def test_many_requests_leave_nothing(shape, requests, tmp_path, folder):
    """Many in a row, good, cancelled and failed, of other sizes and prompts: not one tensor and no memory more."""
    engine = make_engine(shape)
    photos = [landscape(tmp_path / f"{n}.jpg", size) for n, size in enumerate([(320, 180), (180, 320)])]
    errors = []  # held on to, as an Outcome or a log might

    async def one(number: int) -> None:
        request = SMALL.model_copy(update={"prompt": f"prompt {number % 4}", "seed": number})
        photo = photos[number % 2]
        try:
            match number % 4:
                case 0:
                    with failing(engine, "last step", ERRORS[0][0]):
                        await engine.generate(request, {"photo": photo}, folder, Job())
                case 1 | 2:
                    await engine.generate(request, {"photo": photo}, folder, Cancels(engine, at=1 + number % 4).job)
                case _:
                    await engine.generate(request, {"photo": photo}, folder, Job())
        except I2VError as error:
            errors.append(error)

    for number in range(4):
        await one(number)
    tensors, resident = live_tensors(), _resident_bytes()
    for number in range(requests):
        await one(number)
    assert len(errors) == 3 + requests * 3 // 4
    assert live_tensors() == tensors
    assert _resident_bytes() - resident < 30e6  # a clip of this size held by each would be a hundred times as many


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.anyio
async def test_what_a_preset_ignores_it_says_once(photo, folder):
    """A negative prompt without guidance, a last photo where there is one frame to give: one line each."""
    request = SMALL.model_copy(update={"negative_prompt": "blurry"})
    with structlog.testing.capture_logs() as logs:
        await make_engine("tiny").generate(request, {"photo": photo, "last_photo": photo}, folder, Job())
    assert [line["field"] for line in logs if line["event"] == "ignored"] == ["negative_prompt", "last_photo"]


@pytest.mark.anyio
async def test_a_negative_prompt_counts_where_there_is_guidance(shape, photo, folder):
    """The preset's own unless the request has one; each is encoded once, and the second request finds it."""
    preset = replace(PRESETS[shape], schedule=Schedule("unipc", 2, 5.0), guidance=(4.0, 4.0))
    engine = WanEngine(preset, shared_models(shape))
    plans = [
        engine._plan(SMALL.model_copy(update={"negative_prompt": each}), {"photo": photo})
        for each in (None, "", "grey")
    ]
    assert [plan.negative_prompt for plan in plans] == [preset.negative_prompt, "", "grey"]
    clips = []
    for negative in ("", "grey"):
        video = await engine.generate(
            SMALL.model_copy(update={"negative_prompt": negative}), {"photo": photo}, folder, Job()
        )
        clips.append(frames_of(video))
    assert not torch.equal(*clips)
    with failing(engine, "text", RuntimeError) as calls:
        await engine.generate(SMALL.model_copy(update={"negative_prompt": "grey"}), {"photo": photo}, folder, Job())
    assert calls == []


def test_long_clips_are_warned_of(photo):
    """Ten seconds are made, since apps sell them, but not silently."""
    engine = make_engine("tiny-a14b")
    with structlog.testing.capture_logs() as logs:
        plan = engine._plan(SMALL.model_copy(update={"duration_s": 10}), {"photo": photo})
    assert plan.frames == 161
    assert [line["frames"] for line in logs if line["event"] == "long_clip"] == [161]


@pytest.mark.anyio
async def test_frames_made_yuv_on_the_device_look_the_same(shape, photo, folder):
    """Within what two roundings do: the clip is compressed from the same pixels within one level."""
    pictures = []
    for where in (False, True):
        engine = make_engine(shape, yuv_on_device=where)
        pictures.append(frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())).int())
        (folder / "wan.mp4").unlink()
    off = (pictures[0] - pictures[1]).abs().float()
    assert off.mean() < 2.5  # a wrong matrix, or U and V in each other's place, gives more than 10


@pytest.mark.anyio
async def test_the_text_is_read_before_the_photo_where_it_has_to_leave(photo, folder):
    """With offload a photo's encoding may need the room that the text encoder takes; without, both go on at once."""
    for offload, is_first in ((Offload.TEXT, True), (Offload.NONE, False)):
        engine = make_engine("tiny-a14b", offload=offload)
        models, order, photo_begun = engine._models, [], threading.Event()

        def read(*_, wait=not is_first, begun=photo_begun, order=order):
            assert not wait or begun.wait(10)  # would be in vain if the photo came after the text
            order.append("text")

        def look(*_, begun=photo_begun, order=order):
            begun.set()
            order.append("photo")

        hooks = [
            models.text_encoder._model.register_forward_pre_hook(read),
            models.vae.encoder.mid_block.register_forward_pre_hook(look),
        ]
        request = SMALL.model_copy(update={"prompt": "new words", "negative_prompt": None})
        await engine.generate(request, {"photo": photo}, folder, Job())
        assert (order[0] == "text") is is_first
        for hook in hooks:
            hook.remove()
        (folder / "wan.mp4").unlink()


def test_an_area_beyond_the_preset_is_refused(weights_dir):
    """By the name of its setting, before weights are read."""
    with pytest.raises(SettingsError, match="I2V_WAN_AREA"):
        WanEngine.load(PRESETS["tiny"], weights_dir / "nowhere", area_px=10**9)


@pytest.mark.anyio
async def test_the_area_of_the_engine_is_the_default_of_its_clips(photo, folder):
    """A request without one gets it; a request with one gets its own."""
    engine = WanEngine(PRESETS["tiny"], shared_models("tiny"), area_px=96 * 64)
    request = GenerationRequest(duration_s=0.5)
    assert (engine._plan(request, {"photo": photo}).height, engine._plan(SMALL, {"photo": photo}).height) == (64, 32)
    video = await engine.generate(request, {"photo": photo}, folder, Job())
    assert probe(video.path).width * probe(video.path).height == 96 * 64
