"""The route that answers how the whole queue is doing."""

from fastapi import APIRouter
from pydantic import BaseModel

from inference.queues.item import Status
from inference.server.answers import Answer, errors
from inference.server.live import Live
from inference.server.rows.store import Store
from inference.server.workers import Workers


class WorkerView(BaseModel):
    """A worker that was heard of in the last ten minutes."""

    name: str
    worker_type: str | None
    heard_s_ago: float
    item_ids: list[str]


class OverviewView(BaseModel):
    """How many tasks there are, how long they wait, what they cost today (UTC), and who works on them."""

    counts: dict[Status, int]
    oldest_wait_s: float | None
    completed_last_hour: int
    spent_today_usd: float
    unpriced_today: int
    left_s: float | None  # until all that is ongoing is completed, where that can be told
    workers: list[WorkerView]


def overview_routes(store: Store, live: Live, workers: Workers) -> APIRouter:
    """The one route."""
    routes = APIRouter(prefix="/api", tags=["tasks"])

    @routes.get("/overview", summary="See how the whole queue is doing", responses=errors(401))
    def overview() -> Answer[OverviewView]:
        """Tasks by status, the oldest wait, what was spent today (UTC), and the workers of the last ten minutes."""
        seen = [
            WorkerView(name=it.name, worker_type=it.worker_type, heard_s_ago=it.heard_s_ago, item_ids=list(it.item_ids))
            for it in workers.seen()
        ]
        return Answer(data=OverviewView(**store.overview().model_dump(), left_s=live.queue_left_s(), workers=seen))

    return routes
