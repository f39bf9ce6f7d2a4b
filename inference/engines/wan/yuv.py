"""Frames as the encoder wants them, made where they are: half the bytes to copy from a GPU, and less work for ffmpeg.

The pixels are those of ffmpeg's scaler (`media.video.TO_BT709`) within one level: the chroma of two neighbours in a row
is averaged, and columns are halved by a bicubic kernel of eight rows, both as swscale was seen to do it.
"""

import torch
from torch.nn import functional

RED, GREEN, BLUE = 0.2126, 0.7152, 0.0722
"""BT.709's luma (itu.int/rec/R-REC-BT.709, 3.2)."""

BLACK, LUMA_LEVELS, GREY, CHROMA_LEVELS = 16, 219, 128, 224
"""Limited range in 8 bits (BT.709, 4.6)."""


def _bicubic(distance: float) -> float:
    """Swscale's bicubic kernel, B = 0 and C = 0.6 (SWS_PARAM_DEFAULT in libswscale/utils.c)."""
    if distance < 1:
        return 1.4 * distance**3 - 2.4 * distance**2 + 1
    return -0.6 * distance**3 + 3 * distance**2 - 4.8 * distance + 2.4


HALVING = tuple(_bicubic(abs(row - 3.5) / 2) / 2 for row in range(8))
"""Weights of eight rows around a chroma sample, which lies between the fourth and the fifth."""


def to_yuv420p(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [F, H, W, 3], sRGB, as uint8 [F, H * 3/2, W]: the rows of Y, then U, then V, BT.709 in limited range.

    H and W are even.
    """
    count, height, width, _ = frames.shape
    red, green, blue = (frames[..., channel].float() / 255 for channel in range(3))
    luma = RED * red + GREEN * green + BLUE * blue
    chroma = torch.stack([(blue - luma) / (2 - 2 * BLUE), (red - luma) / (2 - 2 * RED)], dim=1)  # [F, 2, H, W]
    pairs = chroma.view(count, 2, height, width // 2, 2).mean(-1)
    padded = functional.pad(pairs, (0, 0, 3, 3), mode="replicate")
    # Added up row by row, as a convolution would be of TF32's precision on a GPU.
    halved = torch.zeros_like(pairs[:, :, ::2])
    for row, weight in enumerate(HALVING):
        halved += weight * padded[:, :, row : row + height - 1 : 2]
    y = luma * LUMA_LEVELS + BLACK
    uv = (halved * CHROMA_LEVELS + GREY).view(count, height // 2, width)
    return torch.cat([y, uv], dim=1).round().clamp(0, 255).to(torch.uint8)
