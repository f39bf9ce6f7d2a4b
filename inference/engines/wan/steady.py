"""Encoding of pictures that repeat, without computing again what cannot change any more.

Wan's video encoder is causal in time and is run chunk by chunk: one frame first, then four at a time. Image-to-video
encodes one photo and then only blank chunks, all the same. What a layer puts out depends on a limited number of frames
before, so once the photo is further back than that, each blank chunk gives bit for bit what the one before gave. From
then on the layer need not run: its last output is used again. The caches of its convolutions, which hold the last two
frames, are constant by then, too, so any other chunk may follow.

How many frames back a layer looks follows from its kernels and strides. In the encoder of Wan2.1, which A14B uses, all
layers before the middle block become steady within the 21 chunks of 81 frames; the middle block and the last
convolution would need more. Of 381.7 TFLOP for 81 frames of 1280x720, 124.2 are left.

This module needs diffusers and nothing else of this package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
)
from torch import nn

CHUNK_FRAMES = 4
"""Frames of every chunk but the first, which has one (`AutoencoderKLWan._encode`)."""

CACHE_FRAMES = 2
"""Frames that a convolution keeps of the chunk before (`CACHE_T` in diffusers)."""


@dataclass(frozen=True, slots=True)
class _Reach:
    """What comes out of a layer: its frames for each chunk, and the first frame that the first chunk does not touch."""

    chunk_frames: int
    steady_frame: int  # counted from 0, the only frame of the first chunk

    @property
    def steady_chunk(self) -> int:
        """The first chunk, counted from 0, all of whose frames are steady. Chunk c ends with frame c·chunk_frames."""
        return math.ceil((self.steady_frame - 1) / self.chunk_frames) + 1

    def through(self, convolution: nn.Conv3d) -> "_Reach":
        """After a causal convolution: output j reads the inputs from stride·j - (kernel - 1) to stride·j."""
        kernel, stride = convolution.kernel_size[0], convolution.stride[0]
        return _Reach(self.chunk_frames // stride, math.ceil((self.steady_frame + kernel - 1) / stride))


def steady_chunks(encoder: Any) -> list[int] | None:
    """For `conv_in` and each of `down_blocks`: the chunk from which on its output repeats, if the input does from 1 on.

    None where the encoder has parts that this module does not know: then everything has to be computed.
    """
    if type(encoder) is not WanEncoder3d or not isinstance(encoder.conv_in, WanCausalConv3d):
        return None
    reach = _Reach(CHUNK_FRAMES, 1).through(encoder.conv_in)
    chunks = [reach.steady_chunk]
    for layer in encoder.down_blocks:
        after = _after(layer, reach)
        if after is None or after.chunk_frames < 1:
            return None
        reach = after
        chunks.append(reach.steady_chunk)
    return chunks


def _after(layer: Any, reach: _Reach) -> _Reach | None:
    """`reach` after one layer; None for a layer that is not known."""
    if type(layer) is WanResidualBlock:
        shortcut = layer.conv_shortcut
        if type(shortcut) is not nn.Identity and shortcut.kernel_size[0] != 1:
            return None
        return reach.through(layer.conv1).through(layer.conv2)
    if type(layer) is WanResample and layer.mode in {"none", "downsample2d"}:  # within a frame
        return reach
    if type(layer) is WanResample and layer.mode == "downsample3d":
        return reach.through(layer.time_conv)
    return None


class ChunkEncoder:
    """Runs an encoder chunk by chunk over one clip, and leaves out layers that are steady."""

    def __init__(self, encoder: Any, cache_slots: int) -> None:
        """`cache_slots`: how many convolutions of the encoder keep frames: `vae._cached_conv_counts["encoder"]`."""
        self._encoder = encoder
        self._caches: list[torch.Tensor | None] = [None] * cache_slots
        self._steady_chunks = steady_chunks(encoder)
        self._slots = [0]  # where the caches of each layer begin, by layer
        self._chunk = 0  # the number of the next
        self._repeating = True  # all chunks so far were the first one and then the repeated one
        self._steady: tuple[int, torch.Tensor] | None = None  # the last steady layer, and what it puts out

    def __call__(self, pictures: torch.Tensor, *, repeats: bool = False) -> torch.Tensor:
        """Encodes the next chunk: [1, 3, 1, H, W] first, then [1, 3, 4, H, W]; returns [1, 2·z, 1, h, w].

        `repeats`: this chunk is the same as every other one but the first.
        """
        if self._steady_chunks is None:
            encoded: torch.Tensor = self._encoder(pictures, feat_cache=self._caches, feat_idx=[0])
            return encoded
        if self._chunk > 0 and not repeats:
            self._repeating, self._steady = False, None
        hidden, slot = self._before_the_middle(pictures, self._steady_chunks)
        self._chunk += 1
        encoder = self._encoder
        hidden = encoder.mid_block(hidden, feat_cache=self._caches, feat_idx=slot)
        hidden = encoder.nonlinearity(encoder.norm_out(hidden))
        return _convolve(encoder.conv_out, hidden, self._caches, slot)

    def _before_the_middle(
        self, pictures: torch.Tensor, steady_chunks: Sequence[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """What the middle block reads, and where its caches begin."""
        begin, hidden = (0, pictures) if self._steady is None else (self._steady[0] + 1, self._steady[1])
        slot = [self._slots[begin]]
        for index, layer in enumerate([self._first, *self._encoder.down_blocks][begin:], begin):
            hidden = layer(hidden, feat_cache=self._caches, feat_idx=slot)
            if self._chunk == 0:
                self._slots.append(slot[0])
            if self._repeating and self._chunk >= steady_chunks[index]:
                self._steady = index, hidden
        return hidden, slot

    def _first(
        self, pictures: torch.Tensor, feat_cache: list[torch.Tensor | None], feat_idx: list[int]
    ) -> torch.Tensor:
        return _convolve(self._encoder.conv_in, pictures, feat_cache, feat_idx)


def _convolve(
    convolution: nn.Module, hidden: torch.Tensor, caches: list[torch.Tensor | None], slot: list[int]
) -> torch.Tensor:
    """A convolution and the frames it keeps, as `WanEncoder3d.forward` has it for its first and its last."""
    before = caches[slot[0]]
    kept = hidden[:, :, -CACHE_FRAMES:].clone()
    if kept.shape[2] < CACHE_FRAMES and before is not None:
        kept = torch.cat([before[:, :, -1:], kept], dim=2)
    convolved: torch.Tensor = convolution(hidden, before)
    caches[slot[0]] = kept
    slot[0] += 1
    return convolved
