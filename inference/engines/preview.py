"""The preview engine: a smooth camera move over the still photo. No model, no GPU, and not a generation.

It lets a laptop try queue, worker and page within seconds, with a real mp4 of the real size. The camera move is chosen
by the prompt (English or Korean); without one it is a gentle push in. The file's metadata say that it is a preview.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
from PIL import Image

from inference.engines.base import Job, photo_of, run_in_thread
from inference.errors import InvalidRequest
from inference.media import photo as photos
from inference.media.video import VideoWriter
from inference.task import LAST_PHOTO, MAX_DURATION_S, MIN_DURATION_S, GenerationRequest, Video

FPS = 24

# The framing of Wan2.2 5B, for which the preview stands in (github.com/Wan-Video/Wan2.2, wan_ti2v_5B.py).
MAX_AREA_PX = 1280 * 704
MULTIPLE_PX = 32

METADATA = {"title": "Preview", "comment": "preview: camera move over a still photo, not a generation"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class View:
    """What the camera sees: 1/zoom of the frame, at a position within the rest."""

    zoom: float = 1.0  # at least 1: the view never leaves the photo
    x: float = 0.0  # -1 the left edge of the photo, 0 the middle, 1 the right edge
    y: float = 0.0  # -1 the top edge, 1 the bottom edge


@dataclass(frozen=True)
class Move:
    """A camera move from one view to another."""

    start: View
    end: View

    @property
    def closest(self) -> float:
        """The larger zoom of both views."""
        return max(self.start.zoom, self.end.zoom)

    def at(self, progress: float) -> View:
        """The view at 0..1 of the duration: eased at both ends, and zooming by equal ratios in equal steps."""
        done = ease(progress)
        start, end = self.start, self.end
        return View(
            zoom=start.zoom * (end.zoom / start.zoom) ** done,
            x=start.x + (end.x - start.x) * done,
            y=start.y + (end.y - start.y) * done,
        )


PUSH = Move(View(1.0), View(1.12))
ZOOM_IN = Move(View(1.0), View(1.35))
ZOOM_OUT = Move(ZOOM_IN.end, ZOOM_IN.start)
PAN_RIGHT = Move(View(1.2, x=-1), View(1.2, x=1))
PAN_LEFT = Move(PAN_RIGHT.end, PAN_RIGHT.start)
TILT_DOWN = Move(View(1.2, y=-1), View(1.2, y=1))
TILT_UP = Move(TILT_DOWN.end, TILT_DOWN.start)


def _english(verbs: str, direction: str) -> str:
    """A verb of the camera with a direction at most four words later, in the same clause.

    "from left to right" goes right: a direction that is only where the move comes from does not count.
    """
    return rf"\b(?:{verbs})(?:[ -]+(?!from\b)\w+){{0,4}}?(?:[ -]+from(?: the)? \w+ to(?: the)?)?[ -]+(?:{direction})\b"


def _korean(side: str) -> str:
    """A side as the target of a movement (왼쪽으로), not as a place (왼쪽에 있는, 왼쪽에서)."""
    target = rf"(?:{side})(?:\s*(?:으?로|을\s*향|방향|이동|팬|패닝)|(?=\s*(?:[,.!]|$)))"
    return rf"{target}|(?:팬|패닝|틸트)\s*(?:{side})"


_ZOOM = "zoom(?:s|ed|ing)?"
_DOLLY = "doll(?:y|ies|ied|ying)"
_ALONG = f"{_DOLLY}|track(?:s|ed|ing)?|camera (?:moves|moving|goes|flies|glides|pulls)"
_TOWARDS = f"{_ALONG}|push(?:es|ed|ing)?"
_AWAY = f"{_ALONG}|pull(?:s|ing)?(?=.(?:back|away))"
_PAN = "pan(?:s|ned|ning)?|truck(?:s|ed|ing)?|track(?:s|ed|ing)?|camera (?:moves|moving|goes|turns|slides|glides)"
_TILT = "tilt(?:s|ed|ing)?|crane(?:s|d)?|craning|pan(?:s|ned|ning)?|camera (?:moves|moving|goes|rises|looks)"

# Which words ask for which move. The phrase that comes first in the prompt wins; of two that start together, the one
# listed first wins, so that "zoom out" goes before "zoom".
WORDS: tuple[tuple[Move, re.Pattern[str]], ...] = tuple(
    (move, re.compile(pattern, re.IGNORECASE))
    for move, pattern in (
        (ZOOM_OUT, _english(_ZOOM, "outwards?|out|back") + "|" + _english(_AWAY, "outwards?|out|back|away|backwards?")),
        (ZOOM_OUT, r"축소|줌\s*아웃|멀어지|멀어져|물러나|물러서|뒤로\s*빠지"),
        (ZOOM_IN, _english(f"{_ZOOM}|{_DOLLY}", "inwards?|into|in|closer|forwards?")),
        (PUSH, _english(_TOWARDS, "inwards?|into|in|closer|forwards?|towards?")),
        (ZOOM_IN, r"확대|줌\s*인|다가가|다가간|다가와|다가온|가까이\s*가|가까워"),
        (PAN_LEFT, _english(_PAN, "left(?:wards?)?") + "|" + _korean("왼쪽|왼편|좌측")),
        (PAN_RIGHT, _english(_PAN, "right(?:wards?)?") + "|" + _korean("오른쪽|오른편|우측")),
        (TILT_UP, _english(_TILT, "up(?:wards?)?") + r"|틸트\s*업|(?<![가-힣])위(?:쪽으)?로(?![가-힣])"),
        (TILT_DOWN, _english(_TILT, "down(?:wards?)?") + r"|틸트\s*다운|(?<![가-힣])아래(?:쪽으)?로(?![가-힣])"),
        (ZOOM_IN, rf"\b(?:{_ZOOM})\b|줌(?!\s*아웃)"),
        (PAN_RIGHT, r"\bpanning\b|(?<=camera )pans?\b|패닝"),
        (TILT_UP, r"\btilting\b|(?<=camera )tilts?\b|틸트"),
    )
)


def choose_move(prompt: str) -> Move:
    """The move a prompt asks for, in English or Korean; a gentle push where it asks for none."""
    prompt = unicodedata.normalize("NFC", prompt)  # macOS writes Korean decomposed
    found = [
        (match.start(), order, move)
        for order, (move, pattern) in enumerate(WORDS)
        if (match := pattern.search(prompt)) is not None
    ]
    return min(found, key=lambda each: each[:2])[2] if found else PUSH


def ease(progress: float) -> float:
    """Smootherstep (Perlin 2002): 0..1 to 0..1, with neither velocity nor acceleration at the ends."""
    return progress**3 * (progress * (progress * 6 - 15) + 10)


def window(view: View, frame: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """What `view` shows of `frame`: (left, top, right, bottom) in the frame's own pixels, never outside of it."""
    left, top, right, bottom = frame
    width, height = (right - left) / view.zoom, (bottom - top) / view.zoom
    x = left + (right - left - width) * (1 + view.x) / 2
    y = top + (bottom - top - height) * (1 + view.y) / 2
    return max(x, left), max(y, top), min(x + width, right), min(y + height, bottom)


def render_move(
    picture: Image.Image, move: Move, size: tuple[int, int], frames: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """The frames of a move over a picture, one at a time: uint8 [height, width, 3] for `size` (width, height).

    Windows are not rounded to pixels: each frame is resampled from where its window really is, so slow moves do
    not jitter.
    """
    frame = photos.cover_box(picture.size, size)
    canvas = round(size[0] * move.closest), round(size[1] * move.closest)
    if canvas[0] < frame[2] - frame[0] and canvas[1] < frame[3] - frame[1]:
        # More pixels than the closest view shows would only make every frame slower.
        picture = picture.resize(canvas, Image.Resampling.LANCZOS, frame, reducing_gap=photos.REDUCING_GAP)
        frame = (0, 0, *canvas)
    for index in range(frames):
        view = move.at(index / (frames - 1))
        yield np.asarray(picture.resize(size, Image.Resampling.BICUBIC, window(view, frame)))


class PreviewEngine:
    """Renders a camera move over the photo on the CPU, framed as Wan2.2 5B would frame it.

    24 frames a second and one more than the duration holds, as queues count them: 5 s are 121 frames. The same
    request gives the same frames. Seed, steps, guidance, the negative prompt and a last photo are ignored.
    """

    name = "preview"
    stages: Mapping[str, float] = {"render": 1.0}  # ffmpeg encodes at the same time

    async def check(self) -> None:
        """As Engine.check: nothing outside of this process is needed."""

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """Makes `preview.mp4` in `folder`. Raises InvalidRequest, InvalidPhoto, EncodeFailed, MachineFault."""
        if not MIN_DURATION_S <= request.duration_s <= MAX_DURATION_S:
            raise InvalidRequest(
                f"duration_s is {request.duration_s:g}; a preview lasts {MIN_DURATION_S:g} to {MAX_DURATION_S:g} s"
            )
        photo = photo_of(request, inputs, self.name)
        unused = {"seed", "steps", "guidance", "negative_prompt"}
        ignored = request.model_dump(include=unused, exclude_none=True)
        if ignored or LAST_PHOTO in inputs:
            log.debug("a preview ignores these", **ignored, last_photo=LAST_PHOTO in inputs)
        return await run_in_thread(job, lambda: self._make(request, photo, folder / "preview.mp4", job))

    def _make(self, request: GenerationRequest, photo: Path, path: Path, job: Job) -> Video:
        info = photos.measure(photo)
        size = photos.fit(info.width, info.height, max_area_px=request.max_area_px or MAX_AREA_PX, multiple=MULTIPLE_PX)
        move = choose_move(request.prompt)
        closest = round(size[0] * move.closest), round(size[1] * move.closest)
        picture = photos.open_photo(photo, cover=closest)
        frames = round(request.duration_s * FPS) + 1
        with VideoWriter(path, width=size[0], height=size[1], fps=FPS, metadata=METADATA) as writer:
            for frame in render_move(picture, move, size, frames):
                job.raise_if_cancelled()
                writer.write(frame)
                job.report("render", writer.frames, frames)
        return writer.video()
