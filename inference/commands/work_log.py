"""What a worker did from its start to its end: lines on the way, and a summary."""

import time
from collections import Counter

import structlog

from inference import logs, terminal
from inference.progress.stages import Sink
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)


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
        """Takes the snapshots of one more lease, and logs them."""
        self._taken += 1
        return logs.stages(lease.task.item_id)

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
