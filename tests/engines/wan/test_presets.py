"""The table: frames, sizes and limits as properties, and what may not be in it."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engines.wan.presets import FRAME_STRIDE, MIN_DURATION_S, PRESETS
from inference.errors import InvalidRequest
from inference.media.photo import MAX_ASPECT_RATIO, fit
from inference.task import GenerationRequest

any_preset = st.sampled_from(list(PRESETS.values()))
FAST, QUALITY = PRESETS["a14b-fast"], PRESETS["a14b-quality"]


@given(preset=any_preset, share=st.floats(0, 1))
def test_frames_are_4k_plus_1_and_nearest(preset, share):
    """Whatever length is asked for: never off by more than half a latent frame, never beyond the limit."""
    longest_s = (preset.max_frames - 1) / preset.fps
    duration_s = MIN_DURATION_S + share * (longest_s - MIN_DURATION_S)
    frames = preset.frames(duration_s)
    assert frames % FRAME_STRIDE == 1
    assert abs((frames - 1) / preset.fps - duration_s) <= FRAME_STRIDE / 2 / preset.fps + 1e-9
    assert FRAME_STRIDE < frames <= preset.max_frames


@pytest.mark.parametrize(
    "fps, seconds, frames", [(24, 3, 73), (24, 5, 121), (24, 7, 169), (24, 10, 241), (16, 5, 81), (16, 10, 161)]
)
def test_what_queues_hand_out(fps, seconds, frames):
    """Lengths that apps offer become the frames that the model's authors would take."""
    for preset in PRESETS.values():
        if preset.fps == fps:
            assert preset.frames(seconds) == frames


@given(
    preset=any_preset,
    width=st.integers(64, 6000),
    ratio=st.floats(1 / MAX_ASPECT_RATIO, MAX_ASPECT_RATIO),
)
def test_sizes_fit_the_model(preset, width, ratio):
    """Any photo we accept has a size: multiples the transformer can cut up, within the area."""
    size = fit(width, max(16, round(width * ratio)), max_area_px=preset.max_area_px, multiple=preset.multiple_px)
    assert size[0] % preset.multiple_px == size[1] % preset.multiple_px == 0
    assert 0 < size[0] * size[1] <= preset.max_area_px


@pytest.mark.parametrize(
    "preset, field, value",
    [
        (FAST, "duration_s", 0.4),
        (FAST, "duration_s", 10.5),
        (FAST, "max_area_px", 1280 * 720 + 1),
        (FAST, "steps", 8),
        (FAST, "guidance", 3.5),
        (QUALITY, "duration_s", 30),
    ],
)
def test_what_a_preset_cannot_do_is_named(preset, field, value):
    """By its field and with the limit, before anything is loaded: a preset knows nothing of weights."""
    request = GenerationRequest(**{"duration_s": 5, field: value})
    with pytest.raises(InvalidRequest, match=rf"^{field} is {value}.*{preset.name}"):
        preset.refuse(request)


def test_what_a_preset_can_do_is_taken():
    """Quality presets take steps and guidance; a distilled one takes its own."""
    QUALITY.refuse(GenerationRequest(duration_s=5, steps=10, guidance=0, max_area_px=832 * 480))
    FAST.refuse(GenerationRequest(duration_s=5, steps=4, guidance=1))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_everything_is_pinned(preset):
    """A revision is a commit, or what it is built from is here; files are named, licences too."""
    for repository in preset.repositories:
        assert repository.built_here or re.fullmatch("[0-9a-f]{40}", repository.revision), repository
        assert repository.license
    assert preset.schedule.sigmas is None or len(preset.schedule.sigmas) == preset.schedule.steps
    assert (preset.boundary is None) == ("transformer_2" not in preset.components)
    assert {lora.expert for lora in preset.loras} <= set(preset.components)


def test_a_licence_against_commercial_use_is_never_the_default():
    """5b-turbo has to be asked for by name, and once more when it is fetched."""
    restricted = [preset.name for preset in PRESETS.values() if not all(r.commercial_use for r in preset.repositories)]
    assert restricted == ["5b-turbo"]


def test_progress_counts_forwards():
    """Guidance doubles the work of a step, and the bar knows."""
    assert QUALITY.stages["denoise"] == 80
    assert replace(QUALITY, guidance=(1.0, 1.0)).stages["denoise"] == 40
    assert list(QUALITY.stages) == ["encode", "denoise", "decode"]
