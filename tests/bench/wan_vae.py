"""What the VAE's changes save, as far as a CPU can say it: its time, and whether the results are the same.

`python -m tests.bench.wan --part encode decode`: the true classes at their true widths, random weights, small pictures,
one thread, sides alternating, CPU seconds of this process.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from inference.engines.wan import lean, vae
from inference.engines.wan.presets import FRAME_STRIDE
from tests.bench.wan_measure import every_frame_encoded
from tests.bench.wan_models import SHAPES

WIDTH, HEIGHT, FRAMES = 48, 64, 81  # pixels; all of A14B's frames
LATENTS = (1, 16, 2, 8, 6)
"""Decoded: 48x64 pixels, five frames."""

DECODES: Mapping[str, tuple[Callable[[AutoencoderKLWan], None], ...]] = {
    "stock": (),
    "plain, fewer copies": (lean.plain_upsampling, lean.fewer_copies),
    "zeros in convolutions": (lean.plain_upsampling, lean.fewer_copies, lean.zeros_in_convolutions),
}
"""Each with those before it."""


@torch.inference_mode()
def encode(rounds: int) -> dict[str, Any]:
    """A14B's encode of a photo and blank frames: all of it, and without what is steady."""
    codec = _codec()
    first = torch.randn(1, 3, 1, HEIGHT, WIDTH).clamp(-1, 1)
    seconds: dict[str, list[float]] = {"all frames": [], "steady": []}
    encoded: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, form in (("all frames", every_frame_encoded()), ("steady", nullcontext())):
            with form:
                began = time.process_time()
                encoded[name] = vae.encode(codec, first, None, FRAMES)
                seconds[name].append(time.process_time() - began)
    difference = (encoded["all frames"] - encoded["steady"]).abs().max().item()
    return {
        "size": f"{WIDTH}x{HEIGHT}, {FRAMES} frames, fp32",
        "cpu_s": seconds,
        "ratio": median(seconds["all frames"]) / median(seconds["steady"]),
        "max_difference": difference,
    }


@torch.inference_mode()
def decode(rounds: int) -> dict[str, Any]:
    """A14B's decode with each exact change of `lean.py`, in the type that it is run in, and in fp32."""
    result: dict[str, Any] = {
        "size": f"{LATENTS[4] * 8}x{LATENTS[3] * 8}, {1 + FRAME_STRIDE * (LATENTS[2] - 1)} frames"
    }
    for dtype in (torch.bfloat16, torch.float32):
        codec = _codec()
        for part in (codec.decoder, codec.post_quant_conv):
            part.to(dtype)
        latents = torch.randn(LATENTS)
        seconds: dict[str, list[float]] = {name: [] for name in DECODES}
        decoded: dict[str, torch.Tensor] = {}
        for _ in range(rounds):
            for name, changes in DECODES.items():
                lean.as_loaded(codec)
                for change in changes:
                    change(codec)
                began = time.process_time()
                decoded[name] = torch.cat(list(vae.decode(codec, latents)))
                seconds[name].append(time.process_time() - began)
        stock, before_s = decoded["stock"].int(), median(seconds["stock"])
        result[str(dtype).removeprefix("torch.")] = {
            name: {
                "cpu_s": seconds[name],
                "of_stock": median(seconds[name]) / before_s,
                "levels_off": (decoded[name].int() - stock).abs().max().item(),
                "pixels_off": (decoded[name].int() != stock).sum().item(),
            }
            for name in DECODES
        }
    return result


def _codec() -> AutoencoderKLWan:
    torch.manual_seed(22)
    config = SHAPES["a14b-480p"].configs["vae"]
    return AutoencoderKLWan(**config).requires_grad_(False).eval()


def print_encode(row: Mapping[str, Any]) -> None:
    """Both sides and their ratio."""
    sides = ", ".join(
        f"{name} " + " ".join(f"{value:.1f}" for value in values) for name, values in row["cpu_s"].items()
    )
    print(
        f"\nA14B's encode, true class, {row['size']}, one thread, CPU seconds: {sides}; "
        f"{row['ratio']:.2f} times as fast, largest difference {row['max_difference']:g}"
    )


def print_decode(row: Mapping[str, Any]) -> None:
    """A line a change and type."""
    print(f"\nA14B's decode, true class, {row['size']}, one thread; of stock's CPU time, and what differs")
    for dtype in ("bfloat16", "float32"):
        for name, figures in row[dtype].items():
            took = " ".join(f"{value:.2f}" for value in figures["cpu_s"])
            print(
                f"  {dtype:9} {name:22} {took} s  {figures['of_stock']:5.2f} x   "
                f"{figures['pixels_off']} values off, by {figures['levels_off']} levels at most"
            )
