"""A 24-megapixel JPEG made ready for a model: media.photo.load against the obvious Pillow code.

Both sides run in turn, in one process, on one file; what is compared is the ratio of their medians, and how far apart
their pixels are.

    python -m tests.bench.photo [--rounds 9] [--out PATH]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from inference.media.photo import fit, load, verify  # noqa: E402

PHOTO = (6000, 4000)  # 24 MP
SIZE = fit(*PHOTO, max_area_px=1280 * 704, multiple=32)  # as Wan2.2 5B would have it


def make_photo(path: Path) -> None:
    """Gradients, edges and sensor noise, stored sideways as phones do."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]].astype(np.float32)
    base = np.stack([x / PHOTO[0], y / PHOTO[1], 0.5 + 0.5 * np.sin(x / 90) * np.sin(y / 70)], axis=-1)
    base += 0.25 * (np.sin(x / 11 + y / 17) > 0.7)[..., None]
    base += rng.normal(0, 0.03, base.shape).astype(np.float32)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray((np.clip(base, 0, 1) * 255).astype(np.uint8)).transpose(Image.Transpose.ROTATE_90)
    stored.save(path, quality=92, exif=exif)


def obvious(path: Path) -> np.ndarray:
    """What a first version does: everything at full size, then scale, then crop."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = max(SIZE[0] / image.width, SIZE[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - SIZE[0]) // 2, (image.height - SIZE[1]) // 2
    return np.array(image.crop((left, top, left + SIZE[0], top + SIZE[1])))


def ours(path: Path) -> np.ndarray:
    """What a worker does."""
    return load(path, SIZE)


def seconds(work: Callable[[Path], object], path: Path) -> float:
    """One run's wall time."""
    started = time.perf_counter()
    work(path)
    return time.perf_counter() - started


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "photo.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        make_photo(path)
        runs: dict[str, list[float]] = {"load": [], "obvious": [], "verify": []}
        for _ in range(asked.rounds):
            for name, work in (("load", ours), ("obvious", obvious), ("verify", verify)):
                runs[name].append(seconds(work, path))
        difference = np.mean((ours(path).astype(np.float32) - obvious(path)) ** 2)
        file_mb = path.stat().st_size / 1e6
    median_s = {name: statistics.median(each) for name, each in runs.items()}
    result = {
        "photo": list(PHOTO),
        "file_mb": file_mb,
        "size": list(SIZE),
        "median_s": median_s,
        "ratio": median_s["load"] / median_s["obvious"],
        "psnr_db": float(10 * np.log10(255**2 / difference)),
    }
    print(f"{PHOTO[0]}x{PHOTO[1]} JPEG of {file_mb:.1f} MB to {SIZE[0]}x{SIZE[1]}, medians of {asked.rounds}\n")
    for name, median in median_s.items():
        print(f"{name:10}{median * 1000:8.0f} ms")
    print(f"\nload takes {result['ratio']:.2f} of the obvious code's time; {result['psnr_db']:.1f} dB apart")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
