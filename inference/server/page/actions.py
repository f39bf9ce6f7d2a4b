"""What the buttons of a card do, for the page's script and for browsers without one."""

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from inference.server.config import ServerConfig
from inference.server.objects import ObjectStore
from inference.server.page.asking import is_fragment, words_for
from inference.server.page.filter import Filter
from inference.server.page.rendering import Renderer
from inference.server.page.views import Views
from inference.server.rows.store import Store
from inference.server.tidy import discard


def action_routes(
    config: ServerConfig, store: Store, objects: ObjectStore, views: Views, renderer: Renderer, **options: object
) -> APIRouter:
    """Cancel, retry, delete. They answer the card as it is then, or lead back to the list."""
    routes = APIRouter(prefix="/page/tasks/{item_id}", **options)  # type: ignore[arg-type]  # the class of routes

    def done(request: Request, item_id: str) -> Response:
        wanted = Filter.of(request.query_params)
        if not is_fragment(request):
            return _back(wanted, f"#task-{item_id}")
        return renderer.html("card.html", words_for(request), card=views.card_of(item_id), filter=wanted)

    @routes.post("/cancel")
    def cancel(item_id: str, request: Request) -> Response:
        store.cancel(item_id)
        return done(request, item_id)

    @routes.post("/retry")
    def retry(item_id: str, request: Request) -> Response:
        store.retry(item_id)
        return done(request, item_id)

    @routes.post("/delete")
    def delete(item_id: str, request: Request) -> Response:
        discard(store.removal.delete(item_id), store, objects, config)
        return Response(status_code=204) if is_fragment(request) else _back(Filter.of(request.query_params), "")

    return routes


def _back(wanted: Filter, anchor: str) -> Response:
    """From `page/tasks/ID/VERB` back to the part of the list that the form was on."""
    return RedirectResponse(f"../../../{wanted.query}{anchor}", 303)
