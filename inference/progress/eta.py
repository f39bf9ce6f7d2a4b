"""How long a task still takes: from how long its stages took before, and from how fast it goes now.

    history = StageHistory()                     one for all tasks; `to_json` and `from_json` keep it over a restart
    eta = TaskEta(history, "wan 5 s")            one for each try of a task
    eta.observe("denoise", 0.31, time.monotonic())
    eta.left_s(time.monotonic())                 None: not known
    eta.complete(time.monotonic())               it ended well, so it is part of the history now

A kind is whatever takes about as long: the same engine, the same seconds of video. Nothing has to know all stages in
advance, since a queue sees only where a worker is and how much of the whole is done.
"""

import heapq
import math
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field, TypeAdapter

from inference.task import Value

RUNS = 30
"""So many runs of a kind are remembered, and older ones forgotten."""

MIN_RUNS = 3
"""A median of fewer runs says too little: the first one loads weights, the second one may be odd."""

KINDS = 200
"""Kinds that are remembered. More than that is a mistake of whoever names them."""

SMOOTHING = 0.3
"""Weight of the newest value in a moving average: tqdm's default (tqdm.std.tqdm, parameter `smoothing`)."""

MIN_STEP = 1e-6
"""Of the whole: less is no progress, but the noise of adding up."""

SEEN_FRACTION = 0.05
"""Without history: so much of the whole has to be done in the present stage before its speed says anything."""

SEEN_S = 3.0
"""Without history: the present stage has to have gone on for so long."""

TRUSTED_FRACTION = 0.5
"""Once so much of a stage is done, its own speed counts alone, and its history no more."""

OVERTIME = 0.25
"""A stage that takes longer than it ever did may take longer still by this part of the time it has taken."""


class Ema:
    """A moving average without the bias of its first values: tqdm's (tqdm.std.EMA)."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._alpha = smoothing
        self._last = 0.0
        self._calls = 0

    def add(self, value: float) -> None:
        """Takes one more value."""
        self._last = self._alpha * value + (1 - self._alpha) * self._last
        self._calls += 1

    @property
    def value(self) -> float:
        """The average. 0 before the first value."""
        return self._last / (1 - (1 - self._alpha) ** self._calls) if self._calls else 0.0


class _Kind(Value):
    runs: Sequence[dict[str, Annotated[float, Field(ge=0)]]] = ()  # the last ones: stage → seconds, in order
    ends: Mapping[str, float] = Field(default_factory=dict)  # stage → how much of the whole is done when it ends


_written: TypeAdapter[dict[str, _Kind]] = TypeAdapter(dict[str, _Kind])


class StageHistory:
    """How long the stages of past runs took, by kind. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, _Kind] = {}  # the one that was added to last is at the end

    def add(self, kind: str, seconds: Mapping[str, float], ends: Mapping[str, float] | None = None) -> None:
        """Remembers one run that ended well: the seconds of each stage, in the order in which it went through them.

        `ends`: how much of the whole was done when each stage ended, 0..1.
        """
        with self._lock:
            known = self._kinds.pop(kind, _Kind())
            self._kinds[kind] = _Kind(
                runs=[*known.runs[1 - RUNS :], dict(seconds)], ends={**known.ends, **(ends or {})}
            )
            while len(self._kinds) > KINDS:
                del self._kinds[next(iter(self._kinds))]

    def stage_s(self, kind: str, stage: str) -> list[float]:
        """Seconds of a stage in the runs that had it. Empty while they are too few."""
        return [run[stage] for run in self._with(kind, stage)]

    def after_s(self, kind: str, stage: str) -> float | None:
        """Median of the seconds from the end of a stage to the end of the run, None while too few runs had it."""
        runs = self._with(kind, stage)
        return statistics.median(_after(run, stage) for run in runs) if runs else None

    def end_of(self, kind: str, stage: str) -> float | None:
        """How much of the whole was done at the end of a stage, in the last run that said so."""
        with self._lock:
            return self._kinds[kind].ends.get(stage) if kind in self._kinds else None

    def medians(self, kind: str) -> dict[str, float]:
        """Median seconds of each stage, in order. Empty while unknown."""
        runs = self._runs(kind)
        if len(runs) < MIN_RUNS:
            return {}
        return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in _order(runs)}

    def typical_s(self, kind: str) -> float | None:
        """Median seconds of a whole run, None while unknown."""
        runs = self._runs(kind)
        return statistics.median(sum(run.values()) for run in runs) if len(runs) >= MIN_RUNS else None

    def to_json(self) -> str:
        """All of it, for `from_json`."""
        with self._lock:
            return _written.dump_json(self._kinds).decode()

    @classmethod
    def from_json(cls, text: str) -> "StageHistory":
        """A history as `to_json` wrote it. Raises ValueError for anything else."""
        history = cls()
        for name, kind in _written.validate_json(text).items():
            for run in kind.runs:
                history.add(name, run, kind.ends)
        return history

    def _runs(self, kind: str) -> Sequence[dict[str, float]]:
        with self._lock:
            return self._kinds[kind].runs if kind in self._kinds else ()

    def _with(self, kind: str, stage: str) -> list[dict[str, float]]:
        """Runs that had the stage; none while they are too few."""
        runs = [run for run in self._runs(kind) if stage in run]
        return runs if len(runs) >= MIN_RUNS else []


class TaskEta:
    """One try of one task. Times are of any clock that never goes back, in seconds. Safe to use from any thread."""

    def __init__(self, history: StageHistory, kind: str) -> None:
        self._lock = threading.RLock()
        self._history = history
        self._kind = kind
        self._seconds: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._expected: Mapping[str, float] = {}
        self._stage: str | None = None
        self._entered: tuple[float, float] = (0.0, 0.0)  # when, and the fraction of the whole then
        self._moved_at = 0.0  # when the fraction was last seen to grow
        self._fraction = 0.0
        self._steps, self._steps_s = Ema(), Ema()  # by how much it grew each time, and after how long
        self._promised: tuple[float, float] | None = None  # what was left when the stage began, and when that was

    def expect(self, ends: Mapping[str, float]) -> None:
        """How much of the whole is done when each stage ends, from who weighs them; without, the last run says."""
        self._expected = ends

    def observe(self, stage: str, fraction: float, at_s: float) -> None:
        """Where the task is, and how much of the whole is done, 0..1."""
        with self._lock:
            step = min(fraction, 1.0) - self._fraction if math.isfinite(fraction) else 0.0
            if step < MIN_STEP:
                step = 0.0
            if stage != self._stage:
                self._enter(stage, self._fraction + step, at_s)
            elif step:
                self._steps.add(step)
                self._steps_s.add(max(0.0, at_s - self._moved_at))
                self._moved_at = at_s
            self._fraction += step

    def left_s(self, at_s: float) -> float | None:
        """Seconds until the task ends well, None where nothing is known that is better than a guess.

        That is also so once all the time that was expected is over: a task that is not done has some left.
        """
        with self._lock:
            return self._left_s(at_s) or None

    def _left_s(self, at_s: float) -> float | None:
        if self._stage is None:
            return None
        past_s = self._history.stage_s(self._kind, self._stage)
        after_s = self._history.after_s(self._kind, self._stage)
        if past_s and after_s is not None:
            stage_left_s = self._stage_left_s(at_s, past_s)
            end = self._end_of(self._stage)
            is_late = not stage_left_s and end is not None and self._fraction < end - MIN_STEP
            return None if is_late else stage_left_s + after_s
        entered_at, entered_fraction = self._entered
        if self._fraction - entered_fraction >= SEEN_FRACTION and at_s - entered_at >= SEEN_S:
            return self._at_this_speed_s(1.0, at_s)
        if self._promised is not None:
            promised_s, promised_at = self._promised
            return max(0.0, promised_s - (at_s - promised_at))
        return None

    def complete(self, at_s: float) -> None:
        """The task ended well: what its stages took is remembered."""
        with self._lock:
            if self._stage is not None:
                self._leave(self._stage, 1.0, at_s)
                self._history.add(self._kind, self._seconds, self._ends)
                self._stage = None

    def _enter(self, stage: str, fraction: float, at_s: float) -> None:
        if self._stage is not None:
            left_s = self.left_s(at_s)
            ahead = (1 - fraction) / (1 - self._fraction) if self._fraction < 1 else 0.0
            self._promised = None if left_s is None else (left_s * ahead, at_s)
            self._leave(self._stage, fraction, at_s)
        self._stage = stage
        self._seconds.setdefault(stage, 0.0)
        self._entered = (at_s, fraction)
        self._moved_at = at_s
        self._steps, self._steps_s = Ema(), Ema()

    def _leave(self, stage: str, fraction: float, at_s: float) -> None:
        self._seconds[stage] += max(0.0, at_s - self._entered[0])
        # Who is seldom told of a task may first hear of it again far beyond the end of a stage that moved step by step.
        step = self._steps.value
        self._ends[stage] = min(fraction, self._fraction + step) if step else fraction

    def _stage_left_s(self, at_s: float, past_s: list[float]) -> float:
        """Seconds to the end of the present stage, by what it took before and by its own speed."""
        elapsed_s = at_s - self._entered[0]
        begin, end = self._entered[1], self._end_of(self._stage or "")
        done = (self._fraction - begin) / (end - begin) if end is not None and end > begin else 0.0
        if not 0 < done <= 1 or end is None:
            longer_s = [each - elapsed_s for each in past_s if each > elapsed_s]
            return statistics.median(longer_s) if longer_s else OVERTIME * elapsed_s
        as_ever_s = max(0.0, statistics.median(past_s) * (1 - done) - (at_s - self._moved_at))
        trust = min(1.0, done / TRUSTED_FRACTION)
        return (1 - trust) * as_ever_s + trust * self._at_this_speed_s(end, at_s)

    def _end_of(self, stage: str) -> float | None:
        return self._expected.get(stage, self._history.end_of(self._kind, stage))

    def _at_this_speed_s(self, until: float, at_s: float) -> float:
        """Seconds until so much of the whole is done. Between two steps it counts down, but not past the next step."""
        step, step_s = self._steps.value, self._steps_s.value
        since_s = min(at_s - self._moved_at, step_s)
        return max(0.0, (until - self._fraction) / step * step_s - since_s)


def group_left_s(
    running_left_s: Iterable[float | None], waiting: int, typical_s: float | None, at_once: int = 1
) -> float | None:
    """Seconds until several tasks have ended: those that run, and those that wait for one of `at_once` places.

    `typical_s` is what a task takes. None where that is needed and unknown.
    """
    places: list[float] = []
    for left_s in running_left_s:
        known_s = typical_s if left_s is None else left_s
        if known_s is None:
            return None
        places.append(known_s)
    if waiting and typical_s is None:
        return None
    places += [0.0] * (max(at_once, 1) - len(places))
    heapq.heapify(places)
    for _ in range(waiting):
        heapq.heapreplace(places, places[0] + (typical_s or 0.0))
    return max(places)


def _after(run: Mapping[str, float], stage: str) -> float:
    """Seconds of the stages after this one."""
    stages = list(run)
    return sum(run[later] for later in stages[stages.index(stage) + 1 :])


def _order(runs: Sequence[dict[str, float]]) -> list[str]:
    """All stages of the runs: in the order of the longest run, others at the end."""
    longest = max(runs, key=len)
    return [*longest, *dict.fromkeys(stage for run in runs for stage in run if stage not in longest)]
