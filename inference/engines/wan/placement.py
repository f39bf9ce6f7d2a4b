"""Which weights stay on the GPU, and which "visit" it: they are copied there only while they are used.

    none     everything stays on the GPU
    text     the text encoder visits: it is needed once a prompt, for a moment
    models   the transformers visit too, one at a time
    blocks   a transformer's blocks follow one another through the GPU: slow, for when nothing else fits

The VAE always stays: it is small, and the last to run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import structlog
import torch

GB = 1e9
CGROUP = Path("/sys/fs/cgroup")

log = structlog.get_logger(__name__)


class Offload(IntEnum):
    """How much is kept off the GPU; each level includes those before it."""

    NONE = 0
    TEXT = 1
    MODELS = 2
    BLOCKS = 3


@dataclass(frozen=True)
class Sizes:
    """What a preset's parts take, in GB of GPU memory."""

    text_encoder: float
    transformers: tuple[float, ...]
    vae: float
    working: float  # beside the weights, while it generates
    block: float  # the largest block of a transformer

    def peak(self, offload: Offload) -> float:
        """The largest amount on the GPU at any time."""
        match offload:
            case Offload.NONE:
                moving = self.text_encoder + sum(self.transformers) + self.working
            case Offload.TEXT:
                moving = sum(self.transformers) + max(self.text_encoder, self.working)
            case Offload.MODELS:
                moving = max(self.text_encoder, max(self.transformers) + self.working)
            case Offload.BLOCKS:  # one at work, the next on its way
                moving = max(self.text_encoder, 2 * self.block + self.working)
        return self.vae + moving


def choose(sizes: Sizes, free_gb: float) -> Offload:
    """The lowest level of offload that fits into `free_gb`; the highest, if none fits."""
    return next((level for level in Offload if sizes.peak(level) <= free_gb), Offload.BLOCKS)


class Placed:
    """A model with a place: on the device, or in host memory and on the device while it is used."""

    def __init__(self, name: str, model: Any, device: torch.device) -> None:
        self.name = name
        self.device = device
        self._model = model
        self._home: dict[torch.Tensor, torch.Tensor] | None = None  # tensors of the model → their copies in host memory
        self._streamed = False

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The model, usable for the length of the block."""
        if self._home is None:
            yield self._model
            return
        try:
            for tensor, home in self._home.items():
                tensor.data = home.to(self.device, non_blocking=True, copy=True)
            yield self._model
        finally:
            for tensor, home in self._home.items():
                tensor.data = home

    def send_home(self) -> None:
        """Keeps the model in host memory from now on. Weights never change, so leaving the device only drops the copy.

        Raises MemoryError or RuntimeError where the host has no room; then nothing has moved.
        """
        if self._home is None and not self._streamed:
            # Pinned memory is copied several times faster, and comes in powers of two: up to twice the size.
            pin = self.device.type == "cuda" and 2 * size_gb(self._model) < host_free_gb()
            tensors = [*self._model.parameters(), *self._model.buffers()]
            homes = [tensor.data.cpu().pin_memory() if pin else tensor.data.cpu() for tensor in tensors]
            self._home = dict(zip(tensors, homes, strict=True))
            for tensor, home in self._home.items():
                tensor.data = home
            log.info("offloaded", component=self.name, to="host memory", pinned=pin)

    def stream_blocks(self) -> None:
        """Copies the model's blocks to the device one after the other from now on. It cannot be undone."""
        if not self._streamed:
            self.send_home()
            self._home, self._streamed = None, True
            self.run_eagerly()  # what comes and goes cannot be one graph
            self._model.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",
            )
            log.info("offloaded", component=self.name, to="host memory, block by block")

    def run_eagerly(self) -> None:
        """Takes `speed.compile_blocks` back, wherever the blocks are."""
        for block in self._model.blocks:
            block._compiled_call_impl = None  # noqa: SLF001 - nn.Module.compile has no opposite


def host_free_gb() -> float:
    """Memory that this process may still take: of the machine, and of its container where that has a limit."""
    free = [float("inf")]
    with suppress(OSError, ValueError, IndexError):
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        free.append(int(available.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # no file, or "max"
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free) / GB


def describe_gpu() -> tuple[str, float] | None:
    """Name and memory in GB of the CUDA device that is taken unless another is named."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / GB


def size_gb(model: torch.nn.Module) -> float:
    """Its parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())) / GB
