"""A proxy that shows a server under a path which the server does not know of, as hosts of several tools do."""

import socket
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread

HEAD_END = b"\r\n\r\n"
CHUNK = 65536


@dataclass(frozen=True)
class Place:
    """Where a page is to be found."""

    host: str
    url: str


@contextmanager
def under_a_path(port: int, path: str = "tools/clips") -> Iterator[Place]:
    """Passes on what is asked under `path`, and answers 404 for everything else. One request a connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = b""
            while HEAD_END not in head:
                if not (more := self.request.recv(CHUNK)):
                    return
                head += more
            head, body = head.split(HEAD_END, 1)
            request, *headers = head.split(b"\r\n")
            method, asked, version = request.split(b" ")
            prefix = f"/{path}/".encode()
            if not asked.startswith(prefix):
                self.request.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                return
            kept = [line for line in headers if not line.lower().startswith(b"connection:")]
            first = b" ".join((method, b"/" + asked.removeprefix(prefix), version))
            with socket.create_connection(("127.0.0.1", port)) as server:
                server.sendall(b"\r\n".join([first, *kept, b"Connection: close"]) + HEAD_END + body)
                sending = Thread(target=pump, args=(self.request, server), daemon=True)
                sending.start()
                pump(server, self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        host = f"127.0.0.1:{server.server_address[1]}"
        try:
            yield Place(host, f"http://{host}/{path}")
        finally:
            server.shutdown()
            serving.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Bytes of one side to the other until it has no more."""
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
