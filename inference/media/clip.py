"""Cuts, converts and shrinks clips made elsewhere. Everything here blocks; callers run it in a thread."""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from inference.errors import EncodeFailed, MediaError
from inference.media.ffmpeg import UNTRUSTED, judge, run
from inference.media.video import CRF, PRESET, TAG_BT709, TO_BT709, VideoInfo, from_os, probe

HD_WIDTH, SD_HEIGHT = 1280, 576
"""From this width on, and above this height, players assume BT.709 for a clip without a matrix tag."""

RECODE_TIMEOUT_S = 120.0
"""The longest clip that is encoded again, ten seconds of 1080p, takes eight seconds in practice."""

COPY_TAGGED = (
    "-c:v",
    "copy",
    "-bsf:v",
    "h264_metadata=video_full_range_flag=0:colour_primaries=1:transfer_characteristics=1:matrix_coefficients=1",
)
"""Changes only the tags: limited range, and BT.709, which is 1 in all three tables of H.264 (annex E)."""

EVERY_FRAME = ("-fps_mode", "passthrough", "-enc_time_base", "demux")
"""Every frame keeps its own time. By default ffmpeg makes the rate constant, and drops frames that are closer together
than the average."""

SHRINK_SHARES = (0.92, 0.6, 0.3)
"""Shares of a size limit that the encoder is given as its target, one after the other: it misses the target by a few
percent, and by more for a clip that is short or noisy."""


ALPHA = re.compile("rgba|bgra|argb|abgr|gbrap|yuva|ya|pal8")
"""How pixel formats begin that have transparency."""

RGB = re.compile("rgb|bgr|argb|abgr|gbr|pal8|gray|ya")
"""How pixel formats begin to which no matrix belongs."""

OVER_WHITE = (
    "format=rgba,split[under][over];[under]drawbox=color=white:replace=1:t=fill[white];[white][over]overlay=format=rgb"
)
"""Pictures with transparency, composed over white as photos are. Without it, whatever colour lies below would show."""

EVEN = "crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0"
"""H.264 with 4:2:0 chroma needs even sides; at most one pixel is cut off, at the right and at the bottom."""


def tidy(
    source: Path,
    target: Path,
    *,
    length_s: float | None = None,
    demuxer: str = "mov",
    keep_container: bool = True,
    timeout_s: float = RECODE_TIMEOUT_S,
) -> VideoInfo:
    """Moves a foreign video to `target` in the format that VideoWriter writes, cut to `length_s`.

    `demuxer` is ffmpeg's reader for its format, `keep_container` says whether that is an mp4, which may stay as it is.

    A cut is exact at any frame rate: it keeps the frames that lie within that time by half at least.

    As little as possible is changed: a clip with the right pixels, tags and an index at the front is only moved, and if
    only tags or the index are wrong, no picture is encoded again. Sound stays.
    Raises MediaError where it is no video, EncodeFailed, MachineFault; `source` is unchanged then.
    """
    info = probe(source, demuxer=demuxer)
    sound = ["-c:a", "copy" if keep_container else "aac"]
    frames = info.frames if length_s is None else _frames_within(info, length_s)
    as_wanted = has_our_pixels(info) and frames == info.frames
    partial = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if as_wanted and keep_container and info.faststart and is_tagged(info):
            source.replace(target)
            return info
        if as_wanted:
            _recode(source, partial, info, [*COPY_TAGGED, *sound], demuxer=demuxer, timeout_s=timeout_s)
        else:
            cut = () if frames == info.frames else _cut(info, frames)
            options = [*_encode(info), "-crf", str(CRF), "-c:a", "aac", *cut]
            _recode(source, partial, info, options, demuxer=demuxer, timeout_s=timeout_s)
        info = _written(partial)
        if info.frames != frames:
            raise EncodeFailed(f"{source.name} became {info.frames} frames, not {frames}")
        partial.replace(target)
    except OSError as error:
        raise from_os(error) from error
    finally:
        partial.unlink(missing_ok=True)
    return info


def index_first(source: Path, target: Path) -> VideoInfo:
    """Moves an mp4 to `target` with its index at the front, so that it plays while it loads; no picture changes.

    Raises MediaError where it is no video, EncodeFailed, MachineFault; `source` is unchanged then.
    """
    info = probe(source)
    partial = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if info.faststart:
            source.replace(target)
            return info
        _recode(source, partial, info, ["-c", "copy"])
        info = _written(partial)
        partial.replace(target)
    except OSError as error:
        raise from_os(error) from error
    finally:
        partial.unlink(missing_ok=True)
    return info


def shrink(source: Path, target: Path, max_bytes: int) -> VideoInfo:
    """Encodes an mp4 again, uncut and with the best quality that fits into `max_bytes`.

    Raises MediaError where it is no video, EncodeFailed where it does not get small enough, MachineFault.
    """
    info = probe(source)
    partial = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        for share in SHRINK_SHARES:
            rate = int(max_bytes * 8 * share / info.duration_s)  # bits a second
            limit = ["-b:v", str(rate), "-maxrate", str(rate), "-bufsize", str(rate // 2)]
            _recode(source, partial, info, [*_encode(info), *limit, "-c:a", "copy"])
            if partial.stat().st_size <= max_bytes:
                partial.replace(target)
                return _written(target)
    except OSError as error:
        raise from_os(error) from error
    finally:
        partial.unlink(missing_ok=True)
    raise EncodeFailed(f"{source.name}: {info.duration_s:.1f} s of video do not fit into {max_bytes} bytes")


def has_our_pixels(info: VideoInfo) -> bool:
    """Whether the pictures of a clip are H.264, yuv420p, limited range and BT.709, tagged so or not."""
    is_bt709 = {info.color_primaries, info.color_trc} <= {"bt709", "unknown"} and _matrix(info) == "bt709"
    return (info.codec, info.pix_fmt) == ("h264", "yuv420p") and info.color_range != "pc" and is_bt709


def is_tagged(info: VideoInfo) -> bool:
    """Whether a clip says of its pictures what a VideoWriter says."""
    said = (info.color_range, info.color_space, info.color_primaries, info.color_trc)
    return said == ("tv", "bt709", "bt709", "bt709")


def _matrix(info: VideoInfo) -> str:
    """The matrix of a clip; without a tag, the one that players assume for its size (mpv: `csputils.c`)."""
    if info.color_space != "unknown":
        return info.color_space
    return "bt709" if info.width >= HD_WIDTH or info.height > SD_HEIGHT else "smpte170m"


def to_our_pixels(info: VideoInfo) -> list[str]:
    """Filters that turn the pictures of a clip into those that a VideoWriter writes: even sides, 4:2:0, BT.709."""
    filters = [TO_BT709, TAG_BT709]
    if info.color_space == "unknown" and not RGB.match(info.pix_fmt):
        filters.insert(0, f"setparams=colorspace={_matrix(info)}")
    if ALPHA.match(info.pix_fmt):
        filters.insert(0, OVER_WHITE)
    if info.width % 2 or info.height % 2:
        filters.insert(0, EVEN)
    return filters


def _encode(info: VideoInfo) -> list[str]:
    """Options to encode the pictures of a clip as a VideoWriter does, each at its own time."""
    return ["-vf", ",".join(to_our_pixels(info)), "-c:v", "libx264", "-preset", PRESET, *EVERY_FRAME]


def _frames_within(info: VideoInfo, length_s: float) -> int:
    """How many frames lie in the first `length_s` of a clip, the last one by half at least; never none."""
    ends_s = [*info.starts_s[1:], info.duration_s]
    middles_s = [(start_s + end_s) / 2 for start_s, end_s in zip(info.starts_s, ends_s, strict=True)]
    return max(1, sum(middle_s <= length_s + 1e-6 for middle_s in middles_s))


def _cut(info: VideoInfo, frames: int) -> tuple[str, str]:
    """Ends picture and sound in the middle of the last frame to keep, so that rounding cannot add a frame."""
    end_s = info.starts_s[frames] if frames < info.frames else info.duration_s
    return "-t", f"{(info.starts_s[frames - 1] + end_s) / 2:.6f}"


def _written(path: Path) -> VideoInfo:
    """Probes what ffmpeg wrote. Raises EncodeFailed where it is no video."""
    try:
        return probe(path)
    except MediaError as error:
        raise EncodeFailed(f"what ffmpeg wrote cannot be read: {error}") from None


def _recode(
    source: Path,
    target: Path,
    info: VideoInfo,
    options: Sequence[str],
    *,
    demuxer: str = "mov",
    timeout_s: float = RECODE_TIMEOUT_S,
) -> None:
    command = ["-loglevel", "error", *UNTRUSTED, "-f", demuxer, "-i", f"file:{source.absolute()}"]
    command += ["-map", "0:v:0", "-map", "0:a:0?", *options, "-movflags", "+faststart", "-f", "mp4", "-y"]
    try:
        ran = run([*command, f"file:{target}"], timeout_s=timeout_s)
    except TimeoutError as error:
        raise EncodeFailed(f"{info.duration_s:.1f} s of video took over {timeout_s:g} s to encode") from error
    if ran.code:
        raise judge(ran.code, ran.said.replace(str(target), source.name).splitlines())
