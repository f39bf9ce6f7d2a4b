"""The RunPod worker with an engine that does what a real one seldom does, as the prompt says. Run as a script."""

import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runpod_handler
from inference.errors import EngineLost
from inference.media.video import VideoWriter

WIDTH, HEIGHT, FRAMES = 1280, 704, 56


class OddEngine:
    """`lost`: the GPU goes. `noise`: of which no encoder makes less than 30 MB. Anything else: two frames."""

    name = "odd"

    def __init__(self) -> None:
        self.stages = {"render": 1.0}
        self._noise = None

    async def generate(self, request, photo, folder, job):  # noqa: ARG002
        """See Engine."""
        if request.prompt == "lost":
            raise EngineLost("the GPU does not work any more: CUDA error: unspecified launch failure")
        path = folder / "out.mp4"
        if request.prompt == "noise" and self._noise is not None:
            shutil.copy("noise.mp4", path)
            return self._noise.model_copy(update={"path": path})
        rng = np.random.default_rng(1)
        with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=24) as writer:
            for _ in range(FRAMES if request.prompt == "noise" else 2):
                writer.write(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        video = writer.video()
        if request.prompt == "noise":
            shutil.copy(path, "noise.mp4")
            self._noise = video
        return video


if __name__ == "__main__":
    runpod_handler.endpoint()._engine = OddEngine()
    runpod_handler.main()
