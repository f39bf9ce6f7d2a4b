"""Templates: where an operator's graph takes what a task brings, and that nothing else of it changes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inference.engines.comfyui.template import Template
from inference.errors import InvalidRequest, SettingsError, is_legible
from inference.task import GenerationRequest

EXAMPLE = Path(__file__).parents[2] / "cases" / "comfy" / "wan22_i2v_template.json"
PHOTO_SIZE = (4000, 3000)
UPLOADED = {"photo": "i2v-1-photo.png"}

PLAIN = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}, "_meta": {"title": "i2v:photo"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["9", 0]}, "_meta": {"title": "i2v:prompt"}},
    "9": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5.safetensors"}},
}
"""As little as a template may have."""


def request(**fields: Any) -> GenerationRequest:
    """What a task asks for."""
    return GenerationRequest(**{"prompt": "pan left", "duration_s": 5, **fields})


def with_node(title: str, **inputs: Any) -> dict[str, Any]:
    """PLAIN and one more node."""
    node = {"class_type": "SomeNode", "inputs": inputs, "_meta": {"title": title}}
    return {**PLAIN, "50": node}


def places(template: Template) -> dict[str, list[str]]:
    """Roles and places as a mapping would say them."""
    return {role: [str(place) for place in found] for role, found in template.places.items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is different in a filled graph, by place."""
    assert before.keys() == after.keys()
    found = {}
    for node_id, node in before.items():
        assert {**after[node_id], "inputs": None} == {**node, "inputs": None}
        assert list(after[node_id]["inputs"]) == list(node["inputs"])
        for name, value in node["inputs"].items():
            if after[node_id]["inputs"][name] != value:
                found[f"{node_id}.{name}"] = after[node_id]["inputs"][name]
    return found


def write(folder: Path, value: object, name: str = "workflow.json") -> Path:
    """A file of JSON, or of text."""
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


# --- filling


def test_the_example_is_filled_as_its_titles_say():
    """Wan2.2 as ComfyUI's own template has it: two samplers, of which one makes the noise."""
    template = Template.load(EXAMPLE)
    before = json.loads(EXAMPLE.read_text())
    filled = template.fill(request(duration_s=3, negative_prompt="fog"), UPLOADED, PHOTO_SIZE, seed=7)
    assert changed(before, filled) == {
        "50.image": "i2v-1-photo.png",
        "51.text": "pan left",
        "52.text": "fog",
        "53.width": 720,  # 4:3 in the area of 832x480, in multiples of 16
        "53.height": 544,
        "53.length": 49,  # 3 s at 16 frames a second are 48; 4k + 1
        "60.noise_seed": 7,
    }
    assert template.graph == before


def test_what_a_request_leaves_open_stays_as_the_operator_set_it():
    """No prompt, no negative prompt, and a length that is only the queue's default."""
    template = Template.load(EXAMPLE)
    filled = template.fill(request(prompt="", names_duration=False), UPLOADED, (832, 480), seed=1)
    assert changed(template.graph, filled) == {"50.image": "i2v-1-photo.png"}


@pytest.mark.parametrize(
    "seconds, fps, step, frames",
    [
        (5, 16, 4, 81),
        (0.5, 16, 4, 9),
        (0.5, 4, 4, 5),  # never a single frame
        (5.0625, 16, 4, 81),
        (5, 24, 4, 121),
        (60, 16, 4, 961),
        (5, 24, 8, 121),  # LTX makes 8k + 1
        (2, 12, 1, 24),
    ],
)
def test_frames_are_the_nearest_that_the_model_makes(seconds, fps, step, frames):
    """Which is said by a mapping where the graph does not."""
    graph = with_node("", length=81)
    template = Template(graph, {"frames": "50.length", "fps": fps, "frame_step": step})
    filled = template.fill(request(duration_s=seconds), UPLOADED, PHOTO_SIZE, seed=1)
    assert filled["50"]["inputs"]["length"] == frames


@pytest.mark.parametrize("seconds, written", [(5, "5"), (2.5, "2.5")])
def test_seconds_are_written_as_they_are(seconds, written):
    """A whole number without a fraction: some nodes take no other."""
    template = Template(with_node("i2v:seconds", duration=1))
    filled = template.fill(request(duration_s=seconds), UPLOADED, PHOTO_SIZE, seed=1)
    assert json.dumps(filled["50"]["inputs"]) == f'{{"duration": {written}}}'


@pytest.mark.parametrize(
    "photo, max_area_px, size",
    [
        ((1920, 1080), None, (848, 464)),
        ((1080, 1920), None, (464, 848)),
        ((1000, 1000), None, (624, 624)),
        ((1920, 1080), 128 * 128, (160, 96)),
        ((1920, 1080), 3840 * 2160, (848, 464)),  # never more than the template's own
    ],
)
def test_a_video_has_the_photos_shape_in_the_templates_area(photo, max_area_px, size):
    """In multiples of 16, and in the area that was asked for where that is less."""
    filled = Template.load(EXAMPLE).fill(request(max_area_px=max_area_px), UPLOADED, photo, seed=1)
    inputs = filled["53"]["inputs"]
    assert (inputs["width"], inputs["height"]) == size


def test_every_place_of_a_role_is_filled():
    """Two loaders of the same photo, two samplers with the same seed."""
    graph = {**with_node("i2v:photo i2v:seed", image="x", seed=1), "51": {**PLAIN["1"]}}
    filled = Template(graph).fill(request(), UPLOADED, PHOTO_SIZE, seed=5)
    assert changed(graph, filled) == {
        "1.image": UPLOADED["photo"],
        "2.text": "pan left",
        "50.image": UPLOADED["photo"],
        "50.seed": 5,
        "51.image": UPLOADED["photo"],
    }


def test_a_last_photo_goes_where_the_template_has_a_place_and_is_needed_there():
    """The operator's own picture at the end of everybody's video would be wrong."""
    template = Template(with_node("i2v:last_photo", image="end.png"))
    filled = template.fill(request(), {**UPLOADED, "last_photo": "end-1.png"}, PHOTO_SIZE, seed=1)
    assert filled["50"]["inputs"]["image"] == "end-1.png"
    for refusing in (
        lambda: template.refuse(request(), UPLOADED),
        lambda: template.fill(request(), UPLOADED, PHOTO_SIZE, seed=1),
    ):
        with pytest.raises(InvalidRequest, match=r"^last_photo: .* needs one, and the task has none"):
            refusing()


def test_files_without_a_place_are_ignored_and_that_is_told():
    """A last photo for a template that knows none."""
    with structlog.testing.capture_logs() as logs:
        filled = Template(PLAIN).fill(request(), {**UPLOADED, "last_photo": "x.png"}, PHOTO_SIZE, seed=1)
    assert "x.png" not in json.dumps(filled)
    assert [(entry["event"], entry["inputs"]) for entry in logs] == [("ignored", ["last_photo"])]


@pytest.mark.parametrize(
    "fields, told",
    [({"steps": 8}, "steps: "), ({"guidance": 3}, "guidance: "), ({"negative_prompt": "fog"}, "negative_prompt: ")],
)
def test_what_a_template_cannot_do_is_refused(fields, told):
    """Before anything is uploaded."""
    with pytest.raises(InvalidRequest, match=f"^{told}"):
        Template(PLAIN).refuse(request(**fields), UPLOADED)


# --- finding


@pytest.mark.parametrize(
    "title, inputs, found",
    [
        ("i2v:seed", {"seed": 1, "steps": 20, "cfg": 3.5}, {"seed": ["50.seed"]}),
        ("i2v:seed", {"noise_seed": 1}, {"seed": ["50.noise_seed"]}),
        ("I2V:Last-Photo", {"image": "x", "upload": "image"}, {"last_photo": ["50.image"]}),
        ("i2v:last_photo", {"picture": "x"}, {"last_photo": ["50.picture"]}),
        ("i2v:negative_prompt", {"value": "x"}, {"negative_prompt": ["50.value"]}),
        (
            "WanVideo TextEncode i2v:negative_prompt",
            {"positive_prompt": "a", "negative_prompt": "b"},
            {"negative_prompt": ["50.negative_prompt"]},
        ),
        ("i2v:frames", {"value": 81}, {"frames": ["50.value"]}),
        ("i2v:frames", {"length": 81, "width": 8}, {"frames": ["50.length"]}),
        (
            "i2v:frames,size",
            {"width": 832, "height": 480, "length": 81, "batch_size": 1},
            {"frames": ["50.length"], "width": ["50.width"], "height": ["50.height"]},
        ),
        ("i2v:frames=batch_size", {"batch_size": 9, "length": 1}, {"frames": ["50.batch_size"]}),
        ("the i2v:seconds=n of it", {"n": 5.5, "m": 1}, {"seconds": ["50.n"]}),
        ("i2v:width i2v:height=h", {"width": 832, "h": 480}, {"width": ["50.width"], "height": ["50.h"]}),
        ("wani2v:nothing", {"x": 1}, {}),
        (None, {"x": 1}, {}),
    ],
)
def test_titles_name_places(title, inputs, found):
    """By the role and what the node has, or by the input's own name."""
    template = Template(with_node(title, **inputs))
    assert not template.problems
    assert places(template) == {"photo": ["1.image"], "prompt": ["2.text"], **found}


@pytest.mark.parametrize(
    "title, inputs, problem",
    [
        ("i2v:foto", {"image": "x"}, 'node 50 "i2v:foto" (SomeNode): i2v:foto: is none of photo, last_photo, prompt'),
        ("i2v:", {}, "i2v:: is none of"),
        (
            "i2v:prompt",
            {"clip_l": "a", "t5xxl": "b"},
            "which of its inputs? Write i2v:prompt= and one of clip_l, t5xxl",
        ),
        ("i2v:seed", {"a": 1, "b": 2, "c": True}, "which of its inputs? Write i2v:seed= and one of a, b"),
        ("i2v:seed", {"sampler": "euler"}, "it has no number of its own"),
        ("i2v:prompt", {"text": ["2", 0], "x": "y"}, 'its text comes from node 2 "i2v:prompt" (CLIPTextEncode): give'),
        (
            "i2v:size",
            {"width": ["9", 0], "height": 480},
            "its width comes from node 9 (CLIPLoader): give that node the",
        ),
        ("i2v:size", {"width": 832}, "i2v:size: it has no input 'height', but width"),
        ("i2v:size=width", {"width": 832}, "stands for two inputs"),
        ("i2v:seconds=n", {"m": 1}, "it has no input 'n', but m"),
        ("i2v:seconds=n", {"n": "five"}, 'its n is "five", and no number'),
        ("i2v:seed=s", {"s": True}, "its s is true, and no number"),
        ("i2v:width", {"width": 832, "height": 480}, "there is a place for the width, and none for the height"),
        ("i2v:size", {"width": 0, "height": 480}, "50.width is 0: the width must be from 16 to 16384"),
        ("i2v:fps", {"fps": 0}, "50.fps is 0: the fps must be from 1 to 240"),
        ("i2v:frames,seed=length", {"length": 81}, "50.length cannot be both frames and seed"),
    ],
)
def test_a_title_that_names_no_place_is_told(title, inputs, problem):
    """With the node, and what to do."""
    template = Template(with_node(title, **inputs))
    assert len(template.problems) == 1, template.problems
    assert problem in template.problems[0]


def test_a_mapping_names_places_without_titles_and_replaces_those_of_titles(tmp_path):
    """Node ids of subgraphs have colons, and inputs may have dots."""
    graph = {
        "57:3": {"class_type": "LoadImage", "inputs": {"image": "x"}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}, "_meta": {"title": "i2v:prompt"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}},
        "50": {"class_type": "Resize", "inputs": {"resize.width": 832, "width": 832, "height": 480, "length": 81}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 1}},
        "57": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
    }
    mapping = {"photo": "57:3", "prompt": ["7.text"], "size": "50", "frames": "50.length", "seed": ["3.seed", "57"]}
    template = Template.load(write(tmp_path, graph), write(tmp_path, {**mapping, "fps": 24, "frame_step": 1}, "m.json"))
    assert places(template) == {
        "photo": ["57:3.image"],
        "prompt": ["7.text"],
        "frames": ["50.length"],
        "width": ["50.width"],
        "height": ["50.height"],
        "seed": ["3.seed", "57.noise_seed"],
    }
    assert (template.fps, template.frame_step, template.frames(2)) == (24, 1, 48)
    dotted = Template(graph, {**mapping, "size": [], "width": "50.resize.width", "height": "50.height"})
    assert places(dotted)["width"] == ["50.resize.width"]


@pytest.mark.parametrize(
    "mapping, problem",
    [
        ({"photo": "99.image"}, "mapping: photo: there is no node '99'"),
        ({"photo": 1}, 'mapping: photo: must be a place such as "52.image"'),
        ({"photo": ["1.image", None]}, 'mapping: photo: must be a place such as "52.image"'),
        ({"photo": "1.picture"}, "mapping: photo: it has no input 'picture', but image"),
        ({"fps": 0}, "mapping: fps: must be a number from 1 to 240"),
        ({"fps": True}, "mapping: fps: must be a number from 1 to 240"),
        ({"frame_step": 2.5}, "mapping: frame_step: must be a whole number from 1 to 64"),
        ({"frame_step": "1.image"}, "mapping: frame_step: is none of"),
    ],
)
def test_a_mapping_that_names_no_place_is_told(mapping, problem):
    """By the entry at fault."""
    template = Template(PLAIN, mapping)
    assert len(template.problems) == 1, template.problems
    assert template.problems[0].startswith(problem)


# --- files


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", r"workflow.json: is not JSON: Expecting property name enclosed in double quotes in line 1"),
        (" \n", r"workflow.json: is empty"),
        ("[]", r"is no workflow: export it in ComfyUI with Workflow → Export \(API\)"),
        ("{}", r"is no workflow"),
        (
            {"nodes": [], "links": [], "version": 0.4},
            r"is in the format of ComfyUI's editor: export it in ComfyUI with",
        ),
        ({"prompt": PLAIN}, r"'prompt' is no node with class_type and inputs: export"),
        ({"1": {"class_type": "X", "inputs": []}}, r"'1' is no node"),
        ('{"1": {"class_type": "X", "inputs": {"a": NaN}}}', r"is not JSON"),
        ('{"1": {"class_type": "X", "inputs": {"a": ' + "[" * 5000 + "]" * 5000 + "}}}", r"is not JSON|too deeply"),
        ('{"1": {"class_type": "X", "inputs": {"a": ' + "[" * 700 + "]" * 700 + "}}}", r"is nested too deeply"),
    ],
)
def test_a_file_that_is_no_graph_is_refused(tmp_path, content, told):
    """With the way to get one."""
    with pytest.raises(SettingsError, match=told) as caught:
        Template.load(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_no_mapping_are_named(tmp_path):
    """The one at fault."""
    with pytest.raises(SettingsError, match=r"none\.json: cannot be read: No such file"):
        Template.load(tmp_path / "none.json")
    workflow = write(tmp_path, PLAIN)
    for content, told in (("[1]", "is no mapping"), ({"foto": "1"}, "'foto' is none of photo, last_photo")):
        with pytest.raises(SettingsError, match=rf"m\.json: {told}"):
            Template.load(workflow, write(tmp_path, content, "m.json"))


def test_a_graph_without_places_says_how_to_name_them(tmp_path):
    """All that is missing at once, with the nodes that look like it."""
    graph = {node_id: {key: node[key] for key in ("class_type", "inputs")} for node_id, node in PLAIN.items()}
    with pytest.raises(SettingsError) as caught:
        Template.load(write(tmp_path, graph))
    photo, prompt = str(caught.value).splitlines()
    assert "no node is named for the photo: give one the title i2v:photo, such as node 1 (LoadImage)" in photo
    assert "the title i2v:prompt, such as node 2 (CLIPTextEncode), then export it in ComfyUI with" in prompt


def test_a_template_describes_itself():
    """What goes where, and what follows from what has no place."""
    said = list(Template.load(EXAMPLE).describe())
    assert ("photo", 'image of node 50 "i2v:photo" (LoadImage), now "example.png"', True) in said
    rate = 'as node 70 "Create Video i2v:fps" (CreateVideo) says'
    assert ("frames", f"4k + 1 at 16 frames a second, {rate}: 5 s are 81", False) in said
    assert [line.role for line in Template(PLAIN).describe()] == [
        "photo",
        "prompt",
        "frames",
        "size",
        "seed",
        "negative_prompt",
    ]


# --- properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(["image", "text", "seed", "length", "width", "height", "fps", "value", "x"])
VALUES = st.one_of(
    st.integers(-(10**30), 10**30), st.integers(16, 2000), st.floats(allow_nan=False), st.text(max_size=5), JSON,
    st.tuples(st.sampled_from("123"), st.integers(0, 2)).map(list),
)  # fmt: skip
TITLES = st.lists(
    st.sampled_from(
        ["photo", "last_photo", "prompt", "frames", "size", "seed", "fps", "seconds=value", "width=x", "?"]
    ),
    max_size=3,
).map(lambda roles: "node " + " ".join(f"i2v:{role}" for role in roles))
NODES = st.fixed_dictionaries(
    {"class_type": st.text(max_size=5), "inputs": st.dictionaries(NAMES, VALUES, max_size=6)},
    optional={"_meta": st.fixed_dictionaries({"title": TITLES}) | JSON},
)
GRAPHS = st.dictionaries(st.sampled_from("1234"), NODES, min_size=1)
MAPPINGS = st.dictionaries(
    st.sampled_from(["photo", "prompt", "frames", "size", "seed", "fps", "frame_step", "width"]),
    st.one_of(st.sampled_from(["1", "2.image", "3.text", "4.x", "9"]), st.integers(-1, 300), JSON),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({"1": {"class_type": "", "inputs": {"text": [[], 0]}, "_meta": {"title": "i2v:prompt"}}}, None)
@given(st.one_of(JSON, GRAPHS), st.none() | MAPPINGS | JSON)
def test_any_json_is_loaded_or_refused(tmp_path, graph, mapping):
    """By SettingsError, in legible lines that are not endless."""
    workflow = write(tmp_path, graph)
    said = None if mapping is None else write(tmp_path, mapping, "m.json")
    try:
        template = Template.load(workflow, said)
    except SettingsError as error:
        lines = str(error).split("\n")
    else:
        lines = [f"{role} {text}" for role, text, _ in template.describe()]
    assert lines
    assert all(line and all(map(is_legible, line)) and len(line) < 1000 for line in lines), lines


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    GRAPHS,
    st.builds(
        request,
        prompt=st.text(max_size=10).filter(lambda text: "\x00" not in text),
        duration_s=st.floats(0.5, 60),
        max_area_px=st.none() | st.integers(64 * 64, 3840 * 2160),
    ),
    st.tuples(st.integers(16, 5000), st.integers(16, 5000)).filter(lambda size: max(size) <= 4 * min(size)),
    st.integers(0, 2**63 - 1),
)
def test_filling_changes_the_places_and_nothing_else(graph, asked, photo_size, seed):
    """The template stays as it was, and can be filled again with the same result."""
    template = Template({**PLAIN, **{f"{node_id}x": node for node_id, node in graph.items()}})
    if template.problems:
        return  # `load` raises them, so that nobody fills a picture of a billion pixels a side
    before = copy.deepcopy(template.graph)
    uploaded = {**UPLOADED, "last_photo": "end.png"}
    try:
        filled = template.fill(asked, uploaded, photo_size, seed)
    except InvalidRequest:
        assert template.graph == before
        return
    assert template.graph == before
    wanted = {str(place) for found in template.places.values() for place in found}
    assert changed(before, filled).keys() <= wanted
    assert filled == template.fill(asked, uploaded, photo_size, seed)
