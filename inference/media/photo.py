"""Photos: read with care, oriented, in sRGB, and framed for a video.

A photo is untrusted: it may be truncated, a decompression bomb, sideways, transparent, 16-bit or Display P3. Everything
here blocks (callers run it in a thread). It raises InvalidPhoto with one line for people, and MachineFault where this
machine is at fault and another could read the photo. Code that reads a photo's bytes runs in a child process that can
be killed; media.child_process has its limits, and what cancelling does.

    measure    its size, from the header alone
    verify     the same, and that every byte decodes
    fit        the size of a video with the photo's shape
    open_photo the whole picture, no larger than it needs to be
    load       the picture, scaled and cropped to a size in one resample
    jpeg       the picture as a file for somebody else's eyes
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from inference.errors import InvalidPhoto
from inference.media import colour
from inference.media.child_process import in_child_process
from inference.media.photo_file import PhotoFile, read, refusing

MAX_PIXELS = 100_000_000
"""More than the largest phone sensor in ordinary use (48 and 64 MP); decoded, 300 MB."""

MIN_SIDE_PX = 16
"""Smaller pictures are icons and tracking pixels."""

MAX_ASPECT_RATIO = 4.0
"""Longer side over shorter. Beyond it lie whole panoramas and strips, which no video model was trained on; up to it,
`fit` finds a size in any area of at least 4 x multiple² pixels."""

REDUCING_GAP = 2.0
"""How many times larger than wanted the cheap decimation may leave a picture before the exact resample: with 2, as in
Pillow's `thumbnail`, it leaves no visible trace."""

# EXIF orientation → what makes the picture upright (EXIF 2.32, 4.6.4); 1 and unknown values need nothing.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {5, 6, 7, 8}


@dataclass(frozen=True)
class PhotoInfo:
    """What a photo's header says."""

    width: int  # pixels, upright
    height: int  # pixels, upright
    format: str  # JPEG, PNG, WEBP or HEIF


@in_child_process
def measure(path: Path, *, max_pixels: int = MAX_PIXELS) -> PhotoInfo:
    """Size and format, from the header; the picture itself is not decoded. Raises InvalidPhoto, MachineFault."""
    with _opened(path, max_pixels) as photo:
        return _info(photo)


@in_child_process
def verify(path: Path, *, max_pixels: int = MAX_PIXELS) -> PhotoInfo:
    """Reads the whole file and checks that it decodes. Raises InvalidPhoto, MachineFault.

    A JPEG is decoded at an eighth of its size, which still reads every byte of its scans and finds a truncated file.
    """
    with _opened(path, max_pixels) as photo:
        info = _info(photo)
        photo.draft(1, 1)
        photo.decode()
        return info


def fit(width: int, height: int, *, max_area_px: int, multiple: int) -> tuple[int, int]:
    """The size of a video that shows a photo of `width` x `height` pixels.

    It is the largest one within `max_area_px` whose sides are multiples of `multiple` and that the photo, scaled to
    cover it, overlaps by less than `multiple` pixels, on one axis. Ties go to the closer aspect ratio.
    Raises ValueError where the area holds no such size.

    >>> fit(3840, 2160, max_area_px=1280 * 704, multiple=32)
    (1280, 704)
    """

    def sizes() -> Iterator[tuple[int, int]]:
        # Whole widths with the tallest height that the photo still covers, then the other way round: what is
        # cut off is what flooring the second side lost, which is less than one multiple.
        for w in range(multiple, max_area_px // multiple + 1, multiple):
            h = w * height // (width * multiple) * multiple
            if w * h > max_area_px:
                break
            yield w, h
        for h in range(multiple, max_area_px // multiple + 1, multiple):
            w = h * width // (height * multiple) * multiple
            if w * h > max_area_px:
                break
            yield w, h

    def area_then_shape(size: tuple[int, int]) -> tuple[int, float]:
        return size[0] * size[1], -abs(math.log(size[0] * height / (size[1] * width)))

    usable = [size for size in sizes() if min(size) > 0]
    if not usable:
        raise ValueError(f"no size in {max_area_px} pixels is near {width}x{height} in multiples of {multiple}")
    return max(usable, key=area_then_shape)


def cover_box(photo: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the photo, in its pixels, that has the shape of `size`."""
    scale = min(photo[0] / size[0], photo[1] / size[1])  # photo pixels per output pixel
    # Rounding may exceed the photo by a tiny amount, and Pillow refuses such a box.
    left, top = max((photo[0] - size[0] * scale) / 2, 0.0), max((photo[1] - size[1] * scale) / 2, 0.0)
    return left, top, min(left + size[0] * scale, photo[0]), min(top + size[1] * scale, photo[1])


@in_child_process
def open_photo(path: Path, *, cover: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright picture, whole, as 8-bit sRGB; transparency lies over white.

    `cover` is the (width, height) that the caller will scale it down to cover: the picture is then no larger than an
    exact resample needs it. A JPEG is decoded straight to a half, a quarter or an eighth of its size where that still
    covers it.
    Raises InvalidPhoto, MachineFault.
    """
    return _picture(path, cover, max_pixels)


@in_child_process
def load(path: Path, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [height, width, 3] sRGB of exactly `size` (width, height), writable.

    Scaled to cover and cropped around its centre in one resample. Raises InvalidPhoto, MachineFault.
    """
    picture = _picture(path, size, max_pixels)
    with refusing():
        scaled = picture.resize(
            size, Image.Resampling.LANCZOS, box=cover_box(picture.size, size), reducing_gap=REDUCING_GAP
        )
        return np.array(scaled)


@in_child_process
def jpeg(path: Path, *, max_side_px: int, widest: float, quality: int = 95) -> bytes:
    """The upright picture as a JPEG in sRGB, without anything a camera wrote into the file.

    Scaled down to `max_side_px`; where its longer side is more than `widest` times the other, both ends are cut off.
    Raises InvalidPhoto, MachineFault.
    """
    picture = _picture(path, None, MAX_PIXELS)
    with refusing():
        width, height = picture.size
        shape = int(min(width, height * widest)), int(min(height, width * widest))
        if shape != picture.size:
            left, top = (width - shape[0]) // 2, (height - shape[1]) // 2
            picture = picture.crop((left, top, left + shape[0], top + shape[1]))
        picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS, REDUCING_GAP)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        return file.getvalue()


def _picture(path: Path, cover: tuple[int, int] | None, max_pixels: int) -> Image.Image:
    with _opened(path, max_pixels) as photo:
        if cover is not None:
            stored = (cover[1], cover[0]) if photo.orientation in SIDEWAYS else cover
            photo.draft(*stored)
        picture = photo.decode()
        if cover is not None:
            factor = int(min(picture.width / stored[0], picture.height / stored[1]) / REDUCING_GAP)
            picture = picture.reduce(factor) if factor > 1 else picture
        picture = _over_white(colour.srgb(picture, photo.claims))
        return picture.transpose(UPRIGHT[photo.orientation]) if photo.orientation in UPRIGHT else picture


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[PhotoFile]:
    """A photo whose header was read and checked. Errors of Pillow in the block are mapped, too."""
    with refusing():
        photo = read(path)
        _judge(photo.image, max_pixels)
        yield photo


def _judge(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidPhoto(
            f"the photo has {width}x{height} = {width * height / 1e6:.0f} megapixels; the limit is {max_pixels / 1e6:g}"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise InvalidPhoto(f"the photo is only {width}x{height} pixels; each side needs at least {MIN_SIDE_PX}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InvalidPhoto(
            f"the photo is {width}x{height} pixels; its longer side may be at most {MAX_ASPECT_RATIO:g} times the other"
        )


def _info(photo: PhotoFile) -> PhotoInfo:
    width, height = photo.image.size
    if photo.orientation in SIDEWAYS:
        width, height = height, width
    return PhotoInfo(width, height, photo.image.format or "")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
