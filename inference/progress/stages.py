"""How far a job is: stages and their weights, snapshots, and the tracker that makes them."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from inference.progress.eta import TaskEta
from inference.progress.events import MAX_PROGRESS
from inference.task import Value

DELIVERY_STAGES: Mapping[str, float] = {"download": 2, "wait": 0, "generate": 90, "upload": 6, "report": 2}
"""Stages of one lease and their share of the whole, in percent. An engine's own stages share `generate`."""


class Progress(Value):
    """A complete snapshot and not a difference, so that missing one loses nothing."""

    stage: str
    done: float  # of `total`, in units of the stage
    total: float
    fraction: float  # of the whole job, 0..1; below 1 until the queue accepted the report
    detail: Mapping[str, Any] = Field(default_factory=dict)  # what else the engine says, for queues that pass it on
    eta_s: float | None = None  # seconds that are left, where enough is known to say so


Sink = Callable[[Progress], None]


def both(one: Sink, other: Sink) -> Sink:
    """A sink that passes each snapshot on to both."""

    def sink(progress: Progress) -> None:
        one(progress)
        other(progress)

    return sink


def plan(engine_stages: Mapping[str, float], medians: Mapping[str, float] | None = None) -> dict[str, float]:
    """Stages of one lease with their weights in percent; the engine's own replace `generate` and share its weight.

    `medians`: how many seconds each stage took in the past. Where every stage has one, they are the weights. Stages
    without a share of the whole, such as waiting for others, have none then either.
    """
    scale = DELIVERY_STAGES["generate"] / sum(engine_stages.values())
    stages: dict[str, float] = {}
    for stage, weight in DELIVERY_STAGES.items():
        if stage == "generate":
            stages |= {name: own * scale for name, own in engine_stages.items()}
        else:
            stages[stage] = weight
    known_s = {stage: (medians or {}).get(stage, 0.0) for stage, weight in stages.items() if weight}
    if min(known_s.values()) <= 0:
        return stages
    return {stage: 100 * known_s.get(stage, 0.0) / sum(known_s.values()) for stage in stages}


class StageTracker:
    """Turns (stage, done, total) into snapshots whose fraction never falls and reaches 1 only through `finish`.

    A stage that is not among `stages` counts time but does not move the fraction. Safe to call from any thread; the
    sink is called in the caller's thread.
    """

    def __init__(self, stages: Mapping[str, float], sink: Sink | None = None, eta: TaskEta | None = None) -> None:
        """`eta`: tells each snapshot how much time is left, and learns from a job that ended well."""
        self._lock = threading.Lock()
        self._sink, self._eta = sink, eta
        whole = sum(stages.values())
        self._span: dict[str, tuple[float, float]] = {}  # stage → (fraction before it, its share)
        before = 0.0
        for stage, weight in stages.items():
            self._span[stage] = (before, weight / whole)
            before += weight / whole
        if eta is not None:
            eta.expect({stage: min(begin + share, MAX_PROGRESS) for stage, (begin, share) in self._span.items()})
        self._counted_at = time.monotonic()
        self._seconds: dict[str, float] = {}
        self.latest: Progress | None = None

    def update(self, stage: str, done: float = 0, total: float = 1, detail: Mapping[str, Any] | None = None) -> None:
        """Reports `done` of `total` for a stage; naming another stage ends the one before."""
        with self._lock:
            self._count_time()
            last = self.latest.fraction if self.latest else 0.0
            before, share = self._span.get(stage, (last, 0.0))
            inside = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
            fraction = max(last, min(before + share * inside, MAX_PROGRESS))
            left_s = None
            if self._eta is not None:
                self._eta.observe(stage, fraction, self._counted_at)
                left_s = self._eta.left_s(self._counted_at)
            self.latest = Progress(
                stage=stage, done=done, total=total, fraction=fraction, detail=dict(detail or {}), eta_s=left_s
            )
            snapshot = self.latest
        if self._sink:
            self._sink(snapshot)

    def finish(self) -> None:
        """The queue accepted the report: 100 %."""
        with self._lock:
            self._count_time()
            if self._eta is not None:
                self._eta.complete(self._counted_at)
            self.latest = Progress(stage="done", done=1, total=1, fraction=1.0)
            snapshot = self.latest
        if self._sink:
            self._sink(snapshot)

    def stage_seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent in each stage so far, in the order they were entered."""
        with self._lock:
            self._count_time()
            return {stage: round(seconds, 3) for stage, seconds in self._seconds.items() if stage != "done"}

    def _count_time(self) -> None:
        now = time.monotonic()
        if self.latest is not None:
            self._seconds[self.latest.stage] = self._seconds.get(self.latest.stage, 0.0) + now - self._counted_at
        self._counted_at = now
