"""The routes of the page. Addresses in answers are relative: the server may be behind a proxy, under an unknown path."""

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute

from inference.errors import I2VError, ItemMissing, ObjectMissing
from inference.server.answers import STATUSES as ERROR_STATUSES
from inference.server.config import ServerConfig
from inference.server.live import Live
from inference.server.objects import ObjectStore
from inference.server.page.asking import LANGUAGE_COOKIE, is_fragment, words_for
from inference.server.page.bundle import completed_items, zipped
from inference.server.page.names import clip_name, safe, shown_name
from inference.server.page.rendering import Renderer
from inference.server.page.sign_in import sign_in_routes
from inference.server.page.thumbnails import Thumbnails
from inference.server.page.views import PAGE_SIZE, Filter, Views
from inference.server.rows.store import Store
from inference.server.tidy import discard
from inference.server.workers import Workers

KEPT = {"cache-control": "private, max-age=86400, immutable"}
"""For pictures and clips: what an id stands for never changes."""

YEAR_S = 365 * 24 * 3600

MEDIA_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}


def page_routes(config: ServerConfig, store: Store, objects: ObjectStore, live: Live, workers: Workers) -> APIRouter:
    """`/`, everything under `/page`, and signing in."""
    renderer = Renderer()
    views = Views(store, objects, live, workers)
    thumbnails = Thumbnails(store, objects)
    routes = APIRouter(include_in_schema=False, route_class=_told_to_people(renderer))

    @routes.get("/")
    def page(request: Request) -> Response:
        """The page, whole."""
        words, wanted = words_for(request), Filter.of(request.query_params)
        answer = renderer.html(
            "page.html",
            words,
            page=views.page(wanted),
            summary=views.summary(wanted),
            filter=wanted,
            max_photo_bytes=config.max_photo_bytes,
            has_key=config.api_key is not None,
        )
        if request.query_params.get("lang") == words.language:
            # Without a path it counts for the folder that the browser sees the page in.
            answer.set_cookie(LANGUAGE_COOKIE, words.language, max_age=YEAR_S, path=None, httponly=True, samesite="lax")
        return answer

    @routes.get("/page/list")
    def listed(request: Request) -> Response:
        """A page of the list."""
        wanted = Filter.of(request.query_params)
        return renderer.html("list.html", words_for(request), page=views.page(wanted), filter=wanted)

    @routes.get("/page/summary")
    def summary(request: Request) -> Response:
        """The strip, and the heads of the groups that the page shows."""
        wanted = Filter.of(request.query_params)
        heads = views.heads(request.query_params.getlist("head")[:PAGE_SIZE])
        return renderer.html(
            "summary_and_heads.html", words_for(request), summary=views.summary(wanted), heads=heads, filter=wanted
        )

    @routes.get("/page/tasks/{item_id}")
    def card(item_id: str, request: Request) -> Response:
        """One card."""
        return _card(request, item_id)

    @routes.post("/page/tasks/{item_id}/cancel")
    def cancel(item_id: str, request: Request) -> Response:
        """Cancels."""
        store.cancel(item_id)
        return _done(request, item_id)

    @routes.post("/page/tasks/{item_id}/retry")
    def retry(item_id: str, request: Request) -> Response:
        """Puts it back in line."""
        store.retry(item_id)
        return _done(request, item_id)

    @routes.post("/page/tasks/{item_id}/delete")
    def delete(item_id: str, request: Request) -> Response:
        """Deletes it with its files."""
        discard(store.removal.delete(item_id), store, objects, config)
        return Response(status_code=204) if is_fragment(request) else _back(request, "")

    @routes.get("/page/groups/{group_id}/clips.zip")
    def clips(group_id: str) -> Response:
        """The group's finished clips."""
        name = store.get_group(group_id).name
        items = completed_items(store, group_id)
        file_name = quote(f"{safe(name or '') or 'clips'}.zip")
        headers = {"content-disposition": f"attachment; filename*=utf-8''{file_name}", "cache-control": "no-store"}
        return StreamingResponse(zipped(items, objects), media_type="application/zip", headers=headers)

    @routes.get("/page/photos/{photo_id}.jpg")
    async def photo(photo_id: str) -> Response:
        """A small picture."""
        return Response(await thumbnails.get(photo_id), media_type="image/jpeg", headers=KEPT)

    @routes.head("/page/clips/{item_id}.mp4")
    @routes.get("/page/clips/{item_id}.mp4")
    def clip(item_id: str, request: Request) -> Response:
        """A finished clip, or the range that was asked for; to be saved with `?download`."""
        item = store.get(item_id)
        if item.status != "completed" or item.video_storage_path is None:
            raise ItemMissing(f"task {item_id} has no clip: it is {item.status}")
        path = objects.path(item.video_storage_path)
        name = clip_name(shown_name(item.photo_filename, item.photo_storage_path), item.video_storage_path)
        return FileResponse(
            path,
            headers=KEPT,
            media_type=MEDIA_TYPES.get(path.suffix.lower(), "video/mp4"),
            filename=name,
            content_disposition_type="attachment" if "download" in request.query_params else "inline",
        )

    @routes.get("/page/static/{name}")
    def static(name: str, request: Request) -> Response:
        """A file that the page loads."""
        answer = renderer.static(name, request.query_params.get("v"))
        if answer is None:
            raise ObjectMissing(f"no file {name}")
        return answer

    def _card(request: Request, item_id: str) -> Response:
        wanted = Filter.of(request.query_params)
        return renderer.html("card_alone.html", words_for(request), card=views.card(store.get(item_id)), filter=wanted)

    def _done(request: Request, item_id: str) -> Response:
        return _card(request, item_id) if is_fragment(request) else _back(request, f"#task-{item_id}")

    routes.include_router(sign_in_routes(config, renderer))
    return routes


def _back(request: Request, fragment: str) -> Response:
    """Back from `page/tasks/ID/VERB` to the part of the list that the form was on."""
    return RedirectResponse(f"../../../{Filter.of(request.query_params).query}{fragment}", 303)


def _told_to_people(renderer: Renderer) -> type[APIRoute]:
    """Routes whose errors are pages, or plain text for the page's script, instead of the API's JSON."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """See APIRoute."""
            handle = super().get_route_handler()

            async def told(request: Request) -> Response:
                try:
                    return await handle(request)
                except I2VError as error:
                    status = next((status for kind, status in ERROR_STATUSES if isinstance(error, kind)), 503)
                    if is_fragment(request):
                        return Response(str(error), status, {"cache-control": "no-store"}, "text/plain")
                    # The page's own folder, as the browser sees it from this address.
                    home = "../" * (request.url.path.count("/") - 1) or "./"
                    return renderer.html("problem.html", words_for(request), status, error=error, status=status, home=home)

            return told

    return PageRoute
