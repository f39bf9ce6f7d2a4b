"""How the Wan engine and stock diffusers are timed: by the same hooks, on the device's own clock, within a budget."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import anyio
import torch
from diffusers.utils import export_to_video, load_image
from PIL import Image, ImageOps

from inference.engines.base import Job
from inference.engines.wan import steady
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.placement import GB, Offload
from inference.engines.wan.presets import Preset
from inference.engines.wan.speed import Switches
from inference.engines.wan.warming import warm_up
from inference.errors import CancelRequested
from inference.progress.stages import Progress, StageTracker
from inference.task import GenerationRequest
from tests.bench.wan_models import Parts, Shape, least_offload
from tests.bench.wan_plan import Case, Expected, warms_up

ROOT = Path(__file__).parents[2]
PROMPT = "The camera moves in slowly while grandmother turns, smiles and waves at whoever holds the picture, take"

Until = Literal["latents", "mp4"]
Run = Callable[[Preset], dict[str, Any]]
Side = Callable[[], Run]  # brings the models into its form


@dataclass
class Budget:
    """How long this may take."""

    seconds: float
    skipped: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self._started)

    def allows(self, what: str, seconds: float, *, share: float = 1.0) -> bool:
        """Whether `share` of the time left is enough for it; says so where it is not."""
        if seconds <= self.left() * share:
            return True
        self.skipped.append(f"{what}: about {seconds:.0f} s, and {max(self.left(), 0) * share:.0f} s to spend")
        print(f"skipped: {self.skipped[-1]}", flush=True)
        return False


@dataclass(frozen=True)
class Terms:
    """How often each case runs, in what time, and how long it is expected to take."""

    rounds: int
    budget: Budget
    expect: Callable[[Case], Expected]


class Stopwatch:
    """When what was reached, by the device's own clock: what is asked of a GPU returns before it is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks: list[tuple[str, Any]] = []
        self._begun = self._now()

    def mark(self, label: str) -> None:
        """Notes that everything asked for so far was done at some moment, without waiting for it."""
        self._marks.append((label, self._now()))

    @contextmanager
    def watching(self, parts: Parts) -> Iterator[None]:
        """Marks where stages begin and end, the same for both sides: both call the same modules."""
        at = {
            "text done": (parts.text_encoder.register_forward_hook,),
            "image": (parts.vae.encoder.conv_in.register_forward_pre_hook,),  # what is steady leaves out the whole
            "image done": (parts.vae.quant_conv.register_forward_hook,),
            "forward": tuple(model.register_forward_pre_hook for model in parts.experts.values()),
            "decode": (parts.vae.post_quant_conv.register_forward_pre_hook,),
            "decode done": (parts.vae.decoder.register_forward_hook,),
        }
        hooks = [add(lambda *_, label=label: self.mark(label)) for label, adds in at.items() for add in adds]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def stages(self, total_s: float) -> dict[str, Any]:
        """Seconds of each stage. `other_s` is what lies between them; `mp4_s` what comes after the last frame."""
        if self._on_gpu:
            torch.cuda.synchronize()
        at: dict[str, list[float]] = {}
        for label, mark in self._marks:
            at.setdefault(label, []).append(
                self._begun.elapsed_time(mark) / 1000 if self._on_gpu else mark - self._begun
            )
        begun, decode = at["begin"][0], at.get("decode", at.get("denoised"))[0]
        encoded = max(at.get("text done", [begun])[-1], at["image done"][-1])  # both at once, where memory allows
        forwards = [*at["forward"], at.get("denoised", [decode])[0]]
        steps = [after - before for before, after in pairwise(forwards)]
        seconds = {
            "text_s": at.get("text done", [begun])[-1] - begun,
            "image_s": at["image done"][-1] - at["image"][0],
            "latents_s": decode,
            "steps_s": steps,
            "denoise_s": sum(steps),
        }
        if "decode done" in at:
            decoded = at["decode done"][-1]
            seconds |= {"decode_s": decoded - decode, "mp4_s": total_s - decoded, "total_s": total_s}
            seconds["other_s"] = decode - encoded + begun - sum(steps)
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Peak:
    """The most memory from here on: on CUDA of the device's, as tensors; else of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # without it: since the process began
                Path("/proc/self/clear_refs").write_text("5")

    def gb(self) -> float:
        """In GB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GB
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GB


class Subject:
    """A shape on a device, with a photo of its format; its models are made when they are first asked for."""

    def __init__(self, shape: Shape, device: torch.device, folder: Path) -> None:
        self.shape = shape
        self.device = device
        self.photo = folder / f"{shape.name}.jpg"
        with Image.open(ROOT / "inference" / "assets" / "sample.jpg") as sample:
            ImageOps.fit(sample, (2 * shape.width, 2 * shape.height)).save(self.photo, quality=90)
        self._folder = folder
        self._parts: Parts | None = None
        self._spoilt = False  # they have a form from which there is no way back
        self._takes = 0
        self._offload: Offload | None = None

    @property
    def parts(self) -> Parts:
        """The models, as they are."""
        if self._parts is None:
            self._parts = Parts.make(self.shape, self.device, self._folder)
        return self._parts

    @property
    def offload(self) -> Offload:
        """The least with which ours fits, if nothing else is on the device."""
        if self._offload is None:
            self._offload = least_offload(self.shape, self.device, self._folder)
        return self._offload

    def forget(self) -> None:
        """Makes room."""
        self._parts, self._spoilt = None, False
        torch.compiler.reset()
        make_room(self.device)

    def side(self, case: Case) -> Side:
        """The engine in a case's form, or stock."""
        return self.stock() if case.switches is None else self.ours(case.switches, case)

    def ours(self, switches: Switches, case: Case) -> Side:
        """The engine."""
        until: Until = "latents" if case.stage in {"encode", "denoise"} else "mp4"

        def prepare() -> Run:
            if self._spoilt:
                self.forget()
            parts, self._spoilt = self.parts, True  # until it has come to a form that can be undone
            models = parts.dress(switches)
            if switches.compile is not None:
                warm_up(models, self.shape.preset, self.shape.width * self.shape.height)
            self._spoilt = bool(
                switches.compile or switches.fp8 or switches.offload is not None or switches.fused_norms
            )

            def run(preset: Preset) -> dict[str, Any]:
                with nullcontext() if case.steady else every_frame_encoded():
                    engine = WanEngine(preset, models)
                    engine.compiled = switches.compile is not None  # as in a container: no clip compiles anything
                    return self._generate(engine, until)

            return run

        return prepare

    def stock(self) -> Side:
        """The stock pipeline, as its example has it: VAE in fp32, attention as torch has it, all frames at once."""

        def prepare() -> Run:
            if self._spoilt:
                self.forget()
            self.parts.undress()
            return self._run_pipeline

        return prepare

    def request(self) -> GenerationRequest:
        """Of the clip, never twice the same: a prompt that is remembered would cost nothing."""
        self._takes += 1
        return GenerationRequest(
            prompt=f"{PROMPT} {self._takes}",
            duration_s=(self.shape.frames - 1) / self.shape.preset.fps,
            max_area_px=self.shape.width * self.shape.height,
            seed=self._takes,
        )

    def _generate(self, engine: WanEngine, until: Until) -> dict[str, Any]:
        def follow(progress: Progress) -> None:
            if (progress.stage, progress.done) == ("denoise", progress.total):
                watch.mark("denoised")
                if until == "latents":
                    job.cancel(CancelRequested("the rest is the same"))

        job = Job(StageTracker(engine.stages, follow))
        request = self.request()
        with self._measuring() as (watch, measured):
            watch.mark("begin")
            with suppress(CancelRequested):
                anyio.run(engine.generate, request, {"photo": self.photo}, self._folder, job)
        offload = engine._models.offload
        self._spoilt |= offload != self.parts.offload  # memory was short, and what has left does not come back
        return measured | {"offload": offload.name.lower()}

    def _run_pipeline(self, preset: Preset) -> dict[str, Any]:
        shape, request = self.shape, self.request()
        pipeline = self.parts.pipeline(preset)
        text: dict[str, Any] = {"prompt": request.prompt}
        if pipeline.text_encoder is None:
            text = {"prompt_embeds": self.parts.embed(request.prompt)}
        with self._measuring() as (watch, measured):
            image = load_image(str(self.photo)).resize((shape.width, shape.height))
            watch.mark("begin")
            frames = pipeline(
                image=image,
                **text,
                width=shape.width,
                height=shape.height,
                num_frames=shape.frames,
                num_inference_steps=preset.schedule.steps,
                guidance_scale=1.0,
                generator=torch.Generator(self.device).manual_seed(request.seed),
            ).frames[0]
            export_to_video(frames, str(self._folder / "stock.mp4"), fps=preset.fps)
        return measured | {"text": "prompt" if "prompt" in text else "embeddings"}

    @contextmanager
    def _measuring(self) -> Iterator[tuple[Stopwatch, dict[str, Any]]]:
        measured: dict[str, Any] = {}
        peak, watch, started = Peak(self.device), Stopwatch(self.device), time.perf_counter()
        with watch.watching(self.parts):
            yield watch, measured
        measured |= watch.stages(time.perf_counter() - started) | {"peak_gb": peak.gb()}


@contextmanager
def every_frame_encoded() -> Iterator[None]:
    """The engine without `steady.py`: blank frames are encoded as if each were another one."""
    known, steady.steady_chunks = steady.steady_chunks, lambda _encoder: None
    try:
        yield
    finally:
        steady.steady_chunks = known


def make_room(device: torch.device) -> None:
    """Gives back what nobody holds on to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def race(
    subject: Subject,
    cases: Sequence[Case],
    terms: Terms,
    keep: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """Runs each case as often as `terms` say, after one short run, and returns the medians; or why there are none.

    In turn on a CPU, whose speed changes with its neighbours; one after the other on a GPU, so that its memory is as
    in production. After its first run a case may take half of the time that is left. `keep` is given what is known
    after each run, so that nothing is lost with what comes later.
    """
    device, whole = subject.device, subject.shape.preset
    rounds, budget = terms.rounds, terms.budget
    by_name = {case.name: case for case in cases}
    order = list(by_name) * rounds if device.type == "cpu" else [name for name in by_name for _ in range(rounds)]
    short = replace(whole, schedule=replace(whole.schedule, steps=1, sigmas=(1.0,)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in by_name}
    warm: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    formed, run = "", None

    def known() -> dict[str, dict[str, Any]]:
        return {
            name: {"warm_up": warm.get(name), "runs": runs[name]}
            | (middle(runs[name]) if runs[name] else {"failed": failed.get(name, "no time")})
            for name in by_name
        }

    for name in order:
        case = by_name[name]
        guess = terms.expect(case)
        measured = short if case.stage in {"encode", "decode"} else whole
        if name in failed:
            continue
        if name not in warm and not budget.allows(f"{name}, first run", guess.prepare_s + guess.first_s):
            failed[name] = "no time"
            continue
        try:
            started = time.perf_counter()
            if name != formed:
                run = None  # it holds on to models
                make_room(device)
                formed, run = name, subject.side(case)()
            if name not in warm:
                prepared_s = time.perf_counter() - started
                warm[name] = run(short) | {"prepared_s": prepared_s}
                runs[name] += [] if warms_up(case, cases) else [warm[name]]
                keep(known())
                if runs[name]:
                    continue
            expected_s = warm[name].get("total_s", warm[name]["latents_s"])
            expected_s += (measured.schedule.steps - 1) * warm[name]["denoise_s"]
            if budget.allows(f"{name}, run {len(runs[name]) + 1}", expected_s, share=0.5 if runs[name] else 1.0):
                runs[name].append(run(measured))
                took = runs[name][-1]
                print(f"{subject.shape.name}, {name}: {took.get('total_s', took['latents_s']):.3f} s", flush=True)
                keep(known())
        except Exception as error:  # noqa: BLE001 - the next part may work, and device time is dear
            failed[name], formed = f"{type(error).__name__}: {error}"[:300], ""
            print(f"failed: {name}: {failed[name]}", flush=True)
    return known()


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what is a number, step by step; of all else the last."""

    def of(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [of(list(each)) for each in zip(*values, strict=True)]
        return median(values) if isinstance(values[0], float) else values[-1]

    return {name: of([run[name] for run in runs]) for name in runs[0]}
