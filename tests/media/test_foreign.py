"""Videos of every format that ComfyUI's nodes write, as the mp4 that is delivered; and what is refused as a video."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import anyio
import anyio.to_thread
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from inference.errors import EncodeFailed, I2VError, InvalidVideo, MachineFault
from inference.media import foreign as module
from inference.media.foreign import as_mp4, container, verify, what_is
from inference.media.video import probe
from tests.media.test_clip import OURS, kind, picture_bytes
from tests.media.test_video import decode

WIDTH, HEIGHT, FRAMES = 65, 49, 16
"""Odd sides, as workflows crop them, and a second at ComfyUI's usual 16 frames a second."""


@functools.cache
def made(*options: str, width: int = WIDTH, height: int = HEIGHT, extra: tuple[str, ...] = ()) -> bytes:
    """A moving test picture, encoded with these options; the last one is the format."""
    source = ["-f", "lavfi", "-i", f"testsrc=s={width}x{height}:r=16:d=1", *extra]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *options[:-1], "-f", options[-1], path]
        subprocess.run(command, check=True)
        return path.read_bytes()


def file(folder: Path, content: bytes) -> Path:
    """A file whose name says nothing."""
    path = folder / "source"
    path.write_bytes(content)
    return path


def pil_animation(folder: Path, format_: str, **options) -> Path:
    """What ComfyUI's SaveAnimatedWEBP and SaveAnimatedPNG write, with transparency around a moving square."""
    frames = []
    for n in range(8):
        frame = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
        ImageDraw.Draw(frame).rectangle((n * 4, 10, n * 4 + 10, 20), fill=(0, 0, 255, 255))
        frames.append(frame)
    path = folder / "source"
    frames[0].save(path, format_, save_all=True, append_images=frames[1:], loop=0, **options)
    return path


FORMATS = {
    "vp8": ("webm", ("-c:v", "libvpx", "-deadline", "realtime", "-pix_fmt", "yuv420p", "webm")),
    "vp9": ("webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-pix_fmt", "yuv420p", "webm")),
    "av1": ("webm", ("-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p", "webm")),
    "rgb vp9": ("webm of vp9 (gbrp)", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-pix_fmt", "gbrp", "webm")),
    "gif": ("gif of gif (bgra)", ("gif",)),
    "apng": ("png of apng (rgb24)", ("-plays", "0", "apng")),
    "webp": ("webp of webp_anim (argb)", ("-c:v", "libwebp_anim", "-loop", "0", "webp")),
    "h264 4:4:4": ("mp4 of h264 (yuv444p)", ("-c:v", "libx264", "-pix_fmt", "yuv444p", "mp4")),
    "h264 10 bits": ("mp4 of h264 (yuv444p10le)", ("-c:v", "libx264", "-pix_fmt", "yuv444p10le", "mp4")),
    "h265": ("mp4 of hevc (yuv444p)", ("-c:v", "libx265", "-x265-params", "log-level=0", "-pix_fmt", "yuv444p", "mp4")),
    "prores": (
        "mov of prores (yuv444p12le)",
        ("-vf", "pad=66:50", "-c:v", "prores_ks", "-pix_fmt", "yuv444p10le", "mov"),
    ),
    "ffv1": ("mkv of ffv1 (bgr0)", ("-c:v", "ffv1", "-pix_fmt", "bgr0", "matroska")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_mp4_that_we_deliver(tmp_path, name):
    """Every frame at its time, even sides, our pixels and tags, and the colours it showed."""
    said, options = FORMATS[name]
    path = file(tmp_path, made(*options))
    assert what_is(path) == said
    assert verify(path).frames == FRAMES
    before = decode(path, *((66, 50) if name == "prores" else (WIDTH, HEIGHT)))
    info = as_mp4(path, tmp_path / "out.mp4")
    assert info == probe(tmp_path / "out.mp4")
    assert kind(tmp_path / "out.mp4") == OURS
    assert what_is(tmp_path / "out.mp4") == "mp4"
    assert (info.frames, info.faststart) == (FRAMES, True)
    assert info.starts_s == pytest.approx([n / 16 for n in range(FRAMES)], abs=0.006)  # GIF counts hundredths
    assert (info.width, info.height) == ((66, 50) if name == "prores" else (64, 48))
    after = decode(tmp_path / "out.mp4", info.width, info.height)
    assert np.median(np.abs(after.astype(int) - before[:, : info.height, : info.width])) <= 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.mp4", "source"]


@pytest.mark.parametrize(
    "format_, options",
    [("WEBP", {"duration": 62, "lossless": True}), ("PNG", {"duration": 62}), ("GIF", {"duration": 60})],
)
def test_what_pillow_writes_is_read_too(tmp_path, format_, options):
    """ComfyUI saves animations with it. Only what moves is stored, and transparency lies over white."""
    path = pil_animation(tmp_path, format_, **options)
    info = as_mp4(path, tmp_path / "out.mp4")
    assert (info.frames, info.fps) == (8, pytest.approx(16, abs=0.7))
    shown = decode(tmp_path / "out.mp4", 64, 48)
    for n in range(8):
        assert np.abs(shown[n, 15, n * 4 + 5].astype(int) - (0, 0, 255)).max() < 30, n
        assert np.abs(shown[n, 40, 60].astype(int) - 255).max() < 8, n


def test_pictures_that_are_right_are_copied(tmp_path):
    """H.264 in another container is not encoded again, and an mp4 that is right as a whole is only moved."""
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    h264 = ("-vf", f"scale=64:48,format=yuv420p,{tags}", "-c:v", "libx264")
    for format_ in ("matroska", "mov"):
        path = file(tmp_path, made(*h264, format_))
        as_mp4(path, tmp_path / "out.mp4")
        assert picture_bytes(tmp_path / "out.mp4") == pytest.approx(picture_bytes(path), abs=64)
        assert (container(tmp_path / "out.mp4"), kind(tmp_path / "out.mp4")) == ("mp4", OURS)
    path = file(tmp_path, made(*h264, "-movflags", "+faststart", "mp4"))
    content = path.read_bytes()
    as_mp4(path, tmp_path / "moved.mp4")
    assert (tmp_path / "moved.mp4").read_bytes() == content


@pytest.mark.parametrize("format_, video, sound", [("webm", "libvpx", "libopus"), ("mov", "libx264", "pcm_s16le")])
def test_sound_stays(tmp_path, format_, video, sound):
    """As AAC, which every browser plays in an mp4."""
    tone = ("-f", "lavfi", "-i", "sine=d=1")
    options = ("-shortest", "-c:v", video, "-pix_fmt", "yuv420p", "-c:a", sound, format_)
    as_mp4(file(tmp_path, made(*options, width=64, height=48, extra=tone)), tmp_path / "out.mp4")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", tmp_path / "out.mp4"]
    assert "Audio: aac" in subprocess.run(command, capture_output=True, check=False, text=True).stderr


def still(folder: Path, format_: str) -> bytes:
    """A picture that does not move."""
    Image.new("RGB", (64, 48)).save(folder / "still", format_)
    return (folder / "still").read_bytes()


def test_what_is_no_video_is_refused(tmp_path):
    """Whatever it is called: stills, texts, and playlists, which would have ffmpeg read other files."""
    (tmp_path / "secret").write_bytes(made("gif"))
    for content in (
        b"",
        b"hello",
        b"\x00" * 5000,
        b"#EXTM3U\n#EXTINF:1,\nsecret\n",
        b"ffconcat version 1.0\nfile secret\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        still(tmp_path, "PNG"),
        still(tmp_path, "WEBP"),
        still(tmp_path, "JPEG"),
    ):
        path = file(tmp_path, content)
        for judge in (verify, what_is, lambda path: as_mp4(path, tmp_path / "out.mp4")):
            with pytest.raises(InvalidVideo, match="is not a video that is known here"):
                judge(path)
    assert not (tmp_path / "out.mp4").exists()


def test_a_few_bytes_may_not_ask_for_gigabytes(tmp_path):
    """A GIF of 8192x4096 is refused by what its header says; one of 65535x65535 even ffmpeg refuses."""
    content = bytearray(made("gif"))
    content[6:10] = b"\xff\xff\xff\xff"
    with pytest.raises(InvalidVideo, match="does not decode"):
        verify(file(tmp_path, bytes(content)))
    content[6:10] = (8192).to_bytes(2, "little") + (4096).to_bytes(2, "little")
    path = file(tmp_path, bytes(content))
    for judge in (verify, lambda path: as_mp4(path, tmp_path / "out.mp4")):
        with pytest.raises(InvalidVideo, match="8192x4096: more than 17 megapixels"):
            judge(path)


def test_lengths_are_bounded(tmp_path, monkeypatch):
    """By what the packets say, not by what the header claims."""
    path = file(tmp_path, made(*FORMATS["vp9"][1]))
    monkeypatch.setattr(module, "MAX_FRAMES", FRAMES - 1)
    with pytest.raises(InvalidVideo, match="the video has 16 frames; the limit is 15"):
        verify(path)
    monkeypatch.setattr(module, "MAX_DURATION_S", 0.5)
    with pytest.raises(InvalidVideo, match=r"lasts 1 s; the limit is 0\.5 s"):
        as_mp4(path, tmp_path / "out.mp4")


@pytest.mark.parametrize("name", ["vp9", "gif", "h264 4:4:4", "apng"])
def test_a_video_that_lost_its_beginning_or_all_but_it_is_refused(tmp_path, name):
    """What its first pictures need is not there."""
    content = made(*FORMATS[name][1])
    with pytest.raises(InvalidVideo):
        verify(file(tmp_path, content[: len(content) // 50]))
    half = len(content) // 2
    with pytest.raises(InvalidVideo):
        verify(file(tmp_path, b"\x00" * half + content[half:]))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["vp8", "gif", "h264 4:4:4", "webp"]), st.lists(st.tuples(st.integers(0), st.integers(0, 255))))
def test_damaged_files_are_read_or_refused(tmp_path, name, damage):
    """By errors of ours, whichever bytes are others."""
    content = bytearray(made(*FORMATS[name][1]))
    for place, byte in damage:
        content[place % len(content)] = byte
    path = file(tmp_path, bytes(content))
    for judge in (verify, lambda path: as_mp4(path, tmp_path / "out.mp4")):
        try:
            judge(path)
        except I2VError as error:
            told = str(error)
        else:
            continue
        assert "\n" not in told


def test_a_title_cannot_pose_as_a_stream(tmp_path):
    """What a file calls itself is printed before what it is."""
    line = "Stream #0:0: Video: h264, yuv420p, 64x48"
    title = ("-metadata", f"title=\n  {line}\r  {line}")
    assert what_is(file(tmp_path, made("-c:v", "ffv1", "-pix_fmt", "bgr0", *title, "matroska"))) == "mkv of ffv1 (bgr0)"


@pytest.mark.parametrize(
    "how, kind_",
    [
        ("kill -9 $$", MachineFault),
        ("kill -24 $$", InvalidVideo),
        ("echo '[in#0] Error: Cannot allocate memory' >&2; exit 244", InvalidVideo),
    ],
)
def test_who_is_at_fault_for_an_end(tmp_path, fake_ffmpeg, how, kind_):
    """The machine where somebody ended ffmpeg, the video where it asked for too much. SIGXCPU is signal 24."""
    path = file(tmp_path, made("gif"))
    fake_ffmpeg(how, but_for="framecrc")
    with pytest.raises(kind_):
        verify(path)


def test_a_conversion_that_takes_too_long_is_given_up(tmp_path, fake_ffmpeg):
    """What was written until then is removed."""
    path = file(tmp_path, made("gif"))
    fake_ffmpeg("exec sleep 60", but_for="framecrc")
    with pytest.raises(EncodeFailed, match=r"took over 0\.1 s to encode"):
        as_mp4(path, tmp_path / "out.mp4", timeout_s=0.1)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_whoever_cancels_it_ends_ffmpeg(tmp_path, fake_ffmpeg):
    """A task that is cancelled must not keep a core busy for minutes, nor its worker waiting."""
    path = file(tmp_path, made("gif"))
    pipe = tmp_path / "begun"
    os.mkfifo(pipe)
    fake_ffmpeg(f"echo $$ > {pipe}; exec sleep 60", but_for="framecrc")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, as_mp4, path, tmp_path / "out.mp4")
        process_id = int(await anyio.to_thread.run_sync(pipe.read_text))
        tasks.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_a_missing_file_is_the_machines(tmp_path):
    """Whoever put it there lost it."""
    with pytest.raises(MachineFault, match="cannot read the video: No such file"):
        what_is(tmp_path / "none")


def test_the_name_of_a_file_says_nothing(tmp_path):
    """A WebM that is called .mp4 is a WebM."""
    path = file(tmp_path, made(*FORMATS["vp8"][1]))
    assert what_is(Path(shutil.move(path, tmp_path / "clip.mp4"))) == "webm"
