"""Runway's API on the wire: its shapes, and what each refusal and silence means. Knows nothing of ledgers.

From the official Python SDK 5.24, its documentation, and experiments with that SDK against a loopback server.
"""

from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from inference.errors import (
    AccountError,
    ContentRefused,
    EngineError,
    EngineFailed,
    InvalidRequest,
    ProviderUnavailable,
    one_line,
)
from inference.transfer import json_api
from inference.transfer.json_api import MAX_SAID_CHARS, JsonApi, Unanswered

VERSION = "2024-11-06"
"""Of the API; every request names it."""

ANSWER_LIMIT_S = 30.0
"""One question, whole."""

DATA_URI_BYTES = 5 * 1024 * 1024
"""A photo in a request has to stay below this, encoded; a larger one is uploaded first."""

OVERLOADED = (502, 503, 504)
"""The API sheds load (502, 503), or could not satisfy the request in time (504); its documentation has all three asked
again, so a request that is answered with one of them was not carried out. No other 5xx says such a thing."""

# Failure codes by dotted segment (docs.dev.runwayml.com/errors/task-failures).
SAFETY = ("SAFETY",)
BAD_INPUT = (("ASSET", "INVALID"), ("THIRD_PARTY", "INPUT_VALIDATION"))
BAD_OUTPUT = ("INTERNAL", "BAD_OUTPUT")
GONE = "GONE"
"""Ours, for a task that Runway does not know any more."""


class Cost(BaseModel):
    """Credits, a cent each."""

    credits: Annotated[float, Field(ge=0)]


TaskId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~-]{1,200}$")]  # part of a URL's path


class Created(BaseModel):
    """The answer to a creation."""

    id: TaskId
    estimatedCost: Cost | None = None  # noqa: N815  as on the wire


class RunwayTask(BaseModel):
    """A task as Runway tells it. Statuses that are not known are of work in progress."""

    id: TaskId
    status: str
    progress: float | None = None  # 0..1, while RUNNING
    output: list[str] = []  # URLs for a day or two; asking again makes new ones
    failure: str | None = None
    failureCode: str | None = None  # noqa: N815
    cost: Cost | None = None  # final, once it ended


class Upload(BaseModel):
    """Where to put a file, and what it is called afterwards."""

    uploadUrl: str  # noqa: N815
    fields: dict[str, str]
    runwayUri: str  # noqa: N815


class Organization(BaseModel):
    """The account behind a key."""

    creditBalance: float  # noqa: N815


class Answer(json_api.Answer):
    """What Runway, or whatever stands in its place, answered."""

    @staticmethod
    def told(payload: dict[str, Any]) -> str:
        """`error`, and which fields the API found wrong: what it says of a value may hold the photo, so only where."""
        told = [str(payload.get("error") or payload.get("message") or "")]
        issues = payload.get("issues")
        for issue in issues if isinstance(issues, list) else []:
            if isinstance(issue, dict):
                path = issue.get("path")
                where = ".".join(map(str, path)) if isinstance(path, list) else ""
                told.append(f"{where}: {issue.get('message', '')}")
        return "; ".join(part for part in told if part)

    @property
    def is_refusal(self) -> bool:
        """Whether it certainly was not carried out. A crash (500) and a timeout of a proxy (408) say no such thing."""
        return (300 <= self.status < 500 and self.status != 408) or self.status in OVERLOADED

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be taken in a few seconds."""
        return self.status == 429 or self.status in OVERLOADED

    def error(self) -> EngineError:
        """What an answer means that is not the one hoped for."""
        said = f"{self.status} {self.said}".strip()
        if self.status == 402 or (self.status in (400, 403) and "credits" in self.said.lower()):
            return AccountError(f"{said}: add credits to the account at dev.runwayml.com")
        if self.status in (401, 403):
            return AccountError(
                f"{said}: it does not accept the key; set RUNWAYML_API_SECRET to one of dev.runwayml.com"
            )
        if self.status == 429:
            return AccountError(f"{said}: this account has had enough for now, or for today")
        if self.status < 400 or self.status in (404, 405):
            return AccountError(f"{said}: there is no Runway API at this address, see I2V_RUNWAY_URL")
        return InvalidRequest(said) if self.status < 500 else ProviderUnavailable(said)


def failed(code: str, why: str, before: tuple[str, ...]) -> EngineError:
    """What a task that ended FAILED means, and whether asking again can help; `before` are codes of earlier tries."""
    said = one_line(f"{code or 'no code'}: {why}", MAX_SAID_CHARS)
    if _has(code, SAFETY):
        return ContentRefused(f"its moderation refused the photo or the prompt ({said})")
    if any(_has(code, parts) for parts in BAD_INPUT):
        return InvalidRequest(f"it cannot use the photo or the prompt ({said})")
    if _has(code, BAD_OUTPUT) and any(_has(earlier, BAD_OUTPUT) for earlier in before):
        return InvalidRequest(f"it made nothing usable of this photo, twice ({said})")
    return EngineFailed(f"the generation failed ({said})")


def refused_before(failures: tuple[str, ...]) -> EngineError | None:
    """Why this very request must not be made again, if it failed for good before."""
    for code in failures:
        if _has(code, SAFETY) or any(_has(code, parts) for parts in BAD_INPUT):
            return failed(code, "as it did before", ())
    return None


def _has(code: str, parts: tuple[str, ...]) -> bool:
    segments = code.upper().split(".")
    return any(tuple(segments[at : at + len(parts)]) == parts for at in range(len(segments)))


class RunwayApi(JsonApi[Answer]):
    """One connection for the length of a block. Every call is one try and raises Unanswered where no answer came."""

    def __init__(self, key: str, base_url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(Answer, f"{base_url.rstrip('/')}/v1/", key, limit_s=ANSWER_LIMIT_S, transport=transport)
        self._client.headers["X-Runway-Version"] = VERSION

    async def task(self, task_id: str) -> RunwayTask | Answer:
        """How a task is, or the answer that does not tell."""
        answer = await self.ask("GET", f"tasks/{task_id}")
        try:
            return RunwayTask.model_validate(answer.payload) if answer.status == 200 else answer
        except ValidationError:
            return answer

    async def organization(self) -> Organization:
        """Whose key it is. Raises EngineError."""
        try:
            answer = await self.ask("GET", "organization")
            if answer.status != 200:
                raise answer.error()
            return Organization.model_validate(answer.payload)
        except (Unanswered, ValidationError) as error:
            said = one_line(str(error), MAX_SAID_CHARS)
            raise ProviderUnavailable(f"no answer of the Runway API: {said}") from None

    async def upload_slot(self) -> Upload:
        """A place for one JPEG, for a day. Raises EngineError."""
        try:
            answer = await self.ask("POST", "uploads", {"filename": "photo.jpg", "type": "ephemeral"})
            if not 200 <= answer.status < 300:
                raise answer.error()
            return Upload.model_validate(answer.payload)
        except Unanswered as error:
            raise ProviderUnavailable(f"no answer of the Runway API: {error}") from None
        except ValidationError:
            raise ProviderUnavailable("its answer to an upload is not what its documents say") from None
