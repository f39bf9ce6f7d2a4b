"""The Wan engine: one photo and a prompt into one clip, on one GPU, again and again.

    encode   prompt → text embeddings (remembered), photo → latents
    denoise  noise → latents, one report a step
    decode   latents → frames → ffmpeg, chunk by chunk: the encoder works on one while the next is decoded

However a generation ends, the engine is usable afterwards: nothing of a request is kept on a model, and the tensors
that an error refers to are released before it is raised.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import structlog
import torch

from inference.engines.base import Job, photo_of, run_in_thread
from inference.engines.wan import compiler, tokens, vae, warming
from inference.engines.wan.compiled import Found
from inference.engines.wan.faults import MAX_REASON_CHARS, OutOfRoom, gpu_is_lost, mapped
from inference.engines.wan.frames import stream
from inference.engines.wan.loading import Models, load
from inference.engines.wan.placement import GB, Offload
from inference.engines.wan.presets import FRAME_STRIDE, Preset
from inference.engines.wan.schedule import Guide, denoise, make_scheduler
from inference.engines.wan.speed import Switches
from inference.engines.wan.yuv import to_yuv420p
from inference.errors import (
    EngineFailed,
    EngineLost,
    I2VError,
    InvalidRequest,
    MachineFault,
    SettingsError,
    one_line,
)
from inference.media import photo as photos
from inference.media.video import VideoWriter
from inference.task import LAST_PHOTO, PHOTO, GenerationRequest, Video

STOP_GRACE_S = 120.0
"""Longer than any forward, which cannot be interrupted. A14B at 720p takes 8 to 19 s (6,523 TFLOP at
790 to 344 TFLOP/s), ten seconds of it up to four times as long."""

WAY_OUT = "`i2v weights compile` once, or I2V_WAN_COMPILE=on at every start"

TORCH_ADVICE = "\n\nSet TORCHDYNAMO_VERBOSE"
"""Where advice for developers of torch begins in its errors."""

MAX_SEED = 2**32
"""Random seeds are short enough for people to type; given seeds may have up to 63 bits."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ClipPlan:
    """A request in the model's own terms."""

    width: int  # pixels
    height: int  # pixels
    frames: int
    seed: int
    steps: int
    guidance: tuple[float, float]
    negative_prompt: str | None  # None without guidance


class WanEngine:
    """Wan2.2 with one preset. One generation at a time; `generate` may be called from any event loop."""

    name = "wan"

    def __init__(self, preset: Preset, models: Models, *, area_px: int | None = None) -> None:
        self.preset = preset
        self.stages: Mapping[str, float] = preset.stages
        self.compiled = False  # the transformer's blocks, and nothing else will be from now on
        self.eager_because = ""  # where they should have been compiled
        self._models = models
        self._area_px = area_px or preset.max_area_px

    @classmethod
    def load(
        cls,
        preset: Preset,
        weights_dir: Path,
        *,
        device: torch.device | None = None,
        switches: Switches | None = None,
        area_px: int | None = None,
        compiled_dir: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Self:
        """Loads the weights of `preset`: seconds to minutes, on CUDA where there is one.

        `area_px` is width x height of clips whose request does not say, the preset's own if None; `compiled_dir` is
        where compiled code is kept, `compiled` beside the weights if None. Where code cannot be compiled, the engine
        runs without, and a line in the log says why. `check` is called between components, and what it raises ends
        the loading. Raises WeightsError; EngineLost where the GPU is unusable or too small; SettingsError for a
        switch that cannot be.
        """
        if area_px is not None and area_px > preset.max_area_px:
            raise SettingsError(
                f"I2V_WAN_AREA: it is {area_px} pixels; preset {preset.name} makes at most {preset.max_area_px}"
            )
        started = time.perf_counter()
        try:
            engine = cls._load(
                preset,
                weights_dir,
                device=device or default_device(),
                switches=switches or Switches(),
                area_px=area_px,
                compiled_dir=compiled_dir or weights_dir / "compiled",
                check=check,
            )
        except I2VError:
            raise
        except torch.OutOfMemoryError:
            needed = f"which is made for {preset.gpu_memory_gb} GB"
            raise EngineLost(f"the GPU has no room for preset {preset.name}, {needed}") from None
        except Exception as error:
            said = one_line(f"{type(error).__name__}: {error}", MAX_REASON_CHARS)
            raise EngineLost(f"preset {preset.name} cannot run here: {said}") from error
        log.info(
            "engine_ready",
            preset=preset.name,
            compiled=engine.compiled,
            seconds=round(time.perf_counter() - started, 2),
        )
        return engine

    @classmethod
    def _load(
        cls,
        preset: Preset,
        weights_dir: Path,
        *,
        device: torch.device,
        switches: Switches,
        area_px: int | None,
        compiled_dir: Path,
        check: Callable[[], None],
    ) -> Self:
        """Loads; where `switches` say so, compiles, or takes what was compiled from `compiled_dir`."""
        facts, known = {}, Found(None)
        if switches.compile is not None:
            facts = compiler.facts_of(preset, device, switches, area_px)
            known = compiler.take(compiled_dir, preset, facts)
            if known.artifacts is None and switches.only_compiled_ahead:
                switches = replace(switches, compile=None)
            elif known.artifacts is None:
                log.info("will_compile", why=known.why, takes="minutes")
        engine = cls(preset, load(preset, weights_dir, device, switches, check, area_px), area_px=area_px)
        if switches.compile is not None:
            new = engine._compile(check, only_ahead=switches.only_compiled_ahead)
            if new is not None and new != known.artifacts:
                compiler.keep(compiled_dir, preset, facts, new)
        elif known.why:
            engine._run_eagerly(known.why, surprising=known.surprising, way_out=WAY_OUT)
        return engine

    def _compile(self, check: Callable[[], None], *, only_ahead: bool) -> bytes | None:
        """Warms up what was prepared to be compiled; what the compiler saved, if it may take more than is there.

        After an error the blocks run eagerly; if memory was short, the clips' own way out of that is left. Raises
        EngineLost where the GPU is lost, and what `check` raises.
        """
        if self._models.offload == Offload.BLOCKS:
            self._run_eagerly("blocks that come and go cannot be compiled")
            return None
        try:
            with compiler.nothing_new_compiled() if only_ahead else nullcontext():
                warming.warm_up(self._models, self.preset, self._area_px, check)
        except I2VError:
            raise
        except Exception as error:
            said = one_line(f"{type(error).__name__}: {error}".partition(TORCH_ADVICE)[0], MAX_REASON_CHARS)
            if gpu_is_lost(error):
                raise EngineLost(f"the GPU does not work any more: {said}") from error
            if only_ahead:
                why = f"what was compiled ahead does not run here: {said}"
                self._run_eagerly(why, surprising=True, way_out=WAY_OUT)
            else:
                self._run_eagerly(f"compiling failed: {said}", surprising=True)
            return None
        self.compiled = True
        saved = None if only_ahead else torch.compiler.save_cache_artifacts()
        return None if saved is None else saved[0]

    def _run_eagerly(self, why: str, *, surprising: bool = False, **told: str) -> None:
        """Leaves the blocks as they are without a compiler. Says so in one line, louder where it was not expected."""
        for expert in self._models.experts:
            expert.run_eagerly()
        self.eager_because = why
        (log.warning if surprising else log.info)("runs_eagerly", why=why, **told)

    def _wait(self) -> None:
        """Waits until the GPU has finished all work that was queued on it."""
        if self._models.device.type == "cuda":
            torch.cuda.synchronize(self._models.device)

    async def check(self) -> None:
        """As Engine.check: nothing outside of this process is needed."""

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """Makes `wan.mp4` in `folder`.

        Raises InvalidRequest, InvalidPhoto, EncodeFailed, MachineFault; EngineFailed, after one try with more offload
        where the GPU ran out of memory; EngineLost when the GPU does not answer any more.
        """
        photo_of(request, inputs, self.name)
        self.preset.refuse(request)
        return await run_in_thread(
            job, lambda: self._generate(request, inputs, folder / "wan.mp4", job), stop_grace_s=STOP_GRACE_S
        )

    def _generate(self, request: GenerationRequest, inputs: Mapping[str, Path], path: Path, job: Job) -> Video:
        plan = self._plan(request, inputs)
        started = time.perf_counter()
        with _peak_memory(self._models.device) as peak:
            try:
                video = self._attempt(request, plan, inputs, path, job)
            except OutOfRoom as error:
                if not self._offload_more(str(error)):
                    raise self._too_large(error, plan) from None
                try:
                    video = self._attempt(request, plan, inputs, path, job)
                except OutOfRoom as again:
                    raise self._too_large(again, plan) from None
        log.info(
            "generated",
            preset=self.preset.name,
            seed=plan.seed,
            size=f"{plan.width}x{plan.height}",
            frames=plan.frames,
            steps=plan.steps,
            seconds=round(time.perf_counter() - started, 2),
            **peak,
        )
        return video

    def _offload_more(self, why: str) -> bool:
        """Moves to the next level of offload; False if there is none. Raises MachineFault, EngineLost."""
        try:
            more = self._models.offload_more()
        except Exception as error:  # noqa: BLE001 - as in `_attempt`
            raised = mapped(error)
            if isinstance(raised, EngineLost):
                raise raised from None
            raise MachineFault(f"{why}, and this machine has no memory left to offload to") from None
        log.warning("out_of_memory", error=why, offload=self._models.offload.name.lower(), retried=more)
        return more

    def _too_large(self, error: Exception, plan: ClipPlan) -> EngineFailed:
        return EngineFailed(
            f"{error} at {plan.width}x{plan.height}, {plan.frames} frames, offload "
            f"{self._models.offload.name.lower()}; a smaller I2V_WAN_AREA may fit"
        )

    def _attempt(
        self, request: GenerationRequest, plan: ClipPlan, inputs: Mapping[str, Path], path: Path, job: Job
    ) -> Video:
        """Raises OutOfRoom and errors of our tree, after which the GPU holds the weights and nothing else."""
        try:
            with torch.inference_mode():
                return self._stages(request, plan, inputs, path, job)
        except Exception as error:  # noqa: BLE001 - whatever a model or a driver comes up with
            raised = mapped(error)
        if self._models.device.type == "cuda":
            with suppress(RuntimeError):  # a lost GPU cannot free memory either
                torch.cuda.empty_cache()
        raise raised

    def _stages(
        self, request: GenerationRequest, plan: ClipPlan, inputs: Mapping[str, Path], path: Path, job: Job
    ) -> Video:
        job.report("encode")
        generator = torch.Generator().manual_seed(plan.seed)  # on the CPU: the same noise on every GPU
        with ThreadPoolExecutor(2, "beside") as beside:
            drawing = beside.submit(self._noise, plan, generator)
            # With offload the text encoder has to leave before the photo needs room, which is only there for who works
            # in the same stream.
            reading = None
            if self._models.offload == Offload.NONE:
                reading = beside.submit(self._read_beside, request, plan)
            else:
                self._read(request, plan)
            job.raise_if_cancelled()
            condition = self._condition(inputs, plan, job)
            if reading is not None:
                reading.result()
            noise = drawing.result().to(self._models.device)
        guide = self._guide(request, plan)
        job.report("encode", 1)
        latents = self._denoise(plan, guide, condition, noise, generator=generator, job=job)
        return self._decode(plan, latents, path, job)

    def _read(self, request: GenerationRequest, plan: ClipPlan) -> None:
        """Has the prompts encoded, into host memory."""
        for prompt in (request.prompt, plan.negative_prompt):
            if prompt is not None:
                self._models.prompts.read(prompt)

    def _read_beside(self, request: GenerationRequest, plan: ClipPlan) -> None:
        """The same in another thread, and on a GPU in another stream."""
        stream = nullcontext() if self._beside is None else torch.cuda.stream(self._beside)
        with torch.inference_mode(), stream:  # both are of a thread
            self._read(request, plan)

    @cached_property
    def _beside(self) -> torch.cuda.Stream | None:
        """One for all clips, since torch keeps memory for each stream that ever used it; None without CUDA."""
        device = self._models.device
        return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _noise(self, plan: ClipPlan, generator: torch.Generator) -> torch.Tensor:
        """[1, z, T, h, w], fp32, in host memory."""
        size = self._models.latent_size(plan.width, plan.height, plan.frames)
        return torch.randn((1, self._models.vae.config.z_dim, *size), generator=generator)

    def _plan(self, request: GenerationRequest, inputs: Mapping[str, Path]) -> ClipPlan:
        """Raises InvalidRequest, InvalidPhoto."""
        preset = self.preset
        info = photos.measure(inputs[PHOTO])
        area_px = request.max_area_px or self._area_px
        try:
            width, height = photos.fit(info.width, info.height, max_area_px=area_px, multiple=preset.multiple_px)
        except ValueError as error:
            raise InvalidRequest(f"max_area_px is {area_px}: {error}") from None
        guidance = preset.guidance if request.guidance is None else (request.guidance, request.guidance)
        guided = max(guidance) > 1
        if request.negative_prompt is not None and not guided:
            log.warning("ignored", field="negative_prompt", because=f"preset {preset.name} runs without guidance")
        if LAST_PHOTO in inputs and not preset.takes_last_photo:
            log.warning("ignored", field="last_photo", because=f"preset {preset.name} starts from one photo")
        frames = preset.frames(request.duration_s)
        if frames > preset.trained_frames:
            log.warning("long_clip", frames=frames, trained_frames=preset.trained_frames, expect="drifting colours")
        return ClipPlan(
            width=width,
            height=height,
            frames=frames,
            seed=secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
            steps=request.steps or preset.schedule.steps,
            guidance=guidance,
            negative_prompt=(preset.negative_prompt if request.negative_prompt is None else request.negative_prompt)
            if guided
            else None,
        )

    def _guide(self, request: GenerationRequest, plan: ClipPlan) -> Guide:
        models = self._models

        def encode(prompt: str) -> torch.Tensor:
            return models.prompts.encode(prompt, device=models.device, dtype=models.dtype)

        negative = None if plan.negative_prompt is None else encode(plan.negative_prompt)
        return Guide(encode(request.prompt), negative, plan.guidance)

    def _condition(self, inputs: Mapping[str, Path], plan: ClipPlan, job: Job) -> torch.Tensor:
        """The photo, and the last one, as conditioning input of the transformer, fp32, with z the channels of a latent.

        5B: [1, z, 1, h, w], the first latent frame. A14B: [1, 4 + z, T, h, w], for each latent frame which of its
        four frames are given, and the latents of a clip that is blank but for them.
        """
        models, preset = self._models, self.preset

        def pixels(path: Path) -> torch.Tensor:
            picture = torch.from_numpy(photos.load(path, (plan.width, plan.height)))
            return vae.to_pixels(picture.to(models.device))

        first = pixels(inputs[PHOTO])
        if preset.first_frame_is_clean:
            return vae.encode(models.vae, first, None, 1)
        last = pixels(inputs[LAST_PHOTO]) if LAST_PHOTO in inputs else None
        latents = vae.encode(models.vae, first, last, plan.frames, job.raise_if_cancelled)
        given = torch.zeros_like(latents[:, :FRAME_STRIDE])
        given[:, :, 0] = 1
        if last is not None:
            given[:, -1, -1] = 1
        return torch.cat([given, latents], dim=1)

    def _denoise(
        self,
        plan: ClipPlan,
        guide: Guide,
        condition: torch.Tensor,
        noise: torch.Tensor,
        *,
        generator: torch.Generator,
        job: Job,
    ) -> torch.Tensor:
        """Clean latents [1, z, T, h, w], fp32, from noise of that shape; `generator` has drawn it."""
        models, preset = self._models, self.preset
        scheduler = make_scheduler(preset.schedule, plan.steps)

        with ExitStack() as visit:
            here: dict[int, Any] = {}  # the expert in use: it stays from step to step

            def forward(expert: int, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                job.raise_if_cancelled()
                if expert not in here:
                    here.clear()
                    visit.close()
                    here[expert] = visit.enter_context(models.experts[expert].on_device())
                if preset.first_frame_is_clean:
                    shown = torch.cat([condition, latents[:, :, 1:]], dim=2)
                else:
                    shown = torch.cat([latents, condition], dim=1)
                timestep, shown = timestep.to(models.device), shown.to(models.dtype)
                # A clip that nobody foresaw would wait minutes for the compiler.
                with torch.compiler.set_stance("eager_on_recompile") if self.compiled else nullcontext():
                    return tokens.velocity(here[expert], shown, timestep, text, clean=preset.first_frame_is_clean)

            def on_step(done: int) -> None:
                self._wait()  # so that the step has really ended when it is reported, and a cancel takes effect now
                job.report("denoise", done, plan.steps)
                job.raise_if_cancelled()

            job.report("denoise", 0, plan.steps)
            latents = denoise(preset, scheduler, noise, guide, forward, generator=generator, on_step=on_step)
        if preset.first_frame_is_clean:
            latents = torch.cat([condition, latents[:, :, 1:]], dim=2)
        return latents

    def _decode(self, plan: ClipPlan, latents: torch.Tensor, path: Path, job: Job) -> Video:
        metadata = {"comment": f"{self.preset.label or 'Wan2.2'}, preset {self.preset.name}, seed {plan.seed}"}

        def report(written: int) -> None:
            job.report("decode", written, plan.frames)

        report(0)
        chunks = vae.decode(self._models.vae, latents)
        pixels: Literal["rgb24", "yuv420p"] = "rgb24"
        if self._models.yuv_on_device:
            chunks, pixels = map(to_yuv420p, chunks), "yuv420p"
        writer = VideoWriter(
            path, width=plan.width, height=plan.height, fps=self.preset.fps, pixels=pixels, metadata=metadata
        )
        stream(chunks, writer, job.raise_if_cancelled, report)
        return writer.video(seed=plan.seed)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """On CUDA, gets the block's `peak_gpu_gb` when it ends."""
    peak: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(device) / GB, 2)


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
