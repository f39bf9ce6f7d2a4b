"""`i2v film` as people use it: real photos, real processes, stopped and killed on the way."""

import signal
from pathlib import Path

import pytest
from PIL import Image

from inference.media.video import probe
from tests.support.processes import Process, environment, i2v_here, until

FRAMES = 13
"""Of the shortest segment that the preview engine makes, half a second."""


def picture(path: Path, size: tuple[int, int], colour: str) -> str:
    """A photo of one colour; its name."""
    Image.new("RGB", size, colour).save(path)
    return path.name


@pytest.fixture
def photos(tmp_path):
    """Wide, tall and square."""
    (tmp_path / "photos").mkdir()
    shapes = {"a.jpg": (96, 64), "b.png": (64, 96), "c.jpg": (80, 80)}
    for name, size in shapes.items():
        picture(tmp_path / "photos" / name, size, "teal")
    return tmp_path / "photos"


@pytest.fixture
def i2v(capsys, photos):
    """The command, in the folder of the photos."""
    return lambda *arguments, **settings: i2v_here(capsys, photos, *arguments, **settings)


def test_photos_become_a_film(i2v, photos):
    """A prompt and a length for each, faded; stdout is the path alone, and nothing else is left."""
    ran = i2v("film", "a.jpg", "b.png", "c.jpg", "-p", "pan left", "-p", "zoom in", "-p", "tilt up",
              "-s", 0.5, "-s", 0.5, "-s", 0.5, "--fade", 0.125, "-o", "film.mp4")  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, f"{photos / 'film.mp4'}\n"), ran.stderr
    info = probe(photos / "film.mp4")
    assert info.frames == 3 * FRAMES - 2 * 3
    assert info.width > info.height
    assert "2/3  b.png  done" in ran.stderr
    assert sorted(path.name for path in photos.iterdir()) == ["a.jpg", "b.png", "c.jpg", "film.mp4"]


def test_kept_segments_are_for_the_next_film(i2v, photos):
    """Of other photos, in another order: what was made for one film is not made again."""
    ran = i2v("film", "a.jpg", "b.png", "pan", "-s", 0.5, "--keep", "kept")
    assert ran.returncode == 0, ran.stderr
    assert len(list((photos / "kept").iterdir())) == 2
    ran = i2v("film", "b.png", "c.jpg", "a.jpg", "-p", "pan", "-s", 0.5, "--keep", "kept", "-o", "other.mp4")
    assert ran.returncode == 0, ran.stderr
    told = [line.split(maxsplit=2)[1:] for line in ran.stderr.splitlines() if "/3" in line]
    assert told == [["b.png", "kept from before"], ["c.jpg", "done"], ["a.jpg", "kept from before"]]
    assert probe(photos / "other.mp4").height > probe(photos / "other.mp4").width
    assert len(list((photos / "kept").iterdir())) == 3


def test_the_same_command_goes_on_where_it_was(photos):
    """After Ctrl-C, which says so, as after a SIGKILL: finished segments are taken as they are."""
    names = [picture(photos / f"{index}.jpg", (96, 64), "navy") for index in range(4)]
    command = ("film", *names, "-s", "1.5", "-p", "pan right", "-o", "film.mp4")
    segments = photos / ".film.mp4.segments"

    def stopped(name: str, number: signal.Signals, at: str) -> Process:
        running = Process(photos, name, *command, env=environment(TMPDIR=photos))
        until(lambda: at in running.stderr.read_text(), 60, f"{at} segments are done")
        running.send(number)
        assert running.wait(20) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert not (photos / "film.mp4").exists()
        return running

    interrupted = stopped("interrupted", signal.SIGINT, "1/4")
    kept = list(segments.glob("*.mp4"))
    assert len(kept) in (1, 2)
    assert f"segments are kept in {segments}: the same command goes on" in interrupted.stderr.read_text()
    assert not list(photos.glob(".i2v-*"))

    killed = stopped("killed", signal.SIGKILL, f"{len(kept) + 1}/4")
    assert killed.stderr.read_text().count("kept from before") == len(kept)
    kept = list(segments.glob("*.mp4"))
    assert len(kept) in (2, 3, 4)

    last = Process(photos, "last", *command, env=environment(TMPDIR=photos))
    assert last.wait(60) == 0, last.stderr.read_text()
    assert last.stderr.read_text().count("kept from before") == len(kept)
    assert probe(photos / "film.mp4").frames == 4 * (36 + 1)
    assert not segments.exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("a.jpg broken.jpg", "photo 2 of 2, broken.jpg: "),
        ("a.jpg b.png c.jpg -p one -p two", "--prompt is given 2 times for 3 photos"),
        ("a.jpg b.png -s 1 -s 2 -s 3", "--seconds is given 3 times for 2 photos"),
        ("a.jpg b.png -s 4 --fade 2.5", "--fade: 2.5 s are more than half of the shortest segment (4 s)"),
        ("a.jpg b.png -s 5 -s 20 --engine wan", "--seconds of b.png is 20; preset"),
        ("a.jpg -o film.mov", "has to end in .mp4"),
        ("a.jpg --keep a.jpg", "is a file"),
        (" ".join(["a.jpg"] * 61), "61 photos are given; a film has at most 60"),
        ("a.jpg --keep /proc/segments", "segment 1 of 1: a segment cannot be kept in /proc/segments"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(i2v, photos, arguments, says):
    """Before anything is generated, and about which photo it is."""
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    ran = i2v("film", *arguments.split(), *([] if "-s" in arguments else ["-s", "0.5"]))
    assert ran.returncode != 0
    assert says in " ".join(ran.stderr.replace("│", " ").split())
    assert not (photos / "film.mp4").exists()
    assert not list(photos.glob(".*"))
