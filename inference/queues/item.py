"""One row of a queue that is ours, and the rules it lives by. MemoryStore and the SQL store both keep to them.

    pending ──lease──▶ processing ──complete──▶ completed
       ▲                │  │  │
       │◀───release─────┘  │  └────────fail────▶ failed ──retry──▶ pending
       │                   │
       └──── lease ran out ┘   (MAX_CRASHES or MAX_LOST times: failed; cancel_requested: cancelled)

    cancel: pending → cancelled at once; processing → cancel_requested, and cancelled as soon as the holder
    writes, releases, or its lease runs out. retry: failed or cancelled → pending, counters at zero.

Within one lease the progress never falls and stays below 1, and it is 1 once the item is completed.

Leasing takes the oldest item that is pending, or processing with a lease that ran out, with
retry_count < MAX_FAILURES and no cancellation requested; or a given item, where all this is true of it. Only the
holder (same worker_id, status processing) can renew, complete, fail or release. A repeated end by the same holder
changes nothing and is accepted.

A worker renews before it spends anything. So a lease that ran out unrenewed was on its way to a worker that never
came, or could not reach the queue, and says nothing about the item: it happens for hours where no GPU is to be had.
"""

from typing import Literal

from pydantic import Field

from inference.progress.events import MAX_PROGRESS
from inference.task import PHOTO, Input, Task, Value, duration_s

MAX_FAILURES = 3
"""An item that failed this often is handed out no more (Life-is-Short API: `retry_count < 3`)."""

MAX_CRASHES = 3
"""An item whose workers went silent this often is dead: it may be what kills them."""

MAX_LOST = 100
"""An item whose leases ran out this often in a row, and no worker was heard of, ends: whoever waits for it is told. At
a quarter of an hour each, as dispatchers lease, no sooner than after a day."""

RELEASE_S = 1
"""A renewal this short hands the item back (Life-is-Short API: `extend_seconds: 1`)."""

CRASHED = f"{MAX_CRASHES} workers went silent while they had this task; it was given up"
LOST = f"leased {MAX_LOST} times in a row, and no worker was heard of; can they reach this queue, with its key?"

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]


class ItemProgress(Value):
    """The last thing a holder said of its progress."""

    stage: str
    fraction: float

    def after(self, last: "ItemProgress | None") -> "ItemProgress":
        """What is kept of it where `last` was kept before."""
        fraction = min(self.fraction, MAX_PROGRESS)
        return ItemProgress(stage=self.stage, fraction=max(fraction, last.fraction) if last else fraction)


DONE = ItemProgress(stage="done", fraction=1.0)
"""The progress of a completed item, whatever its holder said last."""


class Item(Value):
    """A video item: one row. Times are seconds since the epoch on the store's clock."""

    id: str
    group_id: str
    photo_id: str
    photo_storage_path: str
    photo_filename: str | None = None  # as whoever uploaded it called it
    prompt: str = ""
    frame_num: int | None = None  # at 24 fps, 24·seconds + 1; None means 121
    inference_provider: str | None = None
    status: Status = "pending"
    worker_id: str | None = None  # the holder; kept after the end, so that a repeated report is recognised
    leased_until: float | None = None
    lease_seq: int = 0  # counts the leases of this item: a second fence beside worker_id
    retry_count: int = 0  # failures reported
    renewed: bool = False  # the holder was heard of under this lease
    crash_count: int = 0  # leases that ran out after a renewal
    lost_count: int = 0  # leases that ran out without one, since the last renewal
    cancel_requested: bool = False
    progress: ItemProgress | None = None
    video_storage_path: str | None = None
    error_message: str | None = None
    external_ids: dict[str, str] = Field(default_factory=dict)  # runway_task_id, veo_operation_id
    created_at: float
    updated_at: float
    started_at: float | None = None  # when it was leased last; a retry forgets it
    ended_at: float | None = None
    cost_usd: float | None = None  # of a completed item, where its worker knew what the video cost

    @property
    def duration_s(self) -> float:
        """Seconds of video wanted."""
        return duration_s(self.frame_num)

    def to_task(self) -> Task:
        """What a worker is handed."""
        return Task(
            item_id=self.id,
            group_id=self.group_id,
            photo_id=self.photo_id,
            prompt=self.prompt,
            inputs={PHOTO: Input(source=self.photo_storage_path)},
            duration_s=self.duration_s,
            names_duration=self.frame_num is not None,
            provider=self.inference_provider,
            extras={"lease_seq": self.lease_seq},
        )
