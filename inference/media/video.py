"""Writes videos by streaming frames into ffmpeg, and probes finished files.

Both block; callers run them in a thread.
"""

import re
import secrets
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from inference.errors import NO_ROOM_ERRNOS, DiskFull, EncodeFailed, InvalidVideo, MachineFault, MediaError
from inference.media.ffmpeg import MAX_PIXELS, STDERR_LINES, STOPPED, UNTRUSTED, judge, no_start, run, stopped
from inference.task import Video

CRF = 18
"""Constant quality of x264: 18 is about where its loss stops being visible (trac.ffmpeg.org/wiki/Encode/H.264)."""

PRESET = "veryfast"
"""CPU time of 121 frames of 1280x704 (a zoom over the sample photo, 2 cores): 3.5 s, 0.8 MB, 42.3 dB. `superfast` is
2.5 s but 2.9 MB to upload; `medium` is 13 s, 1.0 MB and 43.8 dB: it would keep a GPU waiting for nothing seen."""

MAX_FPS = 240.0

TO_BT709 = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p"
"""RGB, or YUV of another matrix or range, to limited-range YUV by BT.709's matrix, which players expect at this size;
the scaler's own is BT.601's. Primaries and transfer stay: those of ordinary video differ by a few levels."""

TAG_BT709 = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
"""Writes these tags. As output options, primaries and transfer would be lost on the way (ffmpeg 9.0)."""

FINISH_TIMEOUT_S = 120.0
"""For x264's lookahead (40 frames) and the second pass that moves the index to the front; seconds in practice."""

PROBE_TIMEOUT_S = 60.0
"""Probing reads packets without decoding them: milliseconds in practice."""


class VideoWriter:
    """Writes an mp4 at `path`, frame by frame: H.264, yuv420p, BT.709, index at the front.

    The file appears under its name only when the block ends well; when it ends badly, ffmpeg is killed and nothing
    is left behind. Use from one thread.

    >>> with VideoWriter(folder / "clip.mp4", width=1280, height=704, fps=24) as writer:
    ...     for frame in frames:  # uint8 [704, 1280, 3], sRGB
    ...         writer.write(frame)
    >>> writer.video(seed=7)

    Raises EncodeFailed; DiskFull where there was no room for the file; MachineFault where ffmpeg could not start, was
    stopped from outside or got no memory. An exception of the block itself comes out as it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float | Fraction,
        pixels: Literal["rgb24", "yuv420p"] = "rgb24",
        metadata: Mapping[str, str] | None = None,  # mp4 tags: title, comment, …
    ) -> None:
        """`pixels`: what `write` takes; yuv420p is BT.709 in limited range already, and is not converted."""
        for name, side in (("width", width), ("height", height)):
            if side < 2 or side % 2:
                raise EncodeFailed(f"{name} is {side}: H.264 with 4:2:0 chroma needs an even number of pixels")
        if not 0 < fps <= MAX_FPS:
            raise EncodeFailed(f"fps is {fps}: it must be above 0 and at most {MAX_FPS:g}")
        self.path = path
        self.width = width
        self.height = height
        self.fps = Fraction(fps).limit_denominator(1001)  # 23.976… is 24000/1001
        self.frames = 0  # written so far
        self.size_bytes = 0  # of the finished file
        self._pixels = pixels
        self._shape = (height, width, 3) if pixels == "rgb24" else (height * 3 // 2, width)
        self._metadata = dict(metadata or {})
        self._partial = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._said: deque[str] = deque(maxlen=STDERR_LINES)

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(  # noqa: S603  a fixed command; the only foreign words are metadata values
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # A session of its own, so that the terminal's Ctrl-C does not reach ffmpeg. If this process is
                # killed, the pipe closes, and ffmpeg ends by itself.
                start_new_session=True,
            )
        except (OSError, RuntimeError) as error:
            raise no_start(error) from error
        # Read in a thread: a full stderr pipe would block ffmpeg, which would block the writing.
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        return self

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Adds one frame. Returns when ffmpeg has taken it in; keeps nothing.

        uint8 [height, width, 3], sRGB; or uint8 [height * 3/2, width] for yuv420p: the rows of Y, then U, then V.
        """
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise EncodeFailed(
                f"frame {self.frames} is {frame.dtype} {list(frame.shape)}, expected uint8 {list(self._shape)}"
            )
        try:
            self._stdin.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            raise self._failure() from error
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._clean_up()

    def video(self, *, seed: int | None = None) -> Video:
        """The finished video, after the block has ended."""
        return Video(
            path=self.path,
            width=self.width,
            height=self.height,
            fps=float(self.fps),
            frames=self.frames,
            size_bytes=self.size_bytes,
            seed=seed,
        )

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101  Popen was asked for a pipe
        return self._process.stdin

    def _finish(self) -> None:
        if not self.frames:
            raise EncodeFailed("no frame was written")
        try:
            self._stdin.close()
            code = self._process.wait(FINISH_TIMEOUT_S)
        except OSError as error:
            raise self._failure() from error
        except subprocess.TimeoutExpired as error:
            raise EncodeFailed(f"ffmpeg took in every frame and did not end within {FINISH_TIMEOUT_S:g} s") from error
        if code:
            raise self._failure()
        try:
            self.size_bytes = self._partial.stat().st_size
            self._partial.replace(self.path)
        except OSError as error:
            raise from_os(error) from error

    def _failure(self) -> EncodeFailed | MachineFault:
        """The error for an ffmpeg that ended early."""
        with suppress(OSError):
            self._stdin.close()
        try:
            code = self._process.wait(FINISH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return EncodeFailed("ffmpeg stopped reading and did not end")
        self._listener.join()
        return judge(code, self._said)

    def _clean_up(self) -> None:
        """Leaves no process, no thread, no open pipe and no unfinished file, whatever happened before."""
        self._process.kill()  # does nothing to one that has ended
        with suppress(OSError):
            self._stdin.close()
        self._process.wait()
        self._listener.join()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._partial.unlink(missing_ok=True)

    def _listen(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            self._said.append(line.decode(errors="replace").replace(str(self._partial), self.path.name))

    def _command(self) -> list[str]:
        rate = f"{self.fps.numerator}/{self.fps.denominator}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error"]
        command += ["-f", "rawvideo", "-pix_fmt", self._pixels, "-video_size", f"{self.width}x{self.height}"]
        command += ["-framerate", rate, "-i", "pipe:0"]
        command += ["-vf", f"{TO_BT709},{TAG_BT709}" if self._pixels == "rgb24" else TAG_BT709]
        command += ["-c:v", "libx264", "-preset", PRESET, "-crf", str(CRF)]
        for key, value in self._metadata.items():
            command += ["-metadata", f"{key}={value}"]
        return [*command, "-movflags", "+faststart", "-f", "mp4", "-y", f"file:{self._partial}"]


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about its first video stream."""

    codec: str  # h264, …
    pix_fmt: str  # yuv420p, …
    color_range: str  # tv, pc, unknown
    color_space: str  # the matrix: bt709, …, unknown
    color_primaries: str
    color_trc: str  # transfer characteristics
    width: int  # pixels
    height: int  # pixels
    fps: float  # mean: frames / duration_s
    frames: int
    starts_s: tuple[float, ...]  # when each frame is shown, from the first one on
    duration_s: float  # from the first frame to the end of the last
    faststart: bool  # the index lies before the pictures: it plays while it loads
    parameters: str  # those of its decoder; clips can be joined without encoding them only where these are equal
    has_sound: bool


def probe(path: Path, *, demuxer: str = "mov") -> VideoInfo:
    """Reads a video's packets, without decoding them.

    Raises MediaError, of which InvalidVideo where its pictures are too large, and MachineFault as VideoWriter does.

    `demuxer` is ffmpeg's reader for the file's format: `mov` is the one for mp4.
    """
    options = [*UNTRUSTED, "-f", demuxer, "-i", f"file:{path.absolute()}", "-map", "0:v:0"]
    try:
        ran = run([*options, "-c", "copy", "-f", "framecrc", "pipe:1"], timeout_s=PROBE_TIMEOUT_S)
    except TimeoutError as error:
        raise MediaError(f"{path.name} could not be probed within {PROBE_TIMEOUT_S:g} s") from error
    if ran.code in STOPPED:
        raise stopped(ran.code)
    if too_large := TOO_LARGE.search(ran.said):
        raise InvalidVideo(f"the video is {too_large[1]}: more than {MAX_PIXELS / 1e6:.0f} megapixels")
    stream = STREAM_LINE.search(ran.said)
    packets = re.findall(rb"(?m)^0, +-?\d+, +(-?\d+), +(\d+),", ran.out)  # (pts, duration) in ticks
    tick = re.search(rb"(?m)^#tb 0: (\d+)/(\d+)$", ran.out)
    if ran.code or stream is None or tick is None or not packets:
        raise MediaError(f"{path.name} is not a video that can be read")
    starts = sorted(int(pts) for pts, _ in packets)
    tick_s = Fraction(int(tick[1]), int(tick[2]))
    duration_s = float((max(int(pts) + int(length) for pts, length in packets) - starts[0]) * tick_s)
    return VideoInfo(
        codec=stream["codec"],
        pix_fmt=stream["pix_fmt"],
        **_colour(stream["notes"] or ""),
        width=int(stream["width"]),
        height=int(stream["height"]),
        fps=len(packets) / duration_s if duration_s else 0.0,
        frames=len(packets),
        starts_s=tuple(float((start - starts[0]) * tick_s) for start in starts),
        duration_s=duration_s,
        faststart=_index_comes_first(path),
        # For H.264, the "extradata" are its sequence and picture parameter sets; ffmpeg tells their size and checksum.
        parameters=b" ".join(re.findall(rb"(?m)^#(?:extradata|codec_id|dimensions|sar) 0: *(.+)$", ran.out)).decode(),
        has_sound=AUDIO_LINE.search(ran.said) is not None,
    )


# A line of its own: a file's title, which anybody may choose, is printed with more in front of it.
#   Stream #0:0[0x1](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p(tv, bt709, progressive), 1280x704 [SAR …
STREAM_LINE = re.compile(
    r"(?m)^  Stream #0:\d+.*?: Video: (?P<codec>\w+).*?, (?P<pix_fmt>[a-z]\w*)(?:\((?P<notes>[^)]*)\))?,"
    r" (?P<width>\d+)x(?P<height>\d+)"
)


AUDIO_LINE = re.compile(r"(?m)^  Stream #0:\d+.*?: Audio: ")

TOO_LARGE = re.compile(r"Picture size (\d+x\d+) exceeds specified max pixel count")


def _colour(notes: str) -> dict[str, str]:
    """The colour tags in ffmpeg's notes on a pixel format: `tv, bt709, progressive`, `tv, bt709/unknown/unknown`."""
    found = dict.fromkeys(("color_range", "color_space", "color_primaries", "color_trc"), "unknown")
    for note in notes.split(", "):
        if note in {"tv", "pc"}:
            found["color_range"] = note
        elif note.count("/") == 2:
            found["color_space"], found["color_primaries"], found["color_trc"] = note.split("/")
        elif note and note != "progressive" and "first" not in note and "coded" not in note:
            found["color_space"] = found["color_primaries"] = found["color_trc"] = note  # one name for all three
    return found


def _index_comes_first(path: Path) -> bool:
    """Whether `moov` lies before `mdat`: a walk over the headers of the outermost boxes (ISO/IEC 14496-12, 4.2)."""
    with path.open("rb") as file:
        while len(header := file.read(8)) == 8:
            size, kind = int.from_bytes(header[:4]), header[4:]
            if kind in {b"moov", b"mdat"}:
                return kind == b"moov"
            if size == 1:  # a 64-bit size follows
                size = int.from_bytes(file.read(8)) - 8
            if size < 8:
                break
            file.seek(size - 8, 1)
    return False


def from_os(error: OSError) -> EncodeFailed | MachineFault:
    if error.errno in NO_ROOM_ERRNOS:
        return DiskFull("there is no room left for the video on this machine's disk")
    return EncodeFailed(f"the video could not be put in place: {error.strerror}")
