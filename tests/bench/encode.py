"""Frames streamed into ffmpeg against decode-all-then-export_to_video: peak memory, wall time, size and quality.

The peer is diffusers 0.42's `export_to_video` (diffusers/utils/export_utils.py), line for line, fed as its pipelines
feed it: a list of float32 frames. Both sides get the same frames from the same stand-in for a decoder, each in a
process of its own, in turn, within one run.

    python -m tests.bench.encode [--frames 121] [--rounds 3] [--out PATH]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import imageio_ffmpeg  # noqa: E402
import numpy as np  # noqa: E402

from inference.engines.preview import ZOOM_IN, render_move  # noqa: E402
from inference.media.photo import open_photo  # noqa: E402
from inference.media.video import VideoWriter  # noqa: E402

WIDTH, HEIGHT, FPS = 1280, 704, 24
SIDES = ("VideoWriter", "export_to_video")


def pixels(count: int) -> Iterator[np.ndarray]:
    """The reference: a zoom over the sample photo, uint8 [704, 1280, 3]."""
    photo = open_photo(ROOT / "inference" / "assets" / "sample.jpg")
    return render_move(photo, ZOOM_IN, (WIDTH, HEIGHT), count)


def decoded(count: int) -> Iterator[np.ndarray]:
    """The same as a VAE leaves it: float32 in 0..1."""
    for frame in pixels(count):
        yield frame.astype(np.float32) / 255


def ffmpeg_peak_mb() -> float:
    """Peak resident memory of this process's only child so far.

    Not from getrusage: a child's figure there begins with the memory of the parent that it was forked from.
    """
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    peak = next(line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6


def stream(path: Path, count: int) -> float:
    """Ours: each frame is encoded as it is decoded."""
    with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        for frame in decoded(count):
            writer.write((frame * 255 + 0.5).astype(np.uint8))
        return ffmpeg_peak_mb()


def export_to_video(path: Path, count: int) -> float:
    """The peer: all frames first, then diffusers.utils.export_to_video(frames, path, fps=24)."""
    import imageio

    video_frames = list(decoded(count))
    video_frames = [(frame * 255).astype(np.uint8) for frame in video_frames]
    with imageio.get_writer(path, fps=FPS, quality=5.0, bitrate=None, macro_block_size=16) as writer:
        for frame in video_frames:
            writer.append_data(frame)
        return ffmpeg_peak_mb()


def nothing(_path: Path, count: int) -> float:
    """The frames alone: what both sides pay before they encode."""
    for _ in decoded(count):
        pass
    return 0.0


def measure(side: str, path: Path, count: int) -> dict[str, float]:
    """Runs one side in this process: seconds, and peak MB: Python's beyond what two frames take, and ffmpeg's."""
    nothing(path, 2)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    ffmpeg_mb = {"VideoWriter": stream, "export_to_video": export_to_video, "frames alone": nothing}[side](path, count)
    wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "python_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * 1024 / 1e6,
        "ffmpeg_mb": ffmpeg_mb,
    }


def psnr_db(path: Path, count: int) -> float:
    """Peak signal to noise over all frames, decoded by the file's own colour tags; BT.601 where it has none."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"]
    command += ["-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    errors = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for frame in pixels(count):
            shown = np.frombuffer(process.stdout.read(frame.size), np.uint8).reshape(frame.shape)
            errors.append(np.mean((shown.astype(np.float32) - frame) ** 2))
    return float(10 * np.log10(255**2 / np.mean(errors)))


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encode.json")
    parser.add_argument("--side", help="runs this side alone and prints its figures (the bench calls itself so)")
    parser.add_argument("--path", type=Path)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measure(asked.side, asked.path, asked.frames)))
        return

    runs: dict[str, list[dict[str, float]]] = {"frames alone": [], **{side: [] for side in SIDES}}
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.rounds):
            for side, figures in runs.items():
                path = Path(folder) / f"{side.replace(' ', '-')}.mp4"
                command = [sys.executable, __file__, "--side", side, "--path", path, "--frames", str(asked.frames)]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                figures.append(json.loads(ran.stdout))
        for side, figures in runs.items():
            result[side] = {name: statistics.median(each[name] for each in figures) for name in figures[0]}
            if side in SIDES:
                path = Path(folder) / f"{side}.mp4"
                result[side] |= {"file_mb": path.stat().st_size / 1e6, "psnr_db": psnr_db(path, asked.frames)}

    ours, peer = (result[side] for side in SIDES)
    for side in (ours, peer):
        side["both_mb"] = side["python_mb"] + side["ffmpeg_mb"]
    compared = ("wall_s", "python_mb", "ffmpeg_mb", "both_mb", "file_mb")
    result["ratio"] = {name: ours[name] / peer[name] for name in compared}
    print(f"{asked.frames} frames of {WIDTH}x{HEIGHT}, medians of {asked.rounds} rounds\n")
    columns = (*compared, "psnr_db")
    print(f"{'':16}" + "".join(f"{name:>12}" for name in columns))
    for side, figures in result.items():
        cells = (f"{figures[name]:12.2f}" if name in figures else f"{'':12}" for name in columns)
        print(f"{side:16}" + "".join(cells))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"frames": asked.frames, "size": [WIDTH, HEIGHT], **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
