"""Runs graphs at a ComfyUI: uploads what they need, follows the run, and fetches the video.

inputs → uploaded under names of this task → the graph, sent once → followed to its end → the video, as an mp4
"""

import re
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import anyio
import anyio.to_thread
import structlog

from inference.engines.base import Job, photo_of, run_in_thread
from inference.engines.comfyui.api import ComfyApi, base_url
from inference.engines.comfyui.graph import Graph, checked, load_there, rename, save_under
from inference.engines.comfyui.outputs import Output, chosen, listed
from inference.engines.comfyui.progress import RunProgress
from inference.engines.comfyui.refusals import OutOfMemory, refused
from inference.engines.comfyui.run import Run
from inference.engines.comfyui.template import Template
from inference.errors import (
    EngineFailed,
    InvalidRequest,
    MachineFault,
    MediaError,
    PartsMissing,
    ProviderUnavailable,
)
from inference.media import foreign
from inference.media import photo as photos
from inference.media.clip import index_first
from inference.media.video import VideoInfo, probe
from inference.task import LAST_PHOTO, MIN_DURATION_S, PHOTO, GenerationRequest, Video
from inference.transfer.json_api import Unanswered

log = structlog.get_logger(__name__)

FOLDER = "i2v"
"""Where outputs go inside ComfyUI's output folder, and how the names of inputs begin: `rm -r output/i2v input/i2v-*`
cleans up. ComfyUI deletes neither, and offers no request for it."""

PATIENCE_S = 120.0
"""How long a ComfyUI that does not answer is waited for: it starts within a minute, models included later."""

PHOTO_SIDE_PX = 4096
"""More than twice the size of any clip. ComfyUI decodes the whole photo to 12 bytes a pixel."""

SEED_BITS = 53
"""What JavaScript, in which ComfyUI's pages are written, keeps of an integer."""

MAX_VIDEO_BYTES = 2_000_000_000
MAX_OTHERS = 20
MAX_OTHER_BYTES = 200_000_000
"""Of all other files together."""

MAX_NAME_CHARS = 80

HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
"""First brands of HEIC files (ISO/IEC 23008-12), which ComfyUI does not read."""


class ComfyEngine:
    """Generates at a ComfyUI, which runs one prompt after the other, whoever sent it.

    What it leaves there, all under names of its own: inputs, outputs, and the entry in the history, which the operator
    may want to look at; ComfyUI forgets entries beyond the newest 10,000.

    `host`: as COMFY_HOST. `template`: the graph for tasks that bring only a photo; None: those are refused.
    `patience_s`: how long a ComfyUI that went away is waited for. Raises SettingsError for a host that is none.
    """

    name = "comfyui"
    stages: Mapping[str, float] = {"prepare": 2.0, "queue": 1.0, "workflow": 92.0, "fetch": 5.0}

    def __init__(
        self, host: str = "127.0.0.1:8188", *, template: Template | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self._url = base_url(host)
        self._template, self._patience_s = template, patience_s

    async def check(self) -> None:
        """Raises ProviderUnavailable where ComfyUI does not answer, SettingsError where something else does."""
        async with ComfyApi(self._url, patience_s=0) as api:
            await api.system_stats()

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """Makes `comfyui.mp4` (or `.webm`, where that is wanted as it came) in `folder`.

        Raises InvalidRequest, InvalidPhoto, PartsMissing, EngineFailed, ProviderUnavailable, EncodeFailed,
        MachineFault, SettingsError.
        """
        job.raise_if_cancelled()
        template = self._template_for(request, inputs)
        graph = {} if request.workflow is None else checked(request.workflow)
        if not await anyio.Path(folder).is_dir():
            raise MachineFault(f"there is no folder {folder.name} to work in")
        token = secrets.token_hex(6)
        job.report("prepare")
        job.raise_if_cancelled()
        seed = None
        async with ComfyApi(self._url, patience_s=self._patience_s, check=job.raise_if_cancelled) as api:
            if template is None:
                await _bring_inputs(api, job, graph, inputs, token)
            else:
                seed = request.seed if request.seed is not None else secrets.randbits(SEED_BITS)
                graph = await self._filled(api, job, template, request, inputs, seed=seed, token=token)
            save_under(graph, f"{FOLDER}/{token}")
            log.info("comfyui_files", inputs=f"{FOLDER}-{token}-*", outputs=f"{FOLDER}/{token}", nodes=len(graph))
            files, node_errors = await self._run(api, job, graph, request)
            try:
                video, others = chosen(files)
            except InvalidRequest:
                if not node_errors:
                    raise
                # ComfyUI ran only the outputs that it could: what it says of the others is why there is no video.
                raise refused(graph, {"node_errors": node_errors}, of_task=request.workflow is not None) from None
            job.report("fetch")
            made = await _fetched(api, job, video, folder, request)
            if request.workflow is not None:
                made = made.model_copy(update={"others": await _fetch_others(api, others, folder)})
            job.report("fetch", 1)
            return made.model_copy(update={"seed": seed})

    def _template_for(self, request: GenerationRequest, inputs: Mapping[str, Path]) -> Template | None:
        """The template to fill; None for a task that brings a workflow. Before any work is done.

        Raises InvalidRequest, naming the field, and PartsMissing where there is no template.
        """
        if request.workflow is not None:
            return None
        if self._template is None:
            raise PartsMissing("this task brings a photo and no workflow: set I2V_COMFY_WORKFLOW to a graph for those")
        photo_of(request, inputs, self.name)
        if request.duration_s < MIN_DURATION_S:
            raise InvalidRequest(f"duration_s is {request.duration_s:g}; a video lasts at least {MIN_DURATION_S:g} s")
        self._template.refuse(request, inputs)
        return self._template

    async def _filled(
        self,
        api: ComfyApi,
        job: Job,
        template: Template,
        request: GenerationRequest,
        inputs: Mapping[str, Path],
        *,
        seed: int,
        token: str,
    ) -> Graph:
        """The template for one photo task, after its photos were uploaded: upright, in sRGB, as JPEGs."""
        uploaded: dict[str, str] = {}
        size = 0, 0
        for name in (PHOTO, LAST_PHOTO):
            if name not in inputs:
                continue
            picture, shape = await run_in_thread(job, partial(_upright, inputs[name]))
            size = shape if name == PHOTO else size
            uploaded[name] = await api.upload(f"{FOLDER}-{token}-{name}.jpg", picture)
        return template.fill(request, uploaded, size, seed)

    async def _run(
        self, api: ComfyApi, job: Job, graph: Graph, request: GenerationRequest
    ) -> tuple[list[Output], dict[str, object]]:
        """Runs a graph, a second time with memory freed where it did not fit the first time.

        Memory may be full of models that earlier workflows left; ComfyUI itself unloads them only after the failure.
        """
        progress = RunProgress(graph, request.node_weights)
        for may_free in (True, False):
            run = Run(api, job, graph, progress, of_task=request.workflow is not None, stages=("queue", "workflow"))
            try:
                return listed(await run.outputs()), run.node_errors
            except OutOfMemory as error:
                if not may_free:
                    raise MachineFault(f"this machine's ComfyUI has too little memory for it: {error}") from None
                log.warning("comfyui_out_of_memory", error=str(error), then="memory freed, once more")
            try:
                await api.ask("POST", "free", {"unload_models": True, "free_memory": True})
            except Unanswered as error:
                log.warning("comfyui_not_freed", error=str(error))
        raise AssertionError


async def _bring_inputs(api: ComfyApi, job: Job, graph: Graph, inputs: Mapping[str, Path], token: str) -> None:
    """Uploads a workflow's files under names of this task alone, and puts those into the graph.

    They lie at the top of the input folder: nodes that check a name against a list know that level only.
    """
    names: dict[str, str] = {}
    for number, (name, path) in enumerate(inputs.items()):
        content: Path | bytes = path
        called = name if PurePosixPath(name).suffix else name + path.suffix
        if await anyio.to_thread.run_sync(_is_heif, path):
            content, _ = await run_in_thread(job, partial(_upright, path))
            called = f"{PurePosixPath(name).stem}.jpg"
        names[name] = await api.upload(f"{FOLDER}-{token}-{number}-{_safe(called)}", content)
        job.raise_if_cancelled()
    unnamed = set(names) - rename(graph, names)
    if unnamed == {PHOTO} == set(names) and load_there(graph, PHOTO, names[PHOTO]):
        unnamed = set()
    if unnamed:
        log.warning("comfyui_input_unused", inputs=sorted(unnamed), hint="no node of the workflow names it")


def _upright(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A photo as ComfyUI shows it to its nodes as a person would see it, and its size. Blocks."""
    info = photos.measure(path)
    picture = photos.jpeg(path, max_side_px=PHOTO_SIDE_PX, widest=photos.MAX_ASPECT_RATIO)
    return picture, (info.width, info.height)


def _is_heif(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise MachineFault(f"an input cannot be read any more: {error.strerror}") from None
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _safe(name: str) -> str:
    """A name from outside as the end of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-MAX_NAME_CHARS:]


async def _fetched(api: ComfyApi, job: Job, output: Output, folder: Path, request: GenerationRequest) -> Video:
    """Downloads the video and makes of it what the receiver takes. Leaves no other file behind, whatever happens."""
    raw = folder / ".comfyui.raw"
    target: Path | None = None
    try:
        await api.download(output, raw, max_bytes=MAX_VIDEO_BYTES)
        job.raise_if_cancelled()
        try:
            kind = await run_in_thread(job, partial(foreign.what_is, raw))
            as_it_is = kind in request.video_formats
            target = folder / f"comfyui.{kind if as_it_is else 'mp4'}"
            info = await run_in_thread(job, partial(_made, raw, target, kind, request))
        except MediaError as error:
            raise EngineFailed(f"{output.called} of the workflow cannot be used: {error}") from None
        if not as_it_is:
            log.info("comfyui_converted", file=output.called, was=kind, to="mp4")
        size_bytes = (await anyio.Path(target).stat()).st_size
    except BaseException:
        with anyio.CancelScope(shield=True):
            if target is not None:
                await anyio.Path(target).unlink(missing_ok=True)
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.Path(raw).unlink(missing_ok=True)
    return Video(
        path=target, width=info.width, height=info.height, fps=info.fps, frames=info.frames, size_bytes=size_bytes
    )


def _made(raw: Path, target: Path, kind: str, request: GenerationRequest) -> VideoInfo:
    """Moves or converts what came to `target`. Blocks. Raises MediaError, MachineFault.

    A workflow's own mp4 keeps its pictures: they are what its author made. A template's becomes like every other
    engine's, colour tags included, so that all videos of a queue look alike.
    """
    if kind == "mp4" and kind in request.video_formats and request.workflow is not None:
        return index_first(raw, target)
    if kind not in request.video_formats or kind == "mp4":
        return foreign.as_mp4(raw, target)
    info = probe(raw, demuxer=foreign.DEMUXERS[kind])
    raw.replace(target)
    return info


async def _fetch_others(api: ComfyApi, others: list[Output], folder: Path) -> dict[str, Path]:
    """Downloads what else a workflow saved, by file name. A file that cannot be had is left out with a log line.

    The video is there by now, and not worth losing for them.
    """
    fetched: dict[str, Path] = {}
    left_bytes = MAX_OTHER_BYTES
    for number, output in enumerate(others):
        if number >= MAX_OTHERS or left_bytes <= 0:
            log.warning("comfyui_files_left_out", files=len(others) - number)
            break
        safe = _safe(PurePosixPath(output.filename).name)
        name = safe if safe not in fetched else f"{number}-{safe}"
        path = folder / f"other-{number}-{safe}"
        try:
            await api.download(output, path, max_bytes=left_bytes)
        except (EngineFailed, InvalidRequest) as error:
            log.warning("comfyui_file_left_out", file=output.called, error=str(error))
            continue
        except (ProviderUnavailable, MachineFault) as error:  # it would be the same with the next one
            log.warning("comfyui_files_left_out", files=len(others) - number, error=str(error))
            break
        left_bytes -= (await anyio.Path(path).stat()).st_size
        fetched[name] = path
    return fetched
