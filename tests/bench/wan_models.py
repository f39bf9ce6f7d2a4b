"""Wan models of their true sizes with random weights, which run as fast as trained ones, made where they will run.

The same modules stand in two forms, so that two of them need not fit: stock, as diffusers' example loads them, and
ours, as the engine runs them. `python -m tests.bench.wan` measures both.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from inference.engines.wan import lean, placement, weights
from inference.engines.wan.loading import (
    EXPERTS,
    ROOM_TO_BREATHE,
    Models,
    assemble,
    dtype_of,
    prepare_expert,
    prepare_vae,
)
from inference.engines.wan.placement import GB, Offload, Placed, Sizes, size_gb
from inference.engines.wan.presets import FRAME_STRIDE, MAX_PROMPT_TOKENS, PRESETS, Preset
from inference.engines.wan.schedule import make_scheduler
from inference.engines.wan.speed import Switches
from inference.engines.wan.text import PromptEncoder

TERA = 1e12

CONTRAST = 0.1
"""Of what the decoder makes. Plain noise is six times the work for x264 that a clip is: this much gives a clip of 5 s
in 1280x704 the 6 MB that one of a photo has."""


@dataclass(frozen=True)
class Shape:
    """A model and a clip."""

    name: str
    preset: Preset
    width: int  # pixels
    height: int  # pixels
    frames: int
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by component; empty: those of `tiny`
    forward_tflop: float | None = None  # of the true sizes: performance.md, and the counter of `floors`
    decode_tflop: float | None = None
    encode_tflop: float | None = None

    @property
    def experts(self) -> list[str]:
        """The names of its transformers."""
        return [name for name in EXPERTS if name in self.preset.components]

    @property
    def true_size(self) -> bool:
        """Whether there is a published model of this size."""
        return self.forward_tflop is not None

    def config(self, component: str, tiny_dir: Path) -> dict[str, Any]:
        """What its class is made with."""
        if self.configs:
            return dict(self.configs["transformer" if component == "transformer_2" else component])
        return json.loads((tiny_dir / self.preset.name / component / "config.json").read_text())

    def latents(self, stride: int, channels: int) -> tuple[int, int, int, int, int]:
        """Their shape, [1, z, T, h, w]."""
        return (1, channels, (self.frames - 1) // FRAME_STRIDE + 1, self.height // stride, self.width // stride)


_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_VAE_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_DIT_5B = {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30}
_DIT_A14B = {"num_attention_heads": 40, "in_channels": 36, "out_channels": 16, "ffn_dim": 13824, "num_layers": 40}
_5B = {"text_encoder": _UMT5_XXL, "vae": _VAE_5B, "transformer": _DIT_5B}
_A14B = {"text_encoder": _UMT5_XXL, "vae": {"base_dim": 96}, "transformer": _DIT_A14B}
_MID = {
    "text_encoder": _UMT5_XXL | {"vocab_size": 384, "d_model": 256, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    "vae": _VAE_5B | {"base_dim": 16, "decoder_base_dim": 32},
    "transformer": _DIT_5B | {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 6, "text_dim": 256},
}
_5B_4_STEPS = PRESETS["5b-turbo"]  # the targets are for four steps

SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", PRESETS["tiny"], 160, 96, 13),
        Shape("tiny-a14b", PRESETS["tiny-a14b"], 160, 96, 13),
        Shape("mid", replace(_5B_4_STEPS, name="mid", working_gb=1.0), 512, 384, 49, _MID),
        Shape("5b", _5B_4_STEPS, 1280, 704, 121, _5B, 520.7, 2011, 4.2),
        Shape("a14b-480p", PRESETS["a14b-fast"], 832, 480, 81, _A14B, 1678, 275.4, 163.7),
        Shape("a14b-720p", PRESETS["a14b-fast"], 1280, 720, 81, _A14B, 6523, 639, 382),
    )
}


def forward_flops(n: int, d: int, f: int, layers: int, text: int = MAX_PROMPT_TOKENS) -> int:
    """Of one forward, as in performance.md: n tokens of d channels, f of the FFN; embeddings and heads left out."""
    linear = 8 * n * d * d + 4 * n * d * d + 4 * text * d * d + 4 * n * d * f
    return layers * (linear + 4 * n * n * d + 4 * n * text * d)


@dataclass
class Parts:
    """The models of a shape. They are ours after `dress`, stock after `undress`."""

    shape: Shape
    device: torch.device
    tiny_dir: Path
    offload: Offload  # the least with which ours fits
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    experts: dict[str, WanTransformer3DModel]

    @classmethod
    def make(cls, shape: Shape, device: torch.device, tiny_dir: Path) -> "Parts":
        """Random models on `device`, seconds; those that do not fit go to host memory one by one."""
        offload = least_offload(shape, device, tiny_dir)
        if offload == Offload.BLOCKS:
            raise ValueError(f"{shape.name} is too large for this GPU")

        def made(name: str, stays_up_to: Offload) -> Any:
            model = _make(shape, name, tiny_dir, device)
            if offload > stays_up_to:
                Placed(name, model, device).send_home()
                torch.cuda.empty_cache()
            return model

        text_encoder, codec = made("text_encoder", Offload.NONE), made("vae", Offload.BLOCKS)
        experts = {name: made(name, Offload.TEXT) for name in shape.experts}
        return cls(shape, device, tiny_dir, offload, text_encoder, codec, experts)

    def dress(self, switches: Switches) -> Models:
        """As the engine takes them, prepared and put together by its own loading."""
        self.undress()
        preset = self.shape.preset
        offload = self.offload if switches.offload is None else switches.offload
        prepare_vae(self.vae, preset, switches)
        for model in self.experts.values():
            prepare_expert(model, preset, switches, self.device, offload)
        models = assemble(preset, self._tokenizer, self.text_encoder, self.vae, self.experts, self.device, switches)
        models.place(offload)
        return models

    def undress(self) -> None:
        """Back to what diffusers loads: its classes, its attention, the VAE in fp32.

        There is no way back from compile, fp8, offload and fused norms.
        """
        lean.as_loaded(self.vae)
        self.vae.to(torch.float32)
        for parameter in self.vae.parameters():
            # `contiguous` would leave 1x1 kernels with the strides of channels_last, for which convolutions then go.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        for model in self.experts.values():
            model.__class__ = WanTransformer3DModel
            for block in model.blocks:
                block.__class__ = WanTransformerBlock
            model.set_attention_backend("native")

    def pipeline(self, preset: Preset) -> WanImageToVideoPipeline:
        """The stock pipeline over these models with the schedule of `preset`.

        Without the text encoder where that does not fit beside the rest: then it is to be given embeddings.
        """
        scheduler = make_scheduler(preset.schedule)
        spread = scheduler.set_timesteps  # the pipeline can only say how many steps; this says which
        sigmas = np.asarray(preset.schedule.sigmas)
        scheduler.set_timesteps = lambda _steps, device=None: spread(sigmas=sigmas, device=device)
        pipeline = WanImageToVideoPipeline(
            tokenizer=AutoTokenizer.from_pretrained(self._tokenizer, local_files_only=True),
            text_encoder=self.text_encoder if self.offload < Offload.TEXT else None,
            vae=self.vae,
            scheduler=scheduler,
            **self.experts,
            boundary_ratio=preset.boundary,
            expand_timesteps=preset.first_frame_is_clean,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def embed(self, prompt: str) -> torch.Tensor:
        """[1, 512, d]: for a pipeline without a text encoder."""
        visitor = Placed("text_encoder", self.text_encoder, self.device)
        visitor.send_home()
        dtype = dtype_of(self.shape.preset, "transformer")
        with torch.inference_mode():
            return PromptEncoder(self._tokenizer, visitor).encode(prompt, device=self.device, dtype=dtype)

    def size_gb(self) -> float:
        """Of all models, the VAE in fp32."""
        self.undress()
        return sum(map(size_gb, (self.text_encoder, self.vae, *self.experts.values())))

    def save(self, weights_dir: Path) -> None:
        """Puts them where the preset looks for its weights, with the lock files of a fetch."""
        self.undress()
        preset = self.shape.preset
        modules = {"text_encoder": self.text_encoder, "vae": self.vae, **self.experts}
        for name, component in preset.components.items():
            folder = weights.folder_of(weights_dir, component.repository) / component.path
            if name == "tokenizer":
                shutil.copytree(self._tokenizer, folder)
            else:
                modules[name].save_pretrained(folder, max_shard_size="5GB")
        for repository in preset.repositories:
            folder = weights.folder_of(weights_dir, repository)
            files = {}
            for path in filter(Path.is_file, folder.rglob("*")):
                size, digest = path.stat().st_size, "0" * 64
                files[path.relative_to(folder).as_posix()] = weights.Entry(
                    published_digest=digest, published_bytes=size, sha256=digest, size_bytes=size
                )
            weights.Lock(repository=repository.name, revision=repository.revision, files=files).save(folder)

    @property
    def _tokenizer(self) -> Path:
        return self.tiny_dir / "tiny" / "tokenizer"


def least_offload(shape: Shape, device: torch.device, tiny_dir: Path) -> Offload:
    """The least with which ours fits into what is free of a GPU's memory."""
    if device.type != "cuda":
        return Offload.NONE
    return placement.choose(_sizes(shape, tiny_dir), torch.cuda.mem_get_info(device)[0] / GB * ROOM_TO_BREATHE)


def by_formula(model: WanTransformer3DModel, latents: Sequence[int]) -> tuple[int, float]:
    """Tokens that `latents` [1, z, T, h, w] make, and TFLOP of one forward over them."""
    config = model.config
    count = math.prod(latents[2:]) // math.prod(config.patch_size)
    d = config.num_attention_heads * config.attention_head_dim
    return count, forward_flops(count, d, config.ffn_dim, config.num_layers) / TERA


def _make(shape: Shape, name: str, tiny_dir: Path, device: torch.device) -> Any:
    """A component with weights as its class draws them, in the dtypes that loading leaves it in."""
    config = shape.config(name, tiny_dir)
    torch.set_default_dtype(torch.float32 if name == "vae" else dtype_of(shape.preset, name))
    try:
        with device:
            if name == "text_encoder":
                model = UMT5EncoderModel(UMT5Config(**config))
            else:
                model = (AutoencoderKLWan if name == "vae" else WanTransformer3DModel).from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if name in shape.experts:
        kept = set(model._keep_in_fp32_modules)
        for path, parameter in model.named_parameters():
            if not kept.isdisjoint(path.split(".")):
                parameter.data = parameter.data.float()
    elif name == "vae":
        for parameter in model.decoder.conv_out.parameters():
            parameter.data *= CONTRAST
    return model.requires_grad_(False).eval()


def _sizes(shape: Shape, tiny_dir: Path) -> Sizes:
    text_encoder, codec, expert = (
        _make(shape, name, tiny_dir, torch.device("meta")) for name in ("text_encoder", "vae", "transformer")
    )
    experts = (size_gb(expert),) * len(shape.experts)
    working_gb = shape.preset.working_gb * shape.width * shape.height / shape.preset.max_area_px
    return Sizes(size_gb(text_encoder), experts, size_gb(codec), working_gb, size_gb(expert.blocks[0]))
