"""Parts of the ComfyUI engine without a server: graphs, progress, outputs, and whose fault an error is."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engines.comfyui.graph import checked, named, rename, save_under
from inference.engines.comfyui.outputs import chosen, listed
from inference.engines.comfyui.progress import RunProgress
from inference.engines.comfyui.refusals import OutOfMemory, failed, refused
from inference.errors import EngineFailed, I2VError, InvalidRequest, MachineFault, PartsMissing, SettingsError
from tests.engines.comfyui.graphs import wan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NODES = [str(number) for number in range(1, 10)]

# Messages as servers send them, with nodes of the graph and others, in any order and as often as may be.
STATES = st.fixed_dictionaries(
    {"state": st.sampled_from(["running", "finished", "error", "?"])},
    optional={"value": JSON | st.floats(), "max": JSON | st.floats(), "display_node_id": JSON},
)
NODE = st.sampled_from([*NODES, "57:3", None])
MESSAGES = st.one_of(
    st.tuples(st.just("progress_state"), st.fixed_dictionaries({"nodes": st.dictionaries(NODE, STATES | JSON)})),
    st.tuples(st.just("execution_cached"), st.fixed_dictionaries({"nodes": st.lists(NODE)})),
    st.tuples(st.just("executing"), st.fixed_dictionaries({"node": NODE})),
    st.tuples(st.just("executed"), st.fixed_dictionaries({"node": NODE})),
    st.tuples(st.just("progress"), st.fixed_dictionaries({"node": NODE, "value": JSON, "max": JSON})),
    st.tuples(st.text(max_size=12), st.dictionaries(st.text(max_size=6), JSON, max_size=3)),
)
WEIGHTS = st.dictionaries(st.sampled_from([*NODES, "99"]), st.floats(-1e3, 1e9, allow_nan=False), max_size=5)


def refusal_of(part, *given_) -> str | None:
    """What a part says where it refuses; None where it takes what it is given."""
    try:
        part(*given_)
    except InvalidRequest as error:
        return str(error)
    return None


@given(weights=WEIGHTS, messages=st.lists(MESSAGES, max_size=12))
def test_progress_never_falls(weights, messages):
    """Whatever is heard in whatever order: between nothing and all of it, and the details fit."""
    progress = RunProgress(wan(), weights)
    before = progress.done
    for kind, data in messages:
        progress.hear(kind, data)
        assert before <= progress.done <= progress.total
        detail = progress.detail
        assert 0 <= detail["completed_nodes"] <= detail["total_nodes"] == 9
        assert 0 <= detail["current_node_progress"] <= 100
        before = progress.done
    progress.finish()
    assert progress.done == pytest.approx(progress.total)
    assert progress.total > 0


def test_progress_of_a_server_without_snapshots():
    """Before 2025-06: `executing` says which node starts, which ends the one before, and `progress` how far it is."""
    progress = RunProgress(wan(), {})
    for kind, data in [
        ("execution_cached", {"nodes": ["1", "2", "3"]}),
        ("executing", {"node": "6"}),
        ("progress", {"node": "6", "value": 1, "max": 2}),
    ]:
        assert progress.hear(kind, data)
    assert progress.done == 3.5
    assert progress.detail["current_node_progress"] == 50
    progress.hear("executing", {"node": "7"})
    assert progress.done == 4
    assert progress.detail["current_node"] == "7"


def test_a_node_that_unfolds_is_shown_as_the_one_in_the_graph():
    """Nodes inside have ids of their own, which nobody who looks at the graph knows."""
    progress = RunProgress(wan(), {})
    inside = {"state": "running", "value": 1, "max": 2, "display_node_id": "6"}
    progress.hear("progress_state", {"nodes": {"6:1": inside}})
    assert progress.detail["current_node"] == "6"


@given(workflow=st.dictionaries(st.text(max_size=6), JSON, max_size=4))
def test_any_json_is_a_graph_or_refused_in_one_line(workflow):
    """Nothing foreign is raised, whatever a task brings."""
    said = refusal_of(checked, workflow)
    assert said is None or (said.startswith("workflow: ") and "\n" not in said)


@given(
    names=st.dictionaries(st.text(min_size=1, max_size=6), st.text(min_size=1, max_size=6), max_size=4),
    values=st.dictionaries(st.text(max_size=6), JSON, max_size=4),
)
def test_only_names_are_replaced(names, values):
    """Every other value stays, and so do links and everything beside the inputs."""
    graph = {
        "a": {"class_type": "x", "inputs": {**values, "link": ["a", 0]}, "_meta": {"title": next(iter(names), "")}}
    }
    before = copy.deepcopy(graph)
    found = rename(graph, names)
    assert found <= set(names)
    assert graph["a"]["inputs"]["link"] == ["a", 0]
    assert graph["a"]["_meta"] == before["a"]["_meta"]
    if not found:
        assert json.dumps(graph) == json.dumps(before)


def test_names_inside_lists_and_with_a_mark():
    """Some nodes take several files; a name may say that it is in the input folder."""
    graph = {"1": {"class_type": "Many", "inputs": {"files": ["a.png", "b.png", "c.png"], "one": "a.png [input]"}}}
    assert rename(graph, {"a.png": "A", "b.png": "B", "d.png": "D"}) == {"a.png", "b.png"}
    assert graph["1"]["inputs"] == {"files": ["A", "B", "c.png"], "one": "A"}


def test_prefixes():
    """Folders in a prefix stay below ours, whatever they are; one that another node makes is left alone."""
    prefixes = ["video/t", "/t", "../../t", "a\\..\\t", "", "..", ["0", 0]]
    inputs = [*({"filename_prefix": prefix} for prefix in prefixes), {}]
    graph = {str(number): {"class_type": "x", "inputs": each} for number, each in enumerate(inputs)}
    save_under(graph, "i2v/7")
    said = [node["inputs"].get("filename_prefix") for node in graph.values()]
    ours = ["video/t", "t", "t", "a/t", "ComfyUI", "ComfyUI"]
    assert said == [*(f"i2v/7/{prefix}" for prefix in ours), ["0", 0], None]


def test_how_nodes_are_called():
    """By id, title where it says more than the class, and class."""
    graph = wan()
    graph["7"]["_meta"] = {"title": "VAEDecode"}
    assert named(graph, "6") == 'node 6 "Sampling" (KSampler)'
    assert named(graph, "7") == "node 7 (VAEDecode)"
    assert named(graph, "x\n1") == "node x 1 (unknown)"


def file(name: str, kind: str = "output") -> dict[str, str]:
    """As histories list one."""
    return {"filename": name, "subfolder": "", "type": kind}


@pytest.mark.parametrize(
    "outputs, video",
    [
        ({"1": {"images": [file("a.mp4")], "animated": [True]}, "2": {"gifs": [file("b.mp4")]}}, "b.mp4"),
        ({"1": {"videos": [file("a.mp4")]}, "2": {"images": [file("b.webm")], "animated": [True]}}, "a.mp4"),
        ({"1": {"gifs": [file("a.gif")]}, "2": {"images": [file("b.webm")]}}, "b.webm"),
        ({"1": {"video": [file("a.mp4")]}, "2": {"gifs": [file("b.mp4", "temp")]}}, "a.mp4"),
        ({"1": {"images": [file("a.webp")], "animated": [True]}, "2": {"images": [file("b.webp")]}}, "a.webp"),
        ({"1": {"images": [file("a.png")], "animated": (False,)}, "2": {"gifs": [file("b.webp")]}}, "b.webp"),
        ({"1": {"anything": [file("a.MP4")], "text": ["hello"], "number": [1]}}, "a.MP4"),
        ({"1": {"video": file("a.mkv")}}, "a.mkv"),
    ],
)
def test_the_best_video_is_chosen(outputs, video):
    """mp4 before webm before pictures that move; of two alike the later one; never what is temporary."""
    assert chosen(listed(outputs))[0].filename == video


@given(outputs=JSON)
def test_any_outputs_are_read(outputs):
    """A node of somebody's own may put anything there."""
    said = refusal_of(chosen, listed(outputs))
    assert said is None or "no video" in said


@given(payload=JSON, of_task=st.booleans())
def test_any_refusal_is_one_line_of_ours(payload, of_task):
    """Whatever a 400 holds."""
    for said in (payload, {"error": payload, "node_errors": payload}, {"node_errors": {"6": {"errors": [payload]}}}):
        error = refused(wan(), said, of_task=of_task)
        assert isinstance(error, PartsMissing | (InvalidRequest if of_task else SettingsError))
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "kind, message, expected",
    [
        ("torch.OutOfMemoryError", "Allocation on device", OutOfMemory),
        ("torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", OutOfMemory),
        ("RuntimeError", "HIP out of memory", OutOfMemory),
        ("MemoryError", "", OutOfMemory),
        ("RuntimeError", "CUDA error: device-side assert triggered", MachineFault),
        ("OSError", "[Errno 28] No space left on device", MachineFault),
        ("ValueError", "shapes do not match", InvalidRequest),
    ],
)
def test_what_a_node_raised(kind, message, expected):
    """Memory first, then the machine's other faults; all else comes from the workflow."""
    data = {"node_id": "6", "exception_type": kind, "exception_message": f"{message}\n"}
    assert type(failed(wan(), data, of_task=True)) is expected
    if expected is InvalidRequest:
        assert type(failed(wan(), data, of_task=False)) is EngineFailed


def test_no_file_is_shown():
    """A graph may hold a picture, and ComfyUI repeats what it does not like."""
    uri = "data:image/png;base64," + "iVBORw0KGgo" * 50
    errors = [{"type": "x", "message": "Bad", "details": f"image: '{uri}'", "extra_info": {"received_value": uri}}]
    error = refused(wan(), {"error": {}, "node_errors": {"4": {"errors": errors}}}, of_task=True)
    assert isinstance(error, I2VError)
    assert "iVBOR" not in str(error)
