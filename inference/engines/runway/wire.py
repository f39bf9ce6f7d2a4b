"""Runway's HTTP API: its messages, and what each refusal or missing answer means. Knows nothing of payments.

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
"""The version of the API, which every request names."""

ANSWER_LIMIT_S = 30.0
"""For one request, whole."""

DATA_URI_BYTES = 5 * 1024 * 1024
"""The limit for a photo inside a request, encoded. A larger one is uploaded first."""

OVERLOADED = (502, 503, 504)
"""The API is overloaded (502, 503) or did not finish in time (504). Its documentation says to repeat the request after
all three, so it was not carried out. No other 5xx implies that."""

# Failure codes by dotted segment (docs.dev.runwayml.com/errors/task-failures).
SAFETY = ("SAFETY",)
BAD_INPUT = (("ASSET", "INVALID"), ("THIRD_PARTY", "INPUT_VALIDATION"))
BAD_OUTPUT = ("INTERNAL", "BAD_OUTPUT")
GONE = "GONE"
"""Our own code, for a task that Runway no longer knows."""


class Cost(BaseModel):
    """Credits, a cent each."""

    credits: Annotated[float, Field(ge=0)]


TaskId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~-]{1,200}$")]  # part of a URL's path


class Created(BaseModel):
    """The answer to a creation."""

    id: TaskId
    estimatedCost: Cost | None = None  # noqa: N815  as on the wire


class RunwayTask(BaseModel):
    """A task as Runway describes it. An unknown status counts as work in progress."""

    id: TaskId
    status: str
    progress: float | None = None  # 0..1, while RUNNING
    output: list[str] = []  # URLs that hold for a day or two; each request makes new ones
    failure: str | None = None
    failureCode: str | None = None  # noqa: N815
    cost: Cost | None = None  # final once the task has ended


class Upload(BaseModel):
    """Where to upload a file, and the URI that names it afterwards."""

    uploadUrl: str  # noqa: N815
    fields: dict[str, str]
    runwayUri: str  # noqa: N815


class Organization(BaseModel):
    """The account behind a key."""

    creditBalance: float  # noqa: N815


class RunwayAnswer(json_api.ApiAnswer):
    """An answer of Runway, or of a proxy in front of it."""

    @staticmethod
    def told(payload: dict[str, Any]) -> str:
        """`error`, and the names of wrong fields. Their values are left out: one of them may be the photo."""
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
        """Whether the request certainly was not carried out; a crash (500) or a proxy's timeout (408) leave it open."""
        return (300 <= self.status < 500 and self.status != 408) or self.status in OVERLOADED

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be accepted in a few seconds."""
        return self.status == 429 or self.status in OVERLOADED

    def error(self) -> EngineError:
        """The error that an unsuccessful answer stands for."""
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
    """The error for a task that ended FAILED; `before` are the failure codes of earlier attempts."""
    said = one_line(f"{code or 'no code'}: {why}", MAX_SAID_CHARS)
    if _has(code, SAFETY):
        return ContentRefused(f"its moderation refused the photo or the prompt ({said})")
    if any(_has(code, parts) for parts in BAD_INPUT):
        return InvalidRequest(f"it cannot use the photo or the prompt ({said})")
    if _has(code, BAD_OUTPUT) and any(_has(earlier, BAD_OUTPUT) for earlier in before):
        return InvalidRequest(f"it made nothing usable of this photo, twice ({said})")
    return EngineFailed(f"the generation failed ({said})")


def refused_before(failures: tuple[str, ...]) -> EngineError | None:
    """The error for a request that must not be repeated because it failed permanently before; else None."""
    for code in failures:
        if _has(code, SAFETY) or any(_has(code, parts) for parts in BAD_INPUT):
            return failed(code, "as it did before", ())
    return None


def _has(code: str, parts: tuple[str, ...]) -> bool:
    segments = code.upper().split(".")
    return any(tuple(segments[at : at + len(parts)]) == parts for at in range(len(segments)))


class RunwayApi(JsonApi[RunwayAnswer]):
    """One connection for the length of a block. Every call is one attempt; Unanswered is raised if no answer came."""

    def __init__(self, key: str, base_url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(RunwayAnswer, f"{base_url.rstrip('/')}/v1/", key, limit_s=ANSWER_LIMIT_S, transport=transport)
        self._client.headers["X-Runway-Version"] = VERSION

    async def task(self, task_id: str) -> RunwayTask | RunwayAnswer:
        """The state of a task, or an answer that does not contain it."""
        answer = await self.ask("GET", f"tasks/{task_id}")
        try:
            return RunwayTask.model_validate(answer.payload) if answer.status == 200 else answer
        except ValidationError:
            return answer

    async def organization(self) -> Organization:
        """The account behind the key. Raises EngineError."""
        try:
            answer = await self.ask("GET", "organization")
            if answer.status != 200:
                raise answer.error()
            return Organization.model_validate(answer.payload)
        except (Unanswered, ValidationError) as error:
            said = one_line(str(error), MAX_SAID_CHARS)
            raise ProviderUnavailable(f"no answer of the Runway API: {said}") from None

    async def upload_slot(self) -> Upload:
        """A place to upload one JPEG to, which is kept for a day. Raises EngineError."""
        try:
            answer = await self.ask("POST", "uploads", {"filename": "photo.jpg", "type": "ephemeral"})
            if not 200 <= answer.status < 300:
                raise answer.error()
            return Upload.model_validate(answer.payload)
        except Unanswered as error:
            raise ProviderUnavailable(f"no answer of the Runway API: {error}") from None
        except ValidationError:
            raise ProviderUnavailable("its answer to an upload is not what its documents say") from None
