"""A page of somebody else, on a port of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def other_site(html: str = "<!doctype html><title>elsewhere</title>") -> Iterator[int]:
    """Serves one page under every path; its port. `127.0.0.1` is another origin than the queue's, on the same site for
    cookies; `localhost` is another site.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = html.encode()
            self.send_response(200 if self.path != "/favicon.ico" else 204)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(body) if self.path != "/favicon.ico" else 0))
            self.end_headers()
            if self.path != "/favicon.ico":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
