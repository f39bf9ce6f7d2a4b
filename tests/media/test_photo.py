"""Photos as strangers' phones make them: every kind read right, every broken one refused in one line."""

import errno
import io
import os
import struct
import sys
import zlib
from inspect import unwrap
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from inference.errors import I2VError, InvalidPhoto, MachineFault
from inference.media.photo import (
    MAX_ASPECT_RATIO,
    PhotoInfo,
    cover_box,
    fit,
    load,
    measure,
    open_photo,
    verify,
)

# Top left red, top right green, bottom left blue, bottom right white: every orientation tells itself apart.
CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def quarters(width: int = 160, height: int = 96, mode: str = "RGB") -> Image.Image:
    """Four flat quarters."""
    image = Image.new("RGB", (width, height))
    for (x, y), colour in zip([(0, 0), (1, 0), (0, 1), (1, 1)], CORNERS.values(), strict=True):
        image.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """The image as a file of this kind."""
    out = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(out, quality=90, **options)
    else:
        image.save(out, kind, **options)
    return out.getvalue()


def corners(pixels: np.ndarray) -> list[str]:
    """Names of the colours in the four corners: top left, top right, bottom left, bottom right."""
    h, w, _ = pixels.shape
    names = []
    for y, x in ((h // 8, w // 8), (h // 8, -w // 8), (-h // 8, w // 8), (-h // 8, -w // 8)):
        distance = {name: np.abs(pixels[y, x].astype(int) - colour).max() for name, colour in CORNERS.items()}
        name = min(distance, key=distance.get)
        assert distance[name] < 24, (pixels[y, x], name)
        names.append(name)
    return names


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file whose name says nothing about them."""

    def write(content: bytes) -> Path:
        path = tmp_path / "photo.bin"
        path.write_bytes(content)
        return path

    return write


# --- what is read


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
def test_four_formats_are_read_whatever_the_name(file, kind):
    """By content: size and format from measure and verify alike, colours in place."""
    path = file(saved(quarters(), kind))
    assert measure(path) == verify(path) == PhotoInfo(160, 96, kind)
    assert corners(load(path, (96, 64))) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes(file, mode, progressive):
    """Colour, grey and print, baseline and progressive."""
    pixels = load(file(saved(quarters(mode=mode), "JPEG", progressive=progressive, quality=95)), (96, 64))
    assert (pixels.shape, pixels.dtype) == ((64, 96, 3), np.uint8)
    if mode == "L":
        assert np.ptp(pixels, axis=2).max() == 0
    else:
        assert corners(pixels) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_modes_of_png_and_webp(file, mode, kind):
    """All come out as three channels of eight bits, white where they were white."""
    pixels = load(file(saved(quarters(mode=mode), kind, **({"lossless": True} if kind == "WEBP" else {}))), (160, 96))
    assert pixels[-10, -10].tolist() == [255, 255, 255]
    assert pixels[10, 10].tolist() == ([255, 0, 0] if mode in {"P", "RGB", "RGBA"} else [pixels[10, 10, 0]] * 3)


def test_sixteen_bit_grey_keeps_its_range(file):
    """Scaled to eight bits, not cut off at 255."""
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 256 + 17, (64, 1))
    pixels = load(file(saved(Image.fromarray(ramp), "PNG")), (256, 64))
    assert pixels[32, :, 0].tolist() == list(range(256))


def test_sixteen_bit_colour(file):
    """Pillow cannot write it, phones' editors do: made by hand."""
    row = b"\0" + struct.pack(">3H", 0x8000, 0x4000, 0xFFFF) * 32
    pixels = load(file(png(32, 32, depth=16, colour=2, data=zlib.compress(row * 32))), (32, 32))
    assert pixels[16, 16].tolist() == [0x80, 0x40, 0xFF]


def png(width: int, height: int, *, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG with this header, whatever its data is."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "HEIF"])
def test_transparency_lies_over_white(file, kind):
    """Half transparent black is grey, wholly transparent red is white."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    image.paste((255, 0, 0, 0), (0, 0, 32, 64))
    pixels = load(file(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {}))), (64, 64))
    assert pixels[32, 8].min() >= 250
    np.testing.assert_allclose(pixels[32, 56], 127, atol=4)


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_is_white(file, mode, transparent):
    """PNG's tRNS chunk: one palette entry, one grey or one colour is transparent."""
    image = Image.new("RGB", (32, 32), (0, 0, 0)).convert(mode)
    pixels = load(file(saved(image, "PNG", transparency=transparent)), (32, 32))
    assert pixels.min() == 255


UPRIGHT_CORNERS = {
    1: ["red", "green", "blue", "white"],
    2: ["green", "red", "white", "blue"],
    3: ["white", "blue", "green", "red"],
    4: ["blue", "white", "red", "green"],
    5: ["red", "blue", "green", "white"],
    6: ["blue", "red", "white", "green"],
    7: ["white", "green", "blue", "red"],
    8: ["green", "white", "red", "blue"],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
@pytest.mark.parametrize("orientation", UPRIGHT_CORNERS)
def test_exif_orientation_is_applied(file, kind, orientation):
    """All eight, in every format; `measure` already speaks of the upright size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = file(saved(quarters(), kind, exif=exif.tobytes()))
    size = (96, 160) if orientation >= 5 else (160, 96)
    assert (measure(path).width, measure(path).height) == size
    assert open_photo(path).size == size
    assert corners(load(path, size)) == UPRIGHT_CORNERS[orientation]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_photo(file):
    """Its picture is whole."""
    path = file(saved(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"))
    assert verify(path) == PhotoInfo(160, 96, "JPEG")
    assert corners(load(path, (96, 64))) == ["red", "green", "blue", "white"]


def profile(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float], gamma: float) -> bytes:
    """An ICC v2 display profile with these primaries (xy), a D65 white adapted to D50, and a power curve."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d65, d50 = xyz(0.3127, 0.3290), np.array([0.9642, 1.0, 0.8249])
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ d65)) @ bradford
    primaries = np.stack([xyz(*red), xyz(*green), xyz(*blue)], axis=1)
    columns = adapt @ (primaries * np.linalg.solve(primaries, d65))

    def fixed(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78 + b"\0"
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": fixed(d50)}
    tags |= {name: fixed(columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">2I", at + len(body), len(value))
        body += value.ljust((len(value) + 3) // 4 * 4, b"\0")
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4xI", size, 0x02100000) + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += b"".join(struct.pack(">i", round(v * 65536)) for v in d50)
    return head.ljust(128, b"\0") + table + body


DISPLAY_P3 = profile((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), 2.2)  # SMPTE EG 432-1 primaries
ADOBE_RGB = profile((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), 563 / 256)  # Adobe RGB (1998)


@pytest.mark.parametrize(
    "icc, stored, shown",
    [
        # Computed apart, in numpy: the power curve, the matrix between the primaries, sRGB's curve.
        (DISPLAY_P3, (128, 128, 128), (129, 129, 129)),
        (DISPLAY_P3, (200, 100, 50), (216, 93, 24)),
        (ADOBE_RGB, (100, 150, 100), (66, 151, 97)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
def test_embedded_profiles_are_converted_to_srgb(file, kind, icc, stored, shown):
    """Display P3, as iPhones write, and Adobe RGB: the same colours as seen on an sRGB screen."""
    flat = Image.new("RGB", (64, 64), stored)
    flat.info["icc_profile"] = icc
    options = {"HEIF": {}, "WEBP": {"lossless": True, "icc_profile": icc}}.get(kind, {"icc_profile": icc})
    pixels = load(file(saved(flat, kind, **options)), (64, 64))
    np.testing.assert_allclose(pixels[32, 32], shown, atol=4)


@pytest.mark.parametrize("icc", [b"not a profile at all", DISPLAY_P3[:200]])
def test_a_broken_profile_counts_as_none(file, icc):
    """The photo is shown as sRGB."""
    flat = Image.new("RGB", (64, 64), (200, 100, 50))
    np.testing.assert_allclose(load(file(saved(flat, "PNG", icc_profile=icc)), (64, 64))[32, 32], (200, 100, 50))


def test_a_profile_for_other_pixels_counts_as_none(file):
    """An RGB profile in a grey photo: left by editors that dropped the colours."""
    grey = Image.new("L", (64, 64), 90)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load(file(saved(grey, "JPEG", icc_profile=icc)), (64, 64))[32, 32].tolist() == [90, 90, 90]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(file, kind):
    """Not an error, and not the last frame."""
    path = file(saved(quarters(), kind, save_all=True, append_images=[Image.new("RGB", (160, 96))]))
    assert verify(path).format == kind
    assert corners(load(path, (160, 96))) == ["red", "green", "blue", "white"]


def test_a_multi_picture_jpeg_is_its_first_picture(file):
    """Most phones write them: a preview or a depth map follows the photo."""
    path = file(saved(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (160, 96))]))
    assert verify(path) == PhotoInfo(160, 96, "JPEG")
    assert corners(load(path, (160, 96))) == ["red", "green", "blue", "white"]


# --- what is refused


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_other_formats_are_refused(file, kind):
    """What Pillow could read besides is not wanted."""
    with pytest.raises(InvalidPhoto, match="not a JPEG, PNG, WebP or HEIC"):
        measure(file(saved(quarters(), kind)))


@pytest.mark.parametrize(
    "content, why", [(b"", "empty"), (b"<html>404</html>", "not a JPEG"), (b"\xff\xd8\xff\xe0", "damaged")]
)
def test_what_is_no_photo_says_so(file, content, why):
    """An empty file, an error page, a bare signature."""
    with pytest.raises(InvalidPhoto, match=why):
        verify(file(content))


def test_a_missing_file_is_refused_without_its_path(tmp_path):
    """The message travels to people; our folders do not."""
    with pytest.raises(InvalidPhoto) as caught:
        verify(tmp_path / "none.jpg")
    assert str(caught.value) == "the photo cannot be read: No such file or directory"


class Failing(type(Path())):
    """A file that is there and cannot be opened, or not be read, for a reason of the machine."""

    opening: BaseException | None = None
    reading: BaseException | None = None

    def open(self, *_: object) -> io.BytesIO:
        if self.opening:
            raise self.opening
        failing = self

        class File(io.BytesIO):
            def read(self, *_: object) -> bytes:
                raise failing.reading

        return File()


@pytest.mark.parametrize("when", ["opening", "reading"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, None])
def test_trouble_of_this_machine_is_not_the_photos(when, number):
    """Another machine can read it: the task must not end for that. In this process, where the file is a stand-in."""
    path = Failing("photo.jpg")
    setattr(path, when, OSError(number, os.strerror(number)) if number else MemoryError())
    for read in (unwrap(verify), lambda path: unwrap(load)(path, (64, 64))):
        with pytest.raises(I2VError) as caught:
            read(path)
        assert type(caught.value) is MachineFault
        assert caught.value.hand_back
        assert "photo.jpg" not in str(caught.value)


def test_a_machine_without_a_reader_for_heic_is_at_fault(file, monkeypatch):
    """Families read what ends a task: another machine can read their photo, and pip is no word for them.

    Read in this process, which is the one that lacks the reader.
    """
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (measure, verify):
        with pytest.raises(MachineFault, match=r"^this machine has no reader for HEIC photos$") as caught:
            unwrap(read)(file(HEIC))
        assert (caught.value.hand_back, caught.value.task_at_fault) == (True, False)


HEIC = saved(quarters(), "HEIF")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_files_are_refused(file, kind, kept):
    """By verify and by load; a JPEG's missing tail shows although it is decoded at an eighth."""
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)), kind)
    path = file(whole[: int(len(whole) * kept)])
    for read in (verify, lambda path: load(path, (64, 64))):
        with pytest.raises(InvalidPhoto, match="damaged or cut short"):
            read(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_the_last_bytes_of_a_jpeg_count(file, progressive):
    """A transfer that lost the end of the last scan is a damaged photo, baseline or progressive."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (400, 600, 3), dtype=np.uint8))
    whole = saved(noise, "JPEG", progressive=progressive)
    verify(file(whole))
    with pytest.raises(InvalidPhoto):
        verify(file(whole[:-200]))


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG up to its frame header, which promises this many pixels."""
    small = saved(quarters(), "JPEG")
    at = small.index(b"\xff\xc0") + 5
    return small[:at] + struct.pack(">2H", height, width) + small[at + 4 :]


def webp_header(width: int, height: int) -> bytes:
    """An animated WebP whose canvas is this large, with a small picture in its corner."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body

    def minus_one(side: int) -> bytes:
        return (side - 1).to_bytes(3, "little")

    picture = saved(quarters(), "WEBP", lossless=True)[12:]
    frame = bytes(6) + minus_one(160) + minus_one(96) + (40).to_bytes(3, "little") + b"\0" + picture
    body = b"WEBP" + chunk(b"VP8X", b"\x02\0\0\0" + minus_one(width) + minus_one(height))
    body += chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", body)


BOMBS = {
    "PNG": png(30_000, 30_000, depth=8, colour=2, data=zlib.compress(bytes(1 << 20))),
    "JPEG": jpeg_header(60_000, 60_000),
    "WEBP": webp_header(12_000, 12_000),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("read", [measure, verify, open_photo])
def test_bombs_are_refused_before_they_are_decoded(file, kind, read):
    """By the header: the message knows the size, and nothing of that size was allocated."""
    with pytest.raises(InvalidPhoto, match=r"megapixels; the limit is 100$"):
        read(file(BOMBS[kind]))


def test_the_pixel_limit_is_the_callers(file):
    """Exactly at the limit is within it."""
    path = file(saved(quarters(160, 96), "PNG"))
    verify(path, max_pixels=160 * 96)
    with pytest.raises(InvalidPhoto, match=r"160x96 = 0 megapixels; the limit is 0\.01"):
        verify(path, max_pixels=10_000)


@pytest.mark.parametrize(
    "size, why",
    [((15, 20), "each side needs at least 16"), ((1000, 249), "at most 4 times"), ((20, 100), "at most 4 times")],
)
def test_sizes_nothing_can_be_made_of_are_refused(file, size, why):
    """Icons and strips."""
    with pytest.raises(InvalidPhoto, match=why):
        measure(file(saved(Image.new("RGB", size), "PNG")))


SEEDS = {
    "JPEG": saved(quarters(48, 32), "JPEG", icc_profile=DISPLAY_P3, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "progressive": saved(quarters(48, 32, "CMYK"), "JPEG", progressive=True),
    "PNG": saved(quarters(48, 32, "P"), "PNG", icc_profile=ADOBE_RGB, transparency=b"\0\x80"),
    "APNG": saved(quarters(48, 32), "PNG", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "WEBP": saved(quarters(48, 32, "RGBA"), "WEBP", icc_profile=DISPLAY_P3),
    "HEIF": saved(quarters(48, 32), "HEIF"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # as in production, where Pillow's warnings stop nothing
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_raise_anything_but_invalid_photo(tmp_path, data):
    """Real files, cut anywhere and with bytes changed, inserted and removed: read, or refused in one line."""
    content = bytearray(SEEDS[data.draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "change", "insert", "remove", "cut"]))
        some = data.draw(st.binary(min_size=1, max_size=4))
        if kind == "change":
            content[at : at + len(some)] = some
        elif kind == "insert":
            content[at:at] = some
        elif kind == "remove":
            del content[at : at + len(some)]
        elif at > 0:
            del content[at:]
        assume(content)
    path = tmp_path / "fuzzed"
    path.write_bytes(content)
    refusals = []
    for read in (measure, verify, lambda path: load(path, (32, 32), max_pixels=1_000_000)):
        try:
            read(path)
        except InvalidPhoto as refusal:
            refusals.append(str(refusal))
    for refusal in refusals:
        assert refusal
        assert "\n" not in refusal
        assert str(tmp_path) not in refusal


# --- size and crop


@pytest.mark.parametrize(
    "photo, area, multiple, size",
    [
        ((1920, 1080), 1280 * 704, 32, (1280, 704)),  # Wan2.2 5B's own two sizes
        ((1080, 1920), 1280 * 704, 32, (704, 1280)),
        ((4032, 3024), 1280 * 704, 32, (1088, 800)),  # an iPhone's 4:3
        ((3000, 3000), 1280 * 704, 32, (928, 928)),
        ((1920, 1080), 832 * 480, 16, (848, 464)),  # A14B at 480p
        ((1920, 1080), 1280 * 720, 16, (1280, 720)),
        ((64, 36), 1280 * 704, 32, (1280, 704)),  # a small photo is scaled up
    ],
)
def test_well_known_sizes(photo, area, multiple, size):
    """The sizes that the models were trained on, and what ordinary phones' shapes come to."""
    assert fit(*photo, max_area_px=area, multiple=multiple) == size


def crop_px(photo: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """What is cut off in total, in output pixels, on each axis."""
    scale = max(size[0] / photo[0], size[1] / photo[1])
    return photo[0] * scale - size[0], photo[1] * scale - size[1]


def test_sixteen_to_nine_loses_sixteen_rows():
    """1280x720 would be the whole of it."""
    assert crop_px((1920, 1080), (1280, 704)) == (0, 16)


sides = st.integers(16, 12_000)
shapes = st.tuples(sides, sides).filter(lambda photo: max(photo) <= MAX_ASPECT_RATIO * min(photo))


@settings(deadline=None)
@given(photo=shapes, area=st.integers(64 * 64, 3840 * 2160), multiple=st.sampled_from([2, 8, 16, 32]))
def test_a_fitted_size_keeps_its_promises(photo, area, multiple):
    """Multiples, within the area, and a crop of less than one multiple on one axis and none on the other."""
    size = fit(*photo, max_area_px=area, multiple=multiple)
    assert size[0] % multiple == size[1] % multiple == 0
    assert 0 < size[0] * size[1] <= area
    lost = sorted(crop_px(photo, size))
    assert -1e-6 < lost[0] < 1e-6
    assert lost[1] < multiple


@settings(deadline=None)
@given(photo=shapes, multiple=st.sampled_from([8, 16, 32]))
def test_no_larger_size_keeps_them(photo, multiple):
    """Against brute force over every size in a small area."""
    area = 160 * 160
    width, height = fit(*photo, max_area_px=area, multiple=multiple)
    for w in range(multiple, area // multiple + 1, multiple):
        # Heights that w covers with less than one multiple to spare on either axis.
        near = w * photo[1] / photo[0]
        for h in {int((near + k * multiple) // multiple) * multiple for k in (-1, 0, 1, 2)}:
            if h > 0 and width * height < w * h <= area:
                assert max(crop_px(photo, (w, h))) >= multiple


@settings(deadline=None)
@given(photo=shapes, area=st.integers(64 * 64, 1280 * 720))
def test_turning_the_photo_turns_the_size(photo, area):
    """Portrait and landscape are treated alike."""
    width, height = fit(*photo, max_area_px=area, multiple=32)
    turned = fit(photo[1], photo[0], max_area_px=area, multiple=32)
    assert turned[0] * turned[1] == width * height


def test_an_area_without_any_size_is_the_callers_mistake():
    """Less than one multiple squared."""
    with pytest.raises(ValueError, match="no size in 1000 pixels"):
        fit(100, 100, max_area_px=1000, multiple=32)


@settings(deadline=None)
@given(photo=shapes, size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)))
def test_the_crop_is_centred_and_inside(photo, size):
    """As large as the photo allows, in the shape of the output."""
    left, top, right, bottom = cover_box(photo, size)
    assert 0 <= left < right <= photo[0]
    assert 0 <= top < bottom <= photo[1]
    assert left == pytest.approx(photo[0] - right, abs=1e-6)
    assert top == pytest.approx(photo[1] - bottom, abs=1e-6)
    assert min(left, top) == pytest.approx(0, abs=1e-6)
    assert (right - left) * size[1] == pytest.approx((bottom - top) * size[0])


@pytest.mark.parametrize("size", [(1280, 704), (704, 1280), (64, 64), (333, 777)])
def test_a_loaded_photo_has_exactly_the_size_and_no_bars(file, size):
    """A white photo is white to its edges, however it is scaled."""
    pixels = load(file(saved(Image.new("RGB", (640, 360), (255, 255, 255)), "JPEG")), size)
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels.min() >= 254
    assert pixels.flags.writeable


def test_a_draft_is_never_smaller_than_asked_for(file):
    """The JPEG decoder's own scaling stops where the picture still covers the size: nothing is scaled up again."""
    path = file(saved(Image.new("RGB", (4000, 3000)), "JPEG"))
    assert open_photo(path, cover=(900, 700)).size == (1000, 750)
    assert open_photo(path, cover=(1001, 700)).size == (2000, 1500)
    assert open_photo(path).size == (4000, 3000)


def test_a_draft_counts_upright_sides(file):
    """A photo stored sideways is scaled by the sides it will have: a quarter covers 700x1000, a half is too much."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = file(saved(Image.new("RGB", (4000, 3000)), "JPEG", exif=exif))
    assert open_photo(path, cover=(700, 1000)).size == (750, 1000)


def test_a_heic_is_decoded_itself_not_its_thumbnail(file):
    """pillow-heif's `draft` would show an embedded thumbnail in place of the photo."""
    out = io.BytesIO()
    pillow_heif.from_pillow(quarters(640, 480)).save(out, thumbnails=[128])
    path = file(out.getvalue())
    assert open_photo(path).size == open_photo(path, cover=(170, 120)).size == (640, 480)
    assert open_photo(path, cover=(100, 75)).size == (214, 160)
