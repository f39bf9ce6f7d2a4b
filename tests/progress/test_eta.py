"""How long a task still takes: over recorded runs, how far off that was; and its rules one by one."""

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.progress.eta import MIN_RUNS, StageHistory, TaskEta, group_left_s

RECORDED = Path(__file__).parent / "recorded"
BEAT_S = 2.0
"""How often a queue hears of a task; it sees less than the worker does."""


def recorded() -> dict[str, list[list[tuple[float, str, float]]]]:
    """Real runs by kind: (seconds, stage, fraction of the whole) for each update."""
    return {
        kind: runs for file in sorted(RECORDED.glob("*.json")) for kind, runs in json.loads(file.read_text()).items()
    }


def as_beats(run):
    """What a queue is told of a run: where it was at each beat."""
    end = run[-1][0]
    beats, at = [], run[0][0]
    while at < end:
        beats.append((at, *[each for each in run if each[0] <= at][-1][1:]))
        at += BEAT_S
    return [*beats, run[-1]]


def misses(runs, *, knows: bool, at: float):
    """How far off what was said to be left was, when `at` of each run's time was over: 0.1 is 10 % too much.

    None where it was said to be unknown. `knows`: runs before it are history, as in a worker that has made them, and
    the first ones, which have none, are left out.
    """
    history, said = StageHistory(), []
    for number, run in enumerate(runs):
        eta = TaskEta(history if knows else StageHistory(), "kind")
        begin, end = run[0][0], run[-1][0]
        asked_s = begin + at * (end - begin)
        for seconds, stage, fraction in run:
            if seconds > asked_s:
                break
            eta.observe(stage, fraction, seconds)
        left_s = eta.left_s(asked_s)
        if not knows or number >= MIN_RUNS:
            said.append(None if left_s is None else left_s / (end - asked_s) - 1)
        for seconds, stage, fraction in run:
            if seconds > asked_s and stage != "done":
                eta.observe(stage, fraction, seconds)
        eta.complete(end)
    return said


def test_over_recorded_runs_the_time_left_is_about_right():
    """At a fifth of the time and at half of it, as a worker sees a run and as a queue does; figures are printed.

    With history it is always known. Without, it is unknown at first rather than wrong. The runs were recorded on a busy
    machine, and one of the three engines takes another time for each run on purpose.
    """
    figures = {}
    for kind, runs in recorded().items():
        assert len(runs) >= MIN_RUNS + 5
        for hears, heard in (("worker", runs), ("queue", [as_beats(run) for run in runs])):
            for knows in (False, True):
                for at in (0.2, 0.5):
                    said = misses(heard, knows=knows, at=at)
                    known = [abs(miss) for miss in said if miss is not None]
                    median = statistics.median(known) if known else None
                    figures[kind, hears, knows, at] = median
                    told = "unknown" if median is None else f"{median:.0%} off in the median"
                    print(f"{kind}, {hears}, {'with' if knows else 'no'} history, at {at:.0%}: {told},",
                          f"known {len(known)} of {len(said)}")  # fmt: skip
                    assert not knows or len(known) == len(said)
    assert all(median < 0.5 for (_, _, knows, _), median in figures.items() if knows)
    assert statistics.median(figures[key] for key in figures if key[2:] == (True, 0.2)) < 0.25
    assert statistics.median(figures[key] for key in figures if key[2:] == (True, 0.5)) < 0.35
    assert all(median is None or median < 1 for (_, _, knows, _), median in figures.items() if not knows)


def history_of(*runs: dict[str, float], ends: dict[str, float] | None = None) -> StageHistory:
    """A history of one kind, `film`."""
    history = StageHistory()
    for run in runs:
        history.add("film", run, ends)
    return history


THREE = (
    {"load": 10, "draw": 100, "save": 5},
    {"load": 12, "draw": 110, "save": 5},
    {"load": 50, "draw": 90, "save": 6},
)
ENDS = {"load": 0.0, "draw": 0.9, "save": 1.0}


def test_nothing_is_said_before_anything_is_known():
    """No observation; no history and no speed yet; a stage that nobody has seen and that does not move."""
    eta = TaskEta(StageHistory(), "film")
    assert eta.left_s(0) is None
    eta.observe("load", 0.0, 0)
    assert eta.left_s(60) is None
    eta.observe("draw", 0.02, 60)
    eta.observe("draw", 0.12, 61)
    assert eta.left_s(61) is None  # much, but for too short a time
    assert eta.left_s(64) is not None
    eta = TaskEta(StageHistory(), "film")
    eta.observe("draw", 0.02, 60)
    eta.observe("draw", 0.06, 70)
    assert eta.left_s(70) is None  # for long enough, but too little
    eta = TaskEta(history_of(*THREE[:2]), "film")
    eta.observe("load", 0.0, 0)
    assert eta.left_s(0) is None


def test_without_history_speed_tells():
    """From the present stage alone: what an earlier one took has nothing to do with it."""
    eta = TaskEta(StageHistory(), "film")
    eta.observe("load", 0.0, 0)
    eta.observe("load", 0.05, 1)
    eta.observe("load", 0.1, 2)
    eta.observe("draw", 0.1, 100)
    for step in range(1, 4):
        eta.observe("draw", 0.1 + step * 0.1, 100 + step * 10)
    assert eta.left_s(130) == pytest.approx(60)
    assert eta.left_s(135) == pytest.approx(55)
    assert eta.left_s(500) == pytest.approx(50)  # the step is late: no more than a step is counted down
    eta.observe("save", 0.9, 190)
    assert eta.left_s(190) == pytest.approx(50 / 6)  # a stage that does not move: as the one before would have it
    assert eta.left_s(195) == pytest.approx(50 / 6 - 5)
    assert eta.left_s(300) is None  # longer than was expected: how much longer, nobody knows


def test_a_task_that_is_late_is_not_called_nearly_done():
    """In the middle of a stage, once all the time it was expected to take is over."""
    history = StageHistory()
    for _ in range(MIN_RUNS):
        history.add("film", {"draw": 10.0, "save": 0.1}, {"draw": 0.9, "save": 1.0})
    eta = TaskEta(history, "film")
    eta.observe("draw", 0.0, 0)
    eta.observe("draw", 0.6, 6)
    assert 0 < eta.left_s(6) < 6
    assert eta.left_s(60) is None


def test_who_weighs_the_stages_anew_says_where_they_end():
    """The last run ended its first stage at 0.8 of the whole; by what is known since, this one ends it at 0.5."""
    history = StageHistory()
    for _ in range(MIN_RUNS):
        history.add("film", {"load": 100.0, "draw": 100.0}, {"load": 0.8, "draw": 1.0})
    eta = TaskEta(history, "film")
    eta.expect({"load": 0.5, "draw": 1.0})
    for second in range(0, 60, 10):
        eta.observe("load", 0.5 * second / 100, second)
    assert eta.left_s(50) == pytest.approx(150)


def test_speed_is_what_it_was_lately():
    """Tqdm's moving average: a first step that took ten times as long is forgotten after a few others."""
    eta = TaskEta(StageHistory(), "film")
    eta.observe("draw", 0.0, 0)
    for step in range(1, 11):
        eta.observe("draw", step * 0.05, 90 + step * 10)
    assert eta.left_s(190) == pytest.approx(100, rel=0.2)


def test_with_history_it_is_known_from_the_beginning():
    """Medians of the stages that are left; what is left of the present one is what longer runs of it needed."""
    eta = TaskEta(history_of(*THREE, ends=ENDS), "film")
    eta.observe("load", 0.0, 0)
    assert eta.left_s(0) == pytest.approx(12 + 105)
    assert eta.left_s(11) == pytest.approx(20 + 105)  # 1 s like one run of the past, or 39 s like the other
    assert eta.left_s(100) == pytest.approx(25 + 105)  # longer than ever
    eta.observe("draw", 0.0, 100)
    assert eta.left_s(100) == pytest.approx(105)
    eta.observe("save", 0.9, 200)
    assert eta.left_s(202) == pytest.approx(3)


def test_what_is_seen_of_a_stage_outweighs_its_past():
    """A machine twice as slow as those before: after half of the stage its own speed counts alone."""
    eta = TaskEta(history_of(*THREE, ends=ENDS), "film")
    eta.observe("draw", 0.0, 0)
    for step in range(1, 11):
        eta.observe("draw", step * 0.045, step * 10)
        if step == 5:
            assert eta.left_s(50) == pytest.approx((75 + 150) / 2 + 5)
    assert eta.left_s(100) == pytest.approx(100 + 5)


def test_a_stage_ends_where_it_ends_also_for_who_hears_of_it_now_and_then():
    """The next thing that a queue hears may be another stage, far along; the end is a step after what it heard last."""
    history = StageHistory()
    for _ in range(MIN_RUNS):
        eta = TaskEta(history, "film")
        for step in range(5):
            eta.observe("draw", step * 0.1, step * 10)
        eta.observe("save", 0.9, 55)
        eta.complete(60)
    assert history.end_of("film", "draw") == pytest.approx(0.5)
    assert history.end_of("film", "save") == 1
    assert history.end_of("film", "load") is None


def test_a_run_becomes_history():
    """Stages with their seconds, also one that was gone through twice; a try that failed leaves nothing."""
    history = StageHistory()
    for _ in range(MIN_RUNS):
        eta = TaskEta(history, "film")
        for stage, fraction, at_s in (("load", 0, 0), ("draw", 0.1, 5), ("load", 0.1, 15), ("draw", 0.1, 17)):
            eta.observe(stage, fraction, at_s)
        eta.complete(37)
        eta.complete(99)
    TaskEta(history, "film").observe("load", 0, 0)
    assert history.medians("film") == {"load": 7, "draw": 30}
    assert history.typical_s("film") == 37
    assert history.typical_s("another") is None
    assert history.medians("another") == {}


def test_a_stage_that_few_runs_have_weighs_nothing():
    """Loading weights in the first run of a container is no reason to expect it in every run."""
    history = history_of({"load": 60, "draw": 10}, *[{"draw": 10}] * 4)
    assert history.medians("film") == {"load": 0, "draw": 10}


def test_history_is_bounded_and_can_be_kept():
    """30 runs of a kind, 200 kinds; the JSON gives the same again, and anything else is refused."""
    history = history_of(*THREE, ends=ENDS)
    for number in range(40):
        history.add("long", {"draw": number})
    assert history.stage_s("long", "draw") == list(range(10, 40))
    again = StageHistory.from_json(history.to_json())
    assert again.to_json() == history.to_json()
    for number in range(200):
        history.add(f"kind {number}", {"draw": 1})
    assert history.medians("film") == {}
    for text in ("", "[]", '{"film": []}', '{"film": {"runs": [{"a": "x"}], "ends": {}}}', '{"film": {"runs": [[1]]}}',
                 '{"film": {"runs": [{"a": NaN}], "ends": {}}}', '{"film": {"runs": [], "ends": 3}}'):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            StageHistory.from_json(text)


OBSERVED = st.tuples(st.sampled_from(["load", "draw", "save", "new"]), st.floats(), st.floats(0, 1000))


@given(st.lists(OBSERVED), st.booleans())
def test_whatever_is_observed_what_is_left_is_a_time(observed, knows):
    """Not negative, not infinite, not NaN, whatever a worker says."""
    eta = TaskEta(history_of(*THREE, ends=ENDS) if knows else StageHistory(), "film")
    at_s = 0.0
    for stage, fraction, pause_s in observed:
        at_s += pause_s
        eta.observe(stage, fraction, at_s)
        for later_s in (0, 1000):
            left_s = eta.left_s(at_s + later_s)
            assert left_s is None or 0 <= left_s < 1e12
    eta.complete(at_s)


@pytest.mark.parametrize(
    "running, waiting, typical_s, at_once, left_s",
    [
        ([], 0, None, 1, 0),
        ([30.0], 0, None, 1, 30),
        ([30.0, 70.0], 0, None, 2, 70),
        ([30.0], 2, 100, 1, 230),
        ([30.0, 70.0], 3, 100, 2, 230),  # 30 → 130 → 230, and 70 → 170
        ([], 4, 100, 2, 200),
        ([30.0], 1, 100, 2, 100),  # one place is free
        ([None], 0, 100, 1, 100),
        ([None], 0, None, 1, None),
        ([30.0], 1, None, 1, None),
        ([10.0, 10.0, 10.0], 1, 5, 1, 15),  # more run than were thought to
        ([], 1, 100, 0, 100),
    ],
)
def test_a_group_is_done_when_its_last_task_is(running, waiting, typical_s, at_once, left_s):
    """Those that wait take the place that is free first."""
    assert group_left_s(running, waiting, typical_s, at_once) == left_s
