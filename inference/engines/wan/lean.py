"""The VAE's layers with less data movement than in diffusers, each change with its own function.

Half of a decode's time on a large GPU is not spent on products but on moving activations of some hundred megabytes: to
pad them, to copy them, to turn them into 32 bits and back. Layers of a loaded model are given these classes in place;
their weights stay as they are.

In 32 bits the results are the same bit for bit, but for `fuse_norms`, which rounds once where diffusers rounds five
times. In 16 bits, in which clips are decoded, `zeros_in_convolutions` may differ as well: a library may add up the same
products in another order.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanCausalConv3d,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpsample,
)
from torch import nn
from torch.nn import functional

NormAndActivation = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(x, gamma, scale), as `norm_and_silu`."""


SHAPES = 64
"""Shapes and layouts of activations for which the fused norm is compiled. A clip of A14B has some twelve, which torch's
own limit of 8 would leave to slow code, the largest first."""


def _become(root: nn.Module, kind: type[nn.Module], ours: type[nn.Module]) -> None:
    for module in root.modules():
        if type(module) is kind:
            module.__class__ = ours


def as_loaded(vae: AutoencoderKLWan) -> None:
    """Takes back all of this module but `fuse_norms`, which cannot be."""
    for kind, ours in CLASSES.items():
        _become(vae, ours, kind)


def plain_upsampling(vae: AutoencoderKLWan) -> None:
    """Upsampling by nearest pixels copies values, so the round trip through fp32 only moves bytes."""
    _become(vae.decoder, WanUpsample, nn.Upsample)


def zeros_in_convolutions(vae: AutoencoderKLWan) -> None:
    """Convolutions of 16 bits take the zeros around a picture as they go, instead of reading a padded copy of it.

    The decoder has 16 bits, and on a CPU, at true size, it gives the same ones (tests/bench/LOG.md); on a GPU this was
    not tried. Convolutions of 32 bits, which encode, go on with padded copies: their sums were up to 2e-6 off.
    """
    _become(vae, WanCausalConv3d, ZeroPaddingConv3d)


def fewer_copies(vae: AutoencoderKLWan) -> None:
    """The decoder copies no activations that nobody changes, and repeats channels in one go."""
    _become(vae.decoder, WanResidualUpBlock, ReadOnlyUpBlock)
    _become(vae.decoder, DupUp3D, ExpandingDupUp3D)


def fuse_norms(vae: AutoencoderKLWan, backend: str = "inductor") -> None:
    """Norm and activation of the decoder's residual blocks in one pass over memory, in fp32, rounded once.

    `backend`: of torch.compile; the first chunks of each shape compile.
    """
    compiling: Any = torch.compile  # its overloads do not know `recompile_limit`, which it has
    fused = compiling(norm_and_silu, backend=backend, dynamic=False, recompile_limit=SHAPES)
    for module in vae.decoder.modules():
        if isinstance(module, WanResidualBlock) and isinstance(module.nonlinearity, nn.SiLU):
            for name in ("norm1", "norm2"):
                setattr(module, name, FusedNorm(getattr(module, name), fused))
            module.nonlinearity = nn.Identity()


class ZeroPaddingConv3d(WanCausalConv3d):  # type: ignore[misc]
    """A causal convolution: frames before the first come from the cache or are zeros, as are pixels around a frame."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """[1, in, T, H, W] → [1, out, T', H', W']; `cache_x`: the last frames of what was convolved before."""
        if x.dtype == torch.float32:
            return super().forward(x, cache_x)  # type: ignore[no-any-return]
        width, _, height, _, earlier_frames, _ = self._padding
        if cache_x is not None and earlier_frames > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            earlier_frames -= cache_x.shape[2]
        if earlier_frames > 0:
            x = functional.pad(x, (0, 0, 0, 0, earlier_frames, 0))
        around = (0, height, width)
        return functional.conv3d(x, self.weight, self.bias, self.stride, around, self.dilation, self.groups)


class ReadOnlyUpBlock(WanResidualUpBlock):  # type: ignore[misc]
    """A block of the decoder of Wan2.2's VAE, without a copy of its input: no layer writes into what it reads."""

    def forward(
        self,
        x: torch.Tensor,
        feat_cache: list[Any] | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> torch.Tensor:
        """[1, in, T, H, W] → [1, out, T', H', W'], as its base class."""
        hidden = x
        for layer in [*self.resnets, *([] if self.upsampler is None else [self.upsampler])]:
            hidden = layer(hidden, feat_cache=feat_cache, feat_idx=[0] if feat_idx is None else feat_idx)
        return hidden if self.avg_shortcut is None else hidden + self.avg_shortcut(x, first_chunk=first_chunk)


class ExpandingDupUp3D(DupUp3D):  # type: ignore[misc]
    """Repeats channels into time and space with one copy, where diffusers makes one of all repeats first.

    Output channel o at the place f of its factor_t·factor_s² places reads input channel (o·factor + f) // repeats. So
    with `parts` = factor // repeats input channels for each output channel, part p fills a row of `repeats` places.
    """

    def forward(self, x: torch.Tensor, first_chunk: bool = False) -> torch.Tensor:
        """[1, in, T, H, W] → [1, out, T·factor_t, H·factor_s, W·factor_s], as its base class."""
        parts = self.factor // self.repeats if self.factor % self.repeats == 0 else 0
        split = _split(parts, (self.factor_t, self.factor_s, self.factor_s))
        if split is None:
            return super().forward(x, first_chunk=first_chunk)  # type: ignore[no-any-return]
        batch, _, frames, height, width = x.shape
        (parts_t, more_t), (parts_h, more_h), (parts_w, more_w) = split
        rows = x.view(batch, self.out_channels, parts_t, 1, parts_h, 1, parts_w, 1, frames, height, width)
        repeated = rows.expand(-1, -1, -1, more_t, -1, more_h, -1, more_w, -1, -1, -1)
        shape = (batch, self.out_channels, frames * self.factor_t, height * self.factor_s, width * self.factor_s)
        out = repeated.permute(0, 1, 8, 2, 3, 9, 4, 5, 10, 6, 7).reshape(shape)
        return out[:, :, self.factor_t - 1 :] if first_chunk else out


def _split(parts: int, factors: tuple[int, int, int]) -> list[tuple[int, int]] | None:
    """How `parts` rows fall on factors of time, height and width: (rows, repeats) of each; None where it does not.

    Rows take up the outer factors first. Where a factor has rows and repeats, all inner ones have repeats alone.
    """
    split = []
    for factor in factors:
        rows = math.gcd(parts, factor)
        if rows < min(parts, factor):
            return None
        split.append((rows, factor // rows))
        parts //= rows or 1
    return split if parts == 1 else None


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    WanUpsample: nn.Upsample,
    WanCausalConv3d: ZeroPaddingConv3d,
    WanResidualUpBlock: ReadOnlyUpBlock,
    DupUp3D: ExpandingDupUp3D,
}
"""Of diffusers, and ours in their place."""


class FusedNorm(nn.Module):
    """A norm of the VAE together with the activation that follows it."""

    def __init__(self, norm: WanRMS_norm, function: NormAndActivation) -> None:
        super().__init__()
        self.gamma, self.scale, self._function = norm.gamma, norm.scale, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, C, T, H, W] → the same."""
        return self._function(x, self.gamma, self.scale)


def norm_and_silu(x: torch.Tensor, gamma: torch.Tensor, scale: float) -> torch.Tensor:
    """silu(x / max(|x|, 1e-12) · scale · gamma), with |x| over the channels; computed in fp32.

    [1, C, T, H, W] → the same; `gamma` [C, 1, 1, 1]. The epsilon is torch.nn.functional.normalize's.
    """
    values = x.float()
    length = values.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    return functional.silu(values / length * (scale * gamma.float())).to(x.dtype)
