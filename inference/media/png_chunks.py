"""Reads the metadata of a PNG, with limits, and passes only the chunks of its pixels on to the decoder.

A damaged ancillary chunk must not make a photo unusable: one with a wrong checksum is dropped, as libpng does, and text
and profiles are unpacked only up to a limit. Chunks are those of the PNG specification, third edition.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image, ImageChops, PngImagePlugin

from inference.errors import InvalidPhoto
from inference.media import colour
from inference.media.colour import Claim, ColourSpace, Gamma

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_CHUNKS = 100_000
"""A photo of 100 megapixels in libpng's chunks of 8 KB has some 30,000; each costs the decoder 5 µs."""

MAX_UNPACKED_BYTES = 16 << 20
"""The limit for an unpacked profile or text. Profiles of printers have 3 MB."""

PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
"""The only chunks passed on to the decoder, besides tRNS. Without animation chunks an APNG is its first picture."""

EXIF_TEXT, XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
"""Keywords of texts that may hold the orientation: ImageMagick's, and XMP's own."""

SRGB_GAMMA = 45455
"""The gAMA value that stands for sRGB (11.3.2.5), although sRGB is not a power curve."""

SIXTEEN_BITS = 16  # a depth
GREY, COLOUR, PALETTE, GREY_WITH_ALPHA = 0, 2, 3, 4  # colour types
HEADER_BYTES = 13
TRANSPARENT_BYTES = {GREY: 2, COLOUR: 6}  # of tRNS


@dataclass
class Png:
    """A PNG file's parts."""

    content: bytes  # a file of the pixels alone
    exif: bytes = b""
    xmp: bytes = b""
    claims: list[Claim] = field(default_factory=list)  # statements about its colours, in order of precedence
    depth: int = 8  # bits of a sample, or of an index
    colour_type: int = COLOUR
    transparent: tuple[int, ...] = ()  # the one transparent grey or colour, in samples of `depth` bits

    @property
    def is_grey(self) -> bool:
        return self.colour_type in {GREY, GREY_WITH_ALPHA}

    def open(self) -> PngImagePlugin.PngImageFile:
        """The picture, not yet decoded, with its metadata where Pillow expects them."""
        image = PngImagePlugin.PngImageFile(io.BytesIO(self.content))
        image.info["exif"] = self.exif
        if self.xmp:
            image.info["xmp"] = self.xmp
        if self.transparent and self.colour_type == GREY and self.depth in {2, 4}:
            # Pillow scales the samples to 8 bits, but not the transparent value.
            image.info["transparency"] = self.transparent[0] * 255 // (2**self.depth - 1)
        return image


def parse(content: bytes) -> Png:
    """Reads a PNG's chunks. Malformed files are left to the decoder to refuse.

    Raises InvalidPhoto where decoding would be too much work.
    """
    pixels: list[bytes] = []
    ancillary: dict[bytes, bytes] = {}
    texts: dict[bytes, bytes] = {}
    for kind, raw in _chunks(content):
        if kind in PIXELS:
            pixels.append(raw)
            continue
        body = raw[8:-4]
        if raw[-4:] != struct.pack(">I", zlib.crc32(raw[4:-4])):
            continue
        if kind in {b"tEXt", b"zTXt", b"iTXt"}:
            keyword, _, rest = body.partition(b"\0")
            if keyword in {EXIF_TEXT, XMP_TEXT} and keyword not in texts:
                texts[keyword] = _text(kind, rest)
        else:
            ancillary.setdefault(kind, body)
    header = pixels[0][8:-4] if pixels else b""
    depth, colour_type = (header[8], header[9]) if len(header) == HEADER_BYTES else (8, COLOUR)
    transparency = ancillary.get(b"tRNS", b"")
    names_one = len(transparency) == TRANSPARENT_BYTES.get(colour_type)
    if names_one or (transparency and colour_type == PALETTE):
        pixels.insert(1, _chunk(b"tRNS", transparency))
    return Png(
        content=SIGNATURE + b"".join(pixels),
        exif=ancillary.get(b"eXIf") or _hex(texts.get(EXIF_TEXT, b"")),
        xmp=texts.get(XMP_TEXT, b""),
        claims=list(_claims(ancillary)),
        depth=depth,
        colour_type=colour_type,
        transparent=struct.unpack(f">{len(transparency) // 2}H", transparency) if names_one else (),
    )


def with_alpha(image: Image.Image, png: Png) -> Image.Image:
    """A decoded picture of 16 bits a sample with one transparent colour, as mode RGBA."""
    # Pillow keeps the high byte of each sample. With the byte order swapped it keeps the low bytes instead.
    low = PngImagePlugin.PngImageFile(io.BytesIO(png.content))
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    low.load()
    alpha = Image.new("L", image.size)
    halves = (image, [sample >> 8 for sample in png.transparent]), (low, [sample & 255 for sample in png.transparent])
    for half, values in halves:
        for band, value in zip(half.getbands(), values, strict=True):
            differs = half.getchannel(band).point([0 if level == value else 255 for level in range(256)])
            alpha = ImageChops.lighter(alpha, differs)
    low.close()
    picture = image.copy()
    picture.info.pop("transparency", None)
    picture.putalpha(alpha)
    return picture


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each chunk's type, and the whole chunk."""
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        head = content[at : at + 8]
        if len(head) < 8 or not head[4:].isalpha():
            return
        end = at + 12 + int.from_bytes(head[:4])
        yield head[4:], content[at:end]
        if head[4:] == b"IEND":
            return
        at = end
    raise InvalidPhoto(f"the photo is a PNG of more than {MAX_CHUNKS} chunks: too much work to decode")


def _claims(chunks: dict[bytes, bytes]) -> Iterator[Claim]:
    """Statements about colours, in the precedence of the specification (4.3)."""
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) == 4 and cicp[2] == 0:  # the matrix of RGB: a PNG can hold no other
        space = colour.by_code_points(cicp[0], cicp[1], is_full_range=bool(cicp[3]))
        if space is not None:
            yield space
    if b"iCCP" in chunks:
        profile = _unpacked(chunks[b"iCCP"].partition(b"\0")[2][1:])
        if profile:
            yield profile
    if b"sRGB" in chunks:
        yield colour.SRGB
    gamma = _numbers(chunks.get(b"gAMA", b""), 1)
    chromaticities = _numbers(chunks.get(b"cHRM", b""), 8)
    if gamma or chromaticities:
        primaries = colour.BT709
        if chromaticities:
            white, *colours = [
                (x / 1e5, y / 1e5) for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)
            ]
            primaries = (colours[0], colours[1], colours[2], white)
        is_srgb = not gamma or (gamma[0] == SRGB_GAMMA and primaries == colour.BT709)
        yield ColourSpace(primaries, colour.SRGB.curve if is_srgb else Gamma(1e5 / gamma[0]))


def _numbers(body: bytes, count: int) -> tuple[int, ...]:
    """`count` integers of four bytes; none if the length differs or one of them is 0."""
    numbers = struct.unpack(f">{count}I", body) if len(body) == 4 * count else ()
    return numbers if all(numbers) else ()


def _text(kind: bytes, rest: bytes) -> bytes:
    """The text after a chunk's keyword (11.3.3); empty where it cannot be read."""
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _unpacked(rest[1:])
    is_compressed = rest[:1] == b"\1"
    text = rest[2:].split(b"\0", 2)[-1]  # after a language, and the keyword in it
    return _unpacked(text) if is_compressed else text


def _unpacked(body: bytes) -> bytes:
    """Decompresses; empty where the data are damaged or too long."""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(body, MAX_UNPACKED_BYTES)
    except zlib.error:
        return b""
    return text if unpacking.eof else b""


def _hex(text: bytes) -> bytes:
    """A raw profile: a line for its name, one for its length, then digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").strip().split("\n")[2:]))
    except ValueError:
        return b""
