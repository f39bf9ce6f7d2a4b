"""The base of clients for JSON APIs with a key. A call is one request; what an answer means is up to the client."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import anyio
import httpx

from inference.errors import one_line
from inference.transfer.body import IDENTITY, MAX_JSON_BYTES, bounded
from inference.transfer.storage_errors import FOREIGN, reason_of
from inference.transfer.tls import tls_context

CONNECT_TIMEOUT_S = 10.0
MAX_SAID_CHARS = 300

# Raised while a connection is made, and only then (httpcore: connect_tcp, start_tls, CONNECT to a proxy): no byte of
# the request was sent. After any other failure the request may have been carried out.
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(frozen=True)
class ApiAnswer(ABC):
    """An answer of an API, or of a proxy in front of it. Refusals are answers, too."""

    status: int
    payload: Any  # None where the body is not JSON
    said: str  # the reason for people: one line, without the key

    @staticmethod
    @abstractmethod
    def told(payload: dict[str, Any]) -> str:
        """The reason in `payload`, from the fields that this API uses; empty where there is none."""


A = TypeVar("A", bound=ApiAnswer)


class Unanswered(Exception):
    """No answer came. `sent`: the request may have been carried out all the same."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class JsonApi(Generic[A]):
    """A connection to one API for the length of a block. Every call is one request.

    `answer`: the class of its answers. `limit_s`: for one whole request, unless `ask` is given another. `idle_s`: a
    connection on which nothing moves for this long is dead; None: only `limit_s` counts. `max_answer_bytes`: a longer
    answer is truncated, and then is not JSON.
    """

    def __init__(
        self,
        answer: type[A],
        base_url: str,
        key: str,
        *,
        limit_s: float,
        idle_s: float | None = None,
        max_answer_bytes: int = MAX_JSON_BYTES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._answer, self._key, self._limit_s = answer, key, limit_s
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}", **IDENTITY},
            event_hooks={"response": [bounded(max_answer_bytes)]},
            timeout=httpx.Timeout(idle_s, connect=CONNECT_TIMEOUT_S),  # per read; `ask` limits the whole request
            # A new connection for each request: an idle one may be closed, which shows only after the request was sent.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=base_url.startswith("https:"),  # plain http leads to this machine, where a proxy cannot reach it
            verify=tls_context(),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self._client.aclose()

    async def ask(self, method: str, path: str, body: object = None, *, limit_s: float | None = None) -> A:
        """One request. Raises Unanswered, and nothing foreign."""
        try:
            with anyio.fail_after(limit_s or self._limit_s):
                response = await self._client.request(method, path, json=body)
        except FOREIGN as error:
            why = self._clean(f"{self._client.base_url.host}: {reason_of(error)}")
            raise Unanswered(why, sent=not isinstance(error, NEVER_SENT)) from None
        return self._read(response)

    def _read(self, response: httpx.Response) -> A:
        try:
            payload = response.json()
        except (ValueError, RecursionError):
            payload = None
        told = self._answer.told(payload) if isinstance(payload, dict) else ""
        return self._answer(response.status_code, payload, self._clean(told or response.reason_phrase))

    def _clean(self, text: str) -> str:
        return one_line(text.replace(self._key, "…") if self._key else text, MAX_SAID_CHARS)
