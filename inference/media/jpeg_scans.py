"""Counts the scans of a JPEG and finds missing data, without decoding it.

A progressive JPEG is decoded once per scan, each time in full: 500 scans of a 266 KB file take 37 s of a core.
Markers and segments are those of ITU-T T.81, Annex B.
"""

import re
from dataclasses import dataclass, field

from inference.errors import InvalidPhoto

MAX_SCANS = 200
"""Ten are usual, and encoders that optimise for size use a few dozen. Each scan is another pass over all pixels: 200 of
them over 100 megapixels take 15 s of a core."""

MAX_SEGMENTS = 4096
"""Segments hold tables, comments and metadata. A profile alone may take 255 of them, of 64 KB each."""

END = b"\xff\xd9"

FILLERS = (b"\x55" * 256, b"\xaa" * 256, b"\x6d\xb6\xdb" * 85)
"""Bytes that are put where the rest of a scan may be missing. If a decoder still needs data there, different fillers
give different pixels. Several are tried, because for some Huffman codes two fillers may decode to the same pixels."""

# In coded data 0xFF is followed by 0x00, or is a restart marker; before a marker it may be repeated.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

EOI, SOS = 0xD9, 0xDA
SEQUENTIAL, PROGRESSIVE = {0xC0, 0xC1, 0xC9}, {0xC2, 0xCA}
FIRST_SEGMENT = 0xC0  # markers below have no segment, and neither has the start marker
SOI = 0xD8


@dataclass
class Scans:
    """The first picture of a JPEG file."""

    count: int = 0
    has_end: bool = False  # its end marker is there
    # For each component, how many low bits each of the 64 coefficients still lacks; 16 is all of them.
    _lacking: dict[int, list[int]] = field(default_factory=dict)

    @property
    def say_everything(self) -> bool:
        """Whether scans for every bit of every coefficient have begun, the last of which may be cut short."""
        return bool(self._lacking) and not any(map(any, self._lacking.values()))

    def frame(self, body: bytes) -> None:
        """A frame header: component ids are every third byte from the seventh on."""
        self._lacking = {component: [16] * 64 for component in body[6::3]}

    def scan(self, body: bytes, *, is_progressive: bool) -> None:
        """A scan header: components, first and last coefficient, and in four bits how many bits are left out."""
        self.count += 1
        components, rest = body[1 : 1 + 2 * body[0] : 2], body[1 + 2 * body[0] :]
        first, last, lacking = (rest[0], rest[1], rest[2] & 15) if is_progressive else (0, 63, 0)
        for component in components:
            for coefficient in range(first, min(last, 63) + 1):
                self._lacking.setdefault(component, [16] * 64)[coefficient] = lacking


def count(content: bytes) -> Scans:
    """Reads the markers of a JPEG file's first picture. Malformed files are left to the decoder to refuse.

    Raises InvalidPhoto where decoding would be too much work.
    """
    scans, at, is_progressive = Scans(), 2, False
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(content, at)
        if marker is None:
            return scans
        code, at = marker[1][0], marker.end()
        if code == EOI:
            scans.has_end = True
            return scans
        if code < FIRST_SEGMENT or code == SOI:
            continue
        length = int.from_bytes(content[at : at + 2])
        body = content[at + 2 : at + length]
        if length < 2 or len(body) != length - 2:
            return scans
        if code in SEQUENTIAL | PROGRESSIVE:
            is_progressive = code in PROGRESSIVE
            scans.frame(body)
        elif code == SOS:
            if len(body) < 4 or len(body) != 4 + 2 * body[0]:
                return scans
            scans.scan(body, is_progressive=is_progressive)
            if scans.count > MAX_SCANS:
                raise InvalidPhoto(f"the photo is a JPEG of more than {MAX_SCANS} scans: too much work to decode")
        at += length
    raise InvalidPhoto(f"the photo is a JPEG of more than {MAX_SEGMENTS} segments: too much work to decode")
