"""Loads models from a folder and makes them ready to run.

The order of the steps matters: load in the dtype they run in → fuse LoRAs → 8 bits → attention → place → compile.
Nothing is fetched: the error for a missing file names the command that fetches it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import structlog
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers import UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from inference.engines.wan import lean, placement, speed, tokens, weights
from inference.engines.wan.lora import fuse
from inference.engines.wan.placement import GB, Offload, Placed, Sizes, size_gb
from inference.engines.wan.presets import FRAME_STRIDE, ComponentName, Dtype, Preset
from inference.engines.wan.speed import Switches
from inference.engines.wan.text import PromptEncoder
from inference.errors import I2VError, WeightsError, one_line

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

EXPERTS: tuple[ComponentName, ...] = ("transformer", "transformer_2")
LAYERS = 30  # of the 5B; the A14B's 40 make smaller shares of larger files

ROOM_TO_BREATHE = 0.95
"""The share of the free GPU memory that can be used: the allocator's blocks never fit exactly."""

MAX_REASON_CHARS = 300

log = structlog.get_logger(__name__)


@dataclass
class Models:
    """What a preset needs, loaded."""

    prompts: PromptEncoder
    text_encoder: Placed
    vae: AutoencoderKLWan
    experts: tuple[Placed, ...]  # one, or that for high noise and that for low noise
    dtype: torch.dtype  # of the experts' inputs
    device: torch.device
    offload: Offload
    yuv_on_device: bool  # frames become YUV where they are decoded

    def latent_size(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """(T, h, w) of the latents of a clip of that many pixels and frames."""
        stride = self.vae.config.scale_factor_spatial
        return (frames - 1) // FRAME_STRIDE + 1, height // stride, width // stride

    def offload_more(self) -> bool:
        """Moves to the next level of offload; False if there is none."""
        if self.offload == Offload.BLOCKS:
            return False
        level = Offload(self.offload + 1)
        if level == Offload.MODELS and len(self.experts) == 1:
            level = Offload.BLOCKS  # a single transformer needs the same room whether it visits or stays
        self.place(level)
        return True

    def place(self, offload: Offload) -> None:
        """Moves models off the device for a level of offload. It cannot be undone."""
        if offload >= Offload.TEXT:
            self.text_encoder.send_home()
        for expert in self.experts:
            if offload == Offload.MODELS:
                expert.send_home()
            elif offload == Offload.BLOCKS:
                expert.stream_blocks()
        self.offload = offload


def load(
    preset: Preset,
    weights_dir: Path,
    device: torch.device,
    switches: Switches,
    check: Callable[[], None] = lambda: None,
    area_px: int | None = None,
) -> Models:
    """Loads `preset` from `weights_dir`. Takes seconds to minutes; each component's time is logged.

    `check` is called before each component; `area_px` is width x height of the largest clip. Raises WeightsError,
    SettingsError, and torch's OutOfMemoryError.
    """
    weights.require(preset, weights_dir)
    quiet_libraries()
    with _offline():
        return _load(preset, weights_dir, device, switches, check, area_px or preset.max_area_px)


def _load(
    preset: Preset,
    weights_dir: Path,
    device: torch.device,
    switches: Switches,
    check: Callable[[], None],
    area_px: int,
) -> Models:
    folders = {
        name: weights.folder_of(weights_dir, part.repository) / part.path for name, part in preset.components.items()
    }
    # Measured before anything is loaded. Weights are loaded straight to their final place.
    free_gb = torch.cuda.mem_get_info(device)[0] / GB * ROOM_TO_BREATHE if device.type == "cuda" else float("inf")
    host = torch.device("cpu")

    def read(name: ComponentName, kind: Any, dtype: torch.dtype, where: torch.device) -> Any:
        check()
        with _loading(name):
            model = _read(kind, folders[name], where, dtype)
            for lora in preset.loras:
                if lora.expert == name:
                    fuse(model, weights.folder_of(weights_dir, lora.repository) / lora.path, lora.scale)
        return model

    vae = read("vae", AutoencoderKLWan, torch.float32, device)
    prepare_vae(vae, preset, switches)
    sizes = _sizes(preset, folders, vae_gb=size_gb(vae), fp8=switches.fp8, area_px=area_px)
    offload = placement.choose(sizes, free_gb) if switches.offload is None else switches.offload
    log.info(
        "placement",
        preset=preset.name,
        device=str(device),
        offload=offload.name.lower(),
        peak_gb=round(sizes.peak(offload), 1),
        **({"free_gb": round(free_gb, 1)} if device.type == "cuda" else {}),
    )
    where = host if offload >= Offload.TEXT else device
    text_encoder = read("text_encoder", UMT5EncoderModel, dtype_of(preset, "text_encoder"), where)
    where = host if offload >= Offload.MODELS else device
    experts: dict[str, WanTransformer3DModel] = {}
    for name in EXPERTS:
        if name in folders:
            experts[name] = read(name, WanTransformer3DModel, dtype_of(preset, name), where)
            prepare_expert(experts[name], preset, switches, device, offload)
    models = assemble(preset, folders["tokenizer"], text_encoder, vae, experts, device, switches)
    models.place(offload)
    return models


def prepare_vae(vae: AutoencoderKLWan, preset: Preset, switches: Switches) -> None:
    """Applies the switches to a VAE that was read in fp32; it still encodes in fp32."""
    for part in (vae.decoder, vae.post_quant_conv):
        part.to(dtype_of(preset, "vae"))
    if switches.plain_upsampling:
        lean.plain_upsampling(vae)
    if switches.zeros_in_convolutions:
        lean.zeros_in_convolutions(vae)
    if switches.fewer_copies:
        lean.fewer_copies(vae)
    if switches.fused_norms is not None:
        lean.fuse_norms(vae, switches.fused_norms)
    if switches.channels_last:
        speed.channels_last(vae)


def prepare_expert(
    model: WanTransformer3DModel, preset: Preset, switches: Switches, device: torch.device, offload: Offload
) -> None:
    """Applies the switches to a transformer: 8 bits → attention → compile. Raises SettingsError."""
    if switches.shared_timesteps and preset.first_frame_is_clean:
        tokens.share_timesteps(model)
    if switches.fp8:
        speed.to_fp8(model, multiply=speed.multiplies_in_fp8(device))
    attention = speed.choose_attention(switches.attention, device, dtype_of(preset, "transformer"))
    speed.set_attention(model, attention)
    if switches.compile is not None and offload < Offload.BLOCKS:  # moving blocks cannot be compiled
        speed.compile_blocks(model, switches.compile)
    log.info("prepared", attention=attention, fp8=switches.fp8, compile=switches.compile)


def assemble(
    preset: Preset,
    tokenizer_folder: Path,
    text_encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    experts: dict[str, WanTransformer3DModel],
    device: torch.device,
    switches: Switches,
) -> Models:
    """Models that are read and prepared, as an engine takes them. Raises WeightsError for the tokenizer."""
    placed = Placed("text_encoder", text_encoder, device)
    return Models(
        prompts=PromptEncoder(tokenizer_folder, placed),
        text_encoder=placed,
        vae=vae,
        experts=tuple(Placed(name, model, device) for name, model in experts.items()),
        dtype=dtype_of(preset, "transformer"),
        device=device,
        offload=Offload.NONE,
        yuv_on_device=device.type != "cpu" if switches.yuv_on_device is None else switches.yuv_on_device,
    )


def dtype_of(preset: Preset, name: ComponentName) -> torch.dtype:
    """What a component of a preset computes in."""
    return DTYPES[preset.components[name].dtype]


def quiet_libraries() -> None:
    """Turns off progress bars and warnings: a tensor without weights, which they warn of, is an error here."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


@contextmanager
def _offline() -> Iterator[None]:
    """Sets HF_HUB_OFFLINE for the length of a block, so that neither weights nor kernels are fetched."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _read(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model from local files, straight to `device`. Raises WeightsError where tensors are missing or unknown."""
    model, info = kind.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, local_files_only=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(info[problem])
            raise WeightsError(one_line(f"{folder} does not fit its config: {problem} {names}", MAX_REASON_CHARS))
    return model.requires_grad_(False).eval()


def _sizes(preset: Preset, folders: dict[ComponentName, Path], *, vae_gb: float, fp8: bool, area_px: int) -> Sizes:
    """The sizes of the models, from their files, before the large ones are loaded."""

    def gb(name: ComponentName) -> float:
        return sum(file.stat().st_size for file in folders[name].glob("*.safetensors")) / GB

    working_gb = preset.working_gb * area_px / preset.max_area_px
    transformers = tuple(gb(name) / (2 if fp8 else 1) for name in EXPERTS if name in folders)
    return Sizes(gb("text_encoder"), transformers, vae_gb, working_gb, max(transformers) / LAYERS)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Logs how long a component took. Maps exceptions that damaged files cause in libraries."""
    started = time.perf_counter()
    try:
        yield
    except (I2VError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not the fault of the weights
    except Exception as error:
        why = "its files lack tensors that its config asks for" if "meta tensor" in str(error) else str(error)
        raise WeightsError(one_line(f"{name} cannot be loaded: {why}", MAX_REASON_CHARS)) from error
    log.info("loaded", component=name, seconds=round(time.perf_counter() - started, 2))
