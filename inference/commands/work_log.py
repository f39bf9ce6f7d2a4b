"""What a worker did from its start to its end: lines on the way, and a summary."""

import time
from collections import Counter

import structlog

from inference import terminal
from inference.progress.events import percent
from inference.progress.stages import Progress, Sink
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)

QUIET_S = 30.0
"""A stage that goes on for longer than this says how far it is."""


class WorkLog:
    """Logs how far each lease is, and counts how they end."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._taken = 0
        self._ends: Counter[str] = Counter()
        self._cost_usd: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken so far."""
        return self._taken == 0

    def sink(self, lease: Lease) -> Sink:
        """Takes the snapshots of one more lease: a line for each stage, and in a long one now and then."""
        self._taken += 1
        item_id = lease.task.item_id
        stage, told_s = "", 0.0

        def sink(progress: Progress) -> None:
            nonlocal stage, told_s
            now_s = time.monotonic()
            if progress.stage != stage:
                stage, told_s = progress.stage, now_s
                log.info("stage", item_id=item_id, stage=stage, percent=percent(progress.fraction))
            elif now_s - told_s >= QUIET_S:
                told_s = now_s
                left = {} if progress.eta_s is None else {"left_s": round(progress.eta_s)}
                log.info("progress", item_id=item_id, stage=stage, percent=percent(progress.fraction), **left)

        return sink

    def ended(self, outcome: Outcome) -> None:
        """One lease has ended."""
        self._ends[outcome.status] += 1
        if outcome.video is not None and outcome.video.cost_usd is not None:
            self._cost_usd = (self._cost_usd or 0.0) + outcome.video.cost_usd

    def close(self) -> None:
        """Tells what was done."""
        done, failed, cancelled, lost = (self._ends[end] for end in ("completed", "failed", "cancelled", "lease_lost"))
        # Leases that a stop cut short have no outcome: they went back, too.
        handed_back = self._taken - done - failed - cancelled - lost
        uptime_s = time.monotonic() - self._began_s
        facts = {"cancelled": cancelled, "lost": lost, "cost_usd": self._cost_usd and round(self._cost_usd, 4)}
        log.info(
            "worker_stopped",
            done=done,
            failed=failed,
            handed_back=handed_back,
            uptime_s=round(uptime_s),
            **{name: value for name, value in facts.items() if value},
        )
        cost = "" if self._cost_usd is None else f", for {terminal.usd(self._cost_usd)}"
        others = "".join(f", {count} {name}" for name, count in (("cancelled", cancelled), ("lost", lost)) if count)
        terminal.tell(
            f"{done} done, {failed} failed, {handed_back} handed back{others}{cost}, in {terminal.span(uptime_s)}."
        )
