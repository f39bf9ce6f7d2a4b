"""What changes in the queue becomes events, for whoever follows a group of tasks or the whole queue."""

from typing import Any

from inference.progress.events import CompletionEvent, ErrorEvent, Event, ProgressEvent
from inference.progress.hub import ProgressHub
from inference.queues.item import Item
from inference.server.rows.removal import DeletedItem
from inference.server.rows.store import Store

QUEUE = "queue"
"""The project in which every task of this queue is told; a group's are told under the group's id as well."""

MAX_OF_GROUP = 200
"""The newest tasks of a group that a listener is told of at first."""

MAX_ONGOING = 200
"""As MAX_OF_GROUP: of the tasks of the whole queue that wait, and as many of those that are worked on."""

MAX_NEWEST = 50
"""As MAX_OF_GROUP: of all tasks of the queue."""


class Live:
    """Publishes what a store has changed. Safe to call from any thread; it waits for nobody."""

    def __init__(self, hub: ProgressHub | None) -> None:
        self._hub = hub

    def changed(self, item: Item) -> None:
        """Tells of an item as it is now."""
        eta_s = self.left_s(item)
        for project_id in (item.group_id, QUEUE):
            self._publish(event_of_item(item, project_id, eta_s))

    def deleted(self, item: DeletedItem) -> None:
        """Tells of an item that is no more."""
        details = {"error_code": "deleted", "group_id": item.group_id}
        for project_id in (item.group_id, QUEUE):
            self._publish(
                ErrorEvent(project_id=project_id, task_name=item.id, error="the task was deleted", details=details)
            )

    def left_s(self, item: Item) -> float | None:
        """Seconds until the item is completed, of one that is worked on; None where nobody can tell."""
        del item
        return None

    def snapshot(self, store: Store, project_id: str) -> list[Event]:
        """What a listener is told first: how the tasks of a project are now, the oldest first.

        Of a group, its newest tasks; of the whole queue, those that are ongoing and the newest of all.
        Raises QueueUnavailable.
        """
        if project_id == QUEUE:
            items = store.list_items(limit=MAX_NEWEST)
            items += store.list_items(status="processing", limit=MAX_ONGOING)
            items += store.list_items(status="pending", limit=MAX_ONGOING)
        else:
            items = store.list_items(group=project_id, limit=MAX_OF_GROUP)
        newest = {item.id: item for item in sorted(items, key=lambda item: (item.id, item.updated_at))}
        return [event_of_item(item, project_id, self.left_s(item)) for item in newest.values()]

    def _publish(self, event: Event) -> None:
        if self._hub is not None:
            self._hub.publish(event)


def event_of_item(item: Item, project_id: str, eta_s: float | None = None) -> Event:
    """How an item is, as an event of a project."""
    about = {"group_id": item.group_id, "photo_id": item.photo_id}
    match item.status:
        case "completed":
            result = {"item_id": item.id, "group_id": item.group_id} | _known(cost_usd=item.cost_usd)
            return CompletionEvent(project_id=project_id, task_name=item.id, result=result)
        case "failed":
            details = about | {"error_code": "failed"}
            error = item.error_message or "the task failed"
            return ErrorEvent(project_id=project_id, task_name=item.id, error=error, details=details)
        case "cancelled":
            details = about | {"error_code": "cancelled"}
            return ErrorEvent(project_id=project_id, task_name=item.id, error="the task was cancelled", details=details)
        case "pending":
            fraction, stage, lease = 0.0, "waiting", item.lease_seq + 1  # it waits for its next lease
        case "processing":
            fraction, stage, lease = 0.0, "starting", item.lease_seq
            if item.progress:
                fraction, stage = item.progress.fraction, item.progress.stage
    metadata = {"stage": stage, "status": item.status, "lease": lease} | about | _known(eta_s=eta_s)
    return ProgressEvent(
        project_id=project_id,
        task_name=item.id,
        progress=fraction,
        progress_percent=int(fraction * 100),
        status=item.status,
        message=stage,
        metadata=metadata,
    )


def _known(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
