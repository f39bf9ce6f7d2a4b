"""The ASGI application. It checks and answers; what a job needs is done elsewhere.

POST /jobs/run    {"job_id": …}   runs that job, or hands it on
POST /wake        any body        there is work: look now
GET  /jobs/health                 whether the store of jobs answers; needs no token and tells no secret
"""

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Any, Protocol

import anyio
import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from inference.errors import I2VError, QueueUnavailable
from inference.push.answers import RETRY_AFTER_S, Answer, for_error
from inference.push.auth import Auth
from inference.task import identifier

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 128 * 1024
"""A task of Cloud Tasks is at most 100 KB with all its headers (cloud.google.com/tasks/docs/quotas)."""

MAX_WAKE_BYTES = 2 * 1024 * 1024
"""A database's webhook sends the whole row that woke it, which is of no interest here."""

MIN_DEADLINE_S, MAX_DEADLINE_S = 1.0, 1800.0
"""A dispatch deadline of Cloud Tasks is between 15 s and 30 min; other callers may be more impatient."""

DEADLINE_HEADER = "x-dispatch-deadline"
"""Seconds for which the caller waits for an answer. Cloud Tasks itself tells nobody, so `enqueue.py` sends it."""

ANSWER_MARGIN = 0.05
"""The share of a deadline, and at most ANSWER_MARGIN_S, that is kept for the way back of the answer."""

ANSWER_MARGIN_S = 10.0

LINGER_S = 10.0
"""How long the rest of a body that is too large is read."""

HEALTH_LIMIT_S, HEALTH_AGE_S = 10.0, 1.0

Wake = Callable[[], Awaitable[None]]


class Runs(Protocol):
    """Does what `/jobs/run` asks for."""

    async def run(self, job_id: str, extras: Mapping[str, Any], deadline_s: float) -> Answer:
        """Answers within `deadline_s`, whatever becomes of the job after that. Raises I2VError."""
        ...

    async def check(self) -> None:
        """Raises I2VError where jobs cannot be taken now."""
        ...


class Malformed(Exception):
    """The body of a request cannot be used; the text says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def create_app(
    auth: Auth,
    *,
    runs: Runs | None = None,
    wake: Wake | None = None,
    deadline_s: float,
    beside: Sequence[BaseRoute] = (),
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None,
) -> Starlette:
    """The application. `deadline_s`: how long a caller waits who does not say. `lifespan`: open while it is served.

    `beside`: routes that check their callers themselves.

    Without `runs` there is no `/jobs/run`, and without `wake` no `/wake`.
    """
    routes: list[BaseRoute] = [*beside, Route("/jobs/health", _Health(runs).answer, methods=["GET"])]
    if runs is not None:
        routes.append(Route("/jobs/run", partial(_run, auth, runs, deadline_s), methods=["POST"]))
    if wake is not None:
        routes.append(Route("/wake", partial(_wake, auth, wake), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={Exception: _unexpected}, lifespan=lifespan)


async def _run(auth: Auth, runs: Runs, default_s: float, request: Request) -> JSONResponse:
    refusal = await auth.refusal(request.headers)
    if refusal is not None:
        return respond(refusal)
    job_id: str | None = None
    try:
        job_id, extras = _job_of(await body_of(request, MAX_BODY_BYTES))
        limit_s = _deadline_s(request, default_s)
        return respond(await runs.run(job_id, extras, limit_s - min(ANSWER_MARGIN_S, ANSWER_MARGIN * limit_s)))
    except Malformed as error:
        return respond(Answer(http_status=error.status, outcome="malformed", error=str(error)))
    except I2VError as error:
        log.warning("job_not_run", item_id=job_id, error=str(error))
        return respond(for_error(job_id, error))


async def _wake(auth: Auth, wake: Wake, request: Request) -> JSONResponse:
    refusal = await auth.refusal(request.headers)
    if refusal is not None:
        return respond(refusal)
    try:
        await body_of(request, MAX_WAKE_BYTES)  # read, so that the answer reaches a client that still sends
        await wake()
    except Malformed as error:
        return respond(Answer(http_status=error.status, outcome="malformed", error=str(error)))
    except I2VError as error:
        log.warning("not_woken", error=str(error))
        return respond(for_error(None, error))
    return JSONResponse({"outcome": "woken"}, 202)


class _Health:
    """Whether jobs can be taken. Needs no token, so however many ask, the store is asked once in HEALTH_AGE_S.

    Why not is in the log alone: what a database says of itself names its host, user and address.
    """

    def __init__(self, runs: Runs | None) -> None:
        self._runs = runs
        self._lock = anyio.Lock()
        self._is_well = False
        self._looked_at = -math.inf

    async def answer(self, _request: Request) -> JSONResponse:
        async with self._lock:
            if anyio.current_time() >= self._looked_at + HEALTH_AGE_S:
                self._is_well = await self._look()
                self._looked_at = anyio.current_time()
        if not self._is_well:
            return JSONResponse({"status": "unavailable", "error": "no job can be taken now: the log says why"}, 503)
        return JSONResponse({"status": "ok"})

    async def _look(self) -> bool:
        try:
            with anyio.fail_after(HEALTH_LIMIT_S):
                if self._runs is not None:
                    await self._runs.check()
        except TimeoutError:
            log.warning("not_well", error="the store of jobs does not answer")
        except I2VError as error:
            log.warning("not_well", error=str(error))
        else:
            return True
        return False


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    return respond(for_error(None, QueueUnavailable("internal error, try again")))


def respond(answer: Answer) -> JSONResponse:
    """An answer as HTTP."""
    headers = {} if answer.retry_after_s is None else {"retry-after": str(answer.retry_after_s)}
    if answer.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(answer.body(), answer.http_status, headers)


def stopping() -> JSONResponse:
    """For requests that the end of the process cuts off."""
    return respond(
        Answer(http_status=503, outcome="busy", error="the worker is stopping: try again", retry_after_s=RETRY_AFTER_S)
    )


async def body_of(request: Request, limit_bytes: int) -> bytes:
    """The body of a request. Raises Malformed where it is longer."""
    body, deadline = bytearray(), math.inf
    async with aclosing(request.stream()) as chunks:
        with anyio.CancelScope() as scope:
            async for chunk in chunks:
                if len(body) <= limit_bytes:
                    body += chunk
                elif deadline == math.inf:
                    # A client that still sends may lose an early answer, so the rest is read and thrown away.
                    deadline = scope.deadline = anyio.current_time() + LINGER_S
    if len(body) > limit_bytes:
        raise Malformed(413, f"body: more than {limit_bytes} bytes")
    return bytes(body)


def _job_of(body: bytes) -> tuple[str, dict[str, Any]]:
    """The job's id, and all other fields as they came."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed(400, 'body: not JSON; it has to be {"job_id": "…"}') from None
    if not isinstance(given, dict):
        raise Malformed(400, 'body: it has to be {"job_id": "…"}')
    try:
        job_id = identifier.validate_python(given.pop("job_id", None), strict=True)
    except ValidationError:
        raise Malformed(400, "job_id: has to be 1 to 200 letters, digits, and . _ : -") from None
    return job_id, given


def _deadline_s(request: Request, default_s: float) -> float:
    try:
        asked_s = float(request.headers.get(DEADLINE_HEADER, default_s))
    except ValueError:
        raise Malformed(400, f"{DEADLINE_HEADER}: has to be a number of seconds") from None
    if not MIN_DEADLINE_S <= asked_s <= MAX_DEADLINE_S:  # NaN is in no range
        raise Malformed(400, f"{DEADLINE_HEADER}: has to be between {MIN_DEADLINE_S:g} and {MAX_DEADLINE_S:g} s")
    return asked_s
