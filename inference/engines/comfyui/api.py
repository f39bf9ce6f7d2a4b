"""ComfyUI's HTTP API: its requests, and what a missing or unsuccessful answer means.

From `server.py` of github.com/comfyanonymous/ComfyUI, and recordings of a running one.
"""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import anyio
import httpx
import structlog

from inference.engines.comfyui.outputs import Output
from inference.errors import (
    EngineError,
    EngineFailed,
    InvalidRequest,
    MachineFault,
    ObjectMissing,
    ObjectTooLarge,
    ProviderUnavailable,
    SettingsError,
    StorageRefused,
    StorageUnavailable,
    UrlExpired,
)
from inference.transfer import json_api
from inference.transfer.body import IDENTITY
from inference.transfer.json_api import NEVER_SENT, JsonApi, Unanswered
from inference.transfer.network import flaw_in
from inference.transfer.storage import Storage
from inference.transfer.storage_errors import FOREIGN, reason_of

log = structlog.get_logger(__name__)

ANSWER_LIMIT_S = 30.0
"""For one request, whole. While ComfyUI loads a model, Python's lock can keep its web server busy for seconds."""

UPLOAD_LIMIT_S = 300.0
"""For the upload of one input, whole."""

DOWNLOAD_LIMIT_S = 600.0
"""For the download of one output, whole."""

CHUNK_BYTES = 256 * 1024
"""How much of a file is read at once, as it is sent."""

MAX_ANSWER_BYTES = 64_000_000
"""`/queue` repeats the graph of every prompt that waits, and `/object_info` lists every node with every model."""

GATEWAY = (429, 502, 503, 504, *range(520, 531))
"""Answers of something in front of ComfyUI that cannot reach it, or wants fewer requests. From 520 on they are those of
Cloudflare, which is in front of RunPod's pods. ComfyUI itself answers 500 where it fails."""

NOT_HERE = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Answers that no request of ours gets from a ComfyUI: the address leads elsewhere, as to the page of a login, or
something guards it."""

ANSWERED_TRIES = 3
"""How often a request is made that ComfyUI itself answers with 500, or with half an answer."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Between two tries while ComfyUI does not answer; doubled from one to the next."""


def base_url(host: str) -> str:
    """`http://127.0.0.1:8188` of COMFY_HOST: a host with a port, or a whole URL. Raises SettingsError."""
    text = host.strip()
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
        flaw = flaw_in(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        flaw = "not an address"
    if flaw or url.query or url.fragment or url.userinfo:
        raise SettingsError("COMFY_HOST must look like 127.0.0.1:8188 or https://host, without query, fragment or user")
    return str(url).rstrip("/")


class ComfyAnswer(json_api.ApiAnswer):
    """An answer of ComfyUI, or of a proxy in front of it."""

    @staticmethod
    def told(payload: dict[str, Any]) -> str:
        """`error.message` and `error.details`."""
        error = payload.get("error")
        if not isinstance(error, dict):
            return str(error or "")
        return ": ".join(str(error[key]) for key in ("message", "details") if error.get(key))

    @property
    def is_half(self) -> bool:
        """Whether it should have been JSON and is not, because something cut it off or answered in its place."""
        return self.status == 200 and not isinstance(self.payload, dict)

    def error(self, what: str) -> EngineError | SettingsError:
        """The error for an answer that no request of this kind should get."""
        said = "200 and no JSON with it" if self.is_half else f"{self.status} {self.said}".strip()
        if self.status in NOT_HERE:
            return SettingsError(f"COMFY_HOST: no ComfyUI that this worker may use is there; {what} got {said}")
        return EngineFailed(f"ComfyUI answered {what} with {said}")


class ComfyApi(JsonApi[ComfyAnswer]):
    """Connections to one ComfyUI for the length of a block.

    `patience_s`: how long a ComfyUI that does not answer is waited for. `check` is called before every try of
    something that may wait, and raises to end the waiting.
    """

    pause_s = FIRST_PAUSE_S

    def __init__(
        self,
        url: str,
        *,
        patience_s: float,
        check: Callable[[], None] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(
            ComfyAnswer, f"{url}/", "", limit_s=ANSWER_LIMIT_S, max_answer_bytes=MAX_ANSWER_BYTES, transport=transport
        )
        del self._client.headers["Authorization"]  # ComfyUI has no keys
        self.url, self.host = url, httpx.URL(url).netloc.decode("ascii")
        self._patience_s, self._check, self._transport = patience_s, check, transport

    async def insist(self, send: Callable[[], Awaitable[ComfyAnswer]], what: str) -> ComfyAnswer:
        """Repeats a request that may be repeated until it is answered with JSON, or refused.

        A 500 of ComfyUI itself, and half an answer, are only tried again twice.

        Raises ProviderUnavailable after `patience_s` without an answer, and what the check raises.
        """
        away_since: float | None = None
        pause_s, answered = self.pause_s, 0
        while True:
            self._check()
            try:
                answer = await send()
            except Unanswered as error:
                why = str(error)
            else:
                is_gateway = answer.status in GATEWAY
                answered += not is_gateway
                is_well = answer.status < 500 and not answer.is_half
                if not is_gateway and (is_well or answered >= ANSWERED_TRIES):
                    if away_since is not None:
                        log.info("comfyui_is_back", away_s=round(anyio.current_time() - away_since, 1))
                    return answer
                why = f"{self.host}: {answer.status} {answer.said}".strip()
            now = anyio.current_time()
            if away_since is None:
                away_since = now
                log.warning("comfyui_does_not_answer", what=what, error=why, waits_s=self._patience_s)
            if now - away_since >= self._patience_s:
                raise ProviderUnavailable(f"ComfyUI did not answer for {self._patience_s:g} s ({why}): is it running?")
            await anyio.sleep(min(pause_s, self._patience_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def get(self, path: str) -> Any:
        """The JSON at a path. Raises as `insist`, EngineFailed, and SettingsError where no ComfyUI is there."""
        answer = await self.insist(lambda: self.ask("GET", path), f"GET /{path}")
        if answer.status != 200 or not isinstance(answer.payload, dict):
            raise answer.error(f"GET /{path}")
        return answer.payload

    async def system_stats(self) -> dict[str, Any]:
        """What it runs on: one try. Raises ProviderUnavailable, EngineFailed, SettingsError."""
        try:
            answer = await self.ask("GET", "system_stats")
        except Unanswered as error:
            raise ProviderUnavailable(f"no ComfyUI answers at {self.host} ({error}): is it running?") from None
        if answer.status in GATEWAY:
            raise ProviderUnavailable(f"no ComfyUI answers at {self.host}: {answer.status} {answer.said}".strip())
        if answer.is_half:
            raise SettingsError("COMFY_HOST: what answers there is no ComfyUI; GET /system_stats got no JSON")
        if answer.status != 200:
            raise answer.error("GET /system_stats")
        return dict(answer.payload)

    async def upload(self, name: str, path: Path | bytes) -> str:
        """Puts a file into ComfyUI's input folder, and returns the name by which a graph reads it.

        Videos go the same way as images, as in ComfyUI's own pages. Raises as `insist`, InvalidRequest where the file
        is too large for it, EngineFailed, MachineFault.
        """
        answer = await self.insist(lambda: self._upload(name, path), "an upload")
        if answer.status == 413:
            raise InvalidRequest(f"ComfyUI takes no input as large as {name}; it is started with --max-upload-size")
        payload = answer.payload if isinstance(answer.payload, dict) else {}
        if answer.status != 200 or not isinstance(payload.get("name"), str):
            raise answer.error("an upload")
        return "/".join(part for part in (payload.get("subfolder"), payload["name"]) if part)

    async def _upload(self, name: str, content: Path | bytes) -> ComfyAnswer:
        try:
            with anyio.fail_after(UPLOAD_LIMIT_S):
                # With `overwrite` a second try does not become a second file: the name is this task's alone.
                async with _Form.of(name, content, {"overwrite": "true"}) as form:
                    # As `stream`, which httpx passes on unchanged; `content` would be wrapped into a generator.
                    url = f"{self.url}/upload/image"
                    headers = {"Host": self.host, **IDENTITY, **form.headers}
                    response = await self._client.send(httpx.Request("POST", url, headers=headers, stream=form))
        except FOREIGN as error:
            raise Unanswered(f"{self.host}: {reason_of(error)}", sent=not isinstance(error, NEVER_SENT)) from None
        return self._read(response)

    async def download(self, output: Output, path: Path, *, max_bytes: int) -> None:
        """Fetches an output into `path`.

        Raises ProviderUnavailable, EngineFailed, InvalidRequest where it is larger than `max_bytes`, MachineFault.
        """
        query = {"filename": output.filename, "subfolder": output.subfolder, "type": output.kind}
        url = f"{self.url}/view?{urlencode(query)}"
        give_up = anyio.current_time() + self._patience_s
        async with Storage(
            trusted_origins=[self.url], max_download_bytes=max_bytes, transport=self._transport
        ) as storage:
            while True:
                self._check()
                try:
                    with anyio.fail_after(DOWNLOAD_LIMIT_S):
                        await storage.download(url, path)
                except TimeoutError:
                    raise EngineFailed(f"{output.called} did not arrive within {DOWNLOAD_LIMIT_S:g} s") from None
                except StorageUnavailable as error:
                    if anyio.current_time() >= give_up:
                        raise ProviderUnavailable(f"{output.called} cannot be had of ComfyUI: {error}") from None
                    await anyio.sleep(self.pause_s)
                except ObjectTooLarge:
                    raise InvalidRequest(f"workflow: {output.called} is over {max_bytes / 1e6:g} MB") from None
                except (ObjectMissing, StorageRefused, UrlExpired) as error:
                    raise EngineFailed(f"{output.called} cannot be had of ComfyUI: {error}") from None
                else:
                    return


class _Form(httpx.AsyncByteStream):
    """A form with fields and one file under `image`, which is read while it is sent (RFC 7578).

    It is an iterator and not a generator, as httpx's own form is: a generator that is left half-way, because the
    connection broke, has to be closed, of which trio complains.
    """

    def __init__(self, head: bytes, file: anyio.AsyncFile[bytes] | None, size_bytes: int, boundary: str) -> None:
        self._file, self._tail = file, f"\r\n--{boundary}--\r\n".encode()
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + size_bytes + len(self._tail)),
        }
        self._rest = [head]

    @classmethod
    @asynccontextmanager
    async def of(cls, name: str, content: Path | bytes, fields: Mapping[str, str]) -> AsyncIterator[Self]:
        """A form for one try. `name` is plain ASCII. Raises MachineFault where the file cannot be read."""
        boundary = secrets.token_hex(16)
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{fields[key]}' for key in fields]
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        head = "\r\n".join(parts).encode()
        if isinstance(content, bytes):
            yield cls(head + content, None, 0, boundary)
            return
        try:
            file = await anyio.open_file(content, "rb")
            size_bytes = (await anyio.Path(content).stat()).st_size
        except OSError as error:
            raise MachineFault(f"an input cannot be read any more: {error.strerror}") from None
        async with file:
            yield cls(head, file, size_bytes, boundary)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._rest:
            return self._rest.pop()
        if self._file is not None:
            if chunk := await self._file.read(CHUNK_BYTES):
                return chunk
            self._file = None
        if self._tail:
            tail, self._tail = self._tail, b""
            return tail
        raise StopAsyncIteration
