"""On CUDA: what the CPU tests cannot show. In the dtypes of production, each level of offload, compiled or not."""

from dataclasses import replace

import pytest
import torch

from inference.engines.base import Job
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.placement import Offload
from inference.engines.wan.presets import PRESETS
from inference.engines.wan.speed import Switches
from inference.errors import CancelRequested
from tests.engines.contract import EngineContract
from tests.engines.wan.conftest import SMALL, make_engine, tiny_weights
from tests.engines.wan.test_against_diffusers import our_latents
from tests.engines.wan.test_engine import Cancels, failing, frames_of, out_of_memory

pytestmark = pytest.mark.gpu


def on_gpu(name: str, **switches) -> WanEngine:
    """An engine with models of its own, in bf16."""
    preset = PRESETS[name]
    components = {part: replace(each, dtype="bf16") for part, each in preset.components.items()}
    preset = replace(preset, components=components)
    return WanEngine.load(preset, tiny_weights(), device=torch.device("cuda"), switches=Switches(**switches))


class TestContract(EngineContract):
    """The suite every engine passes."""

    request_ = SMALL

    def make(self) -> WanEngine:
        """The A14B's shape: two experts with their LoRAs."""
        return on_gpu("tiny-a14b")


@pytest.mark.parametrize("offload", list(Offload), ids=lambda level: level.name.lower())
@pytest.mark.parametrize("compiled", [None, "inductor"], ids=["eager", "compiled"])
def test_latents_are_those_of_the_cpu(shape, offload, compiled, photo):
    """Within what bf16 rounds, wherever the weights lie and whoever runs the blocks."""
    exact = make_engine(shape)
    plan = exact._plan(SMALL, {"photo": photo})
    expected = our_latents(exact, SMALL, {"photo": photo}, plan)
    engine = on_gpu(shape, offload=offload, compile=compiled)
    latents = our_latents(engine, SMALL, {"photo": photo}, plan).cpu()
    assert (latents - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("attention", ["native", "auto"])
def test_attention_is_installed_as_it_was_chosen(shape, attention, photo):
    """Self-attention and cross-attention of both shapes run on it."""
    engine = on_gpu(shape, attention=attention)
    latents = our_latents(engine, SMALL, {"photo": photo}, engine._plan(SMALL, {"photo": photo}))
    assert torch.isfinite(latents).all()


@pytest.mark.anyio
async def test_memory_returns_to_what_it_was(shape, photo, folder):
    """After a clip, a cancelled one and one that ran out of memory for good, the GPU holds the weights alone."""
    engine = on_gpu(shape, offload=Offload.BLOCKS)
    await engine.generate(SMALL, {"photo": photo}, folder, Job())
    before = torch.cuda.memory_allocated()
    usual = frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job()))
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(CancelRequested):
        await engine.generate(SMALL, {"photo": photo}, folder, Cancels(engine, at=4).job)
    assert torch.cuda.memory_allocated() == before
    with failing(engine, "third chunk", out_of_memory, times=9), pytest.raises(Exception, match="out of memory"):
        await engine.generate(SMALL, {"photo": photo}, folder, Job())
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())), usual)
