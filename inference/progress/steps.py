"""From a step of a workflow to a fraction of the whole.

ProgressMapper.get_director_progress("generate_videos", 0.5)                      0.35
ProgressMapper({"shorts": {"draw": (0, 80), "join": (80, 100)}}).get_progress("shorts", "join", 0.5)     0.9

steps = MultiStepProgressCalculator([("audio", 0.3), ("video", 0.6), ("subtitle", 0.1)])
steps.update("audio", 1.0)
steps.get_overall_progress()                                                      0.3
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Table = Mapping[str, tuple[float, float]]
"""Steps of a workflow: from how many percent of the whole to how many."""

COMPLETE = "complete"
"""A step of every workflow, at 100 percent."""

DIRECTOR: Table = {
    "start": (0, 5),
    "load_character": (5, 10),
    "parse_script": (10, 10),
    "generate_videos": (10, 60),
    "lipsync": (60, 75),
    "subtitles": (75, 85),
    "render": (85, 100),
}

AUDIO: Table = {
    "start": (0, 5),
    "normalize_text": (5, 5),
    "tts_generation": (5, 30),
    "stt_verification": (30, 60),
    "similarity_check": (60, 70),
    "retry_loop": (70, 90),
    "save_file": (90, 100),
}

WRITER: Table = {
    "start": (0, 5),
    "load_persona": (5, 10),
    "load_strategy": (10, 20),
    "generate_hooks": (20, 40),
    "generate_body": (40, 70),
    "generate_cta": (70, 85),
    "optimize_platform": (85, 100),
}

LIPSYNC: Table = {
    "start": (0, 5),
    "upload_video": (5, 20),
    "upload_audio": (20, 30),
    "processing": (30, 80),
    "download": (80, 100),
}

TABLES: Mapping[str, Table] = {"director": DIRECTOR, "audio": AUDIO, "writer": WRITER, "lipsync": LIPSYNC}


class _OnTheClassToo(Generic[P, R]):
    """A method that can be called on the class as well, and then has an instance made without arguments."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: object, owner: type[Any]) -> Callable[P, R]:
        return functools.partial(self._method, owner() if instance is None else instance)


class ProgressMapper:
    """Tables of workflows. Every method can be called on the class, too, for the workflows that come with it.

    Methods raise ValueError for a workflow or a step that is in no table, naming those that are.
    """

    def __init__(self, tables: Mapping[str, Table] | None = None) -> None:
        """`tables`: workflows of your own, in percent; one of the same name takes the place of ours.

        Raises ValueError where a step leaves 0..100 or ends before it begins.
        """
        for workflow, table in (tables or {}).items():
            for step, (begin, end) in table.items():
                if not 0 <= begin <= end <= 100:
                    raise ValueError(
                        f"step {step!r} of {workflow!r} is ({begin}, {end}): write 0 <= begin <= end <= 100"
                    )
        self._tables = {**TABLES, **(tables or {})}

    @_OnTheClassToo
    def get_progress(self, workflow: str, step: str, sub_progress: float = 0.0) -> float:
        """The fraction of the whole, 0..1, where so much of the step is done, 0..1."""
        begin, end = self._percents(workflow, step)
        return (begin + (end - begin) * _inside(sub_progress)) / 100

    @_OnTheClassToo
    def get_step_list(self, workflow: str) -> list[str]:
        """The steps of a workflow, in order."""
        return list(dict.fromkeys([*self._table(workflow), COMPLETE]))

    @_OnTheClassToo
    def get_step_range(self, workflow: str, step: str) -> tuple[float, float]:
        """The fractions of the whole, 0..1, at which a step begins and ends."""
        begin, end = self._percents(workflow, step)
        return begin / 100, end / 100

    @_OnTheClassToo
    def get_director_progress(self, step: str, sub_progress: float = 0.0) -> float:
        """As `get_progress`, for videos from a script."""
        return self.get_progress("director", step, sub_progress)

    @_OnTheClassToo
    def get_audio_progress(self, step: str, sub_progress: float = 0.0) -> float:
        """As `get_progress`, for speech that is verified."""
        return self.get_progress("audio", step, sub_progress)

    @_OnTheClassToo
    def get_writer_progress(self, step: str, sub_progress: float = 0.0) -> float:
        """As `get_progress`, for scripts."""
        return self.get_progress("writer", step, sub_progress)

    @_OnTheClassToo
    def get_lipsync_progress(self, step: str, sub_progress: float = 0.0) -> float:
        """As `get_progress`, for lips that follow speech."""
        return self.get_progress("lipsync", step, sub_progress)

    def _table(self, workflow: str) -> Table:
        if workflow not in self._tables:
            raise ValueError(f"no workflow {workflow!r}; there are: {', '.join(self._tables)}")
        return self._tables[workflow]

    def _percents(self, workflow: str, step: str) -> tuple[float, float]:
        table = self._table(workflow)
        if step in table:
            return table[step]
        if step == COMPLETE:
            return 100, 100
        raise ValueError(f"{workflow!r} has no step {step!r}; there are: {', '.join(self.get_step_list(workflow))}")


class MultiStepProgressCalculator:
    """Weighted steps, each with a fraction of its own. The whole is 1 when all are done; they need no order."""

    def __init__(self, steps: Iterable[tuple[str, float]] | Mapping[str, float]) -> None:
        """Names and weights, which may have any sum. Raises ValueError where they have none, or a name comes twice."""
        pairs = list(steps.items() if isinstance(steps, Mapping) else steps)
        self._weights = dict(pairs)
        sound = all(math.isfinite(weight) and weight >= 0 for weight in self._weights.values())
        if not sound or sum(self._weights.values()) <= 0 or len(self._weights) < len(pairs):
            raise ValueError(f"steps are {pairs}: write each name once, with weights from 0 and one above")
        self._done = dict.fromkeys(self._weights, 0.0)

    def update(self, step: str, progress: float) -> float:
        """So much of a step is done, 0..1. Returns the fraction of the whole. Raises ValueError for an unknown step."""
        if step not in self._done:
            raise ValueError(f"no step {step!r}; there are: {', '.join(self._done)}")
        self._done[step] = _inside(progress)
        return self.get_overall_progress()

    def get_overall_progress(self) -> float:
        """The fraction of the whole, 0..1."""
        done = math.fsum(self._weights[step] * fraction for step, fraction in self._done.items())
        return min(1.0, done / math.fsum(self._weights.values()))


def _inside(fraction: float) -> float:
    """Within 0..1. What is no number has not begun."""
    return 0.0 if math.isnan(fraction) else min(max(fraction, 0.0), 1.0)
