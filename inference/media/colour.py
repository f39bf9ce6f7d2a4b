"""Colour spaces of photos, which files name by an ICC profile or by code points, and their conversion to sRGB.

A colour space that is named without a profile is turned into one, so that one library (LittleCMS, in Pillow) does all
conversions. HDR is clipped as on an SDR screen: everything above 203 nits, the diffuse white of ITU-R BT.2408, is
white.
"""

import io
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Point: TypeAlias = tuple[float, float]
"""A colour's x and y in CIE 1931."""

Primaries: TypeAlias = tuple[Point, Point, Point, Point]
"""Red, green, blue and white."""

Curve: TypeAlias = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""From signals to light, both from 0 to 1."""

CURVE_POINTS = 4096
"""Points of a curve in a profile. PQ needs many: it is steep, and its last 42 % are all white."""

SDR_WHITE_NITS = 203.0
"""ITU-R BT.2408, 2.2: diffuse white in PQ, and in HLG on a screen of 1,000 nits."""

HLG_PEAK_NITS = 1000.0


def _srgb_curve(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """IEC 61966-2-1."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _pq(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """SMPTE ST 2084: nits, up to 10,000."""
    root = signal ** (1 / 78.84375)
    nits = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return np.minimum(nits / SDR_WHITE_NITS, 1)


def _hlg(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """ARIB STD-B67 on a screen of 1,000 nits (ITU-R BT.2100, table 5). Its system gamma, which belongs to the
    luminance, is applied to each colour: exact for greys.
    """
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return np.minimum(HLG_PEAK_NITS / SDR_WHITE_NITS * scene**1.2, 1)


@dataclass(frozen=True)
class Gamma:
    """A power curve."""

    exponent: float

    def __call__(self, signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        light: npt.NDArray[np.float64] = signal**self.exponent
        return light


@dataclass(frozen=True)
class ColourSpace:
    """What red, green and blue are, and how light grows with a signal."""

    primaries: Primaries
    curve: Curve
    is_full_range: bool = True  # False: black is 16/255 and white 235/255


D65 = (0.3127, 0.3290)
BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65)

SRGB = ColourSpace(BT709, _srgb_curve)
ADOBE_RGB = ColourSpace(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65), Gamma(563 / 256))
"""Adobe RGB (1998) Color Image Encoding, 4.3."""

Claim: TypeAlias = ColourSpace | bytes
"""A statement of a file about its colours: a space, or a whole ICC profile."""

UNSPECIFIED = 2
"""The code point `unspecified` in both tables below. If only one of a pair is unspecified, sRGB's value is used."""

# ITU-T H.273, table 2: the primaries that pictures use.
PRIMARIES: dict[int, Primaries] = {
    1: BT709,
    UNSPECIFIED: BT709,
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), (0.310, 0.316)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}

# The same, table 3. Camera curves (1, 6, 7, 14, 15: BT.709 and similar) are replaced by the curve of sRGB, as browsers
# do: pictures with these curves were adjusted to look right on a screen.
CURVES: dict[int, Curve] = {
    **dict.fromkeys((1, UNSPECIFIED, 6, 7, 13, 14, 15), _srgb_curve),
    4: Gamma(2.2),
    5: Gamma(2.8),
    8: Gamma(1.0),
    16: _pq,
    17: Gamma(2.6),
    18: _hlg,
}


def by_code_points(primaries: int, transfer: int, *, is_full_range: bool = True) -> ColourSpace | None:
    """The colour space for code points of ITU-T H.273; None for unknown ones."""
    if primaries not in PRIMARIES or transfer not in CURVES or primaries == transfer == UNSPECIFIED:
        return None
    return ColourSpace(PRIMARIES[primaries], CURVES[transfer], is_full_range)


def srgb(image: Image.Image, claims: Iterable[Claim]) -> Image.Image:
    """The picture in sRGB, mode RGB or RGBA, from mode L, LA, RGB, RGBA or CMYK.

    `claims` are the file's statements in order of precedence; the first usable one is applied. A profile that is
    damaged or made for other pixels (editors leave RGB profiles in grey photos) is ignored.
    """
    has_alpha = image.mode in {"LA", "RGBA"}
    bare = image.convert(image.mode[:-1]) if has_alpha else image
    picture = None
    for claim in claims:
        picture = _converted(bare, claim)
        if picture is not None:
            break
    picture = picture or bare.convert("RGB")
    if has_alpha:
        picture.putalpha(image.getchannel("A"))
    return picture


def _converted(image: Image.Image, claim: Claim) -> Image.Image | None:
    if isinstance(claim, ColourSpace):
        if image.mode == "CMYK":
            return None
        image = image.convert("RGB")
        if claim == SRGB:
            return image
    try:
        profile = claim if isinstance(claim, bytes) else icc_profile(claim)
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, np.linalg.LinAlgError):
        return None


@cache
def icc_profile(space: ColourSpace) -> bytes:
    """The space as a display profile of three primaries and a curve (ICC.1:2001-04, 6.3.1.2).

    Raises ValueError, LinAlgError for primaries that span no space.
    """
    signal = np.linspace(0, 1, CURVE_POINTS)
    if not space.is_full_range:
        signal = np.clip((signal * 255 - 16) / 219, 0, 1)
    curve = np.round(space.curve(signal) * 65535).astype(">u2").tobytes()
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 1) + bytes(79), b"cprt": b"text" + bytes(5)}
    tags |= {b"wtpt": _xyz(D50)}
    tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, _colorants(space.primaries).T), strict=True))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv" + bytes(4) + struct.pack(">I", CURVE_POINTS) + curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(value))
        body += value.ljust((len(value) + 3) // 4 * 4, b"\0")
    head = struct.pack(">I4xI", start + len(body), 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + _xyz(D50)[8:]).ljust(128, b"\0") + table + body


D50 = np.array([0.9642, 1.0, 0.8249])
"""The white of every profile (ICC.1:2001-04, A.1)."""

BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
"""How eyes adapt to another white (ICC.1:2001-04, E.1)."""


def _colorants(primaries: Primaries) -> npt.NDArray[np.float64]:
    """XYZ of red, green and blue as columns [3, 3], seen under D50."""
    red, green, blue, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in primaries)
    columns = np.stack([red, green, blue], axis=1)
    columns *= np.linalg.solve(columns, white)
    adapted: npt.NDArray[np.float64] = (
        np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD @ columns
    )
    if not np.all(np.abs(adapted) < 8):  # larger values fit into a profile, but no colour has them
        raise ValueError(f"{primaries} span no colour space")
    return adapted


def _xyz(values: npt.NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)
