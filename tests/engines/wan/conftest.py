"""What the Wan tests share: the tiny checkpoints, built once, and engines over them."""

import atexit
import functools
import gc
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the Wan engine needs: pip install 'serverless-i2v[wan]'")

import hypothesis  # noqa: F401 - it looks for who refers to what, which it cannot once that is frozen
import torch

from inference.engines.wan import tiny
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.loading import load
from inference.engines.wan.presets import PRESETS
from inference.engines.wan.speed import Switches
from inference.task import GenerationRequest
from tests.engines.contract import landscape

gc.freeze()  # what torch and diffusers brought is here to stay: the collector need not walk it in every other test
torch.set_num_threads(1)  # the suite runs in as many processes as there are cores

SMALL = GenerationRequest(prompt="slow push", duration_s=0.5, max_area_px=64 * 64, seed=1)
"""The smallest clip there is: 96x32 pixels and 13 frames in the 5B's shape, 80x48 and 9 in the A14B's."""


@functools.cache
def tiny_weights() -> Path:
    """A folder with both tiny checkpoints, for as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="i2v-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("tiny", "tiny-a14b"):
        tiny.build(name, folder)
    return folder


@functools.cache
def shared_models(name: str, device: str = "cpu"):
    """The models of a preset, loaded once: engines over them have nothing of their own but these."""
    return load(PRESETS[name], tiny_weights(), torch.device(device), Switches())


def make_engine(name: str, *, area_px: int | None = None, **switches) -> WanEngine:
    """An engine over shared models; with switches, over models of its own."""
    if switches:
        cpu = torch.device("cpu")
        return WanEngine.load(PRESETS[name], tiny_weights(), device=cpu, switches=Switches(**switches), area_px=area_px)
    return WanEngine(PRESETS[name], shared_models(name))


@pytest.fixture
def weights_dir() -> Path:
    """Both tiny checkpoints."""
    return tiny_weights()


@pytest.fixture(params=["tiny", "tiny-a14b"])
def shape(request) -> str:
    """Both shapes of the model: 5B-like and A14B-like."""
    return request.param


@pytest.fixture
def engine(shape) -> WanEngine:
    """An engine of either shape."""
    return make_engine(shape)


@pytest.fixture
def photo(tmp_path) -> Path:
    """A small landscape with a colour in each corner."""
    return landscape(tmp_path / "photo.jpg")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A lease's own folder."""
    folder = tmp_path / "lease"
    folder.mkdir()
    return folder


def pytest_runtest_setup(item) -> None:
    """Tests for a GPU are for where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
