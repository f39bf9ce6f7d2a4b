"""Several clips become one film: one size, one rate, cuts or cross-fades, and not a frame more or less.

    size    the first clip's; the others are scaled to cover it and cropped around their centre: there are no black bars
    rate    the first clip's; a clip of another rate keeps its length, to the nearest frame
    frames  those of all clips together, less the cross-fades, in each of which two clips are seen at once
    sound   kept where any clip has some, silence where a clip has none; it fades where the pictures do

Clips that are encoded alike, with hard cuts between them, are joined without encoding them again. Others are decoded
one after the other, frame by frame, into one encoder. At most two clips are open at a time, so memory does not depend
on how many there are.

Everything here blocks; callers run it in a thread, and cancelling them ends every ffmpeg.
"""

import os
import secrets
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from inference.errors import EncodeFailed, MediaError
from inference.media.child_process import raise_if_cancelled
from inference.media.clip import has_our_pixels, is_tagged, to_our_pixels
from inference.media.ffmpeg import POLL_S, STOPPED, UNTRUSTED, judge, no_start, run, stopped
from inference.media.video import VideoInfo, VideoWriter, from_os, probe

SAMPLE_RATE, CHANNELS = 48_000, 2
"""Of the film's sound: what video is recorded with. Each sample is 16 bits."""

LIMIT_S, LIMIT_PER_S = 120.0, 30.0
"""Longest time for a film: a fixed part, and a part for each of its seconds. Two cores encode a second of 1280x704 in
less than one (tests/bench/film.py)."""

DECODER_THREADS = "2"
"""Decoding is far faster than encoding, and every thread of a decoder holds frames of its own."""

SAME_RATE = 2e-4
"""Mean rates that differ by less are one: containers round times. 24 and 23.976 differ five times more."""

SAME_TIME_S = 1e-3
"""How far a frame may be from its exact time: some containers count in milliseconds."""

Frame = npt.NDArray[np.uint8]  # [height * 3/2, width]: yuv420p, BT.709, limited range
Frames = Generator[Frame, None, None]


@dataclass(frozen=True)
class Clip:
    """One clip of a film, as its file describes it."""

    path: Path
    info: VideoInfo


@dataclass(frozen=True)
class Plan:
    """What a film is made of. Frames are counted at the film's rate."""

    clips: tuple[Clip, ...]
    width: int  # pixels
    height: int  # pixels
    rate: Fraction  # frames a second
    clip_frames: tuple[int, ...]  # of each clip
    overlaps: tuple[int, ...]  # frames that each clip shares with the next one; as many as there are cuts

    @property
    def frames(self) -> int:
        """Of the whole film."""
        return sum(self.clip_frames) - sum(self.overlaps)

    @property
    def duration_s(self) -> float:
        """From the first frame to the end of the last."""
        return float(self.frames / self.rate)

    def start(self, number: int) -> int:
        """The frame of the film with which a clip begins."""
        return sum(self.clip_frames[:number]) - sum(self.overlaps[:number])


def overlaps(clip_frames: Sequence[int], fade_frames: int) -> tuple[int, ...]:
    """How many frames each clip shares with the next, where `fade_frames` are wanted.

    A fade takes at most half of each of its clips. So no frame belongs to two fades, and a clip that came out shorter
    than it was ordered costs a shorter fade and not the film.
    """
    return tuple(min(fade_frames, before // 2, after // 2) for before, after in pairwise(clip_frames))


def plan(clips: Sequence[Path], *, fade_s: float = 0.0) -> Plan:
    """Reads all clips, without decoding them. Raises MediaError naming the one that is no video, MachineFault."""
    found = tuple(Clip(path, probe(path)) for path in clips)
    first = found[0].info
    rate = rate_of(first.fps)
    frames = tuple(_frames_at(rate, clip.info) for clip in found)
    return Plan(
        clips=found,
        width=first.width - first.width % 2,  # 4:2:0 needs even sides
        height=first.height - first.height % 2,
        rate=rate,
        clip_frames=frames,
        overlaps=overlaps(frames, round(fade_s * rate)),
    )


def join(
    clips: Sequence[Path],
    target: Path,
    *,
    fade_s: float = 0.0,
    check: Callable[[], None] = lambda: None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> VideoInfo:
    """Makes the film of at least one clip at `target`: an mp4 as VideoWriter writes it, with the clips' sound.

    `check` is called at every frame, and what it raises ends the work; `report` is told frames done of all. The clips
    stay. Raises MediaError where a clip is no video, EncodeFailed, also where it takes too long, and MachineFault;
    nothing is left behind then.
    """
    planned = plan(clips, fade_s=fade_s)
    give_up_at = time.monotonic() + LIMIT_S + LIMIT_PER_S * planned.duration_s

    def checked() -> None:
        check()
        raise_if_cancelled()
        if time.monotonic() > give_up_at:
            raise EncodeFailed(f"a film of {planned.duration_s:.1f} s was not encoded in time")

    with ExitStack() as left_behind:

        def partial(suffix: str) -> Path:
            path = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}{suffix}")
            left_behind.callback(path.unlink, missing_ok=True)
            return path

        try:
            made = partial(".mp4")
            if not (_is_uniform(planned) and _copy(planned, made, partial(".txt"), checked)):
                _encode(planned, made, checked, report)
            if any(clip.info.has_sound for clip in planned.clips):
                sound, pictures, made = partial(".pcm"), made, partial(".mp4")
                _write_sound(planned, sound, checked)
                _add_sound(pictures, sound, made, give_up_at - time.monotonic())
            info = probe(made)
            if not _is_exact(planned, info):
                raise EncodeFailed(
                    f"the film became {info.frames} frames in {info.duration_s:.3f} s, "
                    f"not {planned.frames} in {planned.duration_s:.3f} s"
                )
            made.replace(target)
        except OSError as error:
            raise from_os(error) from error
        except TimeoutError as error:
            raise EncodeFailed(f"a film of {planned.duration_s:.1f} s was not encoded in time") from error
    report(planned.frames, planned.frames)
    return info


def rate_of(fps: float) -> Fraction:
    """The exact rate for a mean one: 23.976 is 24000/1001, and 23.9998 is 24."""
    near = (Fraction(round(fps)), Fraction(round(fps * 1.001) * 1000, 1001))
    best = min(near, key=lambda rate: abs(rate - fps))
    return best if best and abs(best - fps) < SAME_RATE * fps else Fraction(fps).limit_denominator(1001)


def _frames_at(rate: Fraction, info: VideoInfo) -> int:
    return info.frames if _is_regular(rate, info) else max(1, round(info.duration_s * rate))


def _is_regular(rate: Fraction, info: VideoInfo) -> bool:
    """Whether every frame of a clip is where a constant rate has it."""
    expected_s = [float(number / rate) for number in range(info.frames + 1)]
    return all(
        abs(start_s - exact_s) <= SAME_TIME_S
        for start_s, exact_s in zip((*info.starts_s, info.duration_s), expected_s, strict=True)
    )


def _is_exact(planned: Plan, info: VideoInfo) -> bool:
    return info.frames == planned.frames and _is_regular(planned.rate, info)


# Joined as they are


def _is_uniform(planned: Plan) -> bool:
    """Whether all clips are as VideoWriter writes them, and one decoder can go from each to the next."""
    return (
        not any(planned.overlaps)
        and len({clip.info.parameters for clip in planned.clips}) == 1
        and all(
            has_our_pixels(clip.info) and is_tagged(clip.info) and _is_regular(planned.rate, clip.info)
            for clip in planned.clips
        )
    )


def _copy(planned: Plan, target: Path, script: Path, check: Callable[[], None]) -> bool:
    """Joins the pictures without encoding them; False where the result is not exact, so that they have to be."""
    check()
    script.write_text("ffconcat version 1.0\n" + "".join(_entries(planned)))
    options = ["-loglevel", "error", *UNTRUSTED, "-f", "concat", "-safe", "0", "-i", f"file:{script}"]
    options += ["-map", "0:v:0", "-an", "-c", "copy", "-movflags", "+faststart", "-f", "mp4", "-y", f"file:{target}"]
    ran = run(options, timeout_s=LIMIT_S)
    if ran.code in STOPPED:
        raise stopped(ran.code)
    try:
        return not ran.code and _is_exact(planned, probe(target))
    except MediaError:
        return False


def _entries(planned: Plan) -> Iterator[str]:
    """The lines of a script for ffmpeg's concat demuxer (ffmpeg-formats, 4.5).

    It adds up durations in microseconds. Each is the difference of two rounded times and not rounded by itself, so that
    the sum is never more than half a microsecond off, however many there are.
    """
    times_us = [round(planned.start(number) / planned.rate * 1_000_000) for number in range(len(planned.clips))]
    times_us.append(round(planned.frames / planned.rate * 1_000_000))
    for clip, (start_us, end_us) in zip(planned.clips, pairwise(times_us), strict=True):
        quoted = str(clip.path.absolute()).replace("'", "'\\''")
        yield f"file 'file:{quoted}'\noption format_whitelist mov\nduration {(end_us - start_us) / 1e6:.6f}\n"


# Encoded again


def _encode(planned: Plan, target: Path, check: Callable[[], None], report: Callable[[int, int], None]) -> None:
    with (
        VideoWriter(target, width=planned.width, height=planned.height, fps=planned.rate, pixels="yuv420p") as writer,
        closing(_frames(planned, check)) as frames,
    ):
        for frame in frames:
            check()
            writer.write(frame)
            report(writer.frames, planned.frames)


def _frames(planned: Plan, check: Callable[[], None]) -> Frames:
    """Every frame of the film. At a fade two clips are open, else one."""
    before: Frames | None = None
    current: Frames | None = None
    fade = 0  # frames that this clip shares with the one before
    try:
        for clip, frames, next_fade in zip(planned.clips, planned.clip_frames, (*planned.overlaps, 0), strict=True):
            current = _decoded(planned, clip, frames, check)
            if before is not None:
                for step in range(1, fade + 1):
                    yield _mixed(next(before), next(current), step / (fade + 1))
                before.close()
            for _ in range(frames - fade - next_fade):
                yield next(current)
            before, fade = current, next_fade
    finally:
        for opened in (before, current):
            if opened is not None:
                opened.close()


def _mixed(before: Frame, after: Frame, share: float) -> Frame:
    """Both pictures at once; `share` is how much is seen of the second one, 0..1."""
    weight = round(share * 256)
    mixed = (before.astype(np.uint16) * (256 - weight) + after.astype(np.uint16) * weight + 128) >> 8
    return mixed.astype(np.uint8)


def _decoded(planned: Plan, clip: Clip, frames: int, check: Callable[[], None]) -> Frames:
    """Exactly `frames` frames of a clip in the film's size and rate; a clip that ends early stays on its last frame."""
    options = ["-loglevel", "error", "-threads", DECODER_THREADS, *UNTRUSTED, "-f", "mov"]
    options += ["-i", f"file:{clip.path.absolute()}", "-map", "0:v:0", "-vf", ",".join(_filters(planned, clip.info))]
    options += ["-frames:v", str(frames), "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(  # noqa: S603  a fixed program, fixed words and a path
                [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,  # the terminal's Ctrl-C is for the parent to act on
            )
        except (OSError, RuntimeError) as error:
            raise no_start(error) from error
        with process:
            try:
                assert process.stdout is not None  # noqa: S101  Popen was asked for a pipe
                for _ in range(frames):
                    frame = np.empty((planned.height * 3 // 2, planned.width), np.uint8)
                    if not _filled(process.stdout.fileno(), frame, check):
                        code = process.wait()
                        said.seek(0)
                        lines = said.read().decode(errors="replace").splitlines()
                        raise judge(code, lines or ["it has fewer frames than it says"])
                    yield frame
            finally:
                process.kill()  # does nothing to one that has ended


def _filters(planned: Plan, info: VideoInfo) -> Iterator[str]:
    if not _is_regular(planned.rate, info):
        yield f"fps={planned.rate.numerator}/{planned.rate.denominator}:start_time=0:round=near"
    yield "tpad=stop_mode=clone:stop=-1"
    if (info.width, info.height) != (planned.width, planned.height):
        scale = max(Fraction(planned.width, info.width), Fraction(planned.height, info.height))
        # Rounded up to even sides, so that the picture covers the film's at every edge.
        width, height = (2 * -(-side * scale // 2) for side in (info.width, info.height))
        yield f"scale={width}:{height}:flags=lanczos+accurate_rnd+full_chroma_int"
        yield f"crop={planned.width}:{planned.height}"
    yield from to_our_pixels(info)


def _filled(fd: int, frame: Frame, check: Callable[[], None]) -> bool:
    """Fills a frame from a pipe; False where the pipe ended before."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN | select.POLLHUP)
    left = frame.data.cast("B")
    while left:
        if not waiting.poll(POLL_S * 1000):
            check()
            continue
        got = os.readv(fd, [left])
        if not got:
            return False
        left = left[got:]
    return True


# Sound


def _write_sound(planned: Plan, path: Path, check: Callable[[], None]) -> None:
    """Writes the sound of the whole film as 16-bit samples: on the disk, so that it takes no memory."""

    def sample(frame: int) -> int:
        return round(frame / planned.rate * SAMPLE_RATE)

    with path.open("wb") as file:
        tail = np.zeros((0, CHANNELS), np.int16)  # of the clip before: what is heard together with this one
        for number, clip in enumerate(planned.clips):
            check()
            start = planned.start(number)
            first, last = sample(start), sample(start + planned.clip_frames[number])
            heard = _samples(clip, last - first)
            share = np.linspace(0, 1, len(tail) + 2)[1:-1, None]
            heard[: len(tail)] = np.rint(tail * (1 - share) + heard[: len(tail)] * share)
            is_last = number == len(planned.clips) - 1
            alone = len(heard) if is_last else sample(planned.start(number + 1)) - first
            file.write(heard[:alone].tobytes())
            tail = heard[alone:]


def _samples(clip: Clip, count: int) -> npt.NDArray[np.int16]:
    """The first samples of a clip's sound, then silence: int16 [count, 2]."""
    samples = np.zeros((count, CHANNELS), np.int16)
    if clip.info.has_sound:
        options = ["-loglevel", "error", *UNTRUSTED, "-f", "mov", "-i", f"file:{clip.path.absolute()}"]
        options += ["-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-t", f"{count / SAMPLE_RATE:.6f}"]
        options += ["-ar", str(SAMPLE_RATE), "-ac", str(CHANNELS), "-f", "s16le", "pipe:1"]
        ran = run(options, timeout_s=LIMIT_S)
        if ran.code:
            raise judge(ran.code, ran.said.splitlines())
        heard = np.frombuffer(ran.out, "<i2").reshape(-1, CHANNELS)[:count]
        samples[: len(heard)] = heard
    return samples


def _add_sound(pictures: Path, sound: Path, target: Path, timeout_s: float) -> None:
    options = ["-loglevel", "error", *UNTRUSTED, "-f", "mov", "-i", f"file:{pictures}", "-f", "s16le"]
    options += ["-ar", str(SAMPLE_RATE), "-ac", str(CHANNELS), "-i", f"file:{sound}", "-map", "0:v:0", "-map", "1:a:0"]
    options += ["-c:v", "copy", "-c:a", "aac", "-b:a", "192k", "-movflags", "+faststart", "-f", "mp4", "-y"]
    ran = run([*options, f"file:{target}"], timeout_s=timeout_s)
    if ran.code:
        raise judge(ran.code, ran.said.replace(str(target), "the film").splitlines())
