"""Streams frames from the decoder to ffmpeg. Decoding, copying and writing of three chunks overlap."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from inference.errors import MachineFault
from inference.media.video import VideoWriter

STALL_S = 60
"""After this time without progress ffmpeg has stopped. Four frames take it a tenth of a second."""

Frames = npt.NDArray[np.uint8]  # [F, …]: frames as the writer takes them


def stream(
    chunks: Iterator[torch.Tensor], writer: VideoWriter, check: Callable[[], None], report: Callable[[int], None]
) -> None:
    """Opens `writer`, writes chunks of frames, uint8 [F, …] on any device as it takes them, and closes it.

    Whichever side is the slower sets the pace. `report` is told how many frames are written so far. `check` is called
    between chunks and while a chunk is waited for; what it raises ends the streaming. Raises EncodeFailed, DiskFull,
    and MachineFault, also where ffmpeg stops reading.
    """
    # The writer is closed first: that ends ffmpeg, for which the thread of the pool may be waiting.
    with ThreadPoolExecutor(1, "encode") as pool, writer:
        writing: Future[None] | None = None
        for frames in _on_host(chunks):
            check()
            if writing is not None:
                _finish(writing, check)
                report(writer.frames)
            writing = pool.submit(_write, writer, frames)
        if writing is not None:
            _finish(writing, check)
            report(writer.frames)


def _finish(writing: Future[None], check: Callable[[], None]) -> None:
    for _ in range(STALL_S):
        check()
        with suppress(TimeoutError):
            return writing.result(timeout=1)
    raise MachineFault(f"ffmpeg took no frame for {STALL_S} s")


def _write(writer: VideoWriter, frames: Frames) -> None:
    for frame in frames:
        writer.write(frame)


def _on_host(chunks: Iterator[torch.Tensor]) -> Iterator[Frames]:
    """Chunks as arrays, each handed out when the next is already under way, so that the GPU has work meanwhile."""
    ahead: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
    for chunk in chunks:
        started = _start_copy(chunk)
        if ahead is not None:
            yield _finish_copy(*ahead)
        ahead = started
    if ahead is not None:
        yield _finish_copy(*ahead)


def _start_copy(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if chunk.device.type != "cuda":
        return chunk, None
    host = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True)
    host.copy_(chunk, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied


def _finish_copy(host: torch.Tensor, copied: torch.cuda.Event | None) -> Frames:
    if copied is not None:
        copied.synchronize()
    frames: Frames = host.numpy()
    return frames
