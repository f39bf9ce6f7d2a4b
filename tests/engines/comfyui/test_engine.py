"""The ComfyUI engine: the contract of every engine, names, files, formats, and whose fault an error is."""

import io
import json
from pathlib import Path

import pytest
import structlog
from PIL import Image

from inference.engines.base import Job
from inference.engines.comfyui.api import base_url
from inference.engines.comfyui.engine import ComfyEngine
from inference.errors import (
    EngineFailed,
    InvalidRequest,
    MachineFault,
    PartsMissing,
    ProviderUnavailable,
    SettingsError,
)
from inference.media.video import probe
from inference.progress.stages import StageTracker, plan
from inference.task import GenerationRequest
from tests.engines.comfyui.graphs import still, template, wan
from tests.engines.contract import EngineContract, landscape
from tests.support.comfy_server import PATIENCE_S, ComfyServer, Fault

CASES = Path(__file__).parents[2] / "cases" / "comfy"


class TestContract(EngineContract):
    """With a template for photo tasks, and a real server behind it."""

    @pytest.fixture(autouse=True)
    def _server(self, comfy):
        self.comfy = comfy

    def make(self) -> ComfyEngine:
        return ComfyEngine(self.comfy.url, template=template(), patience_s=PATIENCE_S)


@pytest.fixture
def engine(comfy: ComfyServer) -> ComfyEngine:
    """Without a template."""
    return ComfyEngine(comfy.url, patience_s=PATIENCE_S)


@pytest.fixture
def folder(tmp_path):
    """The lease's own folder, empty."""
    path = tmp_path / "lease"
    path.mkdir()
    return path


@pytest.fixture
def photo(tmp_path):
    """A photo as a queue hands it out."""
    return landscape(tmp_path / "input-0.jpg")


def asks(workflow, **more) -> GenerationRequest:
    """A request with a workflow."""
    return GenerationRequest(duration_s=5, workflow=workflow, **more)


@pytest.mark.anyio
async def test_a_workflow_runs_with_its_own_files(engine, comfy, photo, folder):
    """The photo is uploaded under a name of this task alone, which takes the place of the one in the graph."""
    workflow = wan("x.png")
    video = await engine.generate(asks(workflow), {"x.png": photo}, folder, Job())
    assert workflow == wan("x.png")
    (prompt,) = comfy.prompts
    (name,) = comfy.uploads
    assert prompt.graph["4"]["inputs"]["image"] == name
    assert name.startswith("i2v-")
    assert name.endswith("-0-x.png")
    assert comfy.uploads[name] == photo.read_bytes()
    token = name.split("-")[1]
    assert prompt.graph["9"]["inputs"]["filename_prefix"] == f"i2v/{token}/video/clip"
    assert len(list(comfy.home.glob(f"output/i2v/{token}/video/clip_*.mp4"))) == 1
    info = probe(video.path)
    assert (video.path.name, video.width, video.height, video.frames) == ("comfyui.mp4", 64, 48, 9)
    assert (info.frames, info.faststart, info.codec) == (9, True, "h264")
    assert (video.seed, video.others) == (None, {})
    assert list(folder.iterdir()) == [video.path]


@pytest.mark.anyio
async def test_the_same_workflow_twice_shares_nothing(engine, comfy, photo, folder):
    """Neither ids nor names: a second task must not read the first one's photo."""
    for _ in range(2):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())
    first, second = comfy.prompts
    assert first.id != second.id
    assert first.client_id != second.client_id
    assert len(comfy.uploads) == 2


@pytest.mark.anyio
async def test_pictures_of_a_workflow_are_left_alone(engine, comfy, photo, folder):
    """Its mp4 is not encoded again: only its index moves to the front, as a player needs it."""
    video = await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())
    (made,) = comfy.home.glob("output/i2v/*/video/*.mp4")
    before, after = probe(made), probe(video.path)
    assert (before.faststart, after.faststart) == (False, True)
    assert (after.color_space, after.starts_s, after.pix_fmt) == (before.color_space, before.starts_s, before.pix_fmt)


@pytest.mark.anyio
async def test_an_input_that_nothing_names_is_told(engine, photo, folder):
    """In a log line: most likely a name is misspelt."""
    with structlog.testing.capture_logs() as lines:
        await engine.generate(asks(still("SaveAnimatedWEBP", fps=8.0)), {"y.png": photo}, folder, Job())
    assert [line["inputs"] for line in lines if line["event"] == "comfyui_input_unused"] == [["y.png"]]


@pytest.mark.anyio
async def test_a_photo_that_the_graph_does_not_name_goes_to_its_only_loader(engine, comfy, photo, folder):
    """Older tasks bring the address of a photo, and a graph whose loader still has a file of its author."""
    await engine.generate(asks(wan("example.png")), {"photo": photo}, folder, Job())
    (name,) = comfy.uploads
    assert comfy.prompts[0].graph["4"]["inputs"]["image"] == name


@pytest.mark.anyio
async def test_of_two_loaders_the_titled_one_gets_the_photo(engine, comfy, photo, folder):
    """The other one keeps its own file."""
    workflow = wan("example.png")
    workflow["10"] = {"class_type": "LoadImage", "inputs": {"image": "style.png"}}
    workflow["4"]["_meta"]["title"] = "Start i2v:photo"
    await engine.generate(asks(workflow), {"photo": photo}, folder, Job())
    (name,) = comfy.uploads
    graph = comfy.prompts[0].graph
    assert [graph[node]["inputs"]["image"] for node in ("4", "10")] == [name, "style.png"]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["../../etc/x.png", "ünïcode 1.png", "a" * 200 + ".png", "photo", "-"])
async def test_any_name_can_be_uploaded(name, engine, comfy, photo, folder):
    """Names come from strangers; what is uploaded has a plain one, at the top of the input folder."""
    await engine.generate(asks(wan(name)), {name: photo}, folder, Job())
    (uploaded,) = comfy.uploads
    assert uploaded.isascii()
    assert "/" not in uploaded
    assert len(uploaded) < 110


@pytest.mark.anyio
async def test_two_names_that_clean_up_alike_stay_two(engine, comfy, photo, tmp_path, folder):
    """Both files arrive, each under its own name."""
    other = landscape(tmp_path / "other.jpg", (64, 48))
    graph = wan("a b.png") | {"20": {"class_type": "LoadImage", "inputs": {"image": "a?b.png [input]"}}}
    graph["21"] = {"class_type": "SaveImage", "inputs": {"images": ["20", 0], "filename_prefix": "t"}}
    video = await engine.generate(asks(graph), {"a b.png": photo, "a?b.png": other}, folder, Job())
    assert set(comfy.uploads.values()) == {photo.read_bytes(), other.read_bytes()}
    assert list(video.others) == ["t_00001_.png"]


@pytest.mark.anyio
async def test_a_photo_that_comfyui_cannot_read_is_turned_into_one(engine, comfy, tmp_path, folder):
    """A HEIC of a phone becomes a JPEG; all else is uploaded as it is."""
    import pillow_heif

    heic = tmp_path / "input-0.heic"
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(heic)
    await engine.generate(asks(wan("x.heic")), {"x.heic": heic}, folder, Job())
    ((name, content),) = comfy.uploads.items()
    assert name.endswith("-x.jpg")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))


@pytest.mark.anyio
async def test_a_photo_task_is_filled_into_the_template(comfy, photo, folder):
    """Prompt, seed and an upright sRGB photo; a seed that nobody gave is drawn and told."""
    engine = ComfyEngine(comfy.url, template=template())
    video = await engine.generate(
        GenerationRequest(prompt="a cat", duration_s=1, max_area_px=160 * 96), {"photo": photo}, folder, Job()
    )
    graph = comfy.prompts[0].graph
    assert graph["2"]["inputs"]["text"] == "a cat"
    assert graph["6"]["inputs"]["seed"] == video.seed
    ((name, content),) = comfy.uploads.items()
    assert name.endswith("-photo.jpg")
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (320, 180)
    assert probe(video.path).color_space == "bt709"


@pytest.mark.anyio
async def test_a_photo_task_without_a_template_is_handed_back(engine, photo, folder):
    """Another machine may have one."""
    with pytest.raises(PartsMissing, match="I2V_COMFY_WORKFLOW"):
        await engine.generate(GenerationRequest(duration_s=1), {"photo": photo}, folder, Job())


@pytest.mark.anyio
@pytest.mark.parametrize(
    "workflow, said",
    [
        ({"nodes": [], "links": []}, "Export \\(API\\)"),
        ({}, "no nodes"),
        ({"1": {"inputs": {}}}, "'1' is no node"),
        ({"1": {"class_type": "LoadImage"}}, "'1' is no node"),
        ({"extra": 1}, "'extra' is no node"),
    ],
)
async def test_what_is_no_graph_is_refused_unsent(workflow, said, engine, comfy, folder):
    """With what to do."""
    with pytest.raises(InvalidRequest, match=f"^workflow: .*{said}"):
        await engine.generate(asks(workflow), {}, folder, Job())
    assert comfy.prompts == []


# Formats and further files.


@pytest.mark.anyio
@pytest.mark.parametrize(
    "saver, more",
    [
        ("SaveWEBM", {"codec": "vp9", "fps": 16.0, "crf": 32.0}),
        ("SaveAnimatedWEBP", {"fps": 16.0}),
        ("SaveAnimatedPNG", {"fps": 16.0, "compress_level": 4}),
        ("VHS_VideoCombine", {"frame_rate": 16.0, "format": "image/gif", "save_output": True}),
        ("VHS_VideoCombine", {"frame_rate": 16.0, "format": "video/webm", "save_output": True}),
    ],
)
async def test_every_format_becomes_an_mp4_where_that_is_wanted(saver, more, engine, folder):
    """And a log line says so."""
    with structlog.testing.capture_logs() as lines:
        video = await engine.generate(asks(still(saver, **more)), {}, folder, Job())
    info = probe(video.path)
    assert (info.codec, info.pix_fmt, info.frames, info.width) == ("h264", "yuv420p", 9, 64)
    assert info.fps == pytest.approx(16, rel=0.05)
    (told,) = [line for line in lines if line["event"] == "comfyui_converted"]
    assert told["to"] == "mp4"
    assert list(folder.iterdir()) == [video.path]


@pytest.mark.anyio
async def test_a_webm_stays_one_where_it_can_be_taken(engine, comfy, folder):
    """Byte for byte."""
    workflow = still("SaveWEBM", codec="vp9", fps=16.0, crf=32.0)
    video = await engine.generate(asks(workflow, video_formats=("mp4", "webm")), {}, folder, Job())
    (made,) = comfy.home.glob("output/i2v/*/*.webm")
    assert video.path.name == "comfyui.webm"
    assert video.path.read_bytes() == made.read_bytes()
    assert (video.width, video.height, video.frames) == (64, 48, 9)


@pytest.mark.anyio
async def test_other_files_come_along(engine, comfy, photo, folder):
    """A still that the workflow saved too; what was only a preview does not."""
    graph = wan() | {"10": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "still"}}}
    graph["11"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    video = await engine.generate(asks(graph), {"x.png": photo}, folder, Job())
    ((name, path),) = video.others.items()
    assert name == "still_00001_.png"
    (made,) = comfy.home.glob("output/i2v/*/still*.png")
    assert path.read_bytes() == made.read_bytes()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "workflow, said",
    [
        (still(), r"made no video \(it made 9 images\)"),
        ({"1": still()["1"], "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}, "no file at all"),
        (still("VHS_VideoCombine", frame_rate=8.0, format="video/h264-mp4", save_output=False), "save_output"),
    ],
)
async def test_a_workflow_without_a_video_says_what_it_made(workflow, said, engine, folder):
    """It is the task's fault, and another try would end the same."""
    with pytest.raises(InvalidRequest, match=said):
        await engine.generate(asks(workflow), {}, folder, Job())
    assert list(folder.iterdir()) == []


# Errors by cause.


@pytest.mark.anyio
async def test_a_missing_node_type_is_the_machines(engine, comfy, photo, folder):
    """In the words of this server and of newer ones, which name the node by its title."""
    comfy.missing = {"KSampler"}
    for newer in (False, True):
        comfy.names_missing_type = newer
        with pytest.raises(PartsMissing, match=r'node type KSampler, which node 6 "Sampling" \(KSampler\) needs'):
            await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())


@pytest.mark.anyio
@pytest.mark.parametrize("models", [[], ["other.safetensors"], [f"{n}.safetensors" for n in range(30)]])
async def test_a_missing_model_is_the_machines(models, engine, comfy, photo, folder):
    """However many others there are; ComfyUI leaves long lists out."""
    comfy.models["checkpoints"] = models
    with pytest.raises(PartsMissing, match=r"wan.safetensors for ckpt_name of node 1 \(CheckpointLoaderSimple\)"):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())


@pytest.mark.anyio
@pytest.mark.parametrize(
    "wrong, said",
    [
        (("6", "sampler_name", "eular"), r'node 6 "Sampling" \(KSampler\): Value not in list: sampler_name: \'eular\''),
        (("4", "image", "nowhere.png"), r'node 4 "The photo" \(LoadImage\): .*Invalid image file: nowhere.png'),
        (("5", "width", 0), r"node 5 \(WanImageToVideo\): Value 0 smaller than min of 1: width"),
        (("6", "steps", "many"), "Failed to convert"),
    ],
)
async def test_a_wrong_value_is_the_tasks(wrong, said, engine, photo, folder):
    """Told by node, title, class and field, in one line."""
    workflow, (node, key, value) = wan(), wrong
    workflow[node]["inputs"][key] = value
    with pytest.raises(InvalidRequest, match=f"^workflow: {said}" if said[0] == "n" else said) as caught:
        await engine.generate(asks(workflow), {"x.png": photo}, folder, Job())
    assert "\n" not in str(caught.value)


@pytest.mark.anyio
async def test_no_output_node_is_the_tasks(engine, folder):
    """Recorded as `no_outputs`."""
    with pytest.raises(InvalidRequest, match="no output node"):
        await engine.generate(asks({"1": still()["1"]}), {}, folder, Job())


@pytest.mark.anyio
async def test_a_wrong_template_is_the_operators(comfy, photo, folder):
    """It would fail with every task, and no task may end for that."""
    engine = ComfyEngine(comfy.url, template=template(sampler_name="eular"))
    with pytest.raises(SettingsError, match=r"I2V_COMFY_WORKFLOW: .*eular"):
        await engine.generate(GenerationRequest(duration_s=1), {"photo": photo}, folder, Job())


@pytest.mark.anyio
async def test_half_a_workflow_that_ran_is_told_by_its_other_half(engine, folder):
    """ComfyUI runs the outputs that it can, and answers 200. The one with the video was not among them."""
    graph = still()
    graph["3"] = {"class_type": "SaveWEBM", "inputs": {**still("x", codec="vp7", fps=8.0, crf=1.0)["2"]["inputs"]}}
    with pytest.raises(InvalidRequest, match=r"node 3 \(SaveWEBM\): .*vp7"):
        await engine.generate(asks(graph), {}, folder, Job())


@pytest.mark.anyio
async def test_a_node_that_raises_is_the_tasks(engine, folder):
    """Recorded as `runtime_error`: odd sizes do not fit into this codec."""
    workflow = json.loads((CASES / "runtime_error.json").read_text())["workflow"]
    with pytest.raises(InvalidRequest, match=r"workflow: node 3 \(SaveVideo\): .*Generic error in an external library"):
        await engine.generate(asks(workflow), {}, folder, Job())


@pytest.mark.anyio
async def test_a_broken_gpu_is_the_machines(engine, comfy, photo, folder):
    """After a CUDA error every later run there fails as well."""
    comfy.errors["KSampler"] = ("RuntimeError", "CUDA error: an illegal memory access was encountered")
    with pytest.raises(MachineFault, match="illegal memory access"):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())


@pytest.mark.anyio
async def test_out_of_memory_once_is_tried_again_with_memory_freed(engine, comfy, photo, folder):
    """The second run finds the room that earlier models had taken. Progress does not fall in between."""
    comfy.out_of_memory["KSampler"] = 1
    heard = []
    job = Job(StageTracker(plan(engine.stages), sink=heard.append))
    await engine.generate(asks(wan()), {"x.png": photo}, folder, job)
    assert comfy.freed == 1
    assert [prompt.state for prompt in comfy.prompts] == ["failed", "done"]
    done = [each.done for each in heard if each.stage == "workflow"]
    assert done == sorted(done)


@pytest.mark.anyio
async def test_out_of_memory_twice_is_the_machines(engine, comfy, photo, folder):
    """Another machine may have more."""
    comfy.out_of_memory["KSampler"] = 2
    with pytest.raises(MachineFault, match=r'too little memory .*"Sampling".*Allocation on device'):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())
    assert (comfy.freed, len(comfy.prompts)) == (1, 2)


@pytest.mark.anyio
async def test_an_unreachable_server_is_an_outage(engine, comfy, photo, folder):
    """`check` says so before a task is taken, and `generate` after it has waited."""
    await engine.check()
    comfy.stop()
    with pytest.raises(ProviderUnavailable, match="is it running"):
        await engine.check()
    engine._patience_s = 0.05
    with pytest.raises(ProviderUnavailable, match="is it running"):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())
    comfy.start()


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [Fault(404), Fault(302), Fault(401), Fault(200, body=b"<html>Please log in</html>")])
async def test_another_server_at_that_address_is_a_setting(fault, engine, comfy):
    """404 and the like never come from a ComfyUI, nor does the page of a login in front of it."""
    comfy.faults["GET /system_stats"].append(fault)
    with pytest.raises(SettingsError, match="COMFY_HOST"):
        await engine.check()


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [Fault(404), Fault(503)])
async def test_the_video_is_kept_where_another_file_cannot_be_had(fault, engine, comfy, photo, folder):
    """Though the server goes away: the video is here by then."""
    engine._patience_s = 0
    graph = wan() | {"10": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "still"}}}
    comfy.faults["GET /view"].extend([None, fault])
    video = await engine.generate(asks(graph), {"x.png": photo}, folder, Job())
    assert video.path.is_file()
    assert video.others == {}


@pytest.mark.anyio
async def test_names_of_outputs_are_shown_in_one_line(engine, comfy, folder, monkeypatch):
    """A workflow may put anything there."""
    named = {"filename": f"../a\n\x1b[31m{'b' * 300}.mp4", "subfolder": "", "type": "output"}
    monkeypatch.setattr(comfy, "_save", lambda *_: {"gifs": [named]})
    with pytest.raises(EngineFailed, match="cannot be had") as caught:
        await engine.generate(asks(still("SaveAnimatedWEBP", fps=8.0)), {}, folder, Job())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_an_input_that_is_too_large_for_comfyui(engine, comfy, folder, tmp_path):
    """It refuses it in the midst of the upload, and its answer is heard all the same."""
    comfy.max_upload_bytes = 100_000
    large = tmp_path / "input-0.png"
    large.write_bytes(bytes(20_000_000))
    with pytest.raises(InvalidRequest, match=r"no input as large as i2v-.*--max-upload-size"):
        await engine.generate(asks(wan()), {"x.png": large}, folder, Job())
    assert comfy.asked("POST /upload/image") == 1


@pytest.mark.anyio
async def test_an_output_that_is_gone_is_a_failed_attempt(engine, comfy, photo, folder):
    """Somebody cleaned up at the wrong moment."""
    comfy.faults["GET /view"].append(Fault(404))
    with pytest.raises(EngineFailed, match=r"clip_00001_\.mp4"):
        await engine.generate(asks(wan()), {"x.png": photo}, folder, Job())


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("http://gpu:8188/", "http://gpu:8188"),
        ("https://pod-8188.proxy.runpod.net", "https://pod-8188.proxy.runpod.net"),
        ("[::1]:8188", "http://[::1]:8188"),
    ],
)
def test_hosts(host, url):
    """COMFY_HOST is a host and a port, as elsewhere, or a URL."""
    assert base_url(host) == url


@pytest.mark.parametrize("host", ["", "http://", "host:99999999", "http://u:p@h", "ftp://h", "h?x=1"])
def test_what_is_no_host(host):
    """Said at once, by the name of the setting."""
    with pytest.raises(SettingsError, match="COMFY_HOST"):
        base_url(host)
