"""The preview engine: its contract, its moves, and that they are smooth."""

import unicodedata

import anyio
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inference.engines import preview
from inference.engines.base import Job
from inference.engines.preview import (
    PAN_LEFT,
    PAN_RIGHT,
    PUSH,
    TILT_DOWN,
    TILT_UP,
    ZOOM_IN,
    ZOOM_OUT,
    Move,
    PreviewEngine,
    View,
    choose_move,
    ease,
    render_move,
    window,
)
from inference.errors import InvalidRequest
from inference.media.photo import cover_box
from inference.task import MAX_DURATION_S, GenerationRequest
from tests.engines.contract import EngineContract, landscape

MOVES = {
    "push": PUSH,
    "zoom in": ZOOM_IN,
    "zoom out": ZOOM_OUT,
    "pan left": PAN_LEFT,
    "pan right": PAN_RIGHT,
    "tilt up": TILT_UP,
    "tilt down": TILT_DOWN,
}


class TestPreviewEngine(EngineContract):
    """The suite every engine passes."""

    def make(self):
        """Nothing to prepare."""
        return PreviewEngine()


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("", "push"),
        ("a slow push", "push"),
        ("waves roll in from the sea", "push"),
        ("zoom", "zoom in"),
        ("Zoom in on her face", "zoom in"),
        ("the camera dollies slowly forward", "zoom in"),
        ("dolly-in", "zoom in"),
        ("ZOOMING SLOWLY OUT", "zoom out"),
        ("slow zoom-out", "zoom out"),
        ("dolly back from the house", "zoom out"),
        ("camera pulls away", "zoom out"),
        ("pull back slowly", "zoom out"),
        ("camera pans left", "pan left"),
        ("pan slowly to the left, then zoom in", "pan left"),
        ("the camera moves to the right", "pan right"),
        ("pan from left to right", "pan right"),
        ("pan from the right to the left", "pan left"),
        ("panning over the hills", "pan right"),
        ("tilt up", "tilt up"),
        ("pan up to the sky", "tilt up"),
        ("the camera tilts down slowly", "tilt down"),
        ("얼굴을 확대", "zoom in"),
        ("천천히 줌인", "zoom in"),
        ("카메라가 다가가며", "zoom in"),
        ("줌 아웃", "zoom out"),
        ("화면을 축소하며", "zoom out"),
        ("카메라가 천천히 멀어지는", "zoom out"),
        ("왼쪽으로 이동", "pan left"),
        ("오른쪽으로 천천히 패닝", "pan right"),
        ("왼쪽에서 오른쪽으로", "pan right"),
        ("카메라를 위로", "tilt up"),
        ("틸트 다운", "tilt down"),
        ("아래로 틸트", "tilt down"),
    ],
)
def test_the_prompt_chooses_the_move(prompt, name):
    """English and Korean, in any case; the phrase that comes first wins."""
    assert choose_move(prompt) == MOVES[name]


@pytest.mark.parametrize(
    "prompt",
    [
        "a panda eats bamboo on the left",
        "my company moves up",
        "a frying pan on the stove",
        "the boy pushes a cart down the road",
        "she pulled out a chair",
        "turn left at the corner",
        "the kitchen is spanning right across",
        "왼쪽에 서 있는 남자",
        "서로를 위로하는 가족",
    ],
)
def test_words_that_only_look_like_moves_are_none(prompt):
    """Parts of other words, places and people's own movements leave the gentle push."""
    assert choose_move(prompt) == PUSH


def test_korean_is_read_as_macos_writes_it():
    """Decomposed jamo are the same words."""
    assert choose_move(unicodedata.normalize("NFD", "왼쪽으로 이동")) == PAN_LEFT


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_prompt_chooses_some_move(prompt):
    """No text breaks the choice."""
    assert choose_move(prompt) in MOVES.values()


def test_easing_rests_at_both_ends():
    """From 0 to 1, never back, symmetric, and neither velocity nor acceleration at the ends."""
    values = np.array([ease(t) for t in np.linspace(0, 1, 1001)])
    assert (values[0], values[-1]) == (0, 1)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values + values[::-1], 1, atol=1e-12)
    assert values[1] < 1e-7


views = st.builds(View, zoom=st.floats(1, 4), x=st.floats(-1, 1), y=st.floats(-1, 1))
sides = st.integers(16, 5000)


@settings(deadline=None)
@given(st.builds(Move, views, views), st.tuples(sides, sides), st.tuples(sides, sides), st.floats(0, 1))
def test_no_view_leaves_the_photo(move, photo, size, progress):
    """Any move, photo, output and moment: the window lies in the photo and keeps the output's shape."""
    frame = cover_box(photo, size)
    left, top, right, bottom = window(move.at(progress), frame)
    assert 0 <= left < right <= photo[0]
    assert 0 <= top < bottom <= photo[1]
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=1e-6)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("photo", [(331, 187), (90, 160), (64, 64)])
def test_no_frame_shows_anything_but_the_photo(name, photo):
    """A white photo gives white frames, edge to edge, larger or smaller than the output: no black bars."""
    white = Image.new("RGB", photo, (255, 255, 255))
    for frame in render_move(white, MOVES[name], (96, 64), 9):
        assert frame.shape == (64, 96, 3)
        assert frame.min() == 255


@pytest.mark.parametrize("name", MOVES)
def test_motion_is_smooth_to_a_tenth_of_a_pixel(name):
    """A blob's measured centre follows the eased ideal in every frame, without a step back: nothing is rounded.

    The pan and the push are slow at their ends, a few hundredths of a pixel a frame; windows snapped to whole pixels
    would be half a pixel off.
    """
    move, size, frames = MOVES[name], (320, 192), 61
    photo = (480, 288)
    at = np.array([0.53, 0.46]) * photo
    picture = _blob(photo, at, sigma=6)
    frame = cover_box(photo, size)
    measured, ideal = [], []
    for index, pixels in enumerate(render_move(picture, move, size, frames)):
        left, top, right, bottom = window(move.at(index / (frames - 1)), frame)
        ideal.append([(at[0] - left) * size[0] / (right - left), (at[1] - top) * size[1] / (bottom - top)])
        measured.append(_centre(pixels))
    measured, ideal = np.array(measured), np.array(ideal)
    assert np.abs(measured - ideal).max() < 0.1
    for axis in (0, 1):
        travelled = ideal[-1, axis] - ideal[0, axis]
        steps = np.diff(measured[:, axis]) * np.sign(travelled)
        assert (steps > -0.02).all()  # of a pixel: what eight bits a channel leave of a centre of mass
        assert abs(measured[-1, axis] - measured[0, axis] - travelled) < 0.1


def _blob(size: tuple[int, int], at: np.ndarray, sigma: float) -> Image.Image:
    x, y = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    bell = np.exp(-((x - at[0]) ** 2) / (2 * sigma**2)) * np.exp(-((y[:, None] - at[1]) ** 2) / (2 * sigma**2))
    return Image.fromarray((bell * 255 + 0.5).astype(np.uint8)).convert("RGB")


def _centre(pixels: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) in pixels."""
    mass = pixels[..., 0].astype(float)
    y, x = np.mgrid[: mass.shape[0], : mass.shape[1]] + 0.5
    return np.array([(mass * x).sum(), (mass * y).sum()]) / mass.sum()


def test_zoom_has_a_constant_perceived_rate():
    """Half way through the move the zoom is the geometric mean of its ends, not the arithmetic one."""
    assert ZOOM_IN.at(0.5).zoom == pytest.approx(1.35**0.5)
    assert ZOOM_OUT.at(0.5).zoom == pytest.approx(1.35**0.5)


@pytest.mark.parametrize("name, dark_side", [("pan left", 0), ("pan right", -1), ("tilt up", 0), ("tilt down", -1)])
def test_moves_go_where_their_name_says(name, dark_side):
    """A move to the left ends on the photo's left: at the end the dark half fills more than at the start."""
    ramp = np.full((120, 160, 3), 255, np.uint8)
    axis = 1 if "pan" in name else 0
    middle = ramp.shape[axis] // 2
    half = [slice(None), slice(None)]
    half[axis] = slice(0, middle) if dark_side == 0 else slice(middle, None)
    ramp[tuple(half)] = 0
    first, *_, last = (frame.mean() for frame in render_move(Image.fromarray(ramp), MOVES[name], (96, 64), 5))
    assert last < first - 10


@pytest.mark.anyio
@pytest.mark.parametrize("duration_s, frames", [(5.0, 121), (0.5, 13), (2.02, 49), (MAX_DURATION_S, 1441)])
async def test_frames_are_counted_as_queues_count_them(tmp_path, duration_s, frames):
    """`frame_num` 121 stands for five seconds: one frame more than 24 a second."""
    video = await _generate(tmp_path, duration_s=duration_s, max_area_px=64 * 64)
    assert (video.frames, video.fps) == (frames, 24)


@pytest.mark.anyio
async def test_lengths_outside_its_range_are_refused(tmp_path):
    """By the name of the field, with the range; what is too long for it no task can ask for."""
    with pytest.raises(InvalidRequest, match=r"duration_s is .* 0\.5 to 60 s"):
        await _generate(tmp_path, duration_s=0.49)


@pytest.mark.anyio
async def test_framing_is_wan_5bs_by_default(tmp_path):
    """16:9 gives 1280x704."""
    video = await _generate(tmp_path, duration_s=0.5)
    assert (video.width, video.height) == (1280, 704)


@pytest.mark.anyio
async def test_the_same_request_gives_the_same_file(tmp_path):
    """Whatever the seed, the steps and the guidance: it uses none of them."""
    one = await _generate(tmp_path, duration_s=1, max_area_px=64 * 64, seed=1)
    first = one.path.read_bytes()
    two = await _generate(
        tmp_path, duration_s=1, max_area_px=64 * 64, seed=2, steps=4, guidance=1.5, negative_prompt="x"
    )
    assert first == two.path.read_bytes()


@pytest.mark.anyio
async def test_the_file_says_that_it_is_a_preview(tmp_path):
    """In its title and comment, for whoever finds it later."""
    video = await _generate(tmp_path, duration_s=0.5, max_area_px=64 * 64)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video.path), "-f", "ffmetadata", "-"]
    said = (await anyio.run_process(command)).stdout.decode()
    assert "title=Preview" in said
    assert "comment=preview: camera move over a still photo, not a generation" in said


def test_preview_frames_stay_as_wan_frames_them():
    """The two numbers that stand for Wan2.2 5B."""
    assert (preview.MAX_AREA_PX, preview.MULTIPLE_PX) == (1280 * 704, 32)


async def _generate(tmp_path, **request):
    photo = await anyio.to_thread.run_sync(landscape, tmp_path / "photo.jpg")
    return await PreviewEngine().generate(GenerationRequest(**request), {"photo": photo}, tmp_path, Job())
