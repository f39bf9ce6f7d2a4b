"""Photos into latents and latents into frames, chunk by chunk.

The VAE is causal in time: a latent frame depends on earlier ones only through the caches of the convolutions. So no
whole clip is ever held in memory: blank frames are encoded four at a time, without computing again what repeats
(`steady.py`), and frames are decoded four at a time, with the same result as in one call. The caches are in a list of
one generation and not on the model, where diffusers keeps them, so that a failed call leaves nothing behind.
"""

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from inference.engines.wan.presets import FRAME_STRIDE
from inference.engines.wan.steady import ChunkEncoder


def encode(
    vae: AutoencoderKLWan,
    first: torch.Tensor,
    last: torch.Tensor | None,
    frames: int,
    check: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Normalised latents [1, z, 1 + (frames - 1) / 4, h, w], fp32, of a clip that is blank but for its ends.

    `first` and `last` are pictures [1, 3, 1, H, W] in -1..1; blank is 0, grey. `check` is called between chunks,
    and what it raises ends the work. Encoding is in fp32 (on Hopper, cuDNN multiplies in TF32).
    """
    encoder = ChunkEncoder(vae.encoder, vae._cached_conv_counts["encoder"])  # noqa: SLF001 - counted when it was made
    blank = _patched(vae, torch.zeros_like(first).expand(-1, -1, FRAME_STRIDE, -1, -1))
    chunks = [encoder(_patched(vae, first))]
    for start in range(1, frames, FRAME_STRIDE):
        check()
        if last is not None and start + FRAME_STRIDE >= frames:
            end = torch.zeros_like(first).expand(-1, -1, FRAME_STRIDE - 1, -1, -1)
            chunks.append(encoder(_patched(vae, torch.cat([end, last], dim=2))))
        else:
            chunks.append(encoder(blank, repeats=True))
    moments = vae.quant_conv(torch.cat(chunks, dim=2))
    mean, std = _statistics(vae, moments)
    latents: torch.Tensor = (moments[:, : vae.config.z_dim] - mean) / std  # the mode of the distribution is its mean
    return latents


def _patched(vae: AutoencoderKLWan, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as the encoder reads them, in fp32."""
    if vae.config.patch_size is not None:
        pictures = patchify(pictures, patch_size=vae.config.patch_size)
    return pictures.float()


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Frames of normalised `latents` [1, z, T, h, w]: one [1, H, W, 3] of uint8, then T - 1 times [4, H, W, 3].

    They are on the device, and on CUDA perhaps not computed yet: reading them waits.
    """
    dtype = next(vae.decoder.parameters()).dtype
    mean, std = _statistics(vae, latents)
    hidden = vae.post_quant_conv((latents * std + mean).to(dtype))
    remembered: list[torch.Tensor | None] = [None] * vae._cached_conv_counts["decoder"]  # noqa: SLF001
    for index in range(hidden.shape[2]):
        chunk = vae.decoder(
            hidden[:, :, index : index + 1], feat_cache=remembered, feat_idx=[0], first_chunk=index == 0
        )
        if vae.config.patch_size is not None:
            chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
        yield to_frames(chunk)


def to_pixels(picture: torch.Tensor) -> torch.Tensor:
    """uint8 [H, W, 3] as [1, 3, 1, H, W] in -1..1, fp32."""
    return picture.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def to_frames(chunk: torch.Tensor) -> torch.Tensor:
    """[1, 3, F, H, W] in -1..1 as uint8 [F, H, W, 3], rounded."""
    scaled = (chunk[0].float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of its latents by channel: [1, z, 1, 1, 1] each, fp32."""
    mean, std = (
        torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
