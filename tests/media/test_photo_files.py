"""Files as cameras, phones and editors write them, beside each its right values; and those that only look damaged."""

import io
import struct
import zlib
from inspect import unwrap
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from inference.errors import InvalidPhoto
from inference.media import colour, jpeg_scans, png_chunks
from inference.media.child_process import in_child_process
from inference.media.photo import measure, open_photo, verify

CASES = Path(__file__).parents[1] / "cases" / "photos"

PATCHES = [(200, 40, 40), (40, 160, 60), (40, 60, 190), (220, 200, 60), (128, 128, 128), (240, 240, 240)]
"""What every case shows, from left to right: sRGB as a person sees it."""

SIDEWAYS = {"heic_exif_and_xmp_6.heic", "xmp_orientation6.jpg", "png_raw_profile_exif6.png"}  # stored so

ADOBE_RGB = {"adobergb_exif_r03.jpg", "icc_adobe.jpg"}
"""One level of their red is up to five of sRGB's, where red is dark."""


def patches(path: Path, count: int = 6) -> np.ndarray:
    """What a photo shows, from its left to its right, or downwards where it is upright: [count, 3]."""
    picture = np.asarray(open_photo(path)).astype(int)
    if picture.shape[0] > picture.shape[1]:
        picture = picture.transpose(1, 0, 2)
    height, width, _ = picture.shape
    return picture[height // 2, [int(width * (n + 0.5) / count) for n in range(count)]]


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.iterdir()))
def test_files_of_the_world_show_what_they_should(name):
    """Whole, upright and in the right colours."""
    info = verify(CASES / name)
    assert (info.width, info.height) == ((320, 576) if name in SIDEWAYS else (576, 320))
    right = PATCHES
    if name == "grey16_trns.png":  # the first of them is transparent, and so white
        right = [(grey, grey, grey) for grey in (255, 40, 90, 128, 190, 240)]
    np.testing.assert_allclose(patches(CASES / name), right, atol=5 if name in ADOBE_RGB else 4)


# --- colour spaces


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: np.ndarray, *chunks: bytes, colour_type: int = 2, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of these samples: [height, width, channels] of uint8, or of uint16 for 16 bits."""
    height, width, _ = rows.shape
    lines = b"".join(b"\0" + row.astype(f">u{rows.itemsize}").tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, rows.itemsize * 8, colour_type, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + before + image + after + chunk(b"IEND", b"")


def flat(*samples: int, kind: type = np.uint8) -> np.ndarray:
    """32 x 32 pixels of one colour."""
    return np.full((32, 32, len(samples)), samples, kind)


def gamma(value: float) -> bytes:
    """What 1 / exponent of the curve is."""
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chromaticities(primaries: colour.Primaries) -> bytes:
    """White first, then red, green, blue."""
    red, green, blue, white = primaries
    return chunk(b"cHRM", struct.pack(">8I", *(round(n * 100_000) for n in (*white, *red, *green, *blue))))


def icc(mode: str = "RGB", exponent: float = 1.0) -> bytes:
    """A profile of sRGB's primaries, or of grey, with a power curve."""
    if mode == "RGB":
        return colour.icc_profile(colour.ColourSpace(colour.BT709, colour.Gamma(exponent)))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    desc = b"desc\0\0\0\0" + struct.pack(">I", 1) + bytes(79)
    tags = {b"desc": desc.ljust(92, b"\0"), b"wtpt": white, b"kTRC": curve}
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", 128 + 4 + 12 * len(tags) + len(body), len(value))
        body += value
    head = struct.pack(">I4xI", 128 + len(table) + len(body), 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    return (head + bytes(28) + white[8:]).ljust(128, b"\0") + table + body


def iccp(profile: bytes) -> bytes:
    """An embedded profile."""
    return chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


def cicp(primaries: int, transfer: int, full: int = 1) -> bytes:
    """Code points of ITU-T H.273."""
    return chunk(b"cICP", bytes([primaries, transfer, 0, full]))


LINEAR, P3, SRGB = gamma(1.0), cicp(12, 13), chunk(b"sRGB", b"\0")


@pytest.mark.parametrize(
    "stored, chunks, shown",
    [
        # The stored values were computed apart, from the definitions of the curves and matrices.
        ((184, 56, 49), [P3], (200, 40, 40)),
        ((55, 55, 55), [LINEAR], (128, 128, 128)),
        ((147, 5, 5), [LINEAR], (200, 40, 40)),
        ((128, 128, 128), [gamma(1 / 1.8)], (145, 145, 145)),  # an old Mac's
        ((172, 44, 43), [gamma(256 / 563), chromaticities(colour.ADOBE_RGB.primaries)], (200, 40, 40)),
        ((184, 56, 49), [chromaticities(colour.PRIMARIES[12])], (200, 40, 40)),  # and sRGB's curve, as most
        ((130, 100, 40), [gamma(0.45455), chromaticities(colour.BT709)], (130, 100, 40)),  # how sRGB was said before
        # The specification's order: cICP, iCCP, sRGB, gAMA with cHRM.
        ((184, 56, 49), [LINEAR, SRGB, iccp(icc()), P3], (200, 40, 40)),
        ((55, 55, 55), [LINEAR, SRGB, iccp(icc())], (128, 128, 128)),
        ((55, 55, 55), [LINEAR, SRGB], (55, 55, 55)),
        # What cannot be followed is as good as not said.
        ((55, 55, 55), [LINEAR, iccp(b"no profile")], (128, 128, 128)),
        ((90, 80, 70), [cicp(99, 13)], (90, 80, 70)),
        ((90, 80, 70), [cicp(2, 2)], (90, 80, 70)),
        ((90, 80, 70), [gamma(0)], (90, 80, 70)),
        ((90, 80, 70), [chromaticities(((0.3, 0.3), (0.3, 0.3), (0.3, 0.3), (0.3, 0.3)))], (90, 80, 70)),
        # HDR: 203 nits are white, and what is brighter as well. 24 nits are 0.118 of that.
        ((148, 148, 148), [cicp(9, 16)], (255, 255, 255)),
        ((230, 230, 230), [cicp(9, 16)], (255, 255, 255)),
        ((95, 95, 95), [cicp(9, 16)], (96, 96, 96)),
        ((191, 191, 191), [cicp(9, 18)], (254, 254, 254)),
        ((128, 128, 128), [cicp(9, 18)], (138, 138, 138)),
        # Black is 16, white is 235.
        ((16, 126, 235), [cicp(1, 13, 0)], (0, 128, 255)),
    ],
)
def test_colours_of_a_png_that_has_chunks_for_them(tmp_path, stored, chunks, shown):
    """Each way that the format knows, their order, and what to make of nonsense."""
    path = tmp_path / "photo"
    path.write_bytes(png(flat(*stored), *chunks))
    np.testing.assert_allclose(patches(path, 1), [shown], atol=4)


@pytest.mark.parametrize(
    "primaries, transfer, stored, shown",
    [
        (12, 13, (184, 56, 49), (200, 40, 40)),
        (9, 16, (148, 148, 148), (255, 255, 255)),
        (9, 18, (128, 128, 128), (138, 138, 138)),
        (1, 13, (90, 80, 70), (90, 80, 70)),
        (1, 1, (90, 80, 70), (90, 80, 70)),  # as many encoders say it of what a screen showed
    ],
)
def test_colours_of_a_heic_that_names_its_code_points(tmp_path, primaries, transfer, stored, shown):
    """Phones' own, and HDR."""
    path = tmp_path / "photo"
    image = pillow_heif.from_pillow(Image.fromarray(flat(*stored).repeat(2, 0).repeat(2, 1)))
    points = {"color_primaries": primaries, "transfer_characteristics": transfer}
    image.save(path, quality=-1, format="HEIF", **{"save_nclx_profile": True, **points})
    np.testing.assert_allclose(patches(path, 1), [shown], atol=4)


with Image.open(CASES / "adobergb_exif_r03.jpg") as image:
    R03 = image.info["exif"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("says", ["R03", "2"])
def test_adobe_rgb_as_exif_says_it(tmp_path, kind, says):
    """In every format that carries EXIF: an interoperability index, or a number that some cameras made up."""
    exif = R03
    if says == "2":
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        exif.get_ifd(0x8769)[0xA001] = 2
    path = tmp_path / "photo"
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    Image.fromarray(flat(172, 44, 43)).save(path, kind, exif=exif, **options)
    np.testing.assert_allclose(patches(path, 1), [(200, 40, 40)], atol=4)


def test_a_profile_outweighs_exif(tmp_path):
    """An editor that converted the photo left the camera's words in it."""
    path = tmp_path / "photo"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(flat(172, 44, 43)).save(path, "PNG", exif=R03, icc_profile=srgb)
    np.testing.assert_allclose(patches(path, 1), [(172, 44, 43)], atol=1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [False, True])
def test_profiles_of_grey_photos(tmp_path, kind, alpha):
    """Of 8 and 16 bits, with and without alpha: linear grey of 0.216 is 128."""
    unit = 257 if kind is np.uint16 else 1
    samples = (55 * unit, 255 * unit) if alpha else (55 * unit,)
    path = tmp_path / "photo"
    path.write_bytes(png(flat(*samples, kind=kind), iccp(icc("GRAY")), colour_type=4 if alpha else 0))
    np.testing.assert_allclose(patches(path, 1), [(128, 128, 128)], atol=4)


def test_a_profile_larger_than_a_megabyte_is_followed(tmp_path):
    """Printers' profiles are. Padding stands for their tables."""
    profile = icc()
    profile = struct.pack(">I", len(profile) + 3_000_000) + profile[4:] + bytes(3_000_000)
    path = tmp_path / "photo"
    path.write_bytes(png(flat(55, 55, 55), iccp(profile)))
    np.testing.assert_allclose(patches(path, 1), [(128, 128, 128)], atol=4)


# --- one transparent colour


def packed(levels: np.ndarray, depth: int) -> bytes:
    """Rows [height, width] of samples of less than eight bits, each row with its filter byte."""
    bits = (levels[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return b"".join(b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits)


@pytest.mark.parametrize("depth, transparent, other", [(1, 0, 1), (2, 1, 2), (4, 5, 9), (8, 77, 78), (16, 300, 301)])
def test_one_transparent_grey_at_every_depth(tmp_path, depth, transparent, other):
    """It is white, and its neighbours are what they were."""
    levels = np.array([[transparent] * 16 + [other] * 16] * 32, np.uint16)
    header = chunk(b"IHDR", struct.pack(">2I5B", 32, 32, depth, 0, 0, 0, 0))
    lines = packed(levels, depth) if depth < 16 else b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", transparent))
    path = tmp_path / "photo"
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    shown = other * 255 // (2**depth - 1)
    assert patches(path, 2).tolist() == [[255] * 3, [shown] * 3]


def test_one_transparent_colour_of_sixteen_bits(tmp_path):
    """All sixteen count: what differs in the low byte alone is not transparent."""
    rows = flat(0x1020, 0x3040, 0x5060, kind=np.uint16)
    rows[:, 16:, 2] += 1
    path = tmp_path / "photo"
    path.write_bytes(png(rows, chunk(b"tRNS", struct.pack(">3H", 0x1020, 0x3040, 0x5060))))
    assert patches(path, 2).tolist() == [[255] * 3, [0x10, 0x30, 0x50]]


# --- whole, though parts of them are not


BOMB = zlib.compress(bytes(20_000_000), 9)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))), id="long text"),
        pytest.param(chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB), id="bomb"),
        pytest.param(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), id="bomb as XMP"),
        pytest.param(chunk(b"iCCP", b"name\0\0" + BOMB), id="bomb as profile"),
        pytest.param(chunk(b"zTXt", b"Comment\0\7nonsense"), id="unknown compression"),
        pytest.param(chunk(b"iCCP", b"name\0\7nonsense"), id="unknown compression of a profile"),
        pytest.param(chunk(b"gAMA", b"\0"), id="short gamma"),
        pytest.param(chunk(b"pHYs", b"\0"), id="short density"),
        pytest.param(chunk(b"tEXt", b"Comment\0words")[:-1] + b"?", id="checksum of text"),
        pytest.param(chunk(b"iCCP", b"name\0\0" + zlib.compress(icc()))[:-1] + b"?", id="checksum of profile"),
        pytest.param(chunk(b"tRNS", bytes(6))[:-1] + b"?", id="checksum of transparency"),
        pytest.param(chunk(b"tRNS", b"\0\1"), id="short transparency"),
        pytest.param(chunk(b"eXIf", b"nonsense"), id="no EXIF"),
        pytest.param(chunk(b"prVt", b"whatever"), id="a private chunk"),
    ],
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_odd_chunk_does_not_cost_the_photo(tmp_path, odd, where):
    """Before and behind the pixels, which have nothing to do with it. None of it is unpacked without a bound."""
    path = tmp_path / "photo"
    path.write_bytes(png(flat(10, 20, 30), **{where: odd}))
    assert verify(path).width == 32
    assert patches(path, 1).tolist() == [[10, 20, 30]]


def test_a_png_of_many_chunks_is_refused_before_it_is_decoded(tmp_path):
    """Two million of them in 25 MB cost Pillow a minute."""
    path = tmp_path / "photo"
    path.write_bytes(png(flat(0, 0, 0), chunk(b"tEXt", b"") * (png_chunks.MAX_CHUNKS + 1)))
    for read in (measure, verify, open_photo):
        with pytest.raises(InvalidPhoto, match="PNG of more than 100000 chunks"):
            read(path)


def test_a_jpeg_of_many_segments_is_refused_before_it_is_decoded(tmp_path):
    """So are six million comments."""
    file = io.BytesIO()
    Image.fromarray(flat(0, 0, 0)).save(file, "JPEG")
    path = tmp_path / "photo"
    comment = b"\xff\xfe\0\2"
    path.write_bytes(file.getvalue()[:2] + comment * (jpeg_scans.MAX_SEGMENTS + 1) + file.getvalue()[2:])
    for read in (measure, verify, open_photo):
        with pytest.raises(InvalidPhoto, match="JPEG of more than 4096 segments"):
            read(path)


def noise(**options: object) -> bytes:
    """A JPEG in which every byte counts."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_may_lack_its_end_marker(tmp_path, options, lost):
    """Half of it or all: every pixel is there."""
    path = tmp_path / "photo"
    path.write_bytes(noise(**options))
    whole = np.asarray(open_photo(path))
    path.write_bytes(noise(**options)[:-lost])
    verify(path)
    np.testing.assert_array_equal(open_photo(path), whole)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_a_jpeg_may_lack_nothing_else(tmp_path, options):
    """Wherever it is cut: within a scan, between scans, within their headers."""
    whole = noise(**options)
    path = tmp_path / "photo"
    scans = [at for at in range(len(whole) - 1) if whole[at : at + 2] == b"\xff\xda"]
    for length in {*range(3, len(whole) - 5, len(whole) // 60), *scans, *(at + 9 for at in scans), len(whole) - 6}:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidPhoto, match="damaged or cut short"):
            verify(path)


SIDE_PX = 4000


@in_child_process
def peak_bytes(path: Path) -> int:
    """What this process needs at once for a photo, beside what it had."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here on (proc_pid_clear_refs(5))
    before = resident_bytes("VmRSS")
    unwrap(verify)(path)
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str) -> int:
    """Of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", ["JPEG without its end", "16-bit PNG with a transparent colour"])
def test_what_is_decoded_twice_is_not_kept_twice(tmp_path, kind):
    """A photo needs a few times its pixels at most, which of 100 megapixels are 400 MB; two are taken in at once."""
    path = tmp_path / "photo"
    if kind == "JPEG without its end":
        buffer = io.BytesIO()
        Image.new("RGB", (SIDE_PX, SIDE_PX), (200, 40, 40)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue()[:-2])
    else:
        rows = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint16)
        path.write_bytes(png(rows, chunk(b"tRNS", bytes(6))))
    assert peak_bytes(path) < 3.3 * SIDE_PX * SIDE_PX * 4
