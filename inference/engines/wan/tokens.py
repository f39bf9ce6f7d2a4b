"""TI2V-5B without the repetition in its timesteps.

The model takes a timestep for every token, and diffusers builds the modulation for every token: [1, 27280, 6, 3072]
in fp32 is 2 GB, made again for each forward. Image-to-video has two timesteps, 0 for the photo's tokens and one for
all others, and the photo's come first. So two rows are enough, and each modulation is applied to two slices.

The forward below does what `WanTransformer3DModel.forward` and `WanTransformerBlock.forward` do (diffusers 0.42), for
that case; tests hold them side by side.
"""

from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock


def velocity(
    model: Any, shown: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *, clean: bool
) -> torch.Tensor:
    """The velocity [1, z, T, h, w], fp32, that an expert sees in `shown` at a scalar `timestep`.

    `clean` says that the first frame is the photo's and without noise.
    """
    if clean and not isinstance(model, SharedTransformer):
        timesteps = per_token(timestep, shown.shape, model.config.patch_size)
    else:
        timesteps = timestep.reshape(1)
    seen: torch.Tensor = model(hidden_states=shown, timestep=timesteps, encoder_hidden_states=text)[0]
    return seen.float()


def per_token(timestep: torch.Tensor, shape: torch.Size, patch: tuple[int, int, int]) -> torch.Tensor:
    """[1, tokens]: 0 for the tokens of the first latent frame and `timestep` for the others.

    `shape` is that of the latents, [1, z, T, h, w]; `patch` is (1, 2, 2).
    """
    frame = tokens_of_a_frame(shape, patch)
    timesteps = timestep.expand(1, frame * shape[2]).clone()
    timesteps[:, :frame] = 0
    return timesteps


def tokens_of_a_frame(shape: torch.Size, patch: tuple[int, int, int]) -> int:
    """How many tokens one latent frame of [1, z, T, h, w] has."""
    return (shape[3] // patch[1]) * (shape[4] // patch[2])


def share_timesteps(model: WanTransformer3DModel) -> None:
    """From now on `model` is a SharedTransformer: same weights, same result, called in another way."""
    model.__class__ = SharedTransformer
    for block in model.blocks:
        block.__class__ = SharedBlock


class SharedTransformer(WanTransformer3DModel):
    """A TI2V-5B transformer that is told its two timesteps once instead of once a token."""

    _repeated_blocks: ClassVar[list[str]] = ["SharedBlock"]  # what `compile_repeated_blocks` looks for

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """hidden_states [1, z, T, h, w] whose first frame is the photo's, timestep [1], text [1, 512, d]."""
        patch = self.config.patch_size
        frame = tokens_of_a_frame(hidden_states.shape, patch)
        rotary = self.rope(hidden_states)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [1, N, d]
        timesteps = torch.cat([torch.zeros_like(timestep), timestep])
        rows, modulation, text, _ = self.condition_embedder(timesteps, encoder_hidden_states, None)  # [2, d], [2, 6d]
        modulation = modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            tokens = block(tokens, text, modulation, rotary, frame)
        shift, scale = (self.scale_shift_table + rows.unsqueeze(1)).chunk(2, dim=1)  # [2, 1, d] each
        tokens = modulate(self.norm_out(tokens.float()), scale, shift, frame).type_as(tokens)
        return (unpatchify(self.proj_out(tokens), hidden_states.shape, patch),)


class SharedBlock(WanTransformerBlock):
    """A block that takes its modulation as two rows: for the first `frame` tokens, and for all others."""

    def forward(
        self, tokens: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rotary: Any, frame: int
    ) -> torch.Tensor:
        """Tokens [1, N, d], text [1, 512, d], modulation [2, 6, d]."""
        rows = (self.scale_shift_table + modulation.float()).chunk(6, dim=1)  # [2, 1, d] each
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows

        normed = modulate(self.norm1(tokens.float()), scale, shift, frame).type_as(tokens)
        tokens = add_gated(tokens, self.attn1(normed, None, None, rotary), gate, frame)

        normed = self.norm2(tokens.float()).type_as(tokens)
        tokens = tokens + self.attn2(normed, text, None, None)

        normed = modulate(self.norm3(tokens.float()), ffn_scale, ffn_shift, frame).type_as(tokens)
        return add_gated(tokens, self.ffn(normed), ffn_gate, frame)


def modulate(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, frame: int) -> torch.Tensor:
    """normed·(1 + scale) + shift, row 0 for the first `frame` tokens and row 1 for the others."""
    modulated = torch.addcmul(shift[1], normed, 1 + scale[1])
    modulated[:, :frame] = torch.addcmul(shift[0], normed[:, :frame], 1 + scale[0])
    return modulated


def add_gated(tokens: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, frame: int) -> torch.Tensor:
    """Tokens + update·gate, summed in fp32, row 0 of the gate for the first `frame` tokens."""
    update = update.float()
    summed = torch.addcmul(tokens.float(), update, gate[1])
    summed[:, :frame] = torch.addcmul(tokens[:, :frame].float(), update[:, :frame], gate[0])
    return summed.type_as(tokens)


def unpatchify(tokens: torch.Tensor, shape: torch.Size, patch: tuple[int, int, int]) -> torch.Tensor:
    """[1, N, z·patch] back to [1, z, T, h, w] of `shape`, but for its channels."""
    _, _, frames, height, width = shape
    p_t, p_h, p_w = patch
    tokens = tokens.reshape(1, frames // p_t, height // p_h, width // p_w, p_t, p_h, p_w, -1)
    tokens = tokens.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return tokens.flatten(6, 7).flatten(4, 5).flatten(2, 3)
