"""The RunPod worker with an engine that does what a real one seldom does, as the prompt says. Run as a script."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runpod_handler
from inference.errors import EngineLost
from inference.media.video import VideoWriter

WIDTH, HEIGHT, FRAMES = 1280, 704, 56


class OddEngine:
    """`lost`: the GPU goes. Anything else: noise, of which no encoder makes less than 30 MB."""

    name = "odd"

    def __init__(self) -> None:
        self.stages = {"render": 1.0}

    async def generate(self, request, photo, folder, job):  # noqa: ARG002
        """See Engine."""
        if request.prompt == "lost":
            raise EngineLost("the GPU does not work any more: CUDA error: unspecified launch failure")
        rng = np.random.default_rng(1)
        with VideoWriter(folder / "out.mp4", width=WIDTH, height=HEIGHT, fps=24) as writer:
            for _ in range(FRAMES):
                writer.write(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        return writer.video()


if __name__ == "__main__":
    runpod_handler.endpoint()._engine = OddEngine()
    runpod_handler.main()
