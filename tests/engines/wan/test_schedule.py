"""The sigmas that models were trained with, number by number."""

from dataclasses import replace

import pytest
import torch

from inference.engines.wan.presets import PRESETS
from inference.engines.wan.schedule import make_scheduler

TABLE = {
    # shift 5 makes [1, .75, .5, .25] of what LightX2V calls 1000, 750, 500, 250
    "a14b-fast": [1000, 937.5, 833.3333, 625],
    "5b-fast": [1000, 757, 522],
    "5b-turbo": [1000, 937.5, 833.3333, 625],
}


@pytest.mark.parametrize("name", TABLE)
def test_distilled_models_get_their_own_timesteps(name):
    """Exactly those, and 0 at the end: `set_timesteps(4)` gives others."""
    scheduler = make_scheduler(PRESETS[name].schedule)
    assert scheduler.timesteps.tolist() == pytest.approx(TABLE[name], abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([t / 1000 for t in TABLE[name]] + [0], abs=1e-6)
    spread = make_scheduler(replace(PRESETS[name].schedule, sigmas=None))
    assert spread.timesteps.tolist() != pytest.approx(TABLE[name], abs=1)


@pytest.mark.parametrize("name, steps", [("5b-quality", 50), ("a14b-quality", 40)])
def test_quality_takes_the_authors_spread(name, steps):
    """wan/utils/fm_solvers_unipc.py: linear from 0.999 to 0, then shifted by 5; timesteps are whole numbers."""
    scheduler = make_scheduler(PRESETS[name].schedule)
    linear = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1]
    shifted = 5 * linear / (1 + 4 * linear)
    assert (scheduler.sigmas[:-1] - shifted).abs().max() < 1e-6
    assert scheduler.timesteps.tolist() == [int(sigma * 1000) for sigma in shifted.tolist()]
    assert len(make_scheduler(PRESETS[name].schedule, 10).timesteps) == 10


def test_experts_share_the_fast_schedule_evenly():
    """Boundary 0.9: two steps for high noise, two for low."""
    preset = PRESETS["a14b-fast"]
    high = [t for t in make_scheduler(preset.schedule).timesteps.tolist() if t >= preset.boundary * 1000]
    assert len(high) == 2
