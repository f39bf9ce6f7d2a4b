"""Layers of the encoder that are left out while the picture repeats: the same bits, for less work."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from inference.engines.wan.steady import CHUNK_FRAMES, ChunkEncoder, steady_chunks

SIDE = 32
CHUNKS = 21  # of 81 frames, as A14B makes
DOWNSAMPLES = ([False, True, True], [True, True, False], [True, False, True], [False, False, True])


def small(**config) -> AutoencoderKLWan:
    """A VAE of the true class with few channels."""
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **config)
    return vae.eval().requires_grad_(False)


def pictures(frames: int, seed: int) -> torch.Tensor:
    """Noise [1, 3, frames, SIDE, SIDE] in -1..1."""
    return torch.rand(1, 3, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def clip(chunks: int, last: torch.Tensor | None) -> list[torch.Tensor]:
    """A photo, then blank chunks, the last of which may end with another photo."""
    blank = torch.zeros(1, 3, CHUNK_FRAMES, SIDE, SIDE)
    made = [pictures(1, 2), *[blank] * (chunks - 1)]
    if last is not None:
        made[-1] = torch.cat([blank[:, :, 1:], last], dim=2)
    return made


def whole(vae: AutoencoderKLWan, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every chunk through the whole encoder, as diffusers does it."""
    caches = [None] * vae._cached_conv_counts["encoder"]
    return [vae.encoder(chunk, feat_cache=caches, feat_idx=[0]) for chunk in chunks]


def steadily(vae: AutoencoderKLWan, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same with steady layers left out."""
    encode = ChunkEncoder(vae.encoder, vae._cached_conv_counts["encoder"])
    return [encode(chunk, repeats=not chunk.any()) for chunk in chunks]


def test_the_chunks_follow_from_the_layers_of_the_true_class():
    """As measured on the encoder of Wan2.1, block by block: the middle block alone does not settle in 21 chunks."""
    chunks = steady_chunks(small(temperal_downsample=[False, True, True]).encoder)
    assert chunks == [
        2,  # conv_in
        *(3, 4, 4),  # two blocks, then half the sides
        *(5, 6, 6),  # then half the sides and half the frames
        *(8, 10, 11),  # and once more
        *(15, 19),
    ]


@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("downsample", DOWNSAMPLES, ids=str)
def test_the_bits_are_those_of_the_whole_encoder(downsample, with_last):
    """Maximum difference 0, chunk by chunk, also of a chunk that is not blank after all the others were."""
    vae = small(temperal_downsample=downsample)
    chunks = clip(CHUNKS, pictures(1, 3) if with_last else None)
    for number, (expected, got) in enumerate(zip(whole(vae, chunks), steadily(vae, chunks), strict=True)):
        assert torch.equal(expected, got), number


def test_nothing_is_skipped_after_a_chunk_that_differs():
    """Once a chunk was not the repeated one, outputs of before are of no use."""
    vae = small(temperal_downsample=[False, True, True])
    chunks = [*clip(9, pictures(1, 3)), *clip(9, None)[1:]]
    for expected, got in zip(whole(vae, chunks), steadily(vae, chunks), strict=True):
        assert torch.equal(expected, got)


def test_steady_layers_do_not_run():
    """Each block before the middle one runs once for each chunk up to the one from which on it is steady."""
    vae = small(temperal_downsample=[False, True, True])
    runs = [0] * len(vae.encoder.down_blocks)
    for index, block in enumerate(vae.encoder.down_blocks):
        block.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    steadily(vae, clip(CHUNKS, None))
    assert runs == [chunk + 1 for chunk in steady_chunks(vae.encoder)[1:]]


class Unknown(nn.Module):
    """A layer of which nobody knows how far back it looks: it adds up everything it has ever seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def forward(self, hidden, feat_cache=None, feat_idx=None):  # noqa: ARG002 - as the others
        self.seen += 1
        return hidden + self.seen


def test_an_unknown_layer_makes_everything_run():
    """Nothing is guessed: the result is the whole encoder's."""
    vae = small(temperal_downsample=[False, True, True])
    vae.encoder.down_blocks.insert(3, Unknown())
    assert steady_chunks(vae.encoder) is None
    chunks = clip(6, None)
    expected = whole(vae, chunks)
    vae.encoder.down_blocks[3].seen = 0.0
    for one, other in zip(expected, steadily(vae, chunks), strict=True):
        assert torch.equal(one, other)


def test_the_vae_of_the_small_model_is_not_known():
    """Its blocks average over time as well; it encodes one photo and no blank frames."""
    assert steady_chunks(small(is_residual=True, temperal_downsample=[False, True, True]).encoder) is None
