"""Live progress: streams of events, and tokens with which a page may follow one."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, Field
from starlette.routing import BaseRoute

from inference.progress.hub import ProgressHub
from inference.progress.web.access import TOKEN_LIFETIME_S, Access
from inference.progress.web.app import progress_app
from inference.progress.web.follow import MAX_PROJECT_ID, Bounds, Snapshot, is_project_id
from inference.server.answers import Answer, errors, example
from inference.server.config import ServerConfig


def _legible(project_id: str) -> str:
    if not is_project_id(project_id):
        raise ValueError("has to be characters that can be read")
    return project_id


class EventsTokenRequest(BaseModel):
    """Which project somebody is to follow: a group's id, or `queue` for all tasks."""

    model_config = example({"project_id": "queue"})

    project_id: Annotated[str, Field(min_length=1, max_length=MAX_PROJECT_ID), AfterValidator(_legible)]


class EventsToken(BaseModel):
    """Goes into the query of `/events/{project_id}?token=…` or `/ws/{project_id}?token=…`."""

    token: str
    expires_in: int  # seconds until it begins no more streams; one that has begun goes on


def event_routes(config: ServerConfig) -> APIRouter:
    """The route that needs the key."""
    routes = APIRouter(tags=["progress"])
    access = Access(config.api_key, config.signing_secret)

    @routes.post(
        "/api/events-token",
        summary="Let a page follow a project",
        responses=errors(400, 401),
        response_model=Answer[EventsToken],
    )
    def events_token(asked: EventsTokenRequest) -> object:
        """A token with which a page of any site may begin to follow one project, for some minutes, without the key."""
        token = access.sign(asked.project_id)
        return Answer(data=EventsToken(token=token, expires_in=int(TOKEN_LIFETIME_S)))

    return routes


def stream_routes(hub: ProgressHub, snapshot: Snapshot, bounds: Bounds) -> Sequence[BaseRoute]:
    """`/events/{project_id}` and `/ws/{project_id}`. Guard has checked who asks."""
    return progress_app(hub, access=lambda _connection, _project_id: None, snapshot=snapshot, bounds=bounds).routes
