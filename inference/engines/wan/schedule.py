"""From noise to latents: the sigmas of a preset, and the loop over them.

The schedulers are diffusers'; what is ours is that a distilled model gets exactly the sigmas it was distilled for
(`set_timesteps(4)` spreads others), and that a job can stop between any two forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from inference.engines.wan.presets import Preset, Schedule

TRAIN_TIMESTEPS = 1000
"""Timestep = sigma x 1000 (num_train_timesteps in wan/configs/shared_config.py)."""

Scheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler

Forward = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(expert, latents, timestep, text) → velocity: latents and velocity [1, z, T, h, w], timestep a scalar."""


def make_scheduler(schedule: Schedule, steps: int | None = None) -> Scheduler:
    """A scheduler that has its timesteps; `steps` in place of the schedule's, where its sigmas are not fixed."""
    if schedule.solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=schedule.shift,
        )
        # The authors' spread (wan/utils/fm_solvers_unipc.py); diffusers' own ends at 0.001 in place of 0.
        scheduler.set_timesteps(sigmas=np.linspace(1 - 1 / TRAIN_TIMESTEPS, 0, (steps or schedule.steps) + 1)[:-1])
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        shift=schedule.shift,
        stochastic_sampling=schedule.solver == "dmd",
    )
    if schedule.sigmas is None:
        scheduler.set_timesteps(steps or schedule.steps)
    else:
        scheduler.set_timesteps(sigmas=list(schedule.sigmas))
    return scheduler


@dataclass(frozen=True)
class Guide:
    """What the text does to each forward."""

    text: torch.Tensor  # [1, 512, d]
    negative: torch.Tensor | None  # the same; None where no expert is guided
    scales: tuple[float, float]  # high and low noise


def denoise(
    preset: Preset,
    scheduler: Scheduler,
    latents: torch.Tensor,
    guide: Guide,
    forward: Forward,
    *,
    generator: torch.Generator,
    on_step: Callable[[int], None],
) -> torch.Tensor:
    """Runs every timestep of `scheduler` on `latents` [1, z, T, h, w], fp32 noise, and returns clean ones.

    `generator` gives a stochastic solver its noise. `on_step(done)` is called after each step; what it raises ends
    the loop. With guidance the velocity is v(negative) + scale·(v(text) - v(negative)) (arxiv.org/abs/2207.12598).
    """
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        low_noise = preset.boundary is not None and timestep < preset.boundary * TRAIN_TIMESTEPS
        scale = guide.scales[low_noise]
        velocity = forward(int(low_noise), latents, timestep, guide.text)
        if scale > 1 and guide.negative is not None:
            unguided = forward(int(low_noise), latents, timestep, guide.negative)
            velocity = unguided + scale * (velocity - unguided)
        extra = {"generator": generator} if preset.schedule.solver == "dmd" else {}
        latents = scheduler.step(velocity, timestep, latents, return_dict=False, **extra)[0]
        on_step(done)
    return latents
