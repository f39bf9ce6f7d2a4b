"""Films as real files: how long they are, what is seen and heard in them, and what is left of one that failed."""

import subprocess
import threading
from fractions import Fraction
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.errors import CancelRequested, EncodeFailed, MediaError
from inference.media import film
from inference.media.film import join, overlaps, plan, rate_of
from inference.media.video import probe
from tests.media.test_clip import OURS, kind, planes
from tests.media.test_video import decode, encode

WIDTH, HEIGHT = 64, 48


def clip(path: Path, grey: int, frames: int = 6, size: tuple[int, int] = (WIDTH, HEIGHT), fps: float = 24) -> Path:
    """One of our own clips, of one grey."""
    width, height = size
    picture = np.full((height, width, 3), grey, np.uint8)
    encode(path, [picture] * frames, width=width, height=height, fps=fps)
    return path


def with_sound(path: Path, source: str, name: str = "loud.mp4") -> Path:
    """The same clip with a sound of ffmpeg's."""
    loud = path.with_name(name)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "lavfi", "-i", source]
    command += ["-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", "-shortest", "-y", loud]
    subprocess.run(command, check=True)
    return loud


def heard(path: Path) -> np.ndarray:
    """A film's sound as float32 [samples], one channel."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a:0"]
    command += ["-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", "48000", "-f", "f32le", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)


def greys(path: Path) -> np.ndarray:
    """What each frame shows, as one number."""
    return decode(path, WIDTH, HEIGHT).mean(axis=(1, 2, 3))


# --- how long it is


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(0, 300))
def test_no_frame_is_in_two_fades(clip_frames, fade):
    """Whatever the lengths: what is left of each clip is not negative, and no fade is longer than was asked for."""
    shared = overlaps(clip_frames, fade)
    assert len(shared) == len(clip_frames) - 1
    assert all(0 <= each <= fade for each in shared)
    for before, frames, after in zip((0, *shared), clip_frames, (*shared, 0), strict=True):
        assert before + after <= frames
    roomy = min(clip_frames) // 2 >= fade
    assert not roomy or shared == (fade,) * (len(clip_frames) - 1)


@pytest.mark.parametrize(
    "mean, exact",
    [(24, 24), (23.976, Fraction(24000, 1001)), (23.9990, 24), (29.97, Fraction(30000, 1001)), (12.5, 12.5), (16, 16)],
)
def test_a_mean_rate_is_an_exact_one(mean, exact):
    """As its maker meant it."""
    assert rate_of(mean) == exact


CLIPS = st.tuples(
    st.integers(1, 9),
    st.sampled_from([(64, 48), (48, 64), (96, 32)]),
    st.sampled_from([24.0, 16.0, 30000 / 1001]),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CLIPS, min_size=1, max_size=4), st.sampled_from([0.0, 0.1, 0.4]))
def test_a_film_is_as_long_as_its_clips_less_its_fades(tmp_path, clips, fade_s):
    """Of any sizes, rates and lengths: not a frame more or less, each at its exact time."""
    paths = [
        clip(tmp_path / f"{number}.mp4", 100, frames, size, fps) for number, (frames, size, fps) in enumerate(clips)
    ]
    info = join(paths, tmp_path / "film.mp4", fade_s=fade_s)
    rate = rate_of(clips[0][2])
    own = [max(1, round(frames / Fraction(fps).limit_denominator(1001) * rate)) for frames, _, fps in clips]
    assert info.frames == sum(own) - sum(overlaps(own, round(fade_s * rate)))
    assert info == probe(tmp_path / "film.mp4")
    assert info.starts_s == pytest.approx([float(number / rate) for number in range(info.frames)], abs=1e-3)
    assert info.duration_s == pytest.approx(float(info.frames / rate), abs=1e-3)
    assert (info.width, info.height) == clips[0][1]
    assert info.faststart
    assert kind(tmp_path / "film.mp4") == OURS


def test_sixty_clips_at_an_uneven_rate_do_not_drift(tmp_path):
    """Their lengths are no whole microseconds, in which they are added up; nothing is encoded for it."""
    path = clip(tmp_path / "clip.mp4", 100, frames=7, fps=30000 / 1001)
    info = join([path] * 60, tmp_path / "film.mp4")
    assert info.frames == 420
    assert info.starts_s == pytest.approx([number * 1001 / 30000 for number in range(420)], abs=1e-5)
    assert np.array_equal(planes(tmp_path / "film.mp4"), np.tile(planes(path), 60))


# --- what is seen


def test_clips_that_are_alike_are_not_encoded_again(tmp_path):
    """Every picture is the one that its clip had, to the bit, in its order."""
    paths = [clip(tmp_path / f"{grey}.mp4", grey, frames) for grey, frames in ((40, 5), (120, 30), (200, 1))]
    join(paths, tmp_path / "film.mp4")
    assert np.array_equal(planes(tmp_path / "film.mp4"), np.concatenate([planes(path) for path in paths]))
    np.testing.assert_allclose(greys(tmp_path / "film.mp4"), [40] * 5 + [120] * 30 + [200], atol=2)


def test_a_fade_goes_evenly_from_one_clip_to_the_next(tmp_path):
    """And each clip is seen alone before and after."""
    paths = [clip(tmp_path / f"{grey}.mp4", grey, 8) for grey in (50, 150)]
    join(paths, tmp_path / "film.mp4", fade_s=3 / 24)
    np.testing.assert_allclose(greys(tmp_path / "film.mp4"), [50] * 5 + [75, 100, 125] + [150] * 5, atol=3)


@pytest.mark.parametrize("size", [(48, 64), (160, 32), (34, 90), (64, 50), (640, 480)])
def test_another_shape_is_cropped_and_has_no_bars(tmp_path, size):
    """Tall, wide, odd when scaled, nearly the same, or larger: the clip reaches every edge, and its middle is seen."""
    width, height = size
    picture = np.full((height, width, 3), 200, np.uint8)
    picture[
        height // 2 - height // 8 : height // 2 + height // 8, width // 2 - width // 8 : width // 2 + width // 8
    ] = 60
    encode(tmp_path / "other.mp4", [picture] * 4, width=width, height=height)
    join([clip(tmp_path / "first.mp4", 128, 2), tmp_path / "other.mp4"], tmp_path / "film.mp4")
    frames = decode(tmp_path / "film.mp4", WIDTH, HEIGHT)
    assert len(frames) == 6
    for edge in (frames[2:, 0], frames[2:, -1], frames[2:, :, 0], frames[2:, :, -1]):
        assert edge.min() > 170
    assert frames[2:, HEIGHT // 2 - 2 : HEIGHT // 2 + 2, WIDTH // 2 - 2 : WIDTH // 2 + 2].max() < 90


def test_colours_survive_being_encoded_again(tmp_path):
    """A cross-fade changes what is faded, and no colour beside it."""
    red = np.full((HEIGHT, WIDTH, 3), (200, 60, 30), np.uint8)
    for name in ("a", "b"):
        encode(tmp_path / f"{name}.mp4", [red] * 4, width=WIDTH, height=HEIGHT)
    join([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "film.mp4", fade_s=2 / 24)
    shown = decode(tmp_path / "film.mp4", WIDTH, HEIGHT)
    assert np.abs(shown.astype(int) - (200, 60, 30)).max() <= 4


def test_a_clip_that_is_not_ours_becomes_so(tmp_path):
    """Its pictures are BT.601 in full range, and say nothing: the film shows the colour that players show."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi"]
    command += ["-i", f"color=c=0xC82828:s={WIDTH}x{HEIGHT}:r=24:d=0.25,format=rgb24"]
    command += ["-vf", "scale=out_color_matrix=bt601:out_range=pc,format=yuvj420p", "-crf", "5", "-y"]
    subprocess.run([*command, tmp_path / "other.mp4"], check=True)
    join([clip(tmp_path / "first.mp4", 128, 2), tmp_path / "other.mp4"], tmp_path / "film.mp4")
    assert kind(tmp_path / "film.mp4") == OURS
    assert np.abs(decode(tmp_path / "film.mp4", WIDTH, HEIGHT)[4].mean(axis=(0, 1)) - (200, 40, 40)).max() <= 4


# --- what is heard


def test_sound_is_where_its_clip_is_and_silence_elsewhere(tmp_path):
    """To within a block of AAC; the pictures are not encoded again for it."""
    quiet = clip(tmp_path / "quiet.mp4", 50, 24)
    loud = with_sound(quiet, "sine=frequency=440:sample_rate=44100,volume=6")
    join([quiet, loud, quiet], tmp_path / "film.mp4")
    sound = np.abs(heard(tmp_path / "film.mp4"))
    assert len(sound) == pytest.approx(3 * 48000, abs=2048)
    assert sound[:46000].max() < 0.01
    assert sound[50000:94000].reshape(-1, 1000).max(axis=1).min() > 0.2
    assert sound[98000:].max() < 0.01
    assert np.array_equal(planes(tmp_path / "film.mp4"), np.tile(planes(quiet), 3))


def test_sound_fades_where_the_pictures_do(tmp_path):
    """Half way between loud and silent it is half as loud."""
    quiet = clip(tmp_path / "quiet.mp4", 50, 48)
    loud = with_sound(quiet, "sine=frequency=440,volume=6")
    info = join([loud, quiet], tmp_path / "film.mp4", fade_s=1)
    assert info.frames == 72
    peaks = np.abs(heard(tmp_path / "film.mp4"))[: 3 * 48000].reshape(-1, 4800).max(axis=1)  # of each tenth of a second
    full = peaks[5]
    np.testing.assert_allclose(peaks[10:20] / full, np.linspace(1, 0.1, 10), atol=0.08)
    assert peaks[21:].max() < 0.02 * full


def test_a_film_without_sound_has_no_track_for_it(tmp_path):
    """Silence is only added beside sound."""
    path = clip(tmp_path / "a.mp4", 50)
    join([path, path], tmp_path / "film.mp4")
    assert not plan([tmp_path / "film.mp4"]).clips[0].info.has_sound


# --- what goes wrong


@pytest.mark.parametrize(
    "name", ["it's.mp4", "two words.mp4", "100%d.mp4", "-dash.mp4", "줄\nbreak.mp4", "back\\slash.mp4"]
)
def test_any_file_name_is_a_file_name(tmp_path, name):
    """In the script of the join, too; where that cannot hold it, the clips are encoded."""
    paths = [clip(tmp_path / name, 50, 3), clip(tmp_path / "b.mp4", 50, 3)]
    assert join(paths, tmp_path / "film.mp4").frames == 6


def test_the_clip_that_is_no_video_is_named(tmp_path):
    """And nothing is left behind."""
    path = clip(tmp_path / "a.mp4", 50)
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{path}'\n")
    with pytest.raises(MediaError, match=r"^b\.mp4 is not a video"):
        join([path, tmp_path / "b.mp4"], tmp_path / "film.mp4")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_broken_encoder_leaves_nothing_and_says_why(tmp_path, fake_ffmpeg):
    """The older film stays as well."""
    paths = [clip(tmp_path / f"{grey}.mp4", grey) for grey in (50, 150)]
    (tmp_path / "film.mp4").write_bytes(b"older")
    fake_ffmpeg('echo "[x @ 0x1] broken" >&2; exit 1', but_for="framecrc")
    with pytest.raises(EncodeFailed, match="broken"):
        join(paths, tmp_path / "film.mp4", fade_s=0.1)
    assert (tmp_path / "film.mp4").read_bytes() == b"older"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["150.mp4", "50.mp4", "bin", "film.mp4"]


def test_a_clip_that_ends_early_stays_on_its_last_frame(tmp_path):
    """A damaged end costs no film that is paid for: the length is kept."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(30)]
    encode(tmp_path / "b.mp4", noise, width=WIDTH, height=HEIGHT)
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 3] + bytes(len(whole) - len(whole) * 2 // 3))
    info = join([clip(tmp_path / "a.mp4", 50, 4), tmp_path / "b.mp4"], tmp_path / "film.mp4", fade_s=2 / 24)
    assert info.frames == 4 + 30 - 2


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_a_film_that_is_cancelled_ends_at_once(tmp_path, where):
    """The exception of `check` comes out, whichever frame it is, and no process or file is left."""
    paths = [clip(tmp_path / f"{grey}.mp4", grey, 40) for grey in (50, 150)]
    frames = []

    def check():
        if len(frames) >= (0 if where == "decoder" else 30):
            raise CancelRequested("no")

    with pytest.raises(CancelRequested):
        join(paths, tmp_path / "film.mp4", fade_s=0.1, check=check, report=lambda done, _: frames.append(done))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["150.mp4", "50.mp4"]


@pytest.mark.anyio
async def test_a_thread_whose_call_is_cancelled_ends(tmp_path, fake_ffmpeg):
    """Also while it waits for a decoder that hangs."""
    paths = [await anyio.to_thread.run_sync(clip, tmp_path / f"{grey}.mp4", grey) for grey in (50, 150)]
    fake_ffmpeg(f'case "$*" in *rawvideo*pipe:1) touch "{tmp_path}/began";; esac; exec sleep 600', but_for="framecrc")
    ended = threading.Event()

    def made():
        try:
            join(paths, tmp_path / "film.mp4", fade_s=0.1)
        finally:
            ended.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(anyio.to_thread.run_sync, made, abandon_on_cancel=True))
            while not await anyio.Path(tmp_path / "began").exists():
                await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            assert await anyio.to_thread.run_sync(ended.wait, 10)
    assert not [path async for path in anyio.Path(tmp_path).glob(".film*")]


def test_a_film_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    """The time limit grows with its length."""
    monkeypatch.setattr(film, "LIMIT_S", 0.0)
    monkeypatch.setattr(film, "LIMIT_PER_S", 0.0)
    with pytest.raises(EncodeFailed, match=r"a film of 0\.4 s was not encoded in time"):
        join([clip(tmp_path / "a.mp4", 50), clip(tmp_path / "b.mp4", 50)], tmp_path / "film.mp4", fade_s=0.1)
