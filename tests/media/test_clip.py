"""Clips of others as real files: what is cut, converted and shrunk, and that nothing of them is lost on the way."""

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from inference.errors import EncodeFailed
from inference.media.clip import shrink, tidy
from inference.media.video import probe
from tests.media.test_video import decode, foreign

CASES = Path(__file__).parents[1] / "cases" / "video"

OURS = ("h264", "yuv420p", "tv", "bt709", "bt709", "bt709")
"""Codec, pixels, range and BT.709 in three tags: what every clip that leaves has."""


def kind(path: Path) -> tuple[str, ...]:
    """What is compared with OURS."""
    info = probe(path)
    return info.codec, info.pix_fmt, info.color_range, info.color_space, info.color_primaries, info.color_trc


def case(folder: Path, name: str) -> Path:
    """A clip of `cases/video`, to be moved."""
    return Path(shutil.copy(CASES / name, folder / "source.mp4"))


def flat(path: Path, colour: str, width: int, height: int, *options: str, filters: str = "null") -> Path:
    """A clip of one colour, encoded as somebody else would."""
    source = ["-f", "lavfi", "-i", f"color=c={colour}:s={width}x{height}:r=24:d=0.25,format=rgb24"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-vf", filters, *options]
    subprocess.run([*command, "-c:v", "libx264", "-crf", "5", "-y", path], check=True)
    return path


def yuv(colour_range: str, matrix: str, said: str) -> str:
    """Filters that make 4:2:0 of a range and a matrix, and say so or not."""
    tags = f"setparams=range={colour_range}:colorspace={said}:color_primaries={said}:color_trc={said}"
    return f"scale=out_color_matrix={matrix}:out_range={colour_range},format=yuv420p,{tags}"


def test_a_full_range_clip_becomes_a_limited_one(tmp_path):
    """Its pixels look as before, which a wrong tag alone would change; it needs no cut to be made so."""
    source = case(tmp_path, "run5_full.mp4")
    before = decode(source, 320, 180)
    tidy(source, tmp_path / "out.mp4")
    after = decode(tmp_path / "out.mp4", 320, 180)
    assert kind(tmp_path / "out.mp4") == OURS
    assert len(after) == len(before) == 120
    # Encoded again, edges and noise change; surfaces do not, which a wrong range moves by up to 16 levels.
    assert np.percentile(np.abs(after.astype(int) - before), 75) <= 2


@pytest.mark.parametrize("length_s", [None, 0.125])
@pytest.mark.parametrize(
    "width, height, colour_range, matrix, said",
    [
        (64, 64, "pc", "bt709", "bt709"),
        (64, 64, "tv", "bt601", "smpte170m"),
        (64, 64, "pc", "bt601", "unknown"),  # as players take it: small and unsaid is BT.601
        (1280, 64, "tv", "bt709", "unknown"),  # and large is BT.709
        (1280, 64, "pc", "bt709", "unknown"),
        (1280, 64, "tv", "bt709", "bt709"),
    ],
)
def test_every_clip_that_leaves_is_of_one_kind(tmp_path, *, width, height, colour_range, matrix, said, length_s):
    """H.264, yuv420p, limited range, BT.709, and tagged so; the colour is the one it showed before."""
    filters = yuv(colour_range, matrix, said)
    source = flat(tmp_path / "in.mp4", "0xC82828", width, height, "-movflags", "+faststart", filters=filters)
    tidy(source, tmp_path / "out.mp4", length_s=length_s)
    assert kind(tmp_path / "out.mp4") == OURS
    assert probe(tmp_path / "out.mp4").frames == (3 if length_s else 6)
    shown = decode(tmp_path / "out.mp4", width, height)
    assert np.abs(shown.mean(axis=(0, 1, 2)) - (200, 40, 40)).max() <= 3


def test_a_clip_that_only_does_not_say_what_it_is_keeps_its_pictures(tmp_path):
    """The tags are written into a copy: nothing is encoded again for them."""
    source = flat(tmp_path / "in.mp4", "0xC82828", 1280, 64, filters=yuv("tv", "bt709", "unknown"))
    tidy(source, tmp_path / "out.mp4")
    assert picture_bytes(tmp_path / "out.mp4") == pytest.approx(picture_bytes(source), abs=64)
    assert np.array_equal(planes(tmp_path / "out.mp4"), planes(source))


def test_a_smaller_clip_is_of_the_same_kind(tmp_path):
    """What an answer has no room for is encoded again, too."""
    source = case(tmp_path, "run5_full.mp4")
    shrink(source, tmp_path / "out.mp4", 100_000)
    assert kind(tmp_path / "out.mp4") == OURS
    assert probe(tmp_path / "out.mp4").frames == 120


def test_a_clip_of_variable_rate_is_cut(tmp_path):
    """The frames that lie in the first second are counted: at its mean rate there would be one more."""
    source = case(tmp_path, "vfr.mp4")
    whole = probe(source)
    within = [start_s for start_s in whole.starts_s if start_s < 1]
    info = tidy(source, tmp_path / "out.mp4", length_s=1)
    assert info == probe(tmp_path / "out.mp4")
    assert info.starts_s == pytest.approx(within)
    assert (len(within), round(whole.fps)) == (19, 20)
    assert info.duration_s == pytest.approx(1, abs=1 / 20)


@pytest.mark.parametrize("length_s, frames", [(None, 24), (0.5, 13)])
def test_frames_that_lie_close_together_all_stay(tmp_path, length_s, frames):
    """Pairs of them, 5 ms apart, as a phone would record: at one frame for each of the mean rate's, some would go."""
    pairs = ["-vf", "setpts='N/25/TB-mod(N,2)*0.035/TB'", "-fps_mode", "passthrough"]
    pairs += ["-enc_time_base", "1/90000", "-frames:v", "24", "-pix_fmt", "yuv420p", "-bf", "0"]
    source = foreign(tmp_path / "in.mp4", *pairs, "-video_track_timescale", "90000")
    starts_s = probe(source).starts_s
    info = tidy(source, tmp_path / "out.mp4", length_s=length_s)
    assert info.frames == frames
    assert info.starts_s == pytest.approx(starts_s[:frames], abs=1e-3)


@pytest.mark.parametrize("rate", ["24", "25", "30000/1001", "12.5"])
@pytest.mark.parametrize("length_s", [0.11, 0.47, 0.83])
def test_a_cut_of_a_constant_rate_is_to_the_nearest_frame(tmp_path, rate, length_s):
    """As before anybody counted."""
    source = foreign(tmp_path / "in.mp4", "-r", rate, "-pix_fmt", "yuv420p")
    assert tidy(source, tmp_path / "out.mp4", length_s=length_s).frames == round(length_s * Fraction(rate))


def test_what_cannot_be_cut_is_left_as_it_was(tmp_path, fake_ffmpeg):
    """Whoever paid for it can still deliver it."""
    source = case(tmp_path, "vfr.mp4")
    fake_ffmpeg('echo "[x @ 0x1] broken" >&2; exit 1', but_for="framecrc")  # it can be probed
    with pytest.raises(EncodeFailed, match="broken"):
        tidy(source, tmp_path / "out.mp4", length_s=1)
    assert source.read_bytes() == (CASES / "vfr.mp4").read_bytes()
    assert not (tmp_path / "out.mp4").exists()


def picture_bytes(path: Path) -> int:
    """Bytes of all pictures as they are encoded."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-c", "copy", "-f", "h264", "-"]
    return len(subprocess.run(command, capture_output=True, check=True).stdout)


def planes(path: Path) -> np.ndarray:
    """Every picture as it is stored, without a conversion."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "rawvideo", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
