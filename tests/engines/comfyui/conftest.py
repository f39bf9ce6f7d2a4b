"""A ComfyUI for every test, and an engine that does not wait long for anything."""

import pytest

from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.run import Run
from tests.support.comfy_server import PATIENCE_S, ComfyServer


@pytest.fixture
def comfy():
    """A server with one model."""
    with ComfyServer(pace_s=0) as server:
        server.models["checkpoints"] = ["wan.safetensors"]
        yield server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Pauses that are there for a network are as short as they can be on loopback."""
    monkeypatch.setattr(ComfyApi, "pause_s", 0.01)
    pauses = {"look_s": 0.03, "end_s": 0.01, "lost_s": 0.03, "gone_s": 0.05}
    pauses |= {"first_pause_s": 0.01, "longest_pause_s": 0.02, "stop_pause_s": 0.01}
    for name, pause_s in pauses.items():
        monkeypatch.setattr(Run, name, pause_s)
    # How long sending waits for the socket, and stopping for the end. Where both come, however slowly, nothing waits.
    monkeypatch.setattr(Run, "socket_s", PATIENCE_S)
    monkeypatch.setattr(Run, "stop_s", PATIENCE_S)
