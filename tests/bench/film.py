"""Clips joined into a film: does memory grow with how many there are, and what does joining cost?

Films of few and of many clips, with hard cuts (pictures are copied), with cross-fades, and with one clip of another
shape (pictures are encoded again). Each in a process of its own; memory is that of the process and of every ffmpeg that
it has at the moment, sampled, beyond what the process had before.

    python -m tests.bench.film [--clips 3 60] [--seconds 2] [--out PATH]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from inference.engines.preview import PAN_LEFT, PAN_RIGHT, ZOOM_IN, render_move  # noqa: E402
from inference.media.film import join  # noqa: E402
from inference.media.photo import open_photo  # noqa: E402
from inference.media.video import VideoWriter  # noqa: E402

SIZE, OTHER, FPS = (1280, 704), (704, 1280), 24
KINDS = ("cuts", "fades", "shapes")
SAMPLE_S = 0.02


def make(folder: Path, seconds: float) -> None:
    """Three clips of the sample photo, and one of another shape."""
    photo = open_photo(ROOT / "inference" / "assets" / "sample.jpg")
    frames = round(seconds * FPS) + 1
    sizes = (SIZE, SIZE, SIZE, OTHER)
    for number, (move, size) in enumerate(zip((ZOOM_IN, PAN_LEFT, PAN_RIGHT, ZOOM_IN), sizes, strict=True)):
        with VideoWriter(folder / f"{number}.mp4", width=size[0], height=size[1], fps=FPS) as writer:
            for frame in render_move(photo, move, size, frames):
                writer.write(frame)


def resident_mb() -> float:
    """Of this process and all that it started."""
    pids = [str(os.getpid()), *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    total_kib = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has ended meanwhile
            continue
        total_kib += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return total_kib * 1024 / 1e6


def measure(folder: Path, kind: str, count: int) -> dict[str, float]:
    """One film in this process."""
    clips = [folder / f"{number % 3}.mp4" for number in range(count)]
    if kind == "shapes":
        clips[1] = folder / "3.mp4"
    before_mb, peak_mb, ended = resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak_mb
        while not ended.wait(SAMPLE_S):
            peak_mb = max(peak_mb, resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    info = join(clips, folder / "film.mp4", fade_s=0.5 if kind == "fades" else 0)
    wall_s = time.perf_counter() - started
    ended.set()
    watcher.join()
    return {
        "wall_s": wall_s,
        "s_per_film_s": wall_s / info.duration_s,
        "peak_mb": peak_mb - before_mb,
        "film_s": info.duration_s,
    }


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[3, 60])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "film.json")
    parser.add_argument("--measure", nargs=3, help="one film alone: folder, kind, clips (the bench calls itself so)")
    asked = parser.parse_args()
    if asked.measure:
        folder, kind, count = asked.measure
        print(json.dumps(measure(Path(folder), kind, int(count))))
        return
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), asked.seconds)
        for kind in KINDS:
            for count in asked.clips:
                command = [sys.executable, __file__, "--measure", folder, kind, str(count)]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                result[f"{kind}, {count} clips"] = json.loads(ran.stdout)
    columns = ("film_s", "wall_s", "s_per_film_s", "peak_mb")
    print(f"{'':20}" + "".join(f"{name:>14}" for name in columns))
    for name, figures in result.items():
        print(f"{name:20}" + "".join(f"{figures[column]:14.2f}" for column in columns))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"size": SIZE, "seconds": asked.seconds, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
