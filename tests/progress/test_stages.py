"""Progress: snapshots that never go back and never promise too much."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.progress.stages import DELIVERY_STAGES, StageTracker, plan

STAGES = plan({"denoise": 3, "decode": 1})


def test_engine_stages_take_the_place_of_generate():
    """An engine's stages share what one lease sets aside for generating, in their own proportions."""
    assert list(STAGES) == ["download", "wait", "denoise", "decode", "upload", "report"]
    assert STAGES["denoise"] == pytest.approx(3 * STAGES["decode"])
    assert sum(STAGES.values()) == pytest.approx(sum(DELIVERY_STAGES.values()))


@given(st.lists(st.tuples(st.sampled_from([*STAGES, "unheard of"]), st.floats(-1, 300), st.floats(0, 200))))
def test_the_fraction_never_falls_and_never_reaches_one_early(updates):
    """In whatever order stages are reported, also unknown ones, backwards or past their total."""
    tracker = StageTracker(STAGES)
    fractions = [0.0]
    for stage, done, total in updates:
        tracker.update(stage, done, total)
        fractions.append(tracker.latest.fraction)
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 0.99
    tracker.finish()
    assert tracker.latest.fraction == 1.0


def test_the_sink_sees_every_snapshot_and_the_end():
    """A sink is told of each step and of the accepted end."""
    seen = []
    tracker = StageTracker(STAGES, seen.append)
    tracker.update("download", 1, 2)
    tracker.update("denoise", 1, 4)
    tracker.finish()
    assert [(each.stage, each.done, each.total) for each in seen] == [
        ("download", 1, 2), ("denoise", 1, 4), ("done", 1, 1)
    ]  # fmt: skip


def test_time_is_counted_by_stage():
    """The summary names the stages that were entered, in order, and not the end itself."""
    tracker = StageTracker(STAGES)
    for stage in ("download", "denoise", "upload"):
        tracker.update(stage)
    tracker.finish()
    seconds = tracker.stage_seconds()
    assert list(seconds) == ["download", "denoise", "upload"]
    assert all(value >= 0 for value in seconds.values())


SECONDS = {"download": 1, "wait": 300, "denoise": 60, "decode": 30, "upload": 8, "report": 1}


def test_weights_come_from_the_past_where_every_stage_has_one():
    """Seconds become shares of the whole; waiting for others has none, however long it took."""
    stages = plan({"denoise": 3, "decode": 1}, SECONDS)
    assert stages == {"download": 1, "wait": 0, "denoise": 60, "decode": 30, "upload": 8, "report": 1}
    assert sum(plan({"denoise": 3, "decode": 1}, {**SECONDS, "denoise": 1234}).values()) == pytest.approx(100)


@pytest.mark.parametrize(
    "medians", [None, {}, {**SECONDS, "decode": 0}, {name: s for name, s in SECONDS.items() if name != "upload"}]
)
def test_without_a_past_of_every_stage_weights_are_those_that_ship(medians):
    """One stage that nobody has timed would have no share at all."""
    assert plan({"denoise": 3, "decode": 1}, medians) == STAGES
