"""Steps of workflows as fractions of the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.progress.steps import COMPLETE, TABLES, MultiStepProgressCalculator, ProgressMapper

STEPS = [(workflow, step) for workflow in TABLES for step in ProgressMapper.get_step_list(workflow)]


@pytest.mark.parametrize(
    "workflow, step, sub_progress, whole",
    [
        ("director", "start", 0.0, 0.0),
        ("director", "load_character", 0.0, 0.05),
        ("director", "parse_script", 0.7, 0.10),
        ("director", "generate_videos", 0.5, 0.35),  # the worked example
        ("director", "lipsync", 1.0, 0.75),
        ("director", "subtitles", 0.0, 0.75),
        ("director", "render", 0.0, 0.85),
        ("director", "complete", 0.0, 1.0),
        ("audio", "tts_generation", 0.5, 0.175),
        ("audio", "stt_verification", 1.0, 0.6),
        ("audio", "complete", 0.0, 1.0),
        ("writer", "generate_body", 0.5, 0.55),
        ("lipsync", "processing", 0.5, 0.55),
    ],
)
def test_a_step_is_a_range_of_the_whole(workflow, step, sub_progress, whole):
    """By the name of the workflow or by the method for it, on the class or on an instance, by place or by name."""
    assert ProgressMapper.get_progress(workflow, step, sub_progress) == pytest.approx(whole)
    for mapper in (ProgressMapper, ProgressMapper()):
        method = getattr(mapper, f"get_{workflow}_progress")
        assert method(step, sub_progress) == method(step=step, sub_progress=sub_progress) == pytest.approx(whole)


@pytest.mark.parametrize("workflow, steps", [("director", 7), ("audio", 7), ("writer", 7), ("lipsync", 5)])
def test_workflows_go_from_0_to_100_without_a_gap(workflow, steps):
    """Each step begins where the one before ended."""
    names = ProgressMapper.get_step_list(workflow)
    assert len(names) == steps + 1
    assert names[-1] == COMPLETE
    ranges = [ProgressMapper.get_step_range(workflow, name) for name in names]
    assert [begin for begin, _ in ranges] == [0.0, *(end for _, end in ranges[:-1])]
    assert ranges[-1] == (1.0, 1.0)


@given(st.sampled_from(STEPS), st.floats())
def test_no_number_leads_out_of_a_step(at, sub_progress):
    """Neither a negative one, nor one above 1, nor what is no number."""
    begin, end = ProgressMapper.get_step_range(*at)
    assert begin <= ProgressMapper.get_progress(*at, sub_progress) <= end


def test_tables_of_ones_own():
    """Beside ours, or in the place of one of ours."""
    mapper = ProgressMapper(tables={"shorts": {"draw": (0, 80), "join": (80, 100)}, "director": {"all": (0, 100)}})
    assert mapper.get_progress("shorts", "join", 0.5) == pytest.approx(0.9)
    assert mapper.get_progress("shorts", "complete") == 1
    assert mapper.get_director_progress("all", 0.5) == 0.5
    assert mapper.get_audio_progress("save_file") == 0.9
    assert ProgressMapper.get_director_progress("render") == 0.85


@pytest.mark.parametrize("table", [{"a": (0, 101)}, {"a": (-1, 5)}, {"a": (20, 10)}, {"a": (float("nan"), 10)}])
def test_a_table_that_cannot_be_is_refused(table):
    """By the name of its step."""
    with pytest.raises(ValueError, match=r"step 'a' of 'mine'.*0 <= begin <= end <= 100"):
        ProgressMapper({"mine": table})


def test_what_does_not_exist_is_answered_with_what_does():
    """A wrong step or workflow is a mistake in a program: it is told which there are."""
    with pytest.raises(ValueError, match=r"no step 'renderr'; there are: start, .*, render, complete"):
        ProgressMapper.get_director_progress("renderr")
    with pytest.raises(ValueError, match="no workflow 'films'; there are: director, audio, writer, lipsync"):
        ProgressMapper.get_progress("films", "start")
    with pytest.raises(ValueError, match="no step 'sound'; there are: audio, video"):
        MultiStepProgressCalculator({"audio": 1, "video": 2}).update("sound", 1)


def test_weighted_steps_add_up():
    """The whole is the weighted mean of what is done of each; weights may be percent or seconds as well."""
    for scale in (1, 100):
        steps = MultiStepProgressCalculator([("audio", 0.3 * scale), ("video", 0.6 * scale), ("subtitle", 0.1 * scale)])
        assert steps.update("audio", 1.0) == pytest.approx(0.3)
        steps.update("video", 0.5)
        assert steps.get_overall_progress() == pytest.approx(0.6)


@given(st.dictionaries(st.text(), st.floats(0, 1e9), min_size=1), st.lists(st.floats()))
def test_the_whole_is_1_when_all_is_done_and_never_beyond(weights, fractions):
    """In whatever order and with whatever weights."""
    try:
        steps = MultiStepProgressCalculator(weights)
    except ValueError:
        assert sum(weights.values()) <= 0
        return
    for step, fraction in zip(weights, fractions, strict=False):
        assert 0 <= steps.update(step, fraction) <= 1
    for step in weights:
        steps.update(step, 1)
    assert steps.get_overall_progress() == pytest.approx(1)


@pytest.mark.parametrize(
    "steps", [[], [("a", 0)], [("a", -1), ("b", 2)], [("a", float("nan"))], [("a", 1), ("a", 2)], [("a", float("inf"))]]
)
def test_weights_that_cannot_be_are_refused(steps):
    """No steps, no weight at all, less than nothing, no number, a name twice."""
    with pytest.raises(ValueError, match="write each name once"):
        MultiStepProgressCalculator(steps)
