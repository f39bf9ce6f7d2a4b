"""The shape of every answer: `{"success": true, "data": …}` or `{"success": false, "error": "text"}`."""

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import structlog
from anyio import move_on_after
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from inference.errors import (
    DiskFull,
    I2VError,
    InvalidPhoto,
    ItemMissing,
    NotHolder,
    ObjectMissing,
    ObjectTooLarge,
    QueueRefused,
    WrongState,
    write_error,
)

log = structlog.get_logger(__name__)

D = TypeVar("D")

LINGER_S = 10.0
"""How long the server goes on reading from a client after an early answer."""


class Answer(BaseModel, Generic[D]):
    """A successful answer."""

    success: Literal[True] = True
    data: D


class Failure(BaseModel):
    """A failure, with its reason."""

    success: Literal[False] = False
    error: str


def documented(model: type[BaseModel], description: str, example: dict[str, Any] | None = None) -> dict[str, Any]:
    """A failure in the description of a route. The application describes the `model` itself, once.

    FastAPI would take the model here as well, and build a validator of it for every status of every route: half of the
    time that making the application takes, for validators that nothing ever asks.
    """
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if example is not None:
        content["example"] = example
    return {"description": description, "content": {"application/json": content}}


def _failure(description: str, error: str) -> dict[str, Any]:
    return documented(Failure, description, {"success": False, "error": error})


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _failure("Malformed; the error names the field", "worker_id: field required"),
    401: _failure("No key, or not the right one", "Unauthorized"),
    403: _failure("Not yours, or not from here", "the task belongs to another worker"),
    404: _failure("Nothing there, or not yours any more", "Task not found"),
    409: _failure("Its state does not allow it", "the task is completed"),
    413: _failure("Over a limit", "photo: more than 50000000 bytes"),
    500: _failure("Try again", "internal error, try again"),
    503: _failure("Not working", "the database does not answer"),
}


def example(value: dict[str, Any]) -> ConfigDict:
    """The configuration of a model that shows this value in the API's description."""
    return ConfigDict(json_schema_extra={"example": value})


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures that a route documents. Any route may answer 500, and 403 to a web page."""
    return {status: ERRORS[status] for status in sorted({*statuses, 403, 413, 500})}


def failure(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error answer in the shape of the API."""
    return JSONResponse(Failure(error=error).model_dump(), status, headers)


_STATUSES: Sequence[tuple[type[I2VError], int]] = (
    (ItemMissing, 404),
    (ObjectMissing, 404),
    (NotHolder, 403),
    (WrongState, 409),
    (InvalidPhoto, 400),
    (QueueRefused, 400),
    (ObjectTooLarge, 413),
)


def status_of(error: I2VError) -> int:
    """The status of an answer that tells of an error. 500 for those that say nothing about the request."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Turns every error of the app into a Failure."""

    @app.exception_handler(I2VError)
    async def ours(request: Request, error: I2VError) -> JSONResponse:
        status, path = status_of(error), request.url.path
        if status == 500:
            log.error("the server cannot answer", path=path, error=str(error), full=isinstance(error, DiskFull))
        return failure(status, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        return failure(400, "; ".join(map(_problem, error.errors())))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(why := error.__cause__, OSError):  # FastAPI says 400 where it could not keep a body on the disk
            told = f"an upload cannot be stored: {why.strerror}; try again later"
            return await ours(request, write_error(why, told))
        headers = {"allow": _allowed(request)} if error.status_code == 405 else dict(error.headers or {})
        return failure(error.status_code, str(error.detail), headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("the server failed", path=request.url.path, exc_info=error)
        return failure(500, "internal error, try again")


def _allowed(request: Request) -> str:
    """Every method of a path, for the Allow header: Starlette names those of the first route only."""
    described: dict[str, Any] = request.app.openapi()["paths"]
    methods = {
        method.upper()
        for path, operations in described.items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    }
    return ", ".join(sorted(methods))


def _problem(problem: dict[str, Any]) -> str:
    """One line about one wrong field. JSON syntax errors have a position in place of a field."""
    if problem["type"] == "json_invalid":
        return "body: not JSON"
    where = ".".join(str(part) for part in problem["loc"][1:]) or "body"
    said = str(problem["msg"])
    return f"{where}: {said[0].lower()}{said[1:]}".encode("utf-8", "replace").decode()


class EarlyAnswer(JSONResponse):
    """An answer to a request whose body was not read.

    Closing a connection while its client still sends resets it, and the client may lose the answer. So after the answer
    the server reads and discards the rest for a while.
    """

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """As any response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with move_on_after(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
