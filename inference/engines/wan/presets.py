"""The presets: one table of models and their parameters, without torch.

    preset        model      schedule                guidance  for
    a14b-fast     I2V-A14B   2 + 2 steps, two LoRAs  none      the default: distilled for photos, 80 GB GPU
    a14b-quality  I2V-A14B   40 steps                3.5       the authors' settings
    5b-fast       TI2V-5B    3 steps, distilled      none      seconds a clip; distilled for text, so look at yours
    5b-turbo      TI2V-5B    4 steps, distilled      none      distilled for photos; non-commercial licence
    5b-quality    TI2V-5B    50 steps                5.0       the authors' settings, 24 GB GPU
    tiny          5B-like    as 5b-fast              none      noise: every line that production runs, on any machine
    tiny-a14b     A14B-like  as a14b-fast            none      the same for two experts and their LoRAs

Sources, by the tags used below:

    [5b]    github.com/Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py and wan/textimage2video.py
    [a14b]  the same, wan/configs/wan_i2v_A14B.py and wan/image2video.py
    [neg]   the same, wan/configs/shared_config.py
    [lx2v]  github.com/ModelTC/Wan2.2-Lightning, wan/image2video.py: Euler, 4 steps at shift 5, no guidance
    [fast]  github.com/hao-ai-lab/FastVideo, DmdDenoisingStage: timesteps 1000, 757, 522, fresh noise after each. Its
            authors say of image-to-video that their distillation was not good at it (issue 738); others run it so
    [turbo] github.com/quanhaol/Wan2.2-TI2V-5B-Turbo, pipeline/wan22_fewstep_inference.py: fresh noise after each step.
            Whether its steps are shifted differs between its forks; shift 5 as in [lx2v] is not verified
    [perf]  derived from the architecture with a FLOP counter on meta tensors; see tests/bench/wan.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from inference.errors import InvalidRequest
from inference.task import GenerationRequest

Dtype = Literal["bf16", "fp32"]
ComponentName = Literal["tokenizer", "text_encoder", "vae", "transformer", "transformer_2"]

MIN_DURATION_S = 0.5
"""The shortest clip: three latent frames of the model with fewer frames a second."""

FRAME_STRIDE = 4
"""Frames in one latent frame, after the first, which stands alone: clips have 4k + 1 frames [5b] [a14b]."""

MAX_PROMPT_TOKENS = 512
"""`text_len` [5b] [a14b]; what is longer is cut."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` [neg]: gaudy, overexposed, static, blurred, subtitles, worst quality, extra fingers, …"""


@dataclass(frozen=True)
class Repository:
    """Where files come from, at one revision."""

    name: str  # owner/name on huggingface.co; for one that is built here, a plain name
    revision: str | None  # None: nobody has pinned one yet; the first fetch takes `main` and its lock file says which
    license: str
    commercial_use: bool = True
    built_here: bool = False

    @property
    def folder(self) -> str:
        """The name of its folder beside the others."""
        return self.name.replace("/", "--")


@dataclass(frozen=True)
class Component:
    """One model or tokenizer: a folder of a repository."""

    repository: Repository
    path: str
    dtype: Dtype = "fp32"  # that it computes in; norms and time embeddings stay fp32, as diffusers keeps them
    save_as_bf16: bool = False  # published larger than it is run: saved again when fetched


@dataclass(frozen=True)
class Lora:
    """A low-rank update that is added to the weights of one expert."""

    repository: Repository
    path: str  # of the file in its repository
    expert: Literal["transformer", "transformer_2"]
    scale: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How noise becomes latents."""

    solver: Literal["unipc", "euler", "dmd"]  # dmd: to the clean latents and back to the next noise level, each step
    steps: int
    shift: float  # of the sigmas towards noise: shift·s / (1 + (shift-1)·s)
    sigmas: tuple[float, ...] | None = None  # before the shift; None spreads `steps` as the solver does


@dataclass(frozen=True)
class Preset:
    """A model with everything it is run with."""

    name: str
    components: Mapping[ComponentName, Component]
    fps: int
    trained_frames: int  # longer clips drift in colour and repeat themselves
    max_frames: int  # ten seconds, the longest that the queues we serve hand out
    max_area_px: int  # width x height
    multiple_px: int  # of both sides: the VAE's stride times the patch of the transformer
    schedule: Schedule
    guidance: tuple[float, float]  # high and low noise (the authors' files have low first); 1 is none: half the work
    first_frame_is_clean: bool  # 5B: the photo is the first latent frame, at timestep 0. A14B: it is extra channels
    boundary: float | None = None  # the second expert takes over below this share of the noise
    loras: tuple[Lora, ...] = ()
    negative_prompt: str = NEGATIVE_PROMPT
    gpu_memory_gb: int = 0  # of the smallest GPU it is meant for, with what placement.py then moves off it
    working_gb: float = 0.0  # GPU memory beside the weights at max_area_px and trained_frames [perf]; not measured yet
    weight_of: Mapping[str, float] = field(default_factory=dict)  # stage → its length in forwards of the transformer
    label: str = ""  # put into the file where the output is no real video

    @property
    def distilled(self) -> bool:
        """Trained for these very sigmas, without guidance."""
        return self.schedule.sigmas is not None

    @property
    def built_here(self) -> bool:
        """Its weights are made, not fetched."""
        return all(repository.built_here for repository in self.repositories)

    @property
    def takes_last_photo(self) -> bool:
        """Whether a last frame can be given beside the first: only where frames are conditioned by channels."""
        return not self.first_frame_is_clean

    @property
    def stages(self) -> dict[str, float]:
        """What the engine reports, in order, with relative durations counted in forwards of the transformer."""
        denoise = sum(2 if scale > 1 else 1 for scale in self.guidance) / 2 * self.schedule.steps
        return {"encode": self.weight_of["encode"], "denoise": denoise, "decode": self.weight_of["decode"]}

    @property
    def repositories(self) -> tuple[Repository, ...]:
        """Every repository it takes files from, each once."""
        parts: list[Component | Lora] = [*self.components.values(), *self.loras]
        return tuple(dict.fromkeys(part.repository for part in parts))

    @property
    def pins(self) -> dict[str, str]:
        """Revision of each repository it takes files from: what its weights on disk depend on."""
        return {repository.name: repository.revision or "unpinned" for repository in self.repositories}

    def frames(self, duration_s: float) -> int:
        """The model's own frames for a duration: 4k + 1, nearest to it. Raises InvalidRequest.

        >>> PRESETS["5b-fast"].frames(5), PRESETS["a14b-fast"].frames(5)
        (121, 81)
        """
        longest_s = (self.max_frames - 1) / self.fps
        if not MIN_DURATION_S <= duration_s <= longest_s:
            raise InvalidRequest(
                f"duration_s is {duration_s:g}; preset {self.name} makes {MIN_DURATION_S:g} to {longest_s:g} s"
            )
        return round(duration_s * self.fps / FRAME_STRIDE) * FRAME_STRIDE + 1

    def refuse(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest for what this preset cannot do, naming the field. Touches no weights."""
        self.frames(request.duration_s)
        if request.max_area_px is not None and request.max_area_px > self.max_area_px:
            raise InvalidRequest(
                f"max_area_px is {request.max_area_px}; preset {self.name} makes at most {self.max_area_px}"
            )
        if self.distilled and request.steps not in {None, self.schedule.steps}:
            raise InvalidRequest(f"steps is {request.steps}; preset {self.name} is distilled for {self.schedule.steps}")
        if self.distilled and request.guidance is not None and request.guidance > 1:
            raise InvalidRequest(
                f"guidance is {request.guidance:g}; preset {self.name} is distilled to run without (at most 1)"
            )


_WAN_5B = Repository("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "b8fff7315c768468a5333511427288870b2e9635", "Apache-2.0")
_WAN_A14B = Repository("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "596658fd9ca6b7b71d5057529bbf319ecbc61d74", "Apache-2.0")
_LIGHTNING = Repository("lightx2v/Wan2.2-Lightning", "18bccf8884ec0a078eed79785eb4ef13ea16ce1e", "Apache-2.0")
_SEKO = "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1"
_FASTWAN = Repository(
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "3e187042a324f6f5fb68fd22110a78725253de8f", "Apache-2.0"
)
_TURBO = Repository(
    "yetter-ai/Wan2.2-TI2V-5B-Turbo-Diffusers",
    "15f1944bf867c08e18dcf0a79e41a6176e590edc",  # as one public model card pins it
    "CC BY-NC-SA 4.0",
    commercial_use=False,
)

_5B_QUALITY = Preset(
    name="5b-quality",
    components={
        "tokenizer": Component(_WAN_5B, "tokenizer"),
        "text_encoder": Component(_WAN_5B, "text_encoder", "bf16"),  # t5_dtype [5b]
        "vae": Component(_WAN_5B, "vae", "bf16"),  # to decode; it encodes in fp32 whatever stands here
        "transformer": Component(_WAN_5B, "transformer", "bf16", save_as_bf16=True),  # param_dtype [5b]
    },
    fps=24,  # sample_fps [5b]
    trained_frames=121,  # frame_num [5b]
    max_frames=241,
    max_area_px=1280 * 704,  # MAX_AREA_CONFIGS [5b]
    multiple_px=32,  # 16 of the VAE x 2 of the patch [5b]
    schedule=Schedule("unipc", steps=50, shift=5.0),  # sample_solver, sample_steps, sample_shift [5b]
    guidance=(5.0, 5.0),  # sample_guide_scale [5b]; one model, so both are the same
    first_frame_is_clean=True,
    gpu_memory_gb=24,
    working_gb=8.0,
    weight_of={"encode": 0.3, "decode": 3.9},  # decode 2,011 TFLOP of 521 a forward [perf]
)

_A14B_QUALITY = Preset(
    name="a14b-quality",
    components={
        "tokenizer": Component(_WAN_A14B, "tokenizer"),
        "text_encoder": Component(_WAN_A14B, "text_encoder", "bf16"),  # t5_dtype [a14b]
        "vae": Component(_WAN_A14B, "vae", "bf16"),
        "transformer": Component(_WAN_A14B, "transformer", "bf16", save_as_bf16=True),  # param_dtype [a14b]
        "transformer_2": Component(_WAN_A14B, "transformer_2", "bf16", save_as_bf16=True),
    },
    fps=16,  # sample_fps [a14b]
    trained_frames=81,  # frame_num [a14b]
    max_frames=161,
    max_area_px=1280 * 720,  # MAX_AREA_CONFIGS [a14b]
    multiple_px=16,  # 8 of the VAE x 2 of the patch [a14b]
    schedule=Schedule("unipc", steps=40, shift=5.0),  # sample_steps, sample_shift [a14b]
    guidance=(3.5, 3.5),  # sample_guide_scale [a14b]
    first_frame_is_clean=False,
    boundary=0.9,  # [a14b]
    gpu_memory_gb=80,
    working_gb=12.0,
    weight_of={"encode": 0.1, "decode": 0.1},  # 382 and 639 TFLOP of 6,523 a forward [perf]
)

_TINY = Repository("tiny", "1", "Apache-2.0", built_here=True)
_TINY_A14B = replace(_TINY, name="tiny-a14b")
_NOISE = "noise from a tiny random model: a test of the machinery, not a generation"

_ALL = (
    replace(
        _5B_QUALITY,
        name="5b-fast",
        components={**_5B_QUALITY.components, "transformer": Component(_FASTWAN, "transformer", "bf16")},
        schedule=Schedule("dmd", steps=3, shift=1.0, sigmas=(1.0, 0.757, 0.522)),  # [fast]
        guidance=(1.0, 1.0),
    ),
    replace(
        _5B_QUALITY,
        name="5b-turbo",
        components={**_5B_QUALITY.components, "transformer": Component(_TURBO, "transformer", "bf16")},
        schedule=Schedule("dmd", steps=4, shift=5.0, sigmas=(1.0, 0.75, 0.5, 0.25)),  # [turbo]
        guidance=(1.0, 1.0),
    ),
    _5B_QUALITY,
    replace(
        _A14B_QUALITY,
        name="a14b-fast",
        schedule=Schedule("euler", steps=4, shift=5.0, sigmas=(1.0, 0.75, 0.5, 0.25)),  # [lx2v]
        guidance=(1.0, 1.0),
        loras=(
            Lora(_LIGHTNING, f"{_SEKO}/high_noise_model.safetensors", "transformer"),
            Lora(_LIGHTNING, f"{_SEKO}/low_noise_model.safetensors", "transformer_2"),
        ),
    ),
    _A14B_QUALITY,
    replace(
        _5B_QUALITY,
        name="tiny",
        components={name: Component(_TINY, name) for name in _5B_QUALITY.components},
        schedule=Schedule("dmd", steps=3, shift=1.0, sigmas=(1.0, 0.757, 0.522)),
        guidance=(1.0, 1.0),
        max_area_px=160 * 96,  # its noise is no better for being larger
        gpu_memory_gb=0,
        working_gb=0.5,
        label=_NOISE,
    ),
    replace(
        _A14B_QUALITY,
        name="tiny-a14b",
        components={name: Component(_TINY_A14B, name) for name in _A14B_QUALITY.components},
        schedule=Schedule("euler", steps=4, shift=5.0, sigmas=(1.0, 0.75, 0.5, 0.25)),
        guidance=(1.0, 1.0),
        loras=(
            Lora(_TINY_A14B, "loras/high_noise_model.safetensors", "transformer"),
            Lora(_TINY_A14B, "loras/low_noise_model.safetensors", "transformer_2"),
        ),
        max_area_px=160 * 96,
        gpu_memory_gb=0,
        working_gb=0.5,
        label=_NOISE,
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _ALL}
"""Every preset by its name."""
