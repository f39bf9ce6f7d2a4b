"""What tasks bring: into a folder, under names of ours, bounded and verified, and nothing of it in an error."""

import base64
import io
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inference.errors import (
    AddressRefused,
    I2VError,
    InvalidPhoto,
    InvalidVideo,
    ObjectMissing,
    ObjectTooLarge,
    UrlMalformed,
)
from inference.inputs import MAX_INPUTS, decode_data, fetch, source_kind
from inference.task import Input
from inference.transfer.storage import Storage
from tests.media.test_video import foreign

pytestmark = pytest.mark.anyio

MAX_BYTES = 100_000


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    """Both event loops."""
    return request.param


def picture(kind: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    """A photo as a file."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def data(content: bytes, media_type: str = "image/png") -> str:
    """A data URI as JavaScript writes it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image(source: str) -> Input:
    """An input that is meant to be a photo."""
    return Input(kind="image", source=source)


async def fetched(folder: Path, inputs: dict[str, Input], files: dict[str, bytes] | None = None, **limits):
    """`fetch` from a storage that has some files."""

    async def answer(request: httpx.Request) -> httpx.Response:
        content = (files or {}).get(request.url.path)
        return httpx.Response(404) if content is None else httpx.Response(200, content=content)

    async with Storage(transport=httpx.MockTransport(answer)) as storage:
        return await fetch(inputs, folder, storage=storage, **{"max_bytes": MAX_BYTES, **limits})


async def test_files_have_names_of_ours_and_suffixes_of_their_content(tmp_path):
    """Wherever they come from, whatever they claim to be: a JPEG that says it is a PNG is a .jpg."""
    video = foreign(tmp_path / "in.mp4", "-pix_fmt", "yuv420p").read_bytes()
    inputs = {
        "photo": image("https://bucket.example/1.png?X-Amz-Signature=abc"),
        "last_photo": image(data(picture("WEBP"))),
        "x.png": image(data(picture("JPEG"), "image/png")),
        "drive.webm": Input(kind="video", source="https://bucket.example/drive.webm"),
    }
    folder = tmp_path / "lease"
    folder.mkdir()
    paths = await fetched(folder, inputs, {"/1.png": picture(), "/drive.webm": video})
    assert {name: path.name for name, path in paths.items()} == {
        "photo": "photo.png",
        "last_photo": "last_photo.webp",
        "x.png": "input-3.jpg",
        "drive.webm": "input-4.mp4",
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths.values())
    assert paths["drive.webm"].read_bytes() == video


async def test_no_name_leads_out_of_the_folder_or_over_another_file(tmp_path):
    """Paths, names as long as no file's, and two that differ only in case, where a file system may see one."""
    folder = tmp_path / "lease"
    folder.mkdir()
    names = ["../x", "/etc/x", "a/b.png", "..", "é" * 255, "A.png", "a.png", "photo.png", "input-1", "ph\u00f6to\u202d"]
    inputs = {name: image(data(picture(size=(16 + n, 16)))) for n, name in enumerate(names)}
    paths = await fetched(folder, inputs)
    assert [path.parent for path in paths.values()] == [folder] * len(names)
    assert len(set(paths.values())) == len(list(folder.iterdir())) == len(names)
    for number, path in enumerate(paths.values()):
        with Image.open(path) as shown:
            assert shown.width == 16 + number
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "item, kind, told",
    [
        (image("photos/1.png"), UrlMalformed, "mask: the source is neither"),
        (image("file:///etc/passwd"), UrlMalformed, "mask: the source is neither"),
        (image("data:image/png;base64,iVBOR*w0"), UrlMalformed, "mask: the data URI says that it is base64, and is"),
        (image("data:image/png;base64"), UrlMalformed, "mask: the data URI has no comma"),
        (image("data:image/png;base64,"), UrlMalformed, "mask: the data URI is empty"),
        (image("data:,%zz"), UrlMalformed, "mask: the data URI has a % without"),
        (image("data:,é"), UrlMalformed, "mask: the data URI has characters"),
        (image(data(b"x" * (MAX_BYTES + 1))), ObjectTooLarge, "mask: the data URI holds more than 100000 bytes"),
        (image("https://bucket.example/none?token=s3cret"), ObjectMissing, "mask: https://bucket.example/none: "),
        (image("https://bucket.example/large?token=s3cret"), ObjectTooLarge, "mask: https://bucket.example/large: "),
        (image("https://bucket.example/text"), InvalidPhoto, "mask: the file is not a JPEG, PNG, WebP or HEIC photo"),
        (image(data(b"hello")), InvalidPhoto, "mask: the file is not a JPEG"),
        (image(data(picture()[:-30])), InvalidPhoto, "mask: the photo is damaged"),
        (Input(kind="video", source=data(picture())), InvalidVideo, "mask: the file is not a video"),
    ],
)
async def test_what_is_wrong_is_told_with_the_name(tmp_path, item, kind, told):
    """One line, the task at fault, and neither a signature nor any of the file itself."""
    files = {"/text": b"hello", "/large": b"x" * (MAX_BYTES + 1)}
    with pytest.raises(kind) as caught:
        await fetched(tmp_path, {"mask": item}, files)
    assert str(caught.value).startswith(told)
    assert caught.value.task_at_fault
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "s3cret" not in str(chain)
        assert "iVBOR" not in str(chain)
        chain = chain.__cause__ or chain.__context__


async def test_an_error_about_the_photo_is_told_as_ever(tmp_path):
    """It says already what it is about."""
    with pytest.raises(InvalidPhoto, match=r"^the photo is only 8x8 pixels"):
        await fetched(tmp_path, {"photo": image(data(picture(size=(8, 8))))})


async def test_files_are_bounded_together_as_well(tmp_path):
    """Whether they come by URL or in the task."""
    content = picture()
    inputs = {"a": image("https://bucket.example/a"), "b": image(data(content)), "c": image(data(content))}
    limit = 2 * len(content)
    with pytest.raises(ObjectTooLarge, match=f"^c: the task's files are together larger than {limit} bytes"):
        await fetched(tmp_path, inputs, {"/a": content}, max_total_bytes=limit)
    with pytest.raises(ObjectTooLarge, match=r"^c: the data URI holds more than 1 bytes"):
        await fetched(tmp_path, inputs, {"/a": content}, max_total_bytes=limit + 1)
    with pytest.raises(ObjectTooLarge, match=r"inputs: the task brings 61 files"):
        await fetched(tmp_path, {str(n): image(data(content)) for n in range(MAX_INPUTS + 1)})


async def test_a_video_may_be_larger_than_a_photo(tmp_path):
    """Its limit is its own, and replaces the storage's."""
    video = foreign(tmp_path / "in.mp4", "-pix_fmt", "yuv420p").read_bytes()
    item = Input(kind="video", source="https://bucket.example/v")
    assert await fetched(tmp_path, {"v": item}, {"/v": video}, max_bytes=10, max_video_bytes=len(video))
    with pytest.raises(ObjectTooLarge):
        await fetched(tmp_path, {"v": item}, {"/v": video}, max_video_bytes=len(video) - 1)


async def test_urls_of_strangers_lead_to_public_addresses_only(tmp_path):
    """The rule is the storage's, and it is asked."""
    async with Storage() as storage:
        with pytest.raises(AddressRefused, match=r"^x: "):
            await fetch({"x": image("http://127.0.0.1:1/x")}, tmp_path, storage=storage, max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    "source, kind",
    [
        ("photos/1.jpg", "path"),
        ("https://x.example/1.jpg", "url"),
        ("HTTP://x.example", "url"),
        ("DATA:,x", "data"),
        ("ftp://x.example/1", "path"),
        (" https://x.example", "path"),
        ("", "path"),
    ],
)
def test_kinds_of_sources(source, kind):
    """By the scheme, in either case."""
    assert source_kind(source) == kind


@given(st.binary(min_size=1, max_size=300), st.sampled_from(["", "image/png", "text/plain;charset=utf-8"]))
def test_what_was_encoded_comes_back(content, media_type):
    """In both encodings, and in base64 whose special characters were percent-encoded; never one byte more."""
    encoded = base64.b64encode(content).decode()
    for uri in (
        f"data:{media_type};base64,{encoded}",
        f"DATA:{media_type};BASE64,{quote(encoded, safe='')}",
        f"data:{media_type},{quote(content, safe='')}",
    ):
        assert decode_data(uri, len(content)) == content
        with pytest.raises(I2VError, match=r"more than|empty"):
            decode_data(uri, len(content) - 1)


@given(st.one_of(st.text(max_size=200), st.text(alphabet="data:;bse64,%A=/+ \x00\n", max_size=60).map("data:".__add__)))
def test_any_text_is_decoded_or_refused(uri):
    """By an error of ours, of one line, that does not repeat it."""
    try:
        decoded = decode_data(uri, 50)
    except I2VError as error:
        refusal = error
    else:
        assert 0 < len(decoded) <= 50
        return
    assert refusal.task_at_fault
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 100
