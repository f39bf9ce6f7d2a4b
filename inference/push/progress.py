"""Live progress of jobs, for whoever may ask for one, and for pages that hold a token.

GET  /events/{project_id}, WS /ws/{project_id}    as `inference/progress/web/app.py` has them
POST /events-token    {"project_id": …}           a token with which a page may follow that project
"""

import json
from collections.abc import Sequence
from functools import partial

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from inference.progress.hub import ProgressHub
from inference.progress.web.access import TOKEN, TOKEN_LIFETIME_S, Access, Refusal
from inference.progress.web.app import progress_app
from inference.progress.web.follow import Bounds, is_project_id
from inference.push.answers import Answer
from inference.push.app import Malformed, body_of, respond
from inference.push.auth import Auth

MAX_BODY_BYTES = 4096


def progress_routes(
    hub: ProgressHub,
    auth: Auth,
    secret: str | None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
) -> Sequence[BaseRoute]:
    """The routes over a hub. `secret`: of `auth`; it signs tokens, so without one there are none."""
    tokens = Access(secret, secret) if secret else None

    async def access(connection: HTTPConnection, project_id: str) -> Refusal | None:
        if tokens is not None and TOKEN in connection.query_params:
            return tokens(connection, project_id)
        answer = await auth.refusal(connection.headers)
        return None if answer is None else Refusal(answer.http_status, answer.error or answer.outcome)

    routes = list(progress_app(hub, access=access, bounds=bounds).routes)
    if tokens is not None:
        routes.append(Route("/events-token", partial(_token, auth, tokens), methods=["POST"]))
    return routes


async def _token(auth: Auth, tokens: Access, request: Request) -> JSONResponse:
    refusal = await auth.refusal(request.headers)
    if refusal is not None:
        return respond(refusal)
    try:
        given = json.loads(await body_of(request, MAX_BODY_BYTES))
    except Malformed as error:
        return respond(Answer(http_status=error.status, outcome="malformed", error=str(error)))
    except (ValueError, RecursionError):
        given = None
    project_id = given.get("project_id") if isinstance(given, dict) else None
    if not isinstance(project_id, str) or not is_project_id(project_id):
        return respond(Answer(http_status=400, outcome="malformed", error='body: it has to be {"project_id": "…"}'))
    return JSONResponse({"token": tokens.sign(project_id), "expires_in": int(TOKEN_LIFETIME_S)})
