"""Pictures, clips, and all clips of a group, as the page shows them and people save them."""

from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response, StreamingResponse

from inference.errors import ItemMissing
from inference.server.objects import ObjectStore
from inference.server.page.bundle import completed_items, zipped
from inference.server.page.names import clip_name, safe, shown_name
from inference.server.page.thumbnails import Thumbnails
from inference.server.rows.store import Store

KEPT = {
    "cache-control": "private, max-age=86400, immutable",
    "cross-origin-resource-policy": "same-origin",  # else pages of other sites could show what a browser has kept
}
"""For pictures and clips: what an id stands for never changes."""

MEDIA_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}


def file_routes(store: Store, objects: ObjectStore, **options: object) -> APIRouter:
    """The routes under `/page` that answer files."""
    routes = APIRouter(prefix="/page", **options)  # type: ignore[arg-type]  # the class of routes
    thumbnails = Thumbnails(store, objects)

    @routes.get("/photos/{photo_id}.jpg")
    async def photo(photo_id: str) -> Response:
        return Response(await thumbnails.get(photo_id), media_type="image/jpeg", headers=KEPT)

    @routes.get("/groups/{group_id}/clips.zip")
    def clips(group_id: str) -> Response:
        name = safe(store.get_group(group_id).name or "") or "clips"
        disposition = f"attachment; filename*=utf-8''{quote(name)}.zip"
        return StreamingResponse(
            zipped(completed_items(store, group_id), objects),
            media_type="application/zip",
            headers={"content-disposition": disposition, "cache-control": "no-store"},
        )

    @routes.head("/clips/{item_id}.mp4")
    @routes.get("/clips/{item_id}.mp4")
    def clip(item_id: str, request: Request) -> Response:
        item = store.get(item_id)
        if item.status != "completed" or item.video_storage_path is None:
            raise ItemMissing(f"task {item_id} has no clip: it is {item.status}")
        path = objects.path(item.video_storage_path)
        return FileResponse(
            path,
            headers=KEPT,
            media_type=MEDIA_TYPES.get(path.suffix.lower(), "video/mp4"),
            filename=clip_name(shown_name(item.photo_filename, item.photo_storage_path), item.video_storage_path),
            content_disposition_type="attachment" if "download" in request.query_params else "inline",
        )

    return routes
