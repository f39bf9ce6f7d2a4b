"""What is compiled before the first clip comes, so that none waits for it.

Which graphs there are depends on what runs here. So this module is one of those by which code that was compiled ahead
is told apart (`compiled.TRACED`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import torch

from inference.engines.wan import tokens
from inference.engines.wan.loading import Models
from inference.engines.wan.presets import MAX_PROMPT_TOKENS, Preset
from inference.engines.wan.schedule import TRAIN_TIMESTEPS
from inference.media import photo as photos

CLIPS = (((4, 3), 5.0), ((16, 9), 3.0))
"""Aspect ratios of phone photos (portrait has as many tokens as landscape), and durations that apps offer."""

BLOCKS = 2
"""The first block gets the embedding's output, whose memory layout may differ; every other one gets a block's."""

log = structlog.get_logger(__name__)


@torch.inference_mode()
def warm_up(models: Models, preset: Preset, area_px: int, check: Callable[[], None] = lambda: None) -> None:
    """Compiles what is to be compiled, on two clips: the first for itself, the second for all that differ from it.

    A block sees a clip as a number of tokens, so photos of another shape and clips of another length need no more.
    Only the first blocks run: the others are the same code, and all of them would take as long as a step. `area_px` is
    width x height of the clips; `check` is called between experts, and what it raises ends the work.
    """
    for expert in models.experts:
        check()
        with expert.on_device() as model, _first_blocks(model):
            for shape, duration_s in CLIPS:
                width, height = photos.fit(*shape, max_area_px=area_px, multiple=preset.multiple_px)
                started = time.perf_counter()
                size = models.latent_size(width, height, preset.frames(duration_s))
                shown = torch.zeros(1, model.config.in_channels, *size, device=models.device, dtype=models.dtype)
                text = torch.zeros(1, MAX_PROMPT_TOKENS, model.config.text_dim, device=models.device)
                timestep = torch.tensor(float(TRAIN_TIMESTEPS), device=models.device)
                tokens.velocity(model, shown, timestep, text.to(models.dtype), clean=preset.first_frame_is_clean)
                if models.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = round(time.perf_counter() - started, 2)
                log.info("warmed_up", component=expert.name, size=f"{width}x{height}", seconds=seconds)


@contextmanager
def _first_blocks(model: Any) -> Iterator[None]:
    """For the length of a block, a transformer of BLOCKS layers."""
    blocks = model.blocks
    model.blocks = blocks[:BLOCKS]
    try:
        yield
    finally:
        model.blocks = blocks
