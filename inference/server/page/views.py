"""What the templates show: cards of tasks, groups of cards, a page of the list, and the strip of numbers above it."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from inference.errors import I2VError, ItemMissing
from inference.progress.events import percent
from inference.queues.item import CRASHED, LOST, Item, Status
from inference.server.live import Live
from inference.server.objects import ObjectStore
from inference.server.page.filter import STATUSES, Filter
from inference.server.page.names import shown_name
from inference.server.rows.store import Group, Overview, Store
from inference.server.workers import Workers, WorkerSeen, name_of

PAGE_SIZE = 48
"""Cards on one page: divisible by two, three and four columns."""

STALE_S = 60.0
"""A worker that was not heard of for this long is marked. One that works beats every two seconds, an idle one asks for
tasks every five, unless its settings say otherwise."""

MAX_WORKERS = 12
"""Workers that the strip names."""

Hint = Literal["crashed", "lost", "photo", "refused", "retry"]

# What our workers write in error messages (errors of media/photo*.py and engines/runway/wire.py), and which hint helps
# there. The first match counts.
HINTS: Sequence[tuple[re.Pattern[str], Hint]] = (
    (re.compile(r"moderation refused|cannot use the photo or the prompt|nothing usable of this photo"), "refused"),
    (re.compile(r"the photo (is|has|cannot|takes|crashes|shows)|not a JPEG, PNG, WebP or HEIC"), "photo"),
)


@dataclass(frozen=True, slots=True)
class Card:
    """A task as it is shown."""

    item: Item
    name: str  # of the photo
    age_s: float  # since the task was last put in line
    left_s: float | None
    clip_bytes: int | None  # None: there is no clip, or none in storage any more

    @property
    def status(self) -> Status:
        """The task's status."""
        return self.item.status

    @property
    def percent(self) -> int:
        """Whole percent; 100 for completed tasks alone."""
        if self.status == "completed":
            return 100
        return min(99, percent(self.item.progress.fraction)) if self.item.progress else 0

    @property
    def version(self) -> str:
        """Changes with everything that is shown but progress, which the page moves by itself."""
        item = self.item
        changed_at = "" if item.status == "processing" else f"{item.updated_at:.3f}"
        return f"{item.status}.{item.lease_seq}.{item.cancel_requested:d}.{changed_at}"

    @property
    def took_s(self) -> float | None:
        """From the last lease to the end."""
        item = self.item
        return None if item.started_at is None or item.ended_at is None else max(0.0, item.ended_at - item.started_at)

    @property
    def worker(self) -> str | None:
        """The worker, without what makes the name unique to one lease."""
        return None if self.item.worker_id is None else name_of(self.item.worker_id)

    @property
    def hint(self) -> Hint:
        """What to do about the error."""
        message = self.item.error_message or ""
        if message == CRASHED:
            return "crashed"
        if message == LOST:
            return "lost"
        return next((hint for said, hint in HINTS if said.search(message)), "retry")


@dataclass(frozen=True, slots=True)
class GroupHead:
    """What stands above the cards of a group."""

    group: Group
    left_s: float | None

    @property
    def total(self) -> int:
        """How many tasks it has."""
        return sum(self.group.counts.values())


@dataclass(slots=True)
class Section:
    """Cards that stand together: those of a group, or single ones that follow each other, without a head."""

    head: GroupHead | None
    cards: list[Card] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ListPage:
    """A page of the list."""

    sections: list[Section]
    last_id: str  # of its last task
    has_more: bool

    @property
    def is_empty(self) -> bool:
        """Whether it shows no task."""
        return not self.sections


@dataclass(frozen=True, slots=True)
class Summary:
    """The strip above the list."""

    overview: Overview
    left_s: float | None  # until all that is ongoing is done
    counts: Mapping[Status, int]  # of the filtered group, or else of all
    workers: Sequence[WorkerSeen]
    more_workers: int
    is_waited_for_workers: bool  # tasks wait, and no worker was heard of lately

    @property
    def total(self) -> int:
        """How many tasks there are."""
        return sum(self.counts.values())


class Views:
    """Reads what is shown. Blocking. Raises as Store and ObjectStore."""

    def __init__(self, store: Store, objects: ObjectStore, live: Live, workers: Workers) -> None:
        self._store, self._objects, self._live, self._workers = store, objects, live, workers

    def card_of(self, item_id: str) -> Card:
        """The card of a task as it is now."""
        return self.card(self._store.get(item_id))

    def card(self, item: Item) -> Card:
        """A card."""
        return Card(
            item=item,
            name=shown_name(item.photo_filename, item.photo_storage_path),
            age_s=max(0.0, time.time() - item.updated_at),
            left_s=self._live.left_s(item) if item.status == "processing" else None,
            clip_bytes=self._clip_bytes(item),
        )

    def heads(self, group_ids: Sequence[str]) -> list[GroupHead]:
        """The heads of groups; those that were deleted are left out."""
        return self._timed(self._groups(group_ids))

    def page(self, wanted: Filter) -> ListPage:
        """A page of the list, newest first."""
        items = self._store.list_items(
            status=wanted.status, group=wanted.group, before=wanted.before, limit=PAGE_SIZE + 1
        )
        shown = items[:PAGE_SIZE]
        return ListPage(
            sections=self._sections([self.card(item) for item in shown]),
            last_id=shown[-1].id if shown else "",
            has_more=len(items) > PAGE_SIZE,
        )

    def summary(self, wanted: Filter) -> Summary:
        """The strip."""
        overview = self._store.overview()
        counts = overview.counts
        if wanted.group is not None:
            try:
                counts = self._store.get_group(wanted.group).counts
            except ItemMissing:
                counts = {}
        seen = self._workers.seen()
        return Summary(
            overview=overview,
            left_s=self._live.queue_left_s() if _is_ongoing(overview) else None,
            counts={status: counts.get(status, 0) for status in STATUSES},
            workers=seen[:MAX_WORKERS],
            more_workers=max(0, len(seen) - MAX_WORKERS),
            is_waited_for_workers=bool(overview.counts.get("pending"))
            and not any(worker.heard_s_ago < STALE_S for worker in seen),
        )

    def _sections(self, cards: Sequence[Card]) -> list[Section]:
        by_group: dict[str, list[Card]] = {}
        for card in cards:
            by_group.setdefault(card.item.group_id, []).append(card)
        groups = self._groups(list(by_group))
        heads = {head.group.id: head for head in self._timed([group for group in groups if not _is_single(group)])}
        sections: list[Section] = []
        for group in groups:
            if group.id in heads:
                sections.append(Section(heads[group.id], by_group[group.id]))
            else:
                if not sections or sections[-1].head is not None:
                    sections.append(Section(None))
                sections[-1].cards += by_group[group.id]
        return sections

    def _groups(self, group_ids: Sequence[str]) -> list[Group]:
        found = []
        for group_id in group_ids:
            try:
                found.append(self._store.get_group(group_id))
            except ItemMissing:
                continue
        return found

    def _timed(self, groups: Sequence[Group]) -> list[GroupHead]:
        ongoing = any(group.status in ("pending", "processing") for group in groups)
        left_s = self._live.groups_left_s() if ongoing else {}
        return [GroupHead(group, left_s.get(group.id)) for group in groups]

    def _clip_bytes(self, item: Item) -> int | None:
        if item.status != "completed" or item.video_storage_path is None:
            return None
        try:
            return self._objects.path(item.video_storage_path).stat().st_size
        except (I2VError, OSError):
            return None


def _is_ongoing(overview: Overview) -> bool:
    return bool(overview.counts.get("pending") or overview.counts.get("processing"))


def _is_single(group: Group) -> bool:
    """Whether it is a photo that came alone, which needs no head."""
    return group.name is None and sum(group.counts.values()) == 1
