"""Frames made YUV by torch, beside what ffmpeg makes of the same frames."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from inference.engines.wan.yuv import HALVING, to_yuv420p
from inference.media.video import TO_BT709


def by_ffmpeg(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as the pipeline of VideoWriter turns it into uint8 [H * 3/2, W]."""
    height, width, _ = frame.shape
    told = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i", "-", "-vf", TO_BT709]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *told, "-f", "rawvideo", "-"]
    made = subprocess.run(command, input=frame.tobytes(), capture_output=True, check=True)
    return np.frombuffer(made.stdout, np.uint8).reshape(height * 3 // 2, width)


def noise(rng: np.random.Generator) -> np.ndarray:
    """The hardest case: no pixel is like its neighbour."""
    return rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)


def ramps(_rng: np.random.Generator) -> np.ndarray:
    """Every channel goes its own way."""
    rows, columns = np.mgrid[0:64, 0:96]
    return np.stack([rows * 4, columns * 2, 255 - rows * 2 - columns], axis=-1).astype(np.uint8)


def edges(rng: np.random.Generator) -> np.ndarray:
    """Saturated colours in blocks of odd sizes, up to the border."""
    small = rng.choice(np.array([0, 255], np.uint8), (13, 14, 3))
    return np.ascontiguousarray(small.repeat(5, 0).repeat(7, 1)[:64, :96])


@pytest.mark.parametrize("picture", [noise, ramps, edges])
def test_the_pixels_are_those_of_ffmpeg_within_one_level(picture):
    """Luma and both chroma planes; and nearly all of them exactly."""
    frames = np.stack([picture(np.random.default_rng(seed)) for seed in range(2)])
    ours = to_yuv420p(torch.from_numpy(frames)).numpy().astype(int)
    theirs = np.stack([by_ffmpeg(frame) for frame in frames]).astype(int)
    off = np.abs(ours - theirs)
    assert off.max() <= 1
    assert (off == 0).mean() > 0.9


def test_black_white_and_grey_are_what_the_standard_says():
    """16, 235, and no colour: 128."""
    frames = torch.tensor([0, 255, 128], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 3)
    made = to_yuv420p(frames)
    assert [int(frame[0, 0]) for frame in made] == [16, 235, 126]
    assert (made[:, 4:] == 128).all()


def test_the_kernel_keeps_brightness():
    """Its weights add up to one."""
    assert sum(HALVING) == pytest.approx(1)
