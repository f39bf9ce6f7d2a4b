"""Optimisations for speed or memory that do not change the picture, each with its own switch.

`python -m tests.bench.wan` measures each; tests/bench/LOG.md has what it found, so far on a CPU only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import is_flash_attn_3_available
from torch import nn
from torch.nn.functional import ScalingType

from inference.engines.wan.placement import Offload
from inference.errors import SettingsError

HOPPER = (9, 0)
"""CUDA capability of H100 and H200, for which flash-attention 3 is written."""

ADA = (8, 9)
"""The first CUDA capability with products of 8-bit floats."""

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Switches:
    """How a preset is run."""

    attention: str = "auto"  # one of diffusers' attention backends; auto takes the fastest that is installed
    compile: str | None = None  # the torch.compile backend for the transformer's blocks: inductor
    only_compiled_ahead: bool = False  # take what a build compiled for this machine, and compile nothing here
    shared_timesteps: bool = True  # 5B: modulation once for the photo and once for the rest, not once a token
    plain_upsampling: bool = True  # VAE: copy pixels as they are, not through fp32 and back
    zeros_in_convolutions: bool = True  # VAE: no padded copies
    fewer_copies: bool = True  # VAE: no copies of what is only read
    fused_norms: str | None = None  # VAE: norm and activation in one pass, the torch.compile backend; to tolerance
    yuv_on_device: bool | None = None  # frames become YUV before they are copied; None: where that is off the CPU
    channels_last: bool = False  # VAE: memory layout of the decoder
    fp8: bool = (
        False  # transformers' linear layers in 8 bits: half the memory, and fast where the hardware is made for it
    )
    offload: Offload | None = None  # None: chosen from the memory that is there


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of an attention backend: `wanted`, or for `auto` the one that others found fastest of those installed.

    flash-attention 3 and cuDNN's are for 16 bits on Hopper; torch's own choice is for everything else.
    """
    if wanted != "auto":
        return wanted
    if dtype == torch.float32 or device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return "native"
    return "_flash_3" if is_flash_attn_3_available() else "_native_cudnn"


def set_attention(model: WanTransformer3DModel, backend: str) -> None:
    """Raises SettingsError for a backend that is unknown or not installed."""
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(f"I2V_WAN_ATTENTION: {error}") from None


class Float8Linear(nn.Module):
    """A linear layer whose weights are kept in 8 bits, with a scale for each row of them: half the memory.

    It multiplies in 8 bits as well where `multiply` says so: each token is narrowed with a scale of its own, which is
    twice the products a second on hardware made for it. Otherwise it computes in its input's type, and widens the
    weights when it is its turn: a hundredth of the time of its product, for tens of thousands of tokens.
    """

    def __init__(self, linear: nn.Linear, *, multiply: bool) -> None:
        super().__init__()
        weight, scale = _narrowed(linear.weight.float())
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in]
        self.scale = nn.Parameter(scale, requires_grad=False)  # [out, 1]
        self.bias = linear.bias
        self._multiply = multiply

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        if not self._multiply:
            weight = self.weight.to(values.dtype) * self.scale.to(values.dtype)
            return nn.functional.linear(values, weight, self.bias)
        tokens, scale = _narrowed(values.reshape(-1, values.shape[-1]))
        product = nn.functional.scaled_mm(
            tokens,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale.t(),
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,  # with scales by row, CUDA has no other
            use_fast_accum=True,
        )
        product = product.to(values.dtype).reshape(*values.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def _narrowed(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, m] in 8 bits, and [n, 1] scales in fp32 with which it is the original again, nearly."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    return (rows / scale).to(torch.float8_e4m3fn), scale


def multiplies_in_fp8(device: torch.device) -> bool:
    """Whether the hardware multiplies 8 bits faster than 16: Ada, Hopper and later (CUDA's compute capability 8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= ADA


def to_fp8(model: WanTransformer3DModel, *, multiply: bool = False) -> None:
    """Keeps the linear layers of the blocks in 8 bits, and multiplies in 8 bits where `multiply` says so.

    Embeddings, norms and the output layer stay: they are small, and errors there reach every token. Layers
    whose sides are not multiples of 16, which CUDA does not multiply in 8 bits, are widened.
    """
    for block in model.blocks:
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        for name, layer in layers.items():
            fits = layer.in_features % 16 == 0 and layer.out_features % 16 == 0
            block.set_submodule(name, Float8Linear(layer, multiply=multiply and fits))


def compile_blocks(model: WanTransformer3DModel, backend: str) -> None:
    """Compiles the block that the model repeats, once for all of them (pytorch.org: regional compilation)."""
    model.compile_repeated_blocks(fullgraph=True, backend=backend)


def channels_last(vae: AutoencoderKLWan) -> None:
    """Lays out the decoder's convolutions with channels innermost."""
    layouts: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.decoder.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.to(memory_format=layouts[parameter.dim()])
