"""A client for huggingface.co, over plain HTTP with ranges.

huggingface_hub is not used, because it restarts a file after every interruption
(github.com/huggingface/huggingface_hub/issues/4196), and the largest files have ten gigabytes.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from inference.engines.wan.weights import TENSORS, Entry, Lock, Report, bytes_at, weights_error

T = TypeVar("T")

ENDPOINT = "https://huggingface.co"
CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 30.0
"""A download that moves no byte for this long is dead."""
PAUSES_S = (1.0, 5.0, 20.0)
"""Pauses before each retry. They start over when bytes have arrived."""

MAX_LISTING_BYTES = 8_000_000
"""Limit for a repository's listing. Those of Wan2.2 have some 20 kB."""

LOADABLE = (TENSORS, ".json", ".model", ".txt")
"""Endings of files that loading needs: no pictures, and never a pickle."""


class Hub:
    """A connection to huggingface.co, or to a mirror of it, for the length of a block.

    Raises WeightsError for an endpoint that is no URL, and for a token that cannot be one.
    """

    def __init__(self, endpoint: str, token: str | None, pauses_s: Sequence[float]) -> None:
        if token and not re.fullmatch("[!-~]+", token):
            raise weights_error("the token for the hub has characters that no token has")
        # Uncompressed, so that a range of the answer is a range of the file.
        headers = {"Accept-Encoding": "identity", "User-Agent": "serverless-i2v"}
        if token:
            headers["Authorization"] = f"Bearer {token}"  # httpx drops it where a redirect leads to another origin
        try:
            timeout = httpx.Timeout(IDLE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
            self._client = httpx.Client(base_url=endpoint, headers=headers, timeout=timeout, follow_redirects=True)
        except (httpx.InvalidURL, UnicodeError):
            raise weights_error(f"the hub's address is not a URL such as {ENDPOINT}") from None
        port = self._client.base_url.port
        if port is not None and not 0 < port < 65_536:
            raise weights_error(f"the hub's address is not a URL such as {ENDPOINT}: there is no port {port}")
        self._pauses_s = pauses_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def listing(self, name: str, revision: str) -> Lock:
        """Every file of a revision that loading could read. Raises WeightsError."""

        def ask() -> bytes:
            path = f"/api/models/{name}/revision/{quote(revision, safe='')}"
            with self._answer(path, f"{name} at {revision}", params={"blobs": "true"}) as response:
                return _beginning(response)

        files = {}
        try:
            said = json.loads(self._persist(ask))
            for file in said["siblings"]:
                path, lfs = file["rfilename"], file.get("lfs")
                if path.endswith(LOADABLE) and ".." not in path.split("/"):
                    files[path] = Entry(
                        published_digest=lfs["sha256"] if lfs else file["blobId"],
                        published_bytes=lfs["size"] if lfs else file["size"],
                    )
            return Lock(repository=name, revision=said["sha"], files=files)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise weights_error(f"{self._client.base_url.host} does not answer as a hub about {name}") from None

    def download(self, lock: Lock, path: str, partial: Path, report: Report) -> None:
        """Adds to `partial` what it lacks; reports "download", in bytes of the file. Raises WeightsError, OSError."""
        size_bytes = lock.files[path].published_bytes
        url = f"/{lock.repository}/resolve/{lock.revision}/{quote(path)}"

        def ask() -> None:
            with partial.open("ab") as file:
                headers = {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
                with self._answer(url, f"{lock.repository}: {path}", headers=headers) as response:
                    if response.status_code != 206:  # the whole file instead of the rest, or no such range (416)
                        file.seek(0)
                        file.truncate()
                    if response.status_code == 416:
                        raise httpx.RemoteProtocolError("the hub's file is shorter")
                    for chunk in response.iter_raw():  # never decompressed: a small body could expand without end
                        file.write(chunk)
                        report("download", file.tell())
                        if file.tell() > size_bytes:
                            return
            if bytes_at(partial) < size_bytes:
                raise httpx.RemoteProtocolError("ended early")

        partial.touch()
        if bytes_at(partial) < size_bytes:
            self._persist(ask, lambda: bytes_at(partial))

    @contextmanager
    def _answer(self, path: str, what: str, **options: Any) -> Iterator[httpx.Response]:
        """Raises httpx.HTTPError where it can help to ask again, else WeightsError for what is no success."""
        with self._client.stream("GET", path, **options) as response:
            status = response.status_code
            if status in {408, 429} or status >= 500:
                response.raise_for_status()
            if status in {401, 403}:
                raise weights_error(
                    f"{what}: refused ({status}); there is no such name, or HF_TOKEN has to be one that may read it"
                )
            if status != 416 and not response.is_success:
                raise weights_error(f"{what}: not there ({status}); correct the name or the revision in the preset")
            yield response

    def _persist(self, ask: Callable[[], T], arrived: Callable[[], int] = lambda: 0) -> T:
        """Retries until `ask` succeeds, or until as many retries as there are pauses have brought no bytes."""
        pauses = iter(self._pauses_s)
        while True:
            before = arrived()
            try:
                return ask()
            except httpx.HTTPError as error:
                if arrived() > before:
                    pauses = iter(self._pauses_s)
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise weights_error(
                        f"{self._client.base_url.host} could not be reached ({_reason(error)}): "
                        "run the same command again, it continues where it stopped"
                    ) from None
                time.sleep(pause_s)


def _beginning(response: httpx.Response) -> bytes:
    """At most MAX_LISTING_BYTES of a body, not decompressed."""
    read = bytearray()
    for part in response.iter_raw():
        read += part
        if len(read) >= MAX_LISTING_BYTES:
            break
    return bytes(read)


def _reason(error: httpx.HTTPError) -> str:
    """Without addresses and headers, which may hold credentials."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error) if isinstance(error, httpx.ConnectError) else type(error).__name__
