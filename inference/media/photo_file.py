"""A photo's file: its format, its metadata, and its pixels as they were stored.

Files that would take too much work to decode are refused first, by counting scans, segments or chunks. For formats
without such numbers (HEIC, WebP) only the limits of media.child_process apply.
"""

import errno
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, WebPImagePlugin

from inference.errors import I2VError, InvalidPhoto, MachineFault
from inference.media import colour, jpeg_scans, png_chunks
from inference.media.colour import Claim
from inference.media.png_chunks import Png

# HEVC still images and sequences (ISO/IEC 23008-12, B.4). `mif1` alone may also mean AVIF.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}

# Errors that say nothing about the file: resources ran out, the disk fails, permissions are missing.
MACHINE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES}

DAMAGED = "the photo is damaged or cut short: it does not decode"

DIGESTED_ROWS = 256

# EXIF 2.32, 4.6.4 to 4.6.6.
ORIENTATION, COLOUR_SPACE, INTEROPERABILITY_INDEX = 0x0112, 0xA001, 0x0001
EXIF_IFD, INTEROPERABILITY_IFD = 0x8769, 0xA005


@dataclass
class PhotoFile:
    """A photo whose header was read. Exceptions of its methods are mapped by `refusing`."""

    image: ImageFile.ImageFile  # not yet decoded
    png: Png | None = None
    twins: tuple[ImageFile.ImageFile, ...] = ()  # the same JPEG with other filler bytes in place of its missing end

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 where there is none to be read: broken EXIF does not make a photo unusable.

        pillow-heif has already turned what HEIC says elsewhere and left 1 here.
        """
        try:
            return int(self.image.getexif().get(ORIENTATION, 1))
        except Exception:  # noqa: BLE001  Pillow's EXIF parser raises as freely as its decoders
            return 1

    @property
    def claims(self) -> Iterator[Claim]:
        """Its statements about its colours, in order of precedence."""
        if self.png is not None:
            yield from self.png.claims
        profile = self.image.info.get("icc_profile")
        if profile:
            yield profile
        nclx = self.image.info.get("nclx_profile")  # of HEIC; pillow-heif has expanded the range already
        if nclx:
            space = colour.by_code_points(nclx["color_primaries"], nclx["transfer_characteristics"])
            if space is not None:
                yield space
        if self._says_adobe_rgb:
            yield colour.ADOBE_RGB

    def draft(self, width: int, height: int) -> None:
        """Lets the JPEG decoder scale down to a size that still covers this one.

        Not for HEIC, where a draft is an embedded thumbnail. Not for a JPEG whose end is missing, because a smaller
        picture may not show what is missing.
        """
        if isinstance(self.image, JpegImagePlugin.JpegImageFile) and not self.twins:
            self.image.draft(None, (width, height))

    def decode(self) -> Image.Image:
        """The pixels, of mode L, LA, RGB, RGBA or CMYK."""
        of_twins = set()
        for twin in self.twins:
            of_twins.add(_digest(twin))
            twin.close()  # gives its pixels back: 400 MB of 100 megapixels
        self.image.load()
        if of_twins and of_twins != {_digest(self.image)}:
            raise InvalidPhoto(DAMAGED)
        return self._eight_bit()

    def _eight_bit(self) -> Image.Image:
        image, png = self.image, self.png
        if image.mode == "I;16":  # 16-bit grey; 16-bit colour comes from Pillow with its high bytes already
            samples = np.asarray(image)
            grey = Image.fromarray((samples >> 8).astype(np.uint8))
            if png is not None and png.transparent:
                grey.putalpha(Image.fromarray(np.where(samples == png.transparent[0], 0, 255).astype(np.uint8)))
            return grey
        if png is not None and png.transparent and png.depth == png_chunks.SIXTEEN_BITS:
            return png_chunks.with_alpha(image, png)
        if png is not None and png.is_grey and image.mode == "RGBA":  # 16-bit grey with alpha
            return Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
        if image.mode in {"L", "LA", "RGB", "RGBA", "CMYK"} and "transparency" not in image.info:
            return image
        if image.mode in {"1", "L"}:
            return image.convert("LA" if image.has_transparency_data else "L")
        return image.convert("RGBA" if image.has_transparency_data else "RGB")

    @property
    def _says_adobe_rgb(self) -> bool:
        """Whether EXIF names Adobe RGB, as cameras do without a profile: DCF 2.0's R03, or colour space 2."""
        try:
            exif = self.image.getexif()
            index = exif.get_ifd(INTEROPERABILITY_IFD).get(INTEROPERABILITY_INDEX)
            return index in {"R03", b"R03"} or exif.get_ifd(EXIF_IFD).get(COLOUR_SPACE) == 2
        except Exception:  # noqa: BLE001  as for the orientation
            return False


@contextmanager
def refusing() -> Iterator[None]:
    """Maps whatever Pillow and its codecs raise on a bad file.

    Any exception is mapped, because there is no complete list: OSError, SyntaxError, ValueError, struct.error,
    EOFError, zlib.error, KeyError, IndexError, OverflowError and RuntimeError have all been seen.
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
        raise InvalidPhoto(DAMAGED) from error


def read(path: Path) -> PhotoFile:
    """Opens a photo with the reader for its first bytes; the file's name does not matter.

    The readers are called directly: Image.open would add a bomb check of its own with a process-wide limit, and
    warn about multi-picture JPEGs (most phones write them) whose first picture is all that is wanted.
    Raises InvalidPhoto, and what `refusing` maps.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:
            raise
        raise InvalidPhoto(f"the photo cannot be read: {error.strerror}") from error
    with file:
        content = file.read()
    start = content[:64]
    if not start:
        raise InvalidPhoto("the photo is an empty file")
    if start.startswith(b"\xff\xd8\xff"):
        return _jpeg(content)
    if start.startswith(png_chunks.SIGNATURE):
        png = png_chunks.parse(content)
        return PhotoFile(png.open(), png=png)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return PhotoFile(WebPImagePlugin.WebPImageFile(io.BytesIO(content)))
    if start[4:8] == b"ftyp" and HEIC_BRANDS.intersection(start[i : i + 4] for i in range(8, len(start), 4)):
        return PhotoFile(heic_reader()(io.BytesIO(content)))
    raise InvalidPhoto("the file is not a JPEG, PNG, WebP or HEIC photo")


def _jpeg(content: bytes) -> PhotoFile:
    """A JPEG. If only its end marker is missing, it is complete.

    Whether data are missing, too, is found by decoding it again with different filler bytes at the end: a decoder that
    has all data never reads them.
    """
    scans = jpeg_scans.count(content)
    if scans.has_end or not scans.say_everything:
        return PhotoFile(JpegImagePlugin.JpegImageFile(io.BytesIO(content)))
    if scans.count * (1 + len(jpeg_scans.FILLERS)) > jpeg_scans.MAX_SCANS:
        raise InvalidPhoto(f"the photo is a JPEG of {scans.count} scans without its end: too much work to decode")
    content = content.rstrip(b"\xff")
    image, *twins = (
        JpegImagePlugin.JpegImageFile(io.BytesIO(content + filler + jpeg_scans.END))
        for filler in (b"", *jpeg_scans.FILLERS)
    )
    return PhotoFile(image, twins=tuple(twins))


def _digest(image: ImageFile.ImageFile) -> bytes:
    """Stands for the pixels, which are decoded for it, a few rows at a time."""
    image.load()
    digest = hashlib.sha256()
    for top in range(0, image.height, DIGESTED_ROWS):
        rows = image.crop((0, top, image.width, min(top + DIGESTED_ROWS, image.height)))
        digest.update(rows.tobytes())
    return digest.digest()


def heic_reader() -> type[ImageFile.ImageFile]:
    """What reads HEIC. Raises MachineFault where it is missing, or was built for another system."""
    try:
        from pillow_heif import HeifImageFile  # noqa: PLC0415  slow to import, and most photos need none of it
    except ImportError as error:
        raise MachineFault("this machine has no reader for HEIC photos") from error
    reader: type[ImageFile.ImageFile] = HeifImageFile
    return reader
