"""Videos as real files: what ffmpeg wrote, what is left when it could not, and that nothing is left when it failed."""

import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from inference.errors import DiskFull, EncodeFailed, I2VError, MachineFault, MediaError
from inference.media import video as videos
from inference.media.video import VideoWriter, probe

WIDTH, HEIGHT = 128, 96


def noise(count: int, width: int = WIDTH, height: int = HEIGHT):
    """Frames that hardly compress, one at a time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(path: Path, frames, *, width: int = WIDTH, height: int = HEIGHT, fps: float = 24, **options):
    """A whole video in one call."""
    with VideoWriter(path, width=width, height=height, fps=fps, **options) as writer:
        for frame in frames:
            writer.write(frame)
    return writer.video(seed=7)


def decode(path: Path, width: int, height: int) -> np.ndarray:
    """All frames as a player shows them: the conversion follows the file's own colour tags."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path]
    command += ["-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"]
    command += ["-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


# --- what is written


def test_a_video_is_what_was_asked_for(tmp_path):
    """Every frame is there, H.264 for every player, BT.709 in every tag, index at the front, and nothing else."""
    path = tmp_path / "clip.mp4"
    video = encode(path, noise(25))
    info = probe(path)
    assert (info.codec, info.pix_fmt) == ("h264", "yuv420p")
    assert (info.color_range, info.color_space, info.color_primaries, info.color_trc) == ("tv", *["bt709"] * 3)
    assert (info.width, info.height, info.frames, info.fps) == (WIDTH, HEIGHT, 25, pytest.approx(24))
    assert info.duration_s == pytest.approx(25 / 24)
    assert info.faststart
    assert (video.path, video.width, video.height, video.fps, video.frames) == (path, WIDTH, HEIGHT, 24, 25)
    assert video.size_bytes == path.stat().st_size
    assert video.seed == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0), (255, 255, 255), (200, 120, 60)]
)
def test_colours_survive(tmp_path, colour):
    """Decoded by the file's own tags they come back within three levels: BT.601's matrix would be 20 off in red."""
    frame = np.full((HEIGHT, WIDTH, 3), colour, np.uint8)
    encode(tmp_path / "flat.mp4", [frame] * 3)
    shown = decode(tmp_path / "flat.mp4", WIDTH, HEIGHT)
    assert np.abs(shown.astype(int) - colour).max() <= 3


def test_the_bytes_of_red_are_bt709s(tmp_path):
    """Red is Y 63, Cb 102, Cr 240 in limited range (ITU-R BT.709-6, table 3); by BT.601 it would be 81, 90, 240."""
    encode(tmp_path / "red.mp4", [np.full((HEIGHT, WIDTH, 3), (255, 0, 0), np.uint8)] * 2)
    raw = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "red.mp4", "-f", "rawvideo", "-"],
        capture_output=True,
        check=True,
    ).stdout
    area = WIDTH * HEIGHT
    planes = raw[:area], raw[area : area * 5 // 4], raw[area * 5 // 4 : area * 3 // 2]
    assert [round(np.frombuffer(plane, np.uint8).mean()) for plane in planes] == [
        pytest.approx(63, abs=1),
        pytest.approx(102, abs=1),
        pytest.approx(240, abs=1),
    ]


def test_frames_keep_their_order_and_content(tmp_path):
    """Each frame's own grey comes back at its place."""
    greys = np.linspace(20, 230, 30).astype(np.uint8)
    encode(tmp_path / "ramp.mp4", (np.full((HEIGHT, WIDTH, 3), grey, np.uint8) for grey in greys))
    shown = decode(tmp_path / "ramp.mp4", WIDTH, HEIGHT)
    np.testing.assert_allclose(shown.mean(axis=(1, 2, 3)), greys, atol=2)


@pytest.mark.parametrize("fps, exact", [(16, 16), (23.976, 24000 / 1001), (29.97, 30000 / 1001), (12.5, 12.5)])
def test_rates_are_exact_fractions(tmp_path, fps, exact):
    """23.976 stands for 24000/1001, and does not drift."""
    encode(tmp_path / "clip.mp4", noise(10), fps=fps)
    assert probe(tmp_path / "clip.mp4").fps == pytest.approx(exact, rel=1e-6)


def test_any_memory_layout_is_taken(tmp_path):
    """A transposed tensor's frames are not contiguous."""
    whole = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    whole[0] = 255
    encode(tmp_path / "clip.mp4", [whole.transpose(1, 2, 0)] * 2)
    assert decode(tmp_path / "clip.mp4", WIDTH, HEIGHT)[0].mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=3)


def test_metadata_is_text_and_nothing_else(tmp_path):
    """Whatever the words look like, they end in the file's tags."""
    comment = "-y /etc/passwd; $(reboot) = 'quoted' 한국어"
    encode(tmp_path / "clip.mp4", noise(2), metadata={"title": "A title", "comment": comment})
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", tmp_path / "clip.mp4"],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "A title" in said
    assert comment in said


@pytest.mark.parametrize("name", ["-dash.mp4", "with space.mp4", "100%d.mp4", "http:x.mp4"])
def test_any_file_name_is_a_file_name(tmp_path, name):
    """Not an option, a pattern or a protocol."""
    encode(tmp_path / name, noise(2))
    assert probe(tmp_path / name).frames == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_older_video_is_replaced_whole(tmp_path):
    """Only at the end: until then the old one can be read."""
    path = tmp_path / "clip.mp4"
    encode(path, noise(3))
    with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=24) as writer:
        for frame in noise(5):
            writer.write(frame)
        assert probe(path).frames == 3
    assert probe(path).frames == 5


# --- what is refused


@pytest.mark.parametrize(
    "sides, name",
    [({"width": 127}, "width is 127"), ({"height": 95}, "height is 95"), ({"width": 0}, "width is 0")],
)
def test_odd_sizes_are_named(tmp_path, sides, name):
    """4:2:0 has no half pixels."""
    with pytest.raises(EncodeFailed, match=name):
        VideoWriter(tmp_path / "clip.mp4", **{"width": WIDTH, "height": HEIGHT, "fps": 24, **sides})


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_named(tmp_path, fps):
    """Also the ones that compare oddly."""
    with pytest.raises(EncodeFailed, match="fps is"):
        VideoWriter(tmp_path / "clip.mp4", width=WIDTH, height=HEIGHT, fps=fps)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH), np.uint8),
        np.zeros((HEIGHT, WIDTH, 4), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.float32),
    ],
)
def test_a_frame_of_another_kind_is_refused(tmp_path, frame):
    """Before a byte of it is written: half a frame would shift all that follow."""
    with pytest.raises(EncodeFailed, match=r"frame 1 is .* expected uint8 \[96, 128, 3\]"):
        encode(tmp_path / "clip.mp4", [*noise(1), frame])
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_no_video(tmp_path):
    """Rather than an empty file."""
    with pytest.raises(EncodeFailed, match="no frame"):
        encode(tmp_path / "clip.mp4", [])
    assert list(tmp_path.iterdir()) == []


# --- what is left behind: nothing


class Boom(BaseException):
    """An exception that nothing of ours knows, as KeyboardInterrupt is one."""


def started(folder: Path) -> VideoWriter:
    """A writer for `folder`/a.mp4."""
    return VideoWriter(folder / "a.mp4", width=WIDTH, height=HEIGHT, fps=24)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), Boom()])
def test_an_exception_in_the_block_comes_out_and_leaves_nothing(tmp_path, error):
    """The block's own exception, unchanged; no file, no ffmpeg."""
    writer = started(tmp_path)

    def fail_after_a_frame():
        with writer:
            writer.write(next(noise(1)))
            raise error

    with pytest.raises(type(error)) as caught:
        fail_after_a_frame()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    assert writer._process.returncode == -signal.SIGKILL
    assert not writer._listener.is_alive()


@pytest.mark.parametrize("frames", [3, 2000])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_an_ffmpeg_killed_from_outside_is_the_machines_fault_and_leaves_nothing(tmp_path, frames, kill):
    """As the kernel does when memory runs out and a service that stops: between frames, or after the last."""
    writer = started(tmp_path)

    def kill_at_the_third():
        with writer:
            for index, frame in enumerate(noise(frames)):
                writer.write(frame)
                if index == 2:
                    os.kill(writer._process.pid, kill)

    with pytest.raises(MachineFault, match="ffmpeg was stopped by"):
        kill_at_the_third()
    assert writer.frames < 2000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_kib", [8, 64, 200])
def test_a_full_disk_hands_the_lease_back(tmp_path, size_kib):
    """A real file system of a few KiB, filled at the start, half way, and while the file is finished."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", disk],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(DiskFull, match="no room"):
            encode(disk / "a.mp4", noise(40))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_size_counts_as_a_full_disk(tmp_path):
    """The same without root: ffmpeg inherits a limit of 16 KiB and is stopped at it."""
    script = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import numpy as np
from inference.errors import DiskFull
from inference.media.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
rng = np.random.default_rng(0)
try:
    with VideoWriter(Path({str(tmp_path)!r}) / "a.mp4", width=128, height=96, fps=24) as writer:
        for _ in range(60):
            writer.write(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
except DiskFull as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=True)
    assert "no room" in ran.stdout, ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_one_line_without_our_path(tmp_path):
    """The reason is ffmpeg's; names of temporary files are nobody's business."""
    with pytest.raises(I2VError) as caught:
        encode(tmp_path / "none" / "a.mp4", noise(30))
    assert "No such file or directory" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_ffmpeg_is_one_line(tmp_path, monkeypatch):
    """A binary that does not start."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(MachineFault, match="ffmpeg did not start"):
        encode(tmp_path / "a.mp4", noise(1))
    with pytest.raises(MachineFault, match="ffmpeg did not start"):
        probe(tmp_path / "a.mp4")


def test_a_talkative_ffmpeg_does_not_block(tmp_path, fake_ffmpeg):
    """A megabyte on stderr before the first read of stdin: both pipes would be full for ever."""
    fake_ffmpeg("i=0; while [ $i -lt 9000 ]; do printf '%0120d\\n' $i >&2; i=$((i+1)); done; cat >/dev/null; exit 1")
    with pytest.raises(EncodeFailed, match="ffmpeg ended with 1"):
        encode(tmp_path / "a.mp4", noise(20))


@pytest.mark.parametrize(
    "script,error,says",
    [
        ("kill -SEGV $$", EncodeFailed, "ffmpeg crashed: SIGSEGV"),  # it may again, on any machine
        ("cat >/dev/null; echo '[h264 @ 0x5] odd' >&2; exit 255", EncodeFailed, "ffmpeg ended with 255: odd"),
        ("echo 'malloc: Cannot allocate memory' >&2; exit 244", MachineFault, "no memory"),
        ("kill -KILL $$", MachineFault, "SIGKILL"),
    ],
)
def test_whose_fault_the_end_of_ffmpeg_was(tmp_path, fake_ffmpeg, script, error, says):
    """A lease goes back only for what another machine would do better."""
    fake_ffmpeg(script)
    with pytest.raises(I2VError, match=says) as caught:
        encode(tmp_path / "a.mp4", noise(20))
    assert type(caught.value) is error


def test_an_ffmpeg_killed_while_it_probes(tmp_path, fake_ffmpeg):
    """It says nothing about the video."""
    fake_ffmpeg("kill -KILL $$")
    with pytest.raises(MachineFault, match="SIGKILL"):
        probe(tmp_path / "a.mp4")


def test_an_ffmpeg_that_never_ends_is_killed(tmp_path, fake_ffmpeg, monkeypatch):
    """It took in every frame and hangs: the wait has a limit, and nothing stays."""
    fake_ffmpeg("cat >/dev/null; exec sleep 1000")
    monkeypatch.setattr(videos, "FINISH_TIMEOUT_S", 0.2)
    writer = started(tmp_path)
    with pytest.raises(EncodeFailed, match="did not end within"), writer:
        writer.write(next(noise(1)))
    assert writer._process.returncode == -signal.SIGKILL


def test_ffmpeg_is_outside_of_our_terminal(tmp_path):
    """In its own session, so Ctrl-C reaches us alone; its stdin is our pipe."""
    with started(tmp_path) as writer:
        writer.write(next(noise(1)))
        assert os.getsid(writer._process.pid) == writer._process.pid != os.getsid(0)


def test_memory_stays_flat(tmp_path):
    """200 frames of 0.7 MB pass through, and never more than a few are held."""
    frame = np.zeros((360, 640, 3), np.uint8)
    tracemalloc.start()
    try:
        encode(tmp_path / "long.mp4", (frame.copy() for _ in range(200)), width=640, height=360)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * frame.nbytes


# --- probing


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0\0\0\x18ftypisom" + bytes(64), b"#EXTM3U\nhttp://127.0.0.1/x.ts"]
)
def test_what_is_no_video_is_one_line(tmp_path, content):
    """Nothing, text, a bare header, and a playlist that would send ffmpeg elsewhere."""
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"^a\.mp4 is not a video that can be read$"):
        probe(path)


def test_a_missing_video_is_one_line(tmp_path):
    """The same error as a broken one."""
    with pytest.raises(MediaError, match=r"a\.mp4 is not a video"):
        probe(tmp_path / "a.mp4")


def foreign(path: Path, *options: str) -> Path:
    """A video as somebody else would make it."""
    source = ["-f", "lavfi", "-i", "testsrc2=s=160x90:r=25:d=1"]
    sound = ["-f", "lavfi", "-i", "sine=d=1"] if "aac" in options else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *sound, *options, str(path)]
    subprocess.run(command, check=True)
    return path


def test_an_index_at_the_end_shows(tmp_path):
    """As ffmpeg writes it unless told otherwise."""
    assert not probe(foreign(tmp_path / "late.mp4", "-pix_fmt", "yuv420p")).faststart


def test_untagged_colours_are_unknown(tmp_path):
    """Not guessed."""
    info = probe(foreign(tmp_path / "a.mp4", "-pix_fmt", "yuv420p"))
    assert (info.color_space, info.color_primaries, info.color_trc) == ("unknown", "unknown", "unknown")


def test_sound_beside_the_picture_is_ignored(tmp_path):
    """A provider's mp4 may have it; frames and duration are the picture's."""
    info = probe(foreign(tmp_path / "a.mp4", "-c:a", "aac", "-pix_fmt", "yuv444p"))
    assert (info.codec, info.pix_fmt, info.frames, info.fps) == ("h264", "yuv444p", 25, pytest.approx(25))
