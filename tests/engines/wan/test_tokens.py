"""Two timesteps told once, or one told to every token: the same velocity."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from inference.engines.wan import speed, tokens


@pytest.fixture
def pair(weights_dir):
    """The same weights twice, as diffusers runs them and as we do, and something to run them on."""
    plain, shared = (
        WanTransformer3DModel.from_pretrained(weights_dir / "tiny" / "transformer").requires_grad_(False).eval()
        for _ in range(2)
    )
    # Random modulation of a new model is small: make what is shared matter.
    for model in (plain, shared):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model.condition_embedder.time_proj.weight.normal_(0, 0.3)
    tokens.share_timesteps(shared)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 48, 3, 4, 6, generator=generator)
    text = torch.randn(1, 512, 64, generator=generator)
    return plain, shared, latents, text


@pytest.mark.parametrize("timestep", [1000.0, 522.0, 1.0])
def test_same_velocity(pair, timestep):
    """For every token of every frame, at any noise level."""
    plain, shared, latents, text = pair
    told = torch.tensor(timestep)
    expected = tokens.velocity(plain, latents, told, text, clean=True)
    assert torch.allclose(
        tokens.velocity(shared, latents, told, text, clean=True), expected, atol=1e-4 * expected.abs().max()
    )
    everywhere = plain(latents, told.reshape(1), text)[0]
    assert (everywhere - expected).abs().max() > 1e-2  # the photo's own timestep does matter


def test_the_photo_is_at_timestep_0():
    """The tokens of the first latent frame, and only they."""
    timesteps = tokens.per_token(torch.tensor(757.0), torch.Size([1, 48, 3, 4, 6]), (1, 2, 2))
    assert timesteps.tolist() == [[0.0] * 6 + [757.0] * 12]


def test_blocks_compile_without_a_break(pair):
    """One graph for a block, whichever shape it meets: what regional compilation asks for."""
    _, shared, latents, text = pair
    told = torch.tensor(600.0)
    larger = torch.cat([latents, latents], dim=4)
    expected = [tokens.velocity(shared, each, told, text, clean=True) for each in (latents, larger)]
    torch.compiler.reset()
    speed.compile_blocks(shared, "eager")
    for each, velocity in zip((latents, larger), expected, strict=True):
        assert torch.allclose(tokens.velocity(shared, each, told, text, clean=True), velocity, atol=1e-5)
