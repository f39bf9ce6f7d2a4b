"""What stays on the GPU and what visits: the arithmetic, and that a visit changes nothing."""

import os
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.engines.base import Job
from inference.engines.wan.placement import Offload, Placed, Sizes, choose, host_free_gb
from tests.engines.wan.conftest import SMALL, make_engine
from tests.engines.wan.test_engine import frames_of

gb = st.floats(0.01, 200)
A14B = Sizes(text_encoder=11.4, transformers=(28.6, 28.6), vae=0.5, working=12, block=0.7)
TI2V = Sizes(text_encoder=11.4, transformers=(10.0,), vae=1.7, working=8, block=0.3)


@given(sizes=st.builds(Sizes, gb, st.lists(gb, min_size=1, max_size=2).map(tuple), gb, gb, gb), free_gb=gb)
def test_the_least_that_fits(sizes, free_gb):
    """What is chosen fits, and nothing less would have; where nothing fits, the most there is."""
    chosen = choose(sizes, free_gb)
    assert all(sizes.peak(level) > free_gb for level in Offload if level < chosen)
    assert sizes.peak(chosen) <= free_gb or chosen == Offload.BLOCKS


@pytest.mark.parametrize(
    "sizes, gpu_gb, expected",
    [
        (A14B, 139 * 0.95, Offload.NONE),  # H200
        (A14B, 84 * 0.95, Offload.TEXT),  # H100 80 GB: what 80 GiB come to
        (A14B, 47 * 0.95, Offload.MODELS),  # L40S
        (A14B, 25 * 0.95, Offload.BLOCKS),
        (TI2V, 84 * 0.95, Offload.NONE),
        (TI2V, 25 * 0.95, Offload.TEXT),  # RTX 4090
    ],
)
def test_gpus_people_have(sizes, gpu_gb, expected):
    """A14B within 80 GB and 5B within 24, as they are meant."""
    assert choose(sizes, gpu_gb) == expected


def test_a_visitor_goes_home():
    """On the device only within the block, from the same weights each time, also when the block ends badly."""
    model = torch.nn.Linear(2, 2)
    home = model.weight.data.data_ptr()
    placed = Placed("layer", model, torch.device("cpu"))
    placed.send_home()
    home = model.weight.data.data_ptr()
    for _ in range(2):
        with suppress(ZeroDivisionError), placed.on_device() as visiting:
            assert visiting.weight.data.data_ptr() != home
            raise ZeroDivisionError
        assert model.weight.data.data_ptr() == home


class Narrow(dict):
    """What a model has at home, on a device that is full after two tensors, once."""

    full = True

    def items(self):
        """As a dict's, until there is no room."""
        for number, item in enumerate(super().items()):
            if self.full and number == 2:
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield item


def test_a_visit_that_ends_on_the_way_in_is_undone():
    """No room for the third tensor: the first two do not stay, and the next visit works."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    placed = Placed("layers", model, torch.device("cpu"))
    placed.send_home()
    homes = [parameter.data.data_ptr() for parameter in model.parameters()]
    placed._home = Narrow(placed._home)
    with pytest.raises(torch.OutOfMemoryError), placed.on_device():
        pytest.fail("it must not get here")
    assert [parameter.data.data_ptr() for parameter in model.parameters()] == homes
    with placed.on_device() as visiting:
        assert visiting(torch.ones(1, 2)).shape == (1, 2)


def test_the_host_knows_what_it_may_take():
    """Some, and no more than the machine has."""
    assert 0.1 < host_free_gb() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


@pytest.mark.anyio
@pytest.mark.parametrize("offload", [Offload.TEXT, Offload.MODELS, Offload.BLOCKS])
async def test_every_level_makes_the_same_clip(shape, offload, photo, folder):
    """Where weights lie is nobody's business but the memory's."""
    expected = frames_of(await make_engine(shape).generate(SMALL, {"photo": photo}, folder, Job()))
    engine = make_engine(shape, offload=offload)
    assert engine._models.offload == offload
    for _ in range(2):
        assert torch.equal(frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())), expected)
