"""Frames on their way from the decoder to ffmpeg: one chunk is decoded, one is copied, one is written, at one time."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from inference.media.video import VideoWriter

Frames = npt.NDArray[np.uint8]  # [F, H, W, 3]


def stream(
    chunks: Iterator[torch.Tensor], writer: VideoWriter, check: Callable[[], None], report: Callable[[int], None]
) -> None:
    """Writes chunks of frames, uint8 [F, H, W, 3] on any device; `report` is told how many frames are written so far.

    Whichever side is the slower sets the pace. `check` is called between chunks, and what it raises ends the
    streaming; nothing is written after it has ended. Raises EncodeFailed, DiskFull, MachineFault.
    """
    with ThreadPoolExecutor(1, "encode") as pool:
        writing: Future[None] | None = None
        for frames in _on_host(chunks):
            check()
            if writing is not None:
                writing.result()
                report(writer.frames)
            writing = pool.submit(_write, writer, frames)
        check()
        if writing is not None:
            writing.result()
            report(writer.frames)


def _write(writer: VideoWriter, frames: Frames) -> None:
    for frame in frames:
        writer.write(frame)


def _on_host(chunks: Iterator[torch.Tensor]) -> Iterator[Frames]:
    """Chunks as arrays, each handed out when the next is already under way: the GPU never waits for the reader."""
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
