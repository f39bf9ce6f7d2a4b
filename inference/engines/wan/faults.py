"""Maps exceptions of torch to our errors."""

import traceback

import structlog
import torch

from inference.errors import EngineFailed, EngineLost, I2VError, MachineFault, one_line

MAX_REASON_CHARS = 300

# Messages of libraries below torch, which raise a plain RuntimeError when memory is short.
NO_GPU_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",  # a convolution without room (github.com/pytorch/pytorch/issues/108645)
)
# Messages after which nothing on the GPU works any more. For errors of CUDA itself torch has a type of its own.
GPU_LOST = (
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ECC",
    "_STATUS_EXECUTION_FAILED",
    "_STATUS_INTERNAL_ERROR",
)
NO_HOST_MEMORY = "DefaultCPUAllocator"

log = structlog.get_logger(__name__)


class OutOfRoom(Exception):
    """The GPU had no memory left: worth another attempt with more offload. Never leaves the engine."""


def mapped(error: Exception) -> Exception:
    """An error of our tree, or OutOfRoom, for whatever a generation ended with.

    Its traceback is removed, because the frames in it would keep the request's tensors alive as long as the error. The
    traceback of an unexpected error is logged instead.
    """
    ours = _mapped(error)
    links: list[BaseException | None] = [ours, error]
    seen: set[int] = set()
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            links += [link.__cause__, link.__context__]
    return ours


def _mapped(error: Exception) -> Exception:
    said = one_line(str(error), MAX_REASON_CHARS)
    if isinstance(error, I2VError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in NO_GPU_MEMORY):
        return OutOfRoom("the GPU ran out of memory")
    if isinstance(error, MemoryError) or NO_HOST_MEMORY in said:
        return MachineFault("this machine has no memory left to generate")
    if gpu_is_lost(error):
        return EngineLost(f"the GPU does not work any more: {said}")
    log.error("engine_error", traceback="".join(traceback.format_exception(error)))
    return EngineFailed(f"{type(error).__name__}: {said}")


def gpu_is_lost(error: Exception) -> bool:
    """Whether nothing on the GPU works any more after `error`."""
    return isinstance(error, torch.AcceleratorError) or any(sign in str(error) for sign in GPU_LOST)
