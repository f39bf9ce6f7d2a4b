"""Answers that unfold or never end, to everything here that asks over HTTP, on real connections."""

import gzip
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from inference.engines.wan.hub import Hub
from inference.errors import I2VError, QueueAuthError, QueueUnavailable, StorageUnavailable
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.server.client import QueueClient
from inference.transfer.json_api import JsonApi
from inference.transfer.storage import Storage
from tests.transfer.test_json_api import Why
from tests.transfer.test_storage import Loopback, reply

pytestmark = pytest.mark.anyio

MB = 1_000_000

BOMB = gzip.compress(gzip.compress(bytes(64 * MB), 1))
"""A kilobyte that an httpx client turns into 64 MB when it is called gzip twice; with brotli it could be gigabytes."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    """Both: they complain of different things about bodies that are left."""
    return request.param


@contextmanager
def within(limit_bytes: int):
    """Fails where the block needs more memory than that at any one moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


def bombing(status: int) -> Loopback:
    """A server whose every answer is the bomb."""
    answer = reply(status, BOMB, Content_Encoding="gzip, gzip", Content_Type="application/json", Connection="close")
    return Loopback(lambda _, connection: connection.sendall(answer))


def endless(status: int) -> Loopback:
    """A server whose every answer goes on until nobody listens."""

    def serve(_, connection) -> None:
        connection.sendall(reply(status, Content_Length="", Content_Type="application/json", Connection="close"))
        while True:
            connection.sendall(b"[" * MB)

    return Loopback(serve)


SERVERS = pytest.mark.parametrize("serving", [bombing, endless])


@SERVERS
@pytest.mark.parametrize("call", ["download", "upload", "submit"])
async def test_pages_of_a_storage(tmp_path, serving: Callable[[int], Loopback], call):
    """Their status counts all the same, and what was not read is said."""
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    with serving(503) as server, within(8 * MB):
        url = f"{server.origin}/x"
        async with Storage(trusted_origins=[server.origin]) as storage:
            calls = {
                "download": lambda: storage.download(url, tmp_path / "photo.jpg"),
                "upload": lambda: storage.upload(url, tmp_path / "clip.mp4"),
                "submit": lambda: storage.submit(url, {}, b"photo", name="a.jpg", content_type="image/jpeg"),
            }
            with pytest.raises(StorageUnavailable, match="503") as caught:
                await calls[call]()
    assert ("compressed with gzip" in str(caught.value)) == (serving is bombing)
    assert server.seen[0].headers["accept-encoding"] == "identity"


@SERVERS
@pytest.mark.parametrize("status, error", [(200, I2VError), (401, QueueAuthError), (503, QueueUnavailable)])
async def test_answers_of_a_queue(serving: Callable[[int], Loopback], status, error):
    """To its workers and to its clients: a refusal stays one, and what is no answer is none."""
    with serving(status) as server, within(48 * MB):
        async with (
            Storage() as storage,
            LifeIsShortQueue(server.origin, "key", worker_id="w", storage=storage) as queue,
            QueueClient(server.origin, "key") as client,
        ):
            for call in (queue.lease, queue.check, client.tasks):
                with pytest.raises(error):
                    await call()
    assert {seen.headers["accept-encoding"] for seen in server.seen} == {"identity"}


@SERVERS
async def test_answers_of_a_provider(serving: Callable[[int], Loopback]):
    """Whether it refused decides about money, so its status is not lost with the page."""
    with serving(502) as server, within(8 * MB):
        async with JsonApi(Why, server.origin, "key", limit_s=20, max_answer_bytes=MB) as api:
            answer = await api.ask("POST", "x", {})
    assert (answer.status, answer.payload) == (502, None)


@SERVERS
def test_the_listing_of_a_hub(serving: Callable[[int], Loopback]):
    """Weights come from huggingface.co or from a mirror of it."""
    with (
        serving(200) as server,
        within(48 * MB),
        Hub(server.origin, None, ()) as hub,
        pytest.raises(I2VError, match="does not answer as a hub"),
    ):
        hub.listing("org/model", "main")
