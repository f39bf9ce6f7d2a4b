"""Presigned storage over real sockets: whole or not at all, never over another, nowhere but in its folder."""

import errno
import os
import socket
from contextlib import closing
from urllib.parse import quote, urlsplit

import httpx
import pytest

from inference.errors import DiskFull, ObjectExists, ObjectMissing, StorageRefused
from inference.server import objects as objects_module
from inference.server.objects import INCOMING, ObjectStore, Signer
from tests.server.harness import config, running_server

BUCKET = "group-photos"
VIDEO = {"content-type": "video/mp4"}
signer = Signer("secret")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the server works in."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    """A server on loopback, for all tests here."""
    with running_server(config(folder, max_upload_bytes=20_000_000)) as url:
        yield url


def upload_url(server, path, lifetime_s=60):
    """As presign makes it."""
    token = signer.sign("upload", f"{BUCKET}/{path}", lifetime_s)
    return f"{server}/storage/v1/object/upload/sign/{BUCKET}/{quote(path)}?token={token}"


def download_url(server, path, lifetime_s=60):
    """As presign makes it."""
    token = signer.sign("download", f"{BUCKET}/{path}", lifetime_s)
    return f"{server}/storage/v1/object/sign/{BUCKET}/{quote(path)}?token={token}"


def refused(answer, status, code):
    """Supabase's shape: 400 on the wire, the truth in the body."""
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert set(body) == {"statusCode", "error", "message", "code"}
    assert (body["statusCode"], body["code"]) == (status, code)


def stored(folder):
    """Every file there is."""
    return sorted(
        str(file.relative_to(folder / "objects")) for file in (folder / "objects").rglob("*") if file.is_file()
    )


def test_what_was_uploaded_is_downloaded(server):
    """Byte for byte, with its length and media type, and in parts."""
    body = os.urandom(3_000_000)
    answer = httpx.put(upload_url(server, "videos/a.mp4"), content=body, headers=VIDEO)
    assert (answer.status_code, answer.json()) == (200, {"Key": f"{BUCKET}/videos/a.mp4"})
    got = httpx.get(download_url(server, "videos/a.mp4"))
    assert got.content == body
    assert (got.headers["content-length"], got.headers["content-type"]) == ("3000000", "video/mp4")
    part = httpx.get(download_url(server, "videos/a.mp4"), headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, body[10:20])


def test_head_says_what_get_would(server):
    """All but the bytes: what browsers and players ask before they load a video, and monitors of /healthz."""
    httpx.put(upload_url(server, "videos/head.mp4"), content=b"x" * 1000, headers=VIDEO)
    for url in (download_url(server, "videos/head.mp4"), f"{server}/healthz"):
        got, said = httpx.get(url), httpx.head(url)
        assert (said.status_code, said.content) == (200, b"")
        for name in ("content-length", "content-type", "etag"):
            assert said.headers.get(name) == got.headers.get(name)
    assert httpx.head(download_url(server, "videos/none.mp4")).status_code == 400
    assert httpx.head(download_url(server, "videos/head.mp4") + "x").status_code == 400


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_duplicate_is_answered_before_it_is_read(server, folder, connection):
    """A client that is still writing 12 MB gets the refusal all the same, and the first object stays."""
    path = f"videos/duplicate-{connection}.mp4"
    assert httpx.put(upload_url(server, path), content=b"first", headers=VIDEO).status_code == 200
    again = httpx.put(upload_url(server, path), content=b"x" * 12_000_000, headers=VIDEO | {"connection": connection})
    refused(again, "409", "KeyAlreadyExists")
    assert again.json()["error"] == "Duplicate"
    assert (folder / "objects" / path).read_bytes() == b"first"


def test_the_early_answer_comes_while_nothing_is_sent(server):
    """A duplicate, and a body over the limit, are refused on their headers alone."""
    httpx.put(upload_url(server, "videos/early.mp4"), content=b"first", headers=VIDEO)
    for path, length, code in (
        ("videos/early.mp4", 5, b"KeyAlreadyExists"),
        ("videos/big.mp4", 10**12, b"EntityTooLarge"),
    ):
        with closing(send_head(server, path, length)) as connection:
            assert code in receive(connection, code)


def send_head(server, path, length):
    """A connection over which a PUT was begun."""
    target = urlsplit(upload_url(server, path))
    connection = socket.create_connection((target.hostname, target.port), timeout=10)
    connection.sendall(
        f"PUT {target.path}?{target.query} HTTP/1.1\r\nHost: {target.netloc}\r\n"
        f"Content-Type: video/mp4\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


def receive(connection, until):
    """What arrives, up to and with `until`, or to the end."""
    received = b""
    while until not in received and (chunk := connection.recv(65536)):
        received += chunk
    return received


def test_a_body_cut_short_leaves_nothing(server, folder):
    """The connection ends in the middle: no object, no remains, and the path is free."""
    before = stored(folder)
    connection = send_head(server, "videos/cut.mp4", 1000)
    connection.sendall(b"x" * 500)
    connection.shutdown(socket.SHUT_WR)
    receive(connection, b"\0")
    connection.close()
    answer = httpx.put(upload_url(server, "videos/cut.mp4"), content=b"whole", headers=VIDEO)
    assert answer.status_code == 200
    assert stored(folder) == sorted([*before, "videos/cut.mp4"])


def test_refusals_are_supabases(server):
    """Each with its own code."""
    url = upload_url(server, "videos/r.mp4")
    refused(httpx.put(url, content=b"x", headers={"content-type": "video/mp4; codecs=x"}), "415", "InvalidMimeType")
    refused(httpx.put(url, content=b"x"), "415", "InvalidMimeType")
    refused(httpx.put(url, content=iter([b"x"]), headers=VIDEO), "411", "MissingContentLength")
    refused(httpx.put(url, content=b"x" * 20_000_001, headers=VIDEO), "413", "EntityTooLarge")
    refused(httpx.put(upload_url(server, "videos/r.mp4", -1), content=b"x", headers=VIDEO), "400", "InvalidJWT")
    refused(httpx.get(download_url(server, "videos/none.mp4")), "404", "NoSuchKey")


def test_a_token_is_for_one_thing(server):
    """Another path, another operation, another key, no token: all refused."""
    token = signer.sign("upload", f"{BUCKET}/videos/t.mp4", 60)
    base = f"{server}/storage/v1/object"
    forged = Signer("guess").sign("upload", f"{BUCKET}/videos/t.mp4", 60)
    for path, given, code in (
        ("t2.mp4", token, "InvalidSignature"),
        ("t.mp4", forged, "InvalidSignature"),
        ("t.mp4", token[:-1] + ("0" if token[-1] != "0" else "1"), "InvalidSignature"),
        ("t.mp4", "é.\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "InvalidJWT"),
        ("t.mp4", "", "InvalidJWT"),
        ("t.mp4", "a.b", "InvalidSignature"),
    ):
        url = f"{base}/upload/sign/{BUCKET}/videos/{path}"
        refused(httpx.put(url, params={"token": given}, content=b"x", headers=VIDEO), "400", code)
    refused(httpx.get(f"{base}/sign/{BUCKET}/videos/t.mp4", params={"token": token}), "400", "InvalidSignature")


@pytest.mark.parametrize(
    "path",
    [
        "../queue.db",
        "videos/../../queue.db",
        "/etc/passwd",
        "videos//x.mp4",
        "videos/./x.mp4",
        "videos\\..\\x.mp4",
        "videos/\x00.mp4",
        "%2e%2e/queue.db",
        f"{INCOMING}/x.mp4",
        ".hidden",
        "link/secret",
        "link-file",
        "videos/" + "x" * 300,
        "x/" * 600 + "y",
        "videos/\N{FULLWIDTH FULL STOP}",
        "",
    ],
)
def test_no_path_leads_out(tmp_path, path):
    """Not by name and not by a link inside the folder, reading or writing."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    store = ObjectStore(tmp_path / "objects")
    (tmp_path / "objects" / "link").symlink_to(outside)
    (tmp_path / "objects" / "link-file").symlink_to(outside / "secret")
    assert not store.exists(path)
    assert not store.accepts(path)
    with pytest.raises(ObjectMissing):
        store.path(path)
    with store.incoming() as file, pytest.raises(StorageRefused):
        store.place(file, path)
    assert [entry.name for entry in outside.iterdir()] == ["secret"]


def test_an_encoded_path_leads_nowhere(server):
    """Signed, as if the signer had been tricked, and encoded in the URL: still refused."""
    for path in ("../queue.db", "..%2fqueue.db", f"{INCOMING}/x"):
        token = signer.sign("download", f"{BUCKET}/{path}", 60)
        with httpx.Client() as client:
            url = httpx.URL(f"{server}/storage/v1/object/sign/{BUCKET}/").copy_with(
                raw_path=f"/storage/v1/object/sign/{BUCKET}/{quote(path, safe='')}?token={token}".encode()
            )
            refused(client.get(url), "404", "NoSuchKey")


def test_two_uploads_at_once_have_one_winner(tmp_path):
    """Both were admitted; the second to end is a duplicate, and the first stays."""
    store = ObjectStore(tmp_path)
    with store.incoming() as first, store.incoming() as second:
        first.write(b"first")
        second.write(b"second")
        store.place(first, "videos/a.mp4")
        with pytest.raises(ObjectExists):
            store.place(second, "videos/a.mp4")
    assert store.path("videos/a.mp4").read_bytes() == b"first"
    assert list((tmp_path / INCOMING).iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(server, folder, monkeypatch):
    """Wire 500, as for anything that may pass."""

    def full(_file, _chunk):
        raise DiskFull(os.strerror(errno.ENOSPC))

    monkeypatch.setattr(objects_module, "write", full)
    answer = httpx.put(upload_url(server, "videos/full.mp4"), content=b"x" * 1000, headers=VIDEO)
    assert (answer.status_code, answer.json()["code"]) == (500, "InternalError")
    assert "videos/full.mp4" not in stored(folder)
    assert not any(name.startswith(INCOMING) for name in stored(folder))


def test_a_disk_without_room_is_disk_full():
    """What the system says becomes an error of ours: /dev/full has no room for anything."""
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(DiskFull):  # noqa: PTH123 - a device
        objects_module.write(file, b"x")


def test_a_folder_goes_with_its_last_object(tmp_path):
    """And is made again for the next."""
    store = ObjectStore(tmp_path)
    for name in ("group/a.jpg", "group/b.jpg", "top.jpg"):
        with store.incoming() as file:
            store.place(file, name)
    store.remove("group/a.jpg")
    assert store.exists("group/b.jpg")
    for name in ("group/b.jpg", "group/b.jpg", "top.jpg"):
        store.remove(name)
    assert [entry.name for entry in tmp_path.iterdir()] == [INCOMING]
    with store.incoming() as file:
        store.place(file, "group/a.jpg")
