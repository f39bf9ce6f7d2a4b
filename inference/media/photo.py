"""Photos: read with care, oriented, in sRGB, and framed for a video.

A photo comes from a stranger's phone: it may be cut short, a bomb, sideways, transparent, 16-bit or Display P3.
Everything here blocks (callers put it on a thread), refuses with InvalidPhoto, one line for people, and raises
MachineFault where the trouble is this machine's and another could read the same photo.

    measure    its size, from the header alone
    verify     the same, and that every byte decodes
    fit        the size of a video with the photo's shape
    open_photo the whole picture, decoded no larger than it needs to be
    load       the picture, scaled and cropped to a size in one resample
    jpeg       the picture as a file for somebody else's eyes
"""

import errno
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from inference.errors import I2VError, InvalidPhoto, MachineFault

MAX_PIXELS = 100_000_000
"""More than the largest phone sensor in ordinary use (48 and 64 MP); decoded, 300 MB."""

MIN_SIDE_PX = 16
"""Below this there is nothing to animate: icons and tracking pixels."""

MAX_ASPECT_RATIO = 4.0
"""Longer side over shorter. Beyond it lie whole panoramas and strips, which no video model was trained on; up to it,
`fit` finds a size in any area of at least 4 x multiple² pixels."""

REDUCING_GAP = 2.0
"""How many times larger than wanted the cheap decimation may leave a picture before the exact resample: with 2, as in
Pillow's `thumbnail`, it leaves no visible trace."""

# HEVC still images and sequences (ISO/IEC 23008-12, B.4). `mif1` alone may also mean AVIF.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}

# Why the system would not read a file that may be all right: it ran out of something, a disk fails, our rights.
MACHINE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES}

EXIF_ORIENTATION = 0x0112

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


def measure(path: Path, *, max_pixels: int = MAX_PIXELS) -> PhotoInfo:
    """Size and format, from the header; the picture itself is not decoded. Raises InvalidPhoto, MachineFault."""
    with _opened(path, max_pixels) as image:
        return _info(image)


def verify(path: Path, *, max_pixels: int = MAX_PIXELS) -> PhotoInfo:
    """Reads the whole file and checks that it decodes. Raises InvalidPhoto, MachineFault.

    A JPEG is decoded at an eighth of its size: that still reads every byte of its scans, so one cut short shows.
    """
    with _opened(path, max_pixels) as image:
        info = _info(image)
        _draft(image, (1, 1))
        image.load()
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
    # Rounding must not leave the photo by a hair: Pillow refuses such a box.
    left, top = max((photo[0] - size[0] * scale) / 2, 0.0), max((photo[1] - size[1] * scale) / 2, 0.0)
    return left, top, min(left + size[0] * scale, photo[0]), min(top + size[1] * scale, photo[1])


def open_photo(path: Path, *, cover: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright picture, whole, as 8-bit sRGB; transparency lies over white.

    `cover` is the (width, height) that the caller will scale it down to cover: a JPEG is then decoded straight to
    a half, a quarter or an eighth of its size where that still covers it.
    Raises InvalidPhoto, MachineFault.
    """
    with _opened(path, max_pixels) as image:
        orientation = _orientation(image)
        if cover is not None:
            _draft(image, (cover[1], cover[0]) if orientation in SIDEWAYS else cover)
        image.load()
        picture = _over_white(_srgb(_eight_bit(image)))
        return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def load(path: Path, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [height, width, 3] sRGB of exactly `size` (width, height), writable.

    Scaled to cover and cropped around its centre in one resample. Raises InvalidPhoto, MachineFault.
    """
    picture = open_photo(path, cover=size, max_pixels=max_pixels)
    with _refusing():
        scaled = picture.resize(
            size, Image.Resampling.LANCZOS, box=cover_box(picture.size, size), reducing_gap=REDUCING_GAP
        )
        return np.array(scaled)


def jpeg(path: Path, *, max_side_px: int, widest: float, quality: int = 95) -> bytes:
    """The upright picture as a JPEG in sRGB, without anything a camera wrote into the file.

    Scaled down to `max_side_px`; where its longer side is more than `widest` times the other, both ends are cut off.
    Raises InvalidPhoto, MachineFault.
    """
    picture = open_photo(path)
    with _refusing():
        width, height = picture.size
        shape = int(min(width, height * widest)), int(min(height, width * widest))
        if shape != picture.size:
            left, top = (width - shape[0]) // 2, (height - shape[1]) // 2
            picture = picture.crop((left, top, left + shape[0], top + shape[1]))
        picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS, REDUCING_GAP)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        return file.getvalue()


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """A photo with its header read and judged. What its body does to Pillow is mapped here too."""
    with _refusing():
        try:
            file = path.open("rb")
        except OSError as error:
            if error.errno in MACHINE_ERRNOS:
                raise
            raise InvalidPhoto(f"the photo cannot be read: {error.strerror}") from error
        with file:
            image = _read_header(file)
            _judge(image, max_pixels)
            yield image


@contextmanager
def _refusing() -> Iterator[None]:
    """Maps whatever Pillow and the codecs below it raise on a bad file.

    There is no list of what that is: OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, KeyError,
    IndexError, OverflowError and RuntimeError have all been seen.
    """
    try:
        yield
    except I2VError:
        raise
    except MemoryError as error:
        raise MachineFault("decoding the photo takes more memory than this machine has left") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:  # Pillow's own have no errno
            raise MachineFault(f"this machine cannot read the photo: {error.strerror}") from error
        raise InvalidPhoto("the photo is damaged or cut short: it does not decode") from error


def _read_header(file: BinaryIO) -> ImageFile.ImageFile:
    """The photo's own reader, chosen by its first bytes whatever the file is called.

    The readers are called directly: Image.open would add a bomb check of its own with a process-wide limit, and
    warn about multi-picture JPEGs (most phones write them) whose first picture is all that is wanted.
    """
    start = file.read(64)
    file.seek(0)
    if not start:
        raise InvalidPhoto("the photo is an empty file")
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(file)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if start[4:8] == b"ftyp" and HEIC_BRANDS.intersection(start[i : i + 4] for i in range(8, len(start), 4)):
        return _heic(file)
    raise InvalidPhoto("the file is not a JPEG, PNG, WebP or HEIC photo")


def _heic(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile  # noqa: PLC0415  an optional extra, slow to import
    except ImportError as error:
        raise InvalidPhoto("reading HEIC photos needs: pip install 'serverless-i2v[heic]'") from error
    image: ImageFile.ImageFile = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return image


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


def _info(image: ImageFile.ImageFile) -> PhotoInfo:
    width, height = image.size
    if _orientation(image) in SIDEWAYS:
        width, height = height, width
    return PhotoInfo(width, height, image.format or "")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none to be read: broken EXIF does not make a photo unusable.

    pillow-heif has already turned what HEIC says elsewhere and left 1 here.
    """
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  Pillow's EXIF parser raises as freely as its decoders
        return 1


def _draft(image: ImageFile.ImageFile, size: tuple[int, int]) -> None:
    """Lets the JPEG decoder scale. Not HEIC's: its draft shows an embedded thumbnail in place of the photo."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, size)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Modes L, RGB, RGBA or CMYK, from whatever the file had."""
    if image.mode == "I;16":  # 16-bit grey; 16-bit colour comes from Pillow with its high bytes already
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"L", "RGB", "RGBA", "CMYK"} and not image.has_transparency_data:
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """Converts from the embedded profile; modes RGB or RGBA.

    A profile that cannot be read or does not fit the pixels is as good as none: the photo is taken for sRGB.
    """
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=mode
            )
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            converted = None
        if converted is not None:
            return converted
    return image.convert(mode)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
