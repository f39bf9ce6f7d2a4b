"""One TLS context for all clients of a process, which trusts whom the environment names."""

import gc
import http.server
import ssl
import threading

import httpx
import pytest
import trustme

from inference.errors import SettingsError
from inference.on_runpod.api import RunPodApi
from inference.on_runpod.callback import Callback
from inference.push.oidc import Certificates
from inference.queues.gmanimato import GmAnimatoQueue
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.server.client import QueueClient
from inference.transfer.json_api import JsonApi
from inference.transfer.storage import Storage
from inference.transfer.tls import tls_context

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    tls_context.cache_clear()
    yield
    tls_context.cache_clear()


def contexts() -> set[int]:
    """Every TLS context that is alive, by identity."""
    return {id(each) for each in gc.get_objects() if issubclass(type(each), ssl.SSLContext)}


def test_all_clients_share_one_context():
    """Each would read certifi's authorities otherwise, which is most of what it takes to make one."""
    before = contexts()
    clients = [storage := Storage(), Storage(allow_private=True)]
    clients += [LifeIsShortQueue("https://a.example", "key", worker_id="w", storage=storage)]
    clients += [GmAnimatoQueue("https://a.example", "secret" * 8, worker_id="w", storage=storage)]
    clients += [QueueClient("https://a.example", "key"), RunPodApi("key", "https://a.example", "endpoint")]
    clients += [Callback("https://a.example/hook", "job"), Certificates()]
    assert len(contexts() - before) == 1
    del clients


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_has_no_authorities_is_a_wrong_setting(monkeypatch, tmp_path, content):
    """As in a container where it was not mounted: one line that names the variable, and no traceback."""
    path = tmp_path / "authority.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(SettingsError, match=r"^SSL_CERT_FILE: no certificates can be read from it: \S"):
        tls_context()


async def test_a_private_authority_is_trusted(monkeypatch, tmp_path):
    """SSL_CERT_FILE names a company's own authority; without it, its servers are refused."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with http.server.ThreadingHTTPServer(("localhost", 0), Answering) as server:
        server.handle_error = lambda *_: None  # a client that does not trust us ends the handshake
        server.socket = context.wrap_socket(server.socket, server_side=True)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            url = f"https://localhost:{server.server_port}/"
            async with JsonApi(dict, url, "key", limit_s=5) as api:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await api._client.get("")
            authority.cert_pem.write_to_path(tmp_path / "authority.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            tls_context.cache_clear()
            async with JsonApi(dict, url, "key", limit_s=5) as api:
                assert (await api._client.get("")).status_code == 200
        finally:
            server.shutdown()
            serving.join()
