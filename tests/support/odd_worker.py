"""The RunPod worker with an engine that does what a real one seldom does, as the prompt says. Run as a script."""

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import runpod_handler
from inference.errors import EngineLost
from inference.media.video import VideoWriter
from inference.task import Video

WIDTH, HEIGHT, FPS = 640, 352, 24
NOISE_FRAMES = 36
RNG = np.random.default_rng(1)
LOSSLESS = ("-c:v", "libx264", "-preset", "ultrafast", "-qp", "0", "-pix_fmt", "yuv444p", "-movflags", "+faststart")


class OddEngine:
    """`lost`: the GPU goes. `noise`: more than 30 MB of it, kept without loss. Anything else: two frames."""

    name = "odd"

    def __init__(self) -> None:
        self.stages = {"render": 1.0}

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):  # noqa: ARG002
        """See Engine."""
        if request.prompt == "lost":
            raise EngineLost("the GPU does not work any more: CUDA error: unspecified launch failure")
        path = folder / "out.mp4"
        if request.prompt == "noise":
            return make_noise(path)
        with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=FPS) as writer:
            for _ in range(2):
                writer.write(noise())
        return writer.video()


def noise():
    """One frame."""
    return RNG.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def make_noise(path: Path) -> Video:
    """A large video in a second: frames of no great size, of which nothing is left out."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", str(FPS), "-i", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, *LOSSLESS, path]
    subprocess.run(command, input=b"".join(noise().tobytes() for _ in range(NOISE_FRAMES)), check=True)
    size_bytes = path.stat().st_size
    return Video(path=path, width=WIDTH, height=HEIGHT, fps=FPS, frames=NOISE_FRAMES, size_bytes=size_bytes)


if __name__ == "__main__":
    runpod_handler.worker()._engine = OddEngine()
    runpod_handler.main()
