"""Starting ffmpeg, and what its end means. The binary is the one imageio-ffmpeg ships (it has no ffprobe).

Files that it reads are untrusted: every caller names the demuxer (`-f`), so that a playlist named .mp4 is not followed,
and passes UNTRUSTED before `-i`.
"""

import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from inference.errors import DiskFull, EncodeFailed, MachineFault, one_line
from inference.media.child_process import raise_if_cancelled

MAX_PIXELS = 4096 * 4096
"""Of one picture of a video, above 4K: a header of a few bytes may ask for gigabytes of memory."""

UNTRUSTED = ("-protocol_whitelist", "file,pipe", "-max_pixels", str(MAX_PIXELS))
"""Options for every input: it can make ffmpeg open no URL, and no larger picture is decoded."""

POLL_S = 0.05
"""How often a waiting caller looks whether it was cancelled. The end of ffmpeg wakes it at once."""

STDERR_LINES = 20
"""How much of what ffmpeg said last is kept."""

MAX_REASON_CHARS = 500

# Signals sent to ffmpeg from outside, by the kernel out of memory or a shutdown. On SIGTERM and SIGINT it exits with
# 255 and no message. A crash (SIGSEGV, SIGABRT) may happen again with the same frames on any machine.
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
STOPPED_CODE = 255
NO_MEMORY = "Cannot allocate memory"

NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
"""NO_ROOM_ERRNOS in words, as ffmpeg passes them on."""


@dataclass(frozen=True)
class Ran:
    """An ffmpeg that has ended by itself."""

    code: int  # below 0: the signal that ended it
    out: bytes  # what it wrote to pipe:1
    said: str  # what it wrote to stderr


def run(options: Sequence[str | Path], *, timeout_s: float) -> Ran:
    """Runs ffmpeg to its end and returns what it said. Blocks; where its caller's task is cancelled, ffmpeg is killed.

    Raises TimeoutError after `timeout_s` of wall-clock time, MachineFault where it could not start.
    """
    try:
        process = subprocess.Popen(  # noqa: S603  a fixed program; callers pass fixed words and paths
            [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent to act on
        )
    except (OSError, RuntimeError) as error:
        raise no_start(error) from error
    give_up_at = time.monotonic() + timeout_s
    with process:
        try:
            while True:
                try:
                    out, said = process.communicate(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    raise_if_cancelled()
                    if time.monotonic() > give_up_at:
                        raise TimeoutError(f"ffmpeg ran for {timeout_s:g} s") from None
                else:
                    return Ran(process.returncode, out, said.decode(errors="replace"))
        finally:
            process.kill()  # does nothing to one that has ended


def no_start(error: OSError | RuntimeError) -> MachineFault:
    """The error for an ffmpeg that did not start. imageio-ffmpeg raises RuntimeError when it finds no binary."""
    return MachineFault(one_line(f"ffmpeg did not start: {error}", MAX_REASON_CHARS))


def stopped(code: int) -> MachineFault:
    """The error for an ffmpeg that was ended from outside."""
    by = signal.Signals(-code).name if code < 0 else "a signal"
    return MachineFault(f"ffmpeg was stopped by {by}: this machine is out of memory or shutting down")


def judge(code: int, lines: Iterable[str]) -> EncodeFailed | MachineFault:
    """The error for an ffmpeg that ended badly, from its exit code and the lines that it said."""
    said = deque(lines, maxlen=STDERR_LINES)
    text = " ".join(said)
    if any(reason in text for reason in NO_ROOM) or code == -signal.SIGXFSZ:
        return DiskFull("there is no room left for the video on this machine's disk")
    if NO_MEMORY in text:
        return MachineFault("this machine has no memory left to encode the video")
    if code in STOPPED or (code == STOPPED_CODE and not said):
        return stopped(code)
    if code < 0:
        return EncodeFailed(f"ffmpeg crashed: {signal.Signals(-code).name}")
    # Without the prefix of ffmpeg's component: [libx264 @ 0x55…]
    reason = re.sub(r"^\[[^]]*\] *", "", said[0].strip()) if said else "it did not say why"
    return EncodeFailed(one_line(f"ffmpeg ended with {code}: {reason}", MAX_REASON_CHARS))
