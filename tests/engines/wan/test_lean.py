"""The VAE's layers with less data movement: the same bits, but for the fused norms."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

from inference.engines.wan import lean, vae
from inference.engines.wan.lean import ExpandingDupUp3D

KINDS = {
    "a14b": {},
    "5b": {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
}
EXACT = {
    "plain upsampling": lean.plain_upsampling,
    "zeros in convolutions": lean.zeros_in_convolutions,
    "fewer copies": lean.fewer_copies,
}


def small(kind: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A VAE of the true class with few channels, and norms that do something."""
    torch.manual_seed(1)
    model = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **KINDS[kind])
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    for part in (model.decoder, model.post_quant_conv):
        part.to(dtype)
    return model.eval().requires_grad_(False)


def decoded(model: AutoencoderKLWan) -> torch.Tensor:
    """The decoder's output before it becomes pixels, of four latent frames of noise, chunk by chunk."""
    dtype = next(model.decoder.parameters()).dtype
    latents = torch.randn(1, 4, 4, 6, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    caches = [None] * model._cached_conv_counts["decoder"]
    chunks = [
        model.decoder(latents[:, :, index : index + 1], feat_cache=caches, feat_idx=[0], first_chunk=index == 0)
        for index in range(4)
    ]
    return torch.cat(chunks, dim=2)


def photo() -> torch.Tensor:
    """Noise [1, 3, 1, 32, 48] in -1..1."""
    return torch.rand(1, 3, 1, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("change", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_gives_the_same_bits(kind, dtype, change):
    """Maximum difference 0 in 32 and in 16 bits, at this size."""
    expected, changed = decoded(small(kind, dtype)), small(kind, dtype)
    EXACT[change](changed)
    assert torch.equal(decoded(changed), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_gives_the_same_bits(kind):
    """Its convolutions are of the changed class, too, beside the layers that are left out once they are steady."""
    changed = small(kind)
    lean.zeros_in_convolutions(changed)
    frames = 33 if kind == "a14b" else 1
    assert torch.equal(vae.encode(changed, photo(), None, frames), vae.encode(small(kind), photo(), None, frames))


@pytest.mark.parametrize("dtype, copies", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_only_convolutions_of_16_bits_do_without_padded_copies(monkeypatch, dtype, copies):
    """In 32 bits, at true size, a library was seen to add up the same products in another order."""
    padded = []
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, by: padded.append(any(by[:4])) or pad(x, by))
    changed = small("5b", dtype)
    lean.zeros_in_convolutions(changed)
    decoded(changed)
    assert any(padded) == copies


@pytest.mark.parametrize("first_chunk", [False, True])
@pytest.mark.parametrize("factors", list(itertools.product((1, 2), (1, 2, 3))), ids=str)
@pytest.mark.parametrize("channels", [(4, 4), (8, 4), (4, 8), (16, 4), (12, 4), (4, 2), (6, 3)], ids=str)
def test_channels_are_repeated_to_the_same_places(channels, factors, first_chunk):
    """For every share of channels to factors, those that need diffusers' own way among them."""
    (inner, outer), (in_time, in_space) = channels, factors
    if outer * in_time * in_space**2 % inner:
        return  # no such layer: repeats are whole
    x = torch.randn(1, inner, 2, 3, 4, generator=torch.Generator().manual_seed(4))
    expected = DupUp3D(inner, outer, in_time, in_space)(x, first_chunk=first_chunk)
    assert torch.equal(ExpandingDupUp3D(inner, outer, in_time, in_space)(x, first_chunk=first_chunk), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_norms_are_near_in_32_bits_and_no_farther_from_the_truth_in_16(kind):
    """In bf16 they round once and diffusers five times, so they are nearer to what 32 bits say."""
    exact = decoded(small(kind))
    fused = small(kind)
    lean.fuse_norms(fused, backend="eager")
    assert torch.allclose(decoded(fused), exact, atol=1e-5)
    fused = small(kind, torch.bfloat16)
    lean.fuse_norms(fused, backend="eager")
    off, off_before = ((decoded(each) - exact).abs().mean() for each in (fused, small(kind, torch.bfloat16)))
    assert 0 < off < off_before


def test_every_norm_of_a_residual_block_is_fused():
    """And those of other blocks are left as they were."""
    changed = small("5b")
    blocks = [each for each in changed.decoder.modules() if isinstance(each, lean.WanResidualBlock)]
    lean.fuse_norms(changed, backend="eager")
    assert all(isinstance(norm, lean.FusedNorm) for block in blocks for norm in (block.norm1, block.norm2))
    assert isinstance(changed.decoder.norm_out, lean.WanRMS_norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_vae_can_be_as_it_was_loaded(kind):
    """For a benchmark, which runs diffusers' own pipeline over the same weights."""
    changed = small(kind)
    classes = [type(module) for module in changed.modules()]
    for change in EXACT.values():
        change(changed)
    assert [type(module) for module in changed.modules()] != classes
    lean.as_loaded(changed)
    assert [type(module) for module in changed.modules()] == classes
