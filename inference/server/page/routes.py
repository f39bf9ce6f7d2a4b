"""The page at `/` and its parts. Addresses in answers are relative: a proxy may serve all of it under another path."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from inference.errors import ObjectMissing
from inference.server.config import ServerConfig
from inference.server.live import Live
from inference.server.objects import ObjectStore
from inference.server.page.actions import action_routes
from inference.server.page.asking import LANGUAGE_COOKIE, address_of, words_for
from inference.server.page.files import file_routes
from inference.server.page.filter import Filter
from inference.server.page.rendering import Renderer
from inference.server.page.sign_in import sign_in_routes
from inference.server.page.telling import told_to_people
from inference.server.page.views import PAGE_SIZE, Views
from inference.server.rows.store import Store
from inference.server.workers import Workers

YEAR_S = 365 * 24 * 3600


def page_routes(config: ServerConfig, store: Store, objects: ObjectStore, live: Live, workers: Workers) -> APIRouter:
    """`/`, everything under `/page`, and signing in."""
    renderer = Renderer()
    views = Views(store, objects, live, workers)
    route_class = told_to_people(renderer)
    routes = APIRouter(include_in_schema=False)
    for part in (
        _shown(config, views, renderer, route_class=route_class),
        action_routes(config, store, objects, views, renderer, route_class=route_class),
        file_routes(store, objects, route_class=route_class),
        sign_in_routes(config, renderer),
    ):
        routes.include_router(part)
    return routes


def _shown(config: ServerConfig, views: Views, renderer: Renderer, **options: object) -> APIRouter:
    routes = APIRouter(**options)  # type: ignore[arg-type]  # the class of routes

    @routes.get("/")
    def page(request: Request) -> Response:
        words, wanted = words_for(request), Filter.of(request.query_params)
        answer = renderer.html(
            "page.html",
            words,
            page=views.page(wanted),
            summary=views.summary(wanted),
            filter=wanted,
            api_url=address_of(request, config.public_url),
            max_photo_bytes=config.max_photo_bytes,
            has_key=config.api_key is not None,
        )
        if request.query_params.get("lang") == words.language:
            # Without a path it counts for the folder that the browser sees the page in.
            answer.set_cookie(LANGUAGE_COOKIE, words.language, max_age=YEAR_S, path=None, httponly=True, samesite="lax")
        return answer

    @routes.get("/page/list")
    def listed(request: Request) -> Response:
        wanted = Filter.of(request.query_params)
        return renderer.html("list.html", words_for(request), page=views.page(wanted), filter=wanted)

    @routes.get("/page/summary")
    def summary(request: Request) -> Response:
        wanted = Filter.of(request.query_params)
        heads = views.heads(request.query_params.getlist("head")[:PAGE_SIZE])
        return renderer.html(
            "summary_and_heads.html",
            words_for(request),
            summary=views.summary(wanted),
            heads=heads,
            filter=wanted,
            api_url=address_of(request, config.public_url),
        )

    @routes.get("/page/tasks/{item_id}")
    def card(item_id: str, request: Request) -> Response:
        wanted = Filter.of(request.query_params)
        return renderer.html("card.html", words_for(request), card=views.card_of(item_id), filter=wanted)

    @routes.get("/page/static/{name}")
    def static(name: str, request: Request) -> Response:
        answer = renderer.static(name, request.query_params.get("v"))
        if answer is None:
            raise ObjectMissing(f"no file {name}")
        return answer

    return routes
