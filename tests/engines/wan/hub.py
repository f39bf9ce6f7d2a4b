"""A hub of models on loopback: what huggingface.co answers to listings and downloads, and what goes wrong there.

Small files come from the hub itself, with git's hash of the blob. Large ones (`.safetensors`, as LFS tracks them)
redirect to a CDN, which is another origin and takes ranges. test_weights.py has huggingface_hub itself ask it, too.
"""

import functools
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

HOLD_LIMIT_S = 60
"""An answer that nobody lets go on ends after this, so that a test that went wrong comes to its end."""

GARBLED = bytes(byte ^ 1 for byte in range(256))
"""What becomes of each byte."""


@dataclass(frozen=True)
class Request:
    """What was asked, of which of the two."""

    method: str
    path: str  # without the query
    range: str | None
    authorization: str | None
    of_cdn: bool

    @property
    def start(self) -> int:
        """The first byte that was asked for."""
        return int(self.range.removeprefix("bytes=").removesuffix("-")) if self.range else 0


@dataclass
class Fault:
    """What goes wrong with one answer."""

    status: int | None = None  # instead of the answer
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of the content
    garble: bool = False  # the right length, another content
    ignore_range: bool = False
    cut_after: int | None = None  # bytes of the body; then the connection drops
    hold: threading.Event | None = None  # then nothing more comes until somebody lets go


@dataclass
class Repository:
    """The files of one revision."""

    revision: str
    files: dict[str, bytes]


@functools.cache
def sha256(content: bytes) -> str:
    """As LFS names content."""
    return hashlib.sha256(content).hexdigest()


@functools.cache
def git_sha1(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Both servers, for the length of a block. `requests` is what they were asked, in order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}
        self._faults: dict[str, list[Fault]] = {}
        self._holds: list[threading.Event] = []
        self._servers = [self._server(of_cdn=False), self._server(of_cdn=True)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        """Makes it the only revision of a repository, and returns which."""
        names = json.dumps({path: sha256(content) for path, content in files.items()}, sort_keys=True)
        self._repositories[name] = Repository(hashlib.sha1(names.encode()).hexdigest(), dict(files))
        return self._repositories[name].revision

    def revision(self, name: str) -> str:
        """Which is published."""
        return self._repositories[name].revision

    def files(self, name: str) -> dict[str, bytes]:
        """What is published."""
        return self._repositories[name].files

    def go_wrong(self, path: str, *faults: Fault) -> None:
        """One answer after the other about this file or, for the name of a repository, its listing."""
        self._faults.setdefault(path, []).extend(faults)
        self._holds += [fault.hold for fault in faults if fault.hold]

    def asked(self, path: str) -> list[Request]:
        """Who asked for the content of a file or, for the name of a repository, for its listing."""
        named = f"/models/{path}/revision/" if path in self._repositories else f"/{path}"
        of_cdn = path.endswith(".safetensors")
        return [it for it in self.requests if named in it.path and it.method == "GET" and it.of_cdn == of_cdn]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self._holds:
            hold.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _server(self, *, of_cdn: bool) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            def answer(self) -> None:
                hub._answer(self, of_cdn=of_cdn)

        return _Server(("127.0.0.1", 0), Handler)

    def _answer(self, handler: "_Handler", *, of_cdn: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        headers = handler.headers
        self.requests.append(Request(handler.command, path, headers["Range"], headers["Authorization"], of_cdn))
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            about = name
        else:
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, about = rest.partition("/")
        # Of what redirects to the CDN, the CDN has the faults.
        redirects = about.endswith(".safetensors") and not of_cdn
        faults = self._faults.get(about, [])
        fault = faults.pop(0) if faults and handler.command == "GET" and not redirects else Fault()
        repository = self._repositories.get(name)
        if fault.status:
            handler.send(fault.status, fault.headers, fault.body or b"")
        elif repository is None:
            handler.send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"")
        elif revision not in {"main", repository.revision}:
            handler.send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"")
        elif about == name:
            handler.send(200, {"Content-Type": "application/json"}, fault.body or _listing(name, repository))
        elif about not in repository.files:
            handler.send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"")
        else:
            self._send_file(handler, fault, repository, about, redirects=redirects)

    def _send_file(self, handler: "_Handler", fault: Fault, repository: Repository, path: str, *, redirects: bool):
        content = repository.files[path]
        headers = {"X-Repo-Commit": repository.revision, "Accept-Ranges": "bytes"}
        if redirects:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
            handler.send(302, headers | {"Location": f"{self.cdn_url}{handler.path}?Signature=credential"}, b"")
            return
        headers["ETag"] = f'"{sha256(content) if path.endswith(".safetensors") else git_sha1(content)}"'
        body = content if fault.body is None else fault.body
        body = body.translate(GARBLED) if fault.garble else body
        asked = handler.headers["Range"]
        if asked and not fault.ignore_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send(416, {"Content-Range": f"bytes */{len(body)}"}, b"<html>no such range</html>")
                return
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            handler.send(206, headers, body[start:], fault)
        else:
            handler.send(200, headers, body, fault)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that break off are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm = True  # else the body waits 40 ms for the head to be acknowledged

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        """An answer, or as much of it as the fault lets through."""
        cut = fault is not None and fault.cut_after is not None
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: fault.cut_after] if cut else body)
                self.wfile.flush()
            if cut and fault.hold:
                fault.hold.wait(HOLD_LIMIT_S)
        except OSError:  # the client has gone
            cut = True
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _listing(name: str, repository: Repository) -> bytes:
    """As `/api/models/{name}/revision/{revision}?blobs=true` answers (huggingface_hub, ModelInfo)."""
    siblings = []
    for path, content in sorted(repository.files.items()):
        sibling = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
        if path.endswith(".safetensors"):
            sibling |= {
                "blobId": git_sha1(sha256(content).encode()),  # of the pointer
                "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 135},
            }
        siblings.append(sibling)
    return json.dumps({"id": name, "modelId": name, "sha": repository.revision, "siblings": siblings}).encode()
