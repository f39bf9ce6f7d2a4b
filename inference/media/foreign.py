"""Videos made elsewhere, in whatever format: what they are, whether they can be used, and as the mp4 that we deliver.

A video is untrusted, whoever sends it: one that a task brings comes from a stranger, and one of a ComfyUI server was
made by any workflow. So its format is found in its first bytes and never in its name, ffmpeg is told which demuxer to
use and may open no URL, and size, length and time are limited. Everything here blocks; callers run it in a thread, and
cancelling them ends ffmpeg.
"""

import signal
from pathlib import Path

from inference.errors import InvalidVideo, MachineFault, MediaError
from inference.media.clip import tidy
from inference.media.ffmpeg import STOPPED, UNTRUSTED, run, stopped
from inference.media.video import VideoInfo, probe

MAX_DURATION_S = 600.0
MAX_FRAMES = 36_000
"""600 s at 60 frames a second: far beyond what any workflow makes today, and minutes of encoding."""

DECODED_FRAMES = 3
"""What is decoded of a video to see that it can be: the first picture, and two that build on it."""

CPU_LIMIT_S = 20
"""For ffmpeg to decode the first pictures, which takes well under a second. Processor time, so that a busy machine
refuses nobody's video."""

WALL_LIMIT_S = 60.0
"""For delays that use no processor time: a disk that hangs, a paused process."""

RECODE_TIMEOUT_S = 600.0
"""A minute of 1080p takes about one on two cores."""

DAMAGED = "the video is damaged or cut short: it does not decode"

HEAD_BYTES = 4096
"""How much of a file is read to tell its format."""

# The first box of an mp4 or mov (ISO/IEC 14496-12, QuickTime File Format).
BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
ANIMATION = 0x02
"""The bit of WebP's VP8X chunk that says so (WebP container specification)."""

H264_OF_BROWSERS = {"yuv420p", "yuvj420p"}
"""8 bits and 4:2:0, in limited and in full range: all that browsers play of H.264."""
WEBM_CODECS = {"vp8", "vp9", "av1"}

SUFFIXES = {"mp4": ".mp4", "mov": ".mov", "webm": ".webm", "mkv": ".mkv", "gif": ".gif", "png": ".png", "webp": ".webp"}
"""How files of a container's name are called."""

DEMUXERS = {
    "mp4": "mov",
    "mov": "mov",
    "webm": "matroska",
    "mkv": "matroska",
    "gif": "gif",
    "png": "apng",
    "webp": "webp_anim",
}
"""Containers that are read, and what ffmpeg calls the reader of each."""


def container(path: Path) -> str | None:
    """The container of a video, one of DEMUXERS, by the file's first bytes; None where it is none of them.

    A still PNG or WebP is not a video. Raises OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[4:8] in BOXES:
        return "mov" if head[4:12] == b"ftypqt  " or head[4:8] != b"ftyp" else "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):  # EBML; the document type is the element 42 82 (RFC 8794, 11.2.6)
        _, _, doc_type = head.partition(b"\x42\x82")
        return "webm" if doc_type[1:5] == b"webm" else "mkv"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):  # acTL makes it an animation; it may come after the metadata
        return "png" if b"acTL" in head.partition(b"IDAT")[0] else None
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return "webp" if head[20] & ANIMATION else None
    return None


def what_is(path: Path) -> str:
    """`mp4` or `webm` for a video that browsers play as it is, else words for a log line, such as `mp4 of hevc`.

    `mp4` is H.264 of 8 bits and 4:2:0 in an mp4; `webm` is VP8, VP9 or AV1 of 4:2:0 in a WebM.
    Raises InvalidVideo where it is no video, MachineFault.
    """
    kind, info = _read(path)
    if kind == "mp4" and info.codec == "h264" and info.pix_fmt in H264_OF_BROWSERS:
        return kind
    if kind == "webm" and info.codec in WEBM_CODECS and "420p" in info.pix_fmt:
        return kind
    return f"{kind} of {info.codec} ({info.pix_fmt})"


def verify(path: Path) -> VideoInfo:
    """Checks that a video that a task brings can be used: its format, size and length, and that its start decodes.

    All packets are read, and the first pictures decoded. Raises InvalidVideo, MachineFault.
    """
    kind, info = _read(path)
    _bound(info)
    limits = ["-timelimit", str(CPU_LIMIT_S), "-abort_on", "empty_output_stream"]
    options = [*UNTRUSTED, "-f", DEMUXERS[kind], "-i", f"file:{path.absolute()}", "-map", "0:v:0"]
    try:
        ran = run([*limits, *options, "-frames:v", str(DECODED_FRAMES), "-f", "null", "-"], timeout_s=WALL_LIMIT_S)
    except TimeoutError as error:
        raise MachineFault(f"this machine did not read the video within {WALL_LIMIT_S:g} s") from error
    if ran.code == -signal.SIGXCPU:
        raise InvalidVideo(f"the video takes more than {CPU_LIMIT_S} s of processor time to decode")
    if ran.code in STOPPED:
        raise stopped(ran.code)
    # Also where ffmpeg was refused memory: a few pictures of that size need little, so the file asks for too much. On
    # a machine that has none left, the kernel ends the process.
    if ran.code:
        raise InvalidVideo(DAMAGED)
    return info


def as_mp4(source: Path, target: Path, *, timeout_s: float = RECODE_TIMEOUT_S) -> VideoInfo:
    """Makes the H.264 mp4 at `target` that VideoWriter would have written of a foreign video's pictures.

    Every picture keeps its own time, and the last one stays as long as the one before it. Transparency lies over white,
    odd sides lose one pixel at the right or at the bottom, and sound becomes AAC. As little as possible is changed:
    pictures that are right already are copied, and an mp4 that is right as a whole is moved, so `source` may be gone
    afterwards. HDR is not tone-mapped.
    Raises InvalidVideo where it is no video or beyond the limits above, EncodeFailed, MachineFault; `source` is
    unchanged then.
    """
    kind, info = _read(path=source)
    _bound(info)
    return tidy(source, target, demuxer=DEMUXERS[kind], keep_container=kind == "mp4", timeout_s=timeout_s)


def _read(path: Path) -> tuple[str, VideoInfo]:
    kind = _container(path)
    try:
        return kind, probe(path, demuxer=DEMUXERS[kind])
    except InvalidVideo:
        raise
    except MediaError as error:
        raise InvalidVideo(DAMAGED) from error


def _container(path: Path) -> str:
    try:
        kind = container(path)
    except OSError as error:
        raise MachineFault(f"this machine cannot read the video: {error.strerror}") from error
    if kind is None:
        raise InvalidVideo(
            "the file is not a video that is known here: MP4, MOV, WebM, MKV, or an animated GIF, PNG or WebP"
        )
    return kind


def _bound(info: VideoInfo) -> None:
    if min(info.width, info.height) < 2:
        raise InvalidVideo(f"the video is only {info.width}x{info.height} pixels")
    if info.duration_s > MAX_DURATION_S:
        raise InvalidVideo(f"the video lasts {info.duration_s:.0f} s; the limit is {MAX_DURATION_S:g} s")
    if info.frames > MAX_FRAMES:
        raise InvalidVideo(f"the video has {info.frames} frames; the limit is {MAX_FRAMES}")
