"""Presigned GET and PUT, against scripted bytes on loopback where the connection matters."""

import errno
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio
import anyio.lowlevel
import httpcore
import httpx
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

import inference.transfer.storage
from inference.errors import (
    AddressRefused,
    DiskFull,
    I2VError,
    NotWritable,
    ObjectEmpty,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    SettingsError,
    StorageError,
    StorageRefused,
    StorageUnavailable,
    UrlExpired,
    UrlMalformed,
)
from inference.transfer.network import MAX_EARLY_BYTES, DuplexStream, GuardedNetwork, is_public
from inference.transfer.storage import Storage, redact
from inference.transfer.storage_errors import mapped
from inference.transfer.tls import tls_context

pytestmark = pytest.mark.anyio

SECRET = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0"
URL = f"https://storage.example/object/sign/photos/1.jpg?token={SECRET}"
DUPLICATE = (
    b'{"statusCode":"409","error":"Duplicate","message":"The resource already exists","code":"KeyAlreadyExists"}'
)


class Seen(NamedTuple):
    line: str
    headers: dict[str, str]
    body: bytes


Serve = Callable[[Seen, socket.socket], None]


class Loopback:
    """A server of one function: what to send once a request was read, or its head alone (`read_body=False`)."""

    def __init__(self, serve: Serve, *, read_body: bool = True, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[Seen] = []
        loopback = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 20

            def handle(self) -> None:
                line = self.rfile.readline().decode().strip()
                headers = {}
                while head := self.rfile.readline().decode().strip():
                    name, _, value = head.partition(": ")
                    headers[name.lower()] = value
                body = self.rfile.read(int(headers.get("content-length", 0))) if read_body else b""
                loopback.seen.append(Seen(line, headers, body))
                with suppress(OSError):
                    serve(loopback.seen[-1], self.request)

        class Server(socketserver.ThreadingTCPServer):
            request_queue_size = 32

            def finish_request(self, request, client_address) -> None:
                if tls is not None:
                    try:
                        request = tls.wrap_socket(request, server_side=True)
                    except OSError:
                        return  # a client that does not like the certificate
                super().finish_request(request, client_address)
                if tls is not None:
                    request.close()

            def shutdown_request(self, request) -> None:
                request.close()  # at once: no half-close first, so that unread bytes become a reset

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.origin = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reply(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer; a header given replaces the usual one, an empty one removes it."""
    fields = {"Content-Type": "image/jpeg", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


def sending(answer: bytes | Callable[[Seen], bytes], *, read_body: bool = True) -> Loopback:
    def serve(seen: Seen, connection: socket.socket) -> None:
        connection.sendall(answer(seen) if callable(answer) else answer)

    return Loopback(serve, read_body=read_body)


def answering(status: int, content: bytes = b"", **headers: str) -> Storage:
    """A storage that gets this answer to everything, no network involved."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Storage(transport=httpx.MockTransport(lambda _: httpx.Response(status, headers=named, content=content)))


class Endless(httpx.AsyncByteStream):
    """A body that calls `then` after its first chunk."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then
        self._started = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._started:
            self._then()
            await anyio.sleep_forever()
        self._started = True
        return b"x" * 1_000_000


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    """Both: they treat broken connections differently."""
    return request.param


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Larger than the socket buffers of both ends together."""
    path = tmp_path / "video.mp4"
    path.write_bytes(bytes(range(256)) * 65_536)
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Downloads


async def test_download_keeps_every_byte(tmp_path):
    """The file is whole, alone in its folder, and identity was asked for."""
    photo = bytes(range(256)) * 9_000
    with sending(reply(200, photo)) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            size = await storage.download(f"{server.origin}/p.jpg?token={SECRET}", tmp_path / "photo.jpg")
    assert size == len(photo)
    assert (tmp_path / "photo.jpg").read_bytes() == photo
    assert left_in(tmp_path) == ["photo.jpg"]
    assert server.seen[0].headers["accept-encoding"] == "identity"


async def test_the_signed_query_goes_out_as_it_came(tmp_path):
    """Re-encoding one character of a presigned URL breaks its signature."""
    target = "/b/a%20b~c.jpg?X-Amz-Credential=AK%2F20260101%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature=ab+/=="
    with sending(reply(200, b"photo")) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            await storage.download(server.origin + target, tmp_path / "photo.jpg")
    assert server.seen[0].line == f"GET {target} HTTP/1.1"


@pytest.mark.parametrize("declared", ["5000000", ""], ids=["declared", "undeclared"])
async def test_too_many_bytes(tmp_path, declared):
    """The cap holds whether or not the server says how much will come."""
    with sending(reply(200, b"x" * 5_000_000, Content_Length=declared)) as server:
        async with Storage(trusted_origins=[server.origin], max_download_bytes=1_000_000) as storage:
            with pytest.raises(ObjectTooLarge, match="1000000 bytes"):
                await storage.download(f"{server.origin}/p.jpg", tmp_path / "photo.jpg")
    assert left_in(tmp_path) == []


async def test_exactly_the_cap_is_allowed(tmp_path):
    """The cap is inclusive."""
    assert await Storage(
        max_download_bytes=5, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=b"12345"))
    ).download(URL, tmp_path / "photo")


async def test_a_short_body_is_not_a_photo(tmp_path):
    """A connection that ends early leaves no file, and the old one stays."""
    (tmp_path / "photo.jpg").write_bytes(b"old")
    with sending(reply(200, b"x" * 999, Content_Length="1000")) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            with pytest.raises(StorageUnavailable):
                await storage.download(f"{server.origin}/p.jpg", tmp_path / "photo.jpg")
    assert left_in(tmp_path) == ["photo.jpg"]
    assert (tmp_path / "photo.jpg").read_bytes() == b"old"


@pytest.mark.parametrize(
    "headers,content,error",
    [
        ({"Content-Length": "4"}, b"123", StorageUnavailable),  # a transport less strict than h11
        ({"Content-Length": "0"}, b"", ObjectEmpty),
        ({}, b"", ObjectEmpty),  # or cut: the next try shows it
        ({"Content-Type": "text/html; charset=utf-8"}, b"<h1>Sign in</h1>", StorageRefused),
        ({"Content-Type": "application/json"}, b'{"statusCode":"404","code":"NoSuchKey"}', ObjectMissing),
        ({"Content-Encoding": "br"}, b"1234", StorageRefused),
        ({"Content-Encoding": "aws-chunked, GZIP"}, b"1234", StorageRefused),
        ({"Content-Encoding": "deflate"}, b"1234", StorageRefused),
        ({"Content-Encoding": "zstd"}, b"1234", StorageRefused),
    ],
)
async def test_a_200_that_is_no_photo(tmp_path, headers, content, error):
    """A status alone proves nothing."""

    class Body(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield content

    storage = Storage(transport=httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, stream=Body())))
    with pytest.raises(error):
        await storage.download(URL, tmp_path / "photo.jpg")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("coding", ["aws-chunked", "base64", "UTF-8", "binary", "none", "identity", ""])
async def test_codings_that_are_none(tmp_path, coding):
    """Uploaders store all sorts of words beside a photo, and storages hand them back above intact bytes."""
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Encoding: {coding}\r\n\r\nphoto".encode()
    with sending(answer) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            await storage.download(f"{server.origin}/p.jpg", tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_bytes() == b"photo"


async def test_cancelling_leaves_no_file(tmp_path):
    """A cancelled download takes its temporary file along."""
    with anyio.CancelScope() as scope:
        body = Endless(scope.cancel)
        storage = Storage(transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=body)))
        await storage.download(URL, tmp_path / "photo.jpg")
    assert scope.cancelled_caught
    assert left_in(tmp_path) == []


async def test_a_full_disk_is_the_machines_fault(tmp_path):
    """No room is no reason to fail the task, and nothing stays behind."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = Storage(transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=Endless(full))))
    with pytest.raises(DiskFull, match="No space left"):
        await storage.download(URL, tmp_path / "photo.jpg")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("hops,arrives", [(5, True), (6, False)])
async def test_redirects_are_followed_five_times(tmp_path, hops, arrives):
    """Storages redirect to their mirrors, but not for ever."""

    def answer(seen: Seen) -> bytes:
        left = int(seen.line.split()[1].strip("/"))
        return reply(307, Location=f"/{left - 1}") if left else reply(200, b"photo")

    with sending(answer) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            if arrives:
                assert await storage.download(f"{server.origin}/{hops}", tmp_path / "photo.jpg") == 5
            else:
                with pytest.raises(StorageRefused, match="redirects"):
                    await storage.download(f"{server.origin}/{hops}", tmp_path / "photo.jpg")
    assert len(server.seen) == 6


async def test_as_many_transfers_at_once_as_there_are(tmp_path, monkeypatch):
    """None waits for another's connection until it times out: here none ends before all have begun."""
    monkeypatch.setattr(inference.transfer.storage, "IDLE_TIMEOUT_S", 5.0)
    everybody = threading.Barrier(12, timeout=20)

    def answer(_: Seen) -> bytes:
        everybody.wait()
        return reply(200, b"photo")

    with sending(answer) as server:
        async with Storage(trusted_origins=[server.origin]) as storage, anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(storage.download, f"{server.origin}/p.jpg", tmp_path / f"{number}.jpg")
    assert len(left_in(tmp_path)) == 12


# Uploads


async def test_upload_sends_the_file_afresh_each_time(video):
    """A second try is not an exhausted generator: an empty body would be stored with 200."""
    with sending(reply(200, b'{"Key":"videos/1.mp4"}', Content_Type="application/json")) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            for _ in range(2):
                await storage.upload(f"{server.origin}/v?token={SECRET}", video)
    for seen in server.seen:
        assert seen.line.startswith("PUT ")
        assert seen.body == video.read_bytes()
        assert seen.headers == {
            "host": server.origin.removeprefix("http://"),
            "user-agent": "serverless-i2v",
            "accept": "*/*",
            "accept-encoding": "identity",
            "content-type": "video/mp4",
            "content-length": str(video.stat().st_size),
            "connection": "close",
        }


@pytest.mark.parametrize("linger", ["close", "reset", "half-close"])
async def test_an_early_refusal_of_a_large_upload_is_read(video, linger):
    """Supabase refuses a duplicate before it has read 10 MB, and the refusal is what matters."""

    def serve(_: Seen, connection: socket.socket) -> None:
        connection.sendall(reply(400, DUPLICATE, Content_Type="application/json", Connection="close"))
        if linger == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if linger == "half-close":
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

    with Loopback(serve, read_body=False) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            for _ in range(5):
                with pytest.raises(ObjectExists, match="KeyAlreadyExists The resource already exists"):
                    await storage.upload(f"{server.origin}/v?token={SECRET}", video)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Whoever signs this module's certificates."""
    return trustme.CA()


@pytest.fixture
def tls(authority, monkeypatch, tmp_path_factory) -> Iterator[ssl.SSLContext]:
    """A server's side of TLS for `localhost`; this process trusts its authority."""
    bundle = tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(bundle)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    tls_context.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    yield context
    tls_context.cache_clear()


async def test_over_tls_as_in_production(tls, video, tmp_path):
    """Every byte arrives both ways, and the name on the certificate is the URL's, not the address's."""

    def serve(seen: Seen, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"{}" if seen.body else video.read_bytes(), Connection="close"))

    with Loopback(serve, tls=tls) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            await storage.upload(f"{server.origin}/v?token={SECRET}", video)
            await storage.download(f"{server.origin}/v?token={SECRET}", tmp_path / "back.mp4")
    assert server.seen[0].body == video.read_bytes() == (tmp_path / "back.mp4").read_bytes()


async def test_an_early_refusal_over_tls_is_read(tls, video):
    """The same race as without TLS, below another layer."""

    def serve(_: Seen, connection: socket.socket) -> None:
        connection.sendall(reply(400, DUPLICATE, Content_Type="application/json", Connection="close"))
        while connection.recv(1 << 20):
            pass

    with Loopback(serve, read_body=False, tls=tls) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            for _ in range(3):
                with pytest.raises(ObjectExists, match="KeyAlreadyExists"):
                    await storage.upload(f"{server.origin}/v?token={SECRET}", video)


@pytest.mark.usefixtures("tls")
async def test_a_certificate_for_another_name_is_refused(authority, video):
    """Nothing is sent to a server that cannot prove who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.example").configure_cert(context)
    with Loopback(lambda *_: None, tls=context) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            with pytest.raises(StorageError, match="certificate"):
                await storage.upload(f"{server.origin}/v?token={SECRET}", video)
    assert server.seen == []


async def test_a_server_that_answers_and_stops_reading():
    """A write that times out does not hide the answer that came before."""

    class Stuck(httpcore.AsyncMockStream):
        async def write(self, *_: object) -> None:
            raise httpcore.WriteTimeout

        def get_extra_info(self, info: str) -> object:
            return info == "is_readable"

    stream = DuplexStream(Stuck([b"HTTP/1.1 400 Said\r\n\r\n"]))
    with pytest.raises(httpcore.WriteError):
        await stream.write(b"x")
    assert await stream.read(1000) == b"HTTP/1.1 400 Said\r\n\r\n"
    with pytest.raises(httpcore.WriteTimeout):
        await DuplexStream(Stuck([])).write(b"x")


UNMAPPED = [anyio.BusyResourceError("reading from"), anyio.EndOfStream(), ssl.SSLError(1, "bad record mac")]
"""What a TLS stream of anyio may raise and httpcore does not know."""


@pytest.mark.parametrize("error", UNMAPPED, ids=lambda error: type(error).__name__)
async def test_trouble_while_listening_is_not_the_writes(error):
    """Whoever reads the answer finds out; the bytes went out."""

    class Deaf(httpcore.AsyncMockStream):
        async def read(self, *_: object) -> bytes:
            raise error

        def get_extra_info(self, info: str) -> object:
            return info == "is_readable"

    with anyio.fail_after(1):  # 5 s if each write waited for what can no longer come
        stream = DuplexStream(Deaf([]))
        for _ in range(100):
            await stream.write(b"x")
    with pytest.raises(type(error)):
        await stream.read(1000)


@pytest.mark.parametrize("error", UNMAPPED, ids=lambda error: type(error).__name__)
async def test_what_httpcore_does_not_know_is_a_failed_write(error):
    """No group of exceptions, and after a WriteError httpcore still reads the answer."""

    class Dumb(httpcore.AsyncMockStream):
        async def write(self, *_: object) -> None:
            raise error

    with pytest.raises(httpcore.WriteError, match=type(error).__name__):
        await DuplexStream(Dumb([])).write(b"x")


async def test_an_ended_answer_does_not_slow_the_writes():
    """A server that has closed its side stays readable for ever, with nothing to wait for."""

    class Ended(httpcore.AsyncMockStream):
        def get_extra_info(self, info: str) -> object:
            return info == "is_readable"

    stream = DuplexStream(Ended([]))
    with anyio.fail_after(1):  # 5 s if each waited
        for _ in range(100):
            await stream.write(b"x")


async def test_an_answer_between_two_writes_is_heard():
    """That the first write ended is not yet something heard: the second waits for the bytes that are there."""

    class Late(httpcore.AsyncMockStream):
        reads = writes = 0

        async def read(self, *_: object) -> bytes:
            self.reads += 1
            if self.reads != 2:
                await anyio.sleep_forever()
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            return b"HTTP/1.1 400 Said\r\n\r\n"

        async def write(self, *_: object) -> None:
            self.writes += 1
            if self.writes == 2:
                raise httpcore.WriteError

        def get_extra_info(self, info: str) -> object:
            return info == "is_readable" and self.writes == 1

    stream = DuplexStream(Late([]))
    await stream.write(b"x")
    with pytest.raises(httpcore.WriteError, match="answered before"):
        await stream.write(b"y")
    assert await stream.read(1000) == b"HTTP/1.1 400 Said\r\n\r\n"


async def test_an_answer_that_never_ends_while_an_upload_runs():
    """Its beginning is kept, and heard in the end; the rest would fill memory for as long as the upload lasts."""

    class Pouring(httpcore.AsyncMockStream):
        read_bytes = 0

        async def read(self, max_bytes: int, *_: object) -> bytes:
            await anyio.lowlevel.checkpoint()
            self.read_bytes += max_bytes
            return b"x" * max_bytes

        async def write(self, *_: object) -> None:
            for _tick in range(50):
                await anyio.lowlevel.checkpoint()

    pouring = Pouring([])
    stream = DuplexStream(pouring)
    for _ in range(10):
        await stream.write(b"y")
    assert pouring.read_bytes == MAX_EARLY_BYTES
    assert await stream.read(1 << 20) == b"x" * MAX_EARLY_BYTES
    await stream.write(b"y")
    assert pouring.read_bytes == 2 * MAX_EARLY_BYTES  # what was taken away makes room


async def test_a_server_that_dies_during_an_upload(video):
    """Whether the object was stored is unknown: the error says to try again."""
    with sending(b"", read_body=False) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            with pytest.raises(StorageUnavailable):
                await storage.upload(f"{server.origin}/v?token={SECRET}", video)


@pytest.mark.parametrize("status", [307, 308])
async def test_an_upload_is_sent_again_to_where_the_storage_says(video, status):
    """A new bucket of AWS redirects until its name is known everywhere, mostly before it has read the body."""

    def serve(_: Seen, connection: socket.socket) -> None:
        connection.sendall(reply(status, Location=f"{there.origin}/b?sig=2", Connection="close"))
        while connection.recv(1 << 20):
            pass

    with sending(reply(200, b"{}", Connection="close")) as there, Loopback(serve, read_body=False) as here:
        async with Storage(trusted_origins=[here.origin, there.origin]) as storage:
            await storage.upload(f"{here.origin}/a?sig=1", video)
            await storage.submit(f"{here.origin}/a", {"key": "k"}, b"photo", name="p.jpg", content_type="image/jpeg")
    put, post = there.seen
    assert (put.line, put.body) == ("PUT /b?sig=2 HTTP/1.1", video.read_bytes())
    assert put.headers["content-type"] == "video/mp4"
    assert (post.line, b"photo" in post.body) == ("POST /b?sig=2 HTTP/1.1", True)


async def test_an_upload_follows_nowhere_else(video):
    """Neither to an address that was not allowed, nor for ever, nor from https into the clear, nor as another verb."""
    with (
        sending(reply(200)) as private,
        sending(reply(307, Location=private.origin, Connection="close")) as leading,
        sending(reply(307, Location="/again", Connection="close")) as circling,
    ):
        async with Storage(trusted_origins=[leading.origin, circling.origin]) as storage:
            with pytest.raises(AddressRefused, match=r"127\.0\.0\.1"):
                await storage.upload(f"{leading.origin}/v", video)
            with pytest.raises(StorageRefused, match="more than 5 redirects"):
                await storage.upload(f"{circling.origin}/v", video)
    assert (len(leading.seen), len(circling.seen), private.seen) == (1, 6, [])
    with pytest.raises(StorageRefused, match=r"redirects to http://other\.example/, where all could read it"):
        await answering(307, Location="http://other.example/?sig=2").upload(URL, video)
    for status in (301, 302, 303):
        with pytest.raises(StorageRefused, match=str(status)):
            await answering(status, Location="https://other.example/").upload(URL, video)


async def test_a_storage_of_azure_is_told_the_kind_of_blob(video):
    """Without it the answer is 400; nobody else is told, lest a signature break."""
    with sending(reply(201, Connection="close")) as server:
        async with Storage(trusted_origins=[server.origin]) as storage:
            await storage.upload(f"{server.origin}/c/v.mp4?sv=2026-02-06&sr=b&sp=cw&se=2099-01-01&sig=a%2Bb", video)
            await storage.upload(f"{server.origin}/c/v.mp4?X-Amz-Signature=a", video)
    assert [seen.headers.get("x-ms-blob-type") for seen in server.seen] == ["BlockBlob", None]


async def test_a_web_page_is_no_receipt(video):
    """200 with HTML means that something else answered."""
    with pytest.raises(StorageRefused, match="text/html"):
        await answering(200, b"<h1>Welcome</h1>", Content_Type="text/html").upload(URL, video)


async def test_a_200_whose_body_refuses(video):
    """The body outranks the status."""
    with pytest.raises(ObjectExists):
        await answering(200, DUPLICATE, Content_Type="application/json").upload(URL, video)


async def test_an_empty_or_missing_file_is_not_sent(tmp_path):
    """What the engine did not write must not be stored as a video."""
    (tmp_path / "empty.mp4").touch()
    for name in ("empty.mp4", "missing.mp4"):
        with pytest.raises(StorageRefused, match=name):
            await answering(200).upload(URL, tmp_path / name)


# Refusals


def supabase(code: str, status: int, message: str = "no") -> bytes:
    return json.dumps({"statusCode": str(status), "error": code, "message": message, "code": code}).encode()


def s3(code: str, message: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.mark.parametrize(
    "wire_status,body,error",
    [
        (400, supabase("KeyAlreadyExists", 409), ObjectExists),
        (400, b'{"statusCode":"409","error":"Duplicate","message":"The resource already exists"}', ObjectExists),
        (400, supabase("EntityTooLarge", 413), ObjectTooLarge),
        (400, supabase("InvalidMimeType", 415, "mime type video/mp4 is not supported"), StorageRefused),
        (400, supabase("NoSuchKey", 404), ObjectMissing),
        (400, b'{"statusCode":404,"error":"new name","message":"gone"}', ObjectMissing),
        (400, supabase("InvalidJWT", 400, '"exp" claim timestamp check failed'), UrlExpired),
        (400, b'{"statusCode":"400","error":"Error","message":"jwt expired"}', UrlExpired),
        (400, supabase("InvalidSignature", 400), StorageRefused),
        (400, b'["not", "an object"]', StorageRefused),
        (400, b"[" * 60_000, StorageRefused),
        (429, supabase("SlowDown", 429), StorageUnavailable),
        (500, supabase("InternalError", 500), StorageUnavailable),
        (544, b'{"statusCode":"544","error":"DatabaseTimeout","message":"timed out"}', StorageUnavailable),
        (502, b"<html>Bad gateway</html>", StorageUnavailable),
        (503, s3("SlowDown", "Please reduce your request rate."), StorageUnavailable),
        (403, s3("AccessDenied", "Request has expired"), UrlExpired),
        (403, s3("AccessDenied", "Access Denied"), StorageRefused),
        (403, s3("SignatureDoesNotMatch", "no"), StorageRefused),
        (400, s3("ExpiredToken", "no"), UrlExpired),
        (400, s3("RequestTimeout", "Your socket connection was idle"), StorageUnavailable),
        (409, s3("OperationAborted", "A conflicting operation is in progress"), StorageUnavailable),
        (404, s3("NoSuchKey", "no"), ObjectMissing),
        (404, b"", ObjectMissing),
        (413, b"", ObjectTooLarge),
        (405, b"", StorageRefused),
    ],
)
async def test_refusals(tmp_path, video, wire_status, body, error):
    """The storage's own code decides, then its words, then the status; of either verb."""
    storage = answering(wire_status, body)
    with pytest.raises(StorageError) as downloading:
        await storage.download(URL, tmp_path / "photo.jpg")
    with pytest.raises(StorageError) as uploading:
        await storage.upload(URL, video)
    assert (type(downloading.value), type(uploading.value)) == (error, error)
    assert left_in(tmp_path) == [video.name]


def subclasses(root: type) -> set[type]:
    return {root}.union(*(subclasses(child) for child in root.__subclasses__()))


FOREIGN_ERRORS = sorted(
    subclasses(httpx.HTTPError) | subclasses(httpx.StreamError) | {httpx.InvalidURL, httpx.CookieConflict},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", FOREIGN_ERRORS, ids=lambda kind: kind.__name__)
async def test_no_exception_of_httpx_escapes(tmp_path, kind):
    """Nothing above this module catches foreign types; timeouts and broken connections may be tried again."""

    def fail(request: httpx.Request) -> httpx.Response:
        error = kind.__new__(kind)
        Exception.__init__(error, f"at {request.url}")
        raise error

    with pytest.raises(StorageError) as caught:
        await Storage(transport=httpx.MockTransport(fail)).download(URL, tmp_path / "photo.jpg")
    assert caught.value.retryable == (
        issubclass(kind, httpx.TransportError)
        and not issubclass(kind, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
    )


@pytest.mark.parametrize(
    "error,expected",
    [
        (OSError(errno.ENOSPC, "full"), DiskFull),
        (OSError(errno.EDQUOT, "quota"), DiskFull),
        (OSError(errno.EROFS, "read-only"), NotWritable),
        (PermissionError(errno.EACCES, "denied"), StorageRefused),
        (TimeoutError(), StorageUnavailable),
        (ConnectionResetError(), StorageUnavailable),
        (anyio.BrokenResourceError(), StorageUnavailable),
        (anyio.ClosedResourceError(), StorageUnavailable),
        (anyio.EndOfStream(), StorageUnavailable),
        (ssl.SSLError(1, "bad record mac"), StorageUnavailable),
        (UnicodeError(), UrlMalformed),
    ],
)
def test_other_exceptions_are_mapped(error, expected):
    """Of the system and anyio: only no room, and broken connections, are more than a refusal."""
    assert type(mapped(error, URL)) is expected


@pytest.mark.parametrize(
    "url", ["", "x", "http://", "https://[::1", "http://0177.0.0.1/", "http://h:port/", "http://h/\n", "http://\ud800/"]
)
async def test_what_is_no_url(tmp_path, url):
    """A queue may hand out anything for a URL."""
    with pytest.raises(StorageError):
        await Storage().download(url, tmp_path / "photo.jpg")


# Secrets


def everything_said(error: BaseException | None) -> str:
    """The error and all that a traceback would print after it."""
    if error is None:
        return ""
    return f"{error} {error!r} " + everything_said(error.__cause__) + everything_said(error.__context__)


async def test_no_error_holds_the_query(tmp_path, video, caplog):
    """Not the token, whether httpx, the server or a redirect repeats it; and httpx logs no URL."""
    caplog.set_level("INFO")

    def raising(kind: type[Exception]) -> Callable[[httpx.Request], httpx.Response]:
        def fail(request: httpx.Request) -> httpx.Response:
            raise kind(f"{request.url} failed")

        return fail

    echo = json.dumps({"message": f"Route PUT:/x?token={SECRET} not found; {SECRET}", "error": "Not Found"}).encode()
    answers: list[Callable[[httpx.Request], httpx.Response]] = [
        raising(httpx.ConnectError),
        raising(httpx.ReadTimeout),
        raising(httpx.InvalidURL),
        raising(OSError),
        lambda _: httpx.Response(404, content=echo),
        lambda _: httpx.Response(400, content=s3("AccessDenied", SECRET)),
        lambda _: httpx.Response(307, headers={"Location": URL}),
        lambda _: httpx.Response(307, headers={"Location": f"ftp://h/?token={SECRET}"}),
        lambda _: httpx.Response(200, headers={"Content-Type": "text/html"}, content=SECRET.encode()),
    ]
    for answer in answers:
        storage = Storage(transport=httpx.MockTransport(answer), max_download_bytes=10)
        with pytest.raises(I2VError) as caught:
            await storage.download(URL, tmp_path / "photo.jpg")
        assert SECRET not in everything_said(caught.value)
        with pytest.raises(I2VError) as caught:
            await storage.upload(URL, video)
        assert SECRET not in everything_said(caught.value)
    with pytest.raises(AddressRefused) as caught:
        await Storage().download(f"http://user:{SECRET}@127.0.0.1/x?token={SECRET}#{SECRET}", tmp_path / "photo.jpg")
    assert SECRET not in everything_said(caught.value)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url,shown",
    [
        (URL, "https://storage.example/object/sign/photos/1.jpg"),
        ("https://user:pass@h:9000/a@b#frag", "https://h:9000/a@b"),
        ("https://h#frag?x", "https://h"),
        ("https://h/a\nb", "https://h/a b"),
    ],
)
def test_redact(url, shown):
    """Scheme, host and path."""
    assert redact(url) == shown


@given(st.text(), st.text("abcdef", min_size=8))
def test_redact_takes_any_text(head, secret):
    """It is called on what no parser took, and never shows what follows a question mark."""
    shown = redact(f"{head}?{secret}")
    assert secret not in shown or secret in head
    assert "\n" not in shown


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "100::1",
        "5f00::1",
    ],
)
def test_addresses_a_worker_must_not_visit(address):
    """Loopback, private, link-local and metadata addresses, in every form that leads to them."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet(address):
    """Public ones, also as an IPv6-only network writes them."""
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.1", "localhost", "LOCALHOST", "[::ffff:127.0.0.1]", "0"],
)
async def test_this_machine_is_refused_however_it_is_spelled(tmp_path, video, host):
    """A photo URL must not reach what listens here, by either verb."""
    with sending(reply(200, b"secret")) as server:
        async with Storage() as storage:
            with pytest.raises(AddressRefused, match="set I2V_ALLOW_PRIVATE_ADDRESSES=true"):
                await storage.download(f"http://{host}:{server.port}/?t={SECRET}", tmp_path / "photo.jpg")
            with pytest.raises(AddressRefused):
                await storage.upload(f"http://{host}:{server.port}/?t={SECRET}", video)
    assert server.seen == []


@pytest.mark.parametrize("url", ["ftp://8.8.8.8/x", "file:///etc/passwd", "//8.8.8.8/x", "data:image/png,x"])
async def test_only_http(tmp_path, url):
    """No other scheme, whatever the transport would do with it."""
    with pytest.raises(UrlMalformed, match="neither http nor https"):
        await answering(200, b"x").download(url, tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8:99999/x", "https://8.8.8.8:0/x", "http://8.8.8.8:port/x", "http://[::1/x"]
)
async def test_a_url_that_nobody_can_follow_is_the_task_s_fault(tmp_path, video, url):
    """Not the machine's, which would stop after three of them: as an address, as a redirect, before it is needed."""
    redirecting = Storage(transport=httpx.MockTransport(lambda _: httpx.Response(307, headers={"Location": url})))
    async with Storage() as storage:
        for ask in (
            lambda: storage.download(url, tmp_path / "photo.jpg"),
            lambda: storage.upload(url, video),
            lambda: storage.check(url),
            lambda: redirecting.download(URL, tmp_path / "photo.jpg"),
        ):
            with pytest.raises(StorageRefused) as caught:
                await ask()
            assert caught.value.task_at_fault


async def test_a_redirect_leads_nowhere_private(tmp_path):
    """Trust in one origin does not extend to where it points, be it the next port of the same host."""
    with sending(reply(200, b"secret")) as inner, sending(reply(302, Location=f"{inner.origin}/x")) as outer:
        async with Storage(trusted_origins=[outer.origin]) as storage:
            with pytest.raises(AddressRefused, match=r"127\.0\.0\.1"):
                await storage.download(f"{outer.origin}/p.jpg", tmp_path / "photo.jpg")
        assert len(outer.seen) == 1
        assert inner.seen == []
        async with Storage(allow_private=True) as storage:
            assert await storage.download(f"{outer.origin}/p.jpg", tmp_path / "photo.jpg") == 6


class Recorder(httpcore.AsyncNetworkBackend):
    """Notes where connections go; addresses in `down` do not answer."""

    def __init__(self, *down: str) -> None:
        self.tried: list[str] = []
        self._down = down

    async def connect_tcp(self, host: str, *_: Any) -> httpcore.AsyncNetworkStream:
        self.tried.append(host)
        if host in self._down:
            raise httpcore.ConnectError
        return httpcore.AsyncMockStream([])


def resolving(*answers: list[str]) -> Callable:
    """A name server that gives each answer once."""
    left = list(answers)

    async def resolve(_host: str, _port: int) -> list[str]:
        return left.pop(0)

    return resolve


async def test_the_address_checked_is_the_address_used():
    """A name that is public when checked and private when used (DNS rebinding) is looked up once only."""
    recorder = Recorder()
    network = GuardedNetwork(resolve=resolving(["8.8.8.8"], ["127.0.0.1"]), inner=recorder)
    await network.connect_tcp("rebind.example", 80)
    with pytest.raises(AddressRefused, match=r"rebind\.example is at 127\.0\.0\.1"):
        await network.connect_tcp("rebind.example", 80)
    assert recorder.tried == ["8.8.8.8"]


async def test_one_private_address_among_many_refuses_all():
    """Else the first that does not answer would lead on to the private one."""
    recorder = Recorder("8.8.8.8")
    network = GuardedNetwork(resolve=resolving(["8.8.8.8", "10.0.0.1"]), inner=recorder)
    with pytest.raises(AddressRefused):
        await network.connect_tcp("mixed.example", 80)
    assert recorder.tried == []


async def test_the_next_address_is_tried():
    """A host with a dead address is not a dead host; one with none, or only dead ones, is."""
    recorder = Recorder("2606:4700::1", "8.8.4.4")
    network = GuardedNetwork(resolve=resolving(["2606:4700::1", "8.8.8.8"], ["8.8.4.4"], []), inner=recorder)
    await network.connect_tcp("dual.example", 443)
    assert recorder.tried == ["2606:4700::1", "8.8.8.8"]
    for _ in range(2):
        with pytest.raises(httpcore.ConnectError):
            await network.connect_tcp("dual.example", 443)


async def test_trust_is_for_one_port():
    """An origin is a host and a port."""
    recorder = Recorder()
    network = GuardedNetwork(
        trusted={("minio.lan", 9000)}, resolve=resolving(["10.0.0.1"], ["10.0.0.1"]), inner=recorder
    )
    await network.connect_tcp("minio.lan", 9000)
    with pytest.raises(AddressRefused):
        await network.connect_tcp("minio.lan", 22)
    assert recorder.tried == ["10.0.0.1"]


async def test_trust_in_a_host_is_for_every_port_of_it(tmp_path, video):
    """An app on a laptop has its storage at the next port, and calls itself by another name of the same machine."""
    with sending(reply(200, b"secret")) as server:
        async with Storage(trusted_hosts=["http://localhost:3000"]) as storage:
            assert await storage.download(f"{server.origin}/p.jpg", tmp_path / "photo.jpg") == 6
            await storage.upload(f"{server.origin}/v.mp4", video)
    recorder = Recorder()
    addresses = [["10.0.0.1"]] * 2
    network = GuardedNetwork(trusted={("app.lan", None)}, resolve=resolving(*addresses), inner=recorder)
    await network.connect_tcp("app.lan", 54321)
    with pytest.raises(AddressRefused):
        await network.connect_tcp("other.lan", 54321)
    assert recorder.tried == ["10.0.0.1"]


async def test_a_name_nobody_knows_may_be_known_later():
    """A failed look-up is trouble of the network, not of the task."""

    async def resolve(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(httpcore.ConnectError, match="cannot resolve"):
        await GuardedNetwork(resolve=resolve).connect_tcp("gone.example", 80)


@pytest.mark.parametrize("origin", ["", "minio.lan:9000", "ftp://h", "https://", "http://[::1"])
def test_a_trusted_origin_must_be_one(origin):
    """A setting that would trust nothing, or something else, is an error at the start."""
    with pytest.raises(SettingsError):
        Storage(trusted_origins=[origin])
