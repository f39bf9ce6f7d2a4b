"""A ComfyUI of our own on loopback: it queues, validates and "executes" graphs as the real one does, and misbehaves.

    with ComfyServer() as comfy:
        comfy.url                               for ComfyEngine, or COMFY_HOST of a process
        comfy.hold("KSampler"); ...; comfy.release()    a run stands still before that node, else it goes on by itself
        comfy.drop_after = [3]                  the socket is cut after the third message of the next run
        comfy.faults["POST /prompt"].append(LOST_AFTER)
        comfy.prompts, comfy.uploads, comfy.asked("POST /prompt")

It is a real server (HTTP and websocket) in a thread, so tests of any kind, event loop and process reach it. Nodes do no
work: what a saver saves is a real file of the size, length and rate that its graph asks for.

Where each behaviour was seen: "recording" is `tests/cases/comfy/*.json`, taken from a real server of 2026, against
which `test_stand_in.py` holds this one; "source" is ComfyUI's `server.py`, `execution.py`, `nodes.py`,
`comfy_execution/progress.py` and `folder_paths.py`.
"""

import asyncio
import copy
import functools
import hashlib
import io
import itertools
import json
import socket
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import imageio_ffmpeg
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

QUIET = {"log_config": None, "log_level": None, "access_log": False, "lifespan": "off", "proxy_headers": False}
"""What uvicorn would do beside. A proxy's headers would be read by something that stands before the connection."""

PATIENCE_S = 60.0
"""How long something is waited for that is sure to come; only a test that fails waits so long."""

STEP_S = 0.002
"""Between two looks of something that waits inside the server."""


# What nodes there are: their required inputs as in `/object_info`, and whether they are outputs (source: `nodes.py`,
# `comfy_extras/nodes_video.py`, `comfy_extras/nodes_wan.py`; VHS: ComfyUI-VideoHelperSuite).
INT, FLOAT, STRING = ("INT", {"min": 0, "max": 0xFFFFFFFFFFFFFFFF}), ("FLOAT", {}), ("STRING", {})
SIZE = ("INT", {"default": 512, "min": 1, "max": 16384})
IMAGE, LATENT, MODEL, CLIP, VAE, VIDEO = ("IMAGE",), ("LATENT",), ("MODEL",), ("CLIP",), ("VAE",), ("VIDEO",)
CONDITIONING = ("CONDITIONING",)
PREFIX = {"images": IMAGE, "filename_prefix": STRING}

NODES: dict[str, dict[str, Any]] = {
    "EmptyImage": {"width": SIZE, "height": SIZE, "batch_size": SIZE, "color": INT},
    "LoadImage": {"image": ("FILES", {"image_upload": True})},
    "LoadVideo": {"file": ("FILES", {"video_upload": True})},
    "VHS_LoadVideo": {"video": ("FILES", {})},
    "CreateVideo": {"images": IMAGE, "fps": FLOAT},
    "SaveVideo": {
        "video": VIDEO,
        "filename_prefix": STRING,
        "format": (["auto", "mp4"],),
        "codec": (["auto", "h264"],),
    },
    "SaveWEBM": {**PREFIX, "codec": (["vp9", "av1"],), "fps": FLOAT, "crf": FLOAT},
    "SaveAnimatedWEBP": {**PREFIX, "fps": FLOAT},
    "SaveAnimatedPNG": {**PREFIX, "fps": FLOAT, "compress_level": INT},
    "SaveImage": PREFIX,
    "PreviewImage": {"images": IMAGE},
    "VHS_VideoCombine": {
        **PREFIX,
        "frame_rate": FLOAT,
        "format": (["image/gif", "video/h264-mp4", "video/webm"],),
        "save_output": ("BOOLEAN", {}),
    },
    "CheckpointLoaderSimple": {
        "ckpt_name": ("checkpoints", {"tooltip": "The name of the checkpoint (model) to load."})
    },
    "UNETLoader": {"unet_name": ("diffusion_models", {}), "weight_dtype": (["default", "fp8_e4m3fn"],)},
    "CLIPTextEncode": {"text": STRING, "clip": CLIP},
    "VAEDecode": {"samples": LATENT, "vae": VAE},
    "EmptyLatentImage": {"width": SIZE, "height": SIZE, "batch_size": SIZE},
    "WanImageToVideo": {
        "positive": CONDITIONING,
        "negative": CONDITIONING,
        "vae": VAE,
        "start_image": IMAGE,
        "width": SIZE,
        "height": SIZE,
        "length": SIZE,
    },
    "KSampler": {
        "model": MODEL,
        "positive": CONDITIONING,
        "negative": CONDITIONING,
        "latent_image": LATENT,
        "seed": INT,
        "steps": ("INT", {"min": 1, "max": 10000}),
        "cfg": FLOAT,
        "sampler_name": (["euler", "uni_pc"],),
        "scheduler": (["normal", "simple"],),
        "denoise": FLOAT,
    },
}
OPTIONAL = {("WanImageToVideo", "start_image")}
OUTPUTS = {name for name in NODES if name.startswith(("Save", "Preview", "VHS_VideoCombine"))}
OUTPUT_NAMES = {"SaveAnimatedPNG", "SaveAnimatedWEBP", "SaveVideo", "SaveWEBM"}
"""These list their files under `images`, with `"animated": [true]` (recordings `savevideo`, `webm`)."""


@dataclass(frozen=True)
class Fault:
    """What becomes of one request. Without a status the connection breaks unanswered."""

    status: int | None = None
    carried_out: bool = False  # before the answer goes wrong
    body: bytes = b"500 Internal Server Error\n\nServer got itself in trouble"  # aiohttp's own page


LOST_BEFORE = Fault()
LOST_AFTER = Fault(carried_out=True)
BROKEN = Fault(500)
BROKEN_AFTER = Fault(500, carried_out=True)


@dataclass
class Prompt:
    """One prompt in the server's books."""

    id: str
    number: float
    graph: dict[str, Any]
    client_id: str | None
    outputs: list[str]
    state: str = "waiting"  # waiting, running, done, interrupted, failed, deleted, lost
    sent: list[dict[str, Any]] = field(default_factory=list)  # its messages, whoever heard them

    @property
    def item(self) -> list[Any]:
        """As `/queue` and the history list it (source: `PromptQueue.put`)."""
        extra = {"client_id": self.client_id} if self.client_id else {}
        return [self.number, self.id, self.graph, extra, self.outputs]


class Interrupted(Exception):
    """A run was told to stop."""


class Failed(Exception):
    """A node raised: type and message, as Python gives them."""


class ComfyServer:
    """A ComfyUI for the length of a block. Attributes may be set from any thread, before the thing happens."""

    def __init__(self, *, pace_s: float = 0.001) -> None:
        self.pace_s = pace_s  # between two messages of a run
        self.models: dict[str, list[str]] = {"checkpoints": [], "diffusion_models": []}
        self.missing: set[str] = set()  # node types that are not installed
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)  # by "METHOD /path"
        self.drop_after: list[int] = []  # each for one run: the socket is cut after so many of its messages
        self.drop_every = False  # the socket is cut after every message, and the run goes on once there is a new one
        self.drop_silently = False  # cut sockets stay open, and nothing comes any more (a network that went away)
        self.refuse_sockets = False
        self.history_late = 0  # so many looks at the history find a run that has ended still running
        self.out_of_memory: dict[str, int] = {}  # class of a node → how often it fails for want of memory
        self.errors: dict[str, tuple[str, str]] = {}  # class of a node → type and message of its exception
        self.is_old = False  # as before 2025-08: it makes its own prompt ids, and interrupts whatever runs
        self.names_missing_type = False  # newer servers' error for an unknown node type
        self.max_upload_bytes = 100 * 1024 * 1024  # `--max-upload-size`
        self.previews = True  # binary preview frames between the messages of a sampler
        self.port = 0
        self._held: set[str] = set()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="comfy-")
        self.home = Path(self._folder.name)
        self.requests: list[str] = []
        self.prompts: list[Prompt] = []
        self.freed = 0
        self.sockets_opened = 0
        self._numbers = itertools.count()
        self._forget()

    def _forget(self) -> None:
        """What a restart loses: queue, history, cache, sockets. Files stay."""
        self._waiting: list[Prompt] = []
        self._running: Prompt | None = None
        self.history: dict[str, dict[str, Any]] = {}
        self._cache: dict[str, dict[str, Any] | None] = {}  # what a node made, by its signature
        self._sockets: dict[str, Callable[[dict[str, Any] | bytes], Awaitable[None]]] = {}
        self._interrupt = False
        self._last_node: str | None = None
        self._late = 0

    # The life of the server.

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Listens, on the port of before where there was one."""
        config = uvicorn.Config(self._app, port=self.port, ws="wsproto", interface="asgi3", http="h11", **QUIET)
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._thread.start()
        patience = time.monotonic() + PATIENCE_S
        while not self._server.started:
            assert time.monotonic() < patience, "the stand-in did not start"
            threading.Event().wait(STEP_S)

    def _serve(self, listener: socket.socket) -> None:
        asyncio.run(self._serve_until_stopped(listener))
        listener.close()

    async def _serve_until_stopped(self, listener: socket.socket) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        tasks = [asyncio.create_task(self._server.serve(sockets=[listener])), asyncio.create_task(self._execute())]
        await self._stopped.wait()
        # As a crash does it, and at once; uvicorn's own way waits for connections to end. Those that were accepted
        # already are made first: asyncio loses the ones that are still in the making when their server is closed.
        self._loop.remove_reader(listener)
        for _ in range(10):
            await asyncio.sleep(0)
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def stop(self) -> None:
        """Is gone, as after a crash: connections break, the queue and the history are forgotten."""
        self._held.clear()
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(PATIENCE_S)
        self._thread = None
        for prompt in [*self._waiting, *([self._running] if self._running else [])]:
            prompt.state = "lost"
        self._forget()

    def restart(self) -> None:
        """Gone and back again."""
        self.stop()
        self.start()

    # What tests do and see.

    def hold(self, class_type: str) -> None:
        """Runs stand still before such a node, until `release`."""
        self._held.add(class_type)

    def release(self, *class_types: str) -> None:
        """Whatever stands still goes on, or only what stands before such nodes."""
        self._held -= set(class_types) or self._held

    def occupy(self, count: int = 1) -> list[Prompt]:
        """Another client's prompts: the first runs until `release`, the others wait behind it."""
        graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0}}}
        graph["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "theirs"}}
        self.hold("SaveImage")
        theirs = [self._accept(str(uuid.uuid4()), copy.deepcopy(graph), "somebody-else", ["2"]) for _ in range(count)]
        self.until(lambda: theirs[0].state == "running")
        return theirs

    def until(self, condition: Callable[[], Any]) -> None:
        """Waits, in a thread that is not the server's, until something is the case."""
        patience = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < patience, "it did not happen"
            threading.Event().wait(STEP_S)

    def asked(self, what: str) -> int:
        """How often something was requested: "POST /prompt"."""
        return self.requests.count(what)

    @property
    def uploads(self) -> dict[str, bytes]:
        """What lies in the input folder, by path."""
        folder = self.home / "input"
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    @property
    def ours(self) -> list[Prompt]:
        """The prompts that were sent through `/prompt`, in order."""
        return [prompt for prompt in self.prompts if prompt.client_id != "somebody-else"]

    # HTTP.

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = Headers(scope=scope)
        # Pages of other sites may do nothing here (source: `create_origin_only_middleware`). Only browsers send these.
        is_foreign = urlsplit(headers.get("origin", f"//{headers['host']}")).netloc != headers["host"]
        is_foreign = is_foreign or headers.get("sec-fetch-site") == "cross-site"
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send, refuse=self.refuse_sockets or is_foreign)
            return
        if is_foreign:
            await Response(status_code=403)(scope, receive, send)
            return
        what = f"{scope['method']} {scope['path']}"
        self.requests.append(what)
        queued = self.faults.get(what) or self.faults.get(f"{scope['method']} /{scope['path'].split('/')[1]}")
        fault = queued.popleft() if queued else None
        if fault is None:
            await self._http(scope, receive, send)
            return
        if fault.carried_out:

            async def swallow(_: Any) -> None:
                pass

            await self._http(scope, receive, swallow)
        if fault.status is None:
            send.__self__.transport.abort()  # uvicorn's: the connection is cut where it is
            return
        await Response(fault.body, fault.status)(scope, receive, send)

    @functools.cached_property
    def _http(self) -> Starlette:
        routes = [
            Route("/", lambda _: Response("<html>ComfyUI</html>", media_type="text/html")),
            Route("/prompt", self._post_prompt, methods=["POST"]),
            Route("/queue", self._queue, methods=["GET", "POST"]),
            Route("/interrupt", self._post_interrupt, methods=["POST"]),
            Route("/free", self._post_free, methods=["POST"]),
            Route("/history", self._post_history, methods=["POST"]),
            Route("/history/{id}", self._get_history),
            Route("/upload/image", self._upload, methods=["POST"]),
            Route("/view", self._view),
            Route("/system_stats", self._system_stats),
            Route("/object_info", self._object_info),
            Route("/object_info/{class_type}", self._object_info),
        ]
        return Starlette(routes=routes)

    async def _post_prompt(self, request: Request) -> Response:
        """Own ids are taken, the same one twice as well, and then runs twice (contract; source: `post_prompt`)."""
        body = await request.json()
        if "prompt" not in body:
            error = {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided"}
            return JSONResponse({"error": {**error, "extra_info": {}}, "node_errors": {}}, 400)
        error, outputs, node_errors = self.validate(body["prompt"])
        if error is not None:
            return JSONResponse({"error": error, "node_errors": node_errors}, 400)
        own = None if self.is_old else body.get("prompt_id")
        prompt = self._accept(str(own or uuid.uuid4()), body["prompt"], body.get("client_id"), outputs)
        return JSONResponse({"prompt_id": prompt.id, "number": prompt.number, "node_errors": node_errors})

    def _accept(self, prompt_id: str, graph: dict[str, Any], client_id: str | None, outputs: list[str]) -> Prompt:
        prompt = Prompt(prompt_id, next(self._numbers), graph, client_id, outputs)
        self.prompts.append(prompt)
        self._waiting.append(prompt)
        return prompt

    async def _queue(self, request: Request) -> Response:
        """`delete` takes away what waits, never what runs (source: `delete_queue_item`)."""
        if request.method == "GET":
            running = [self._running.item] if self._running else []
            return JSONResponse({"queue_running": running, "queue_pending": [each.item for each in self._waiting]})
        body = await request.json()
        for prompt in list(self._waiting):
            if prompt.id in body.get("delete", []) or body.get("clear"):
                self._waiting.remove(prompt)
                prompt.state = "deleted"
                await self._tell(None, "status", self._status())
        return Response()

    async def _post_interrupt(self, request: Request) -> Response:
        """A foreign id leaves the run alone; no id, or an old server, interrupts whatever runs (source)."""
        body = json.loads(await request.body() or b"{}")
        named = None if self.is_old else body.get("prompt_id")
        if self._running is not None and named in {None, self._running.id}:
            self._interrupt = True
        return Response()

    async def _post_free(self, request: Request) -> Response:
        if (await request.json()) == {"unload_models": True, "free_memory": True}:
            self.freed += 1
        return Response()

    async def _post_history(self, request: Request) -> Response:
        for prompt_id in (await request.json()).get("delete", []):
            self.history.pop(prompt_id, None)
        return Response()

    async def _get_history(self, request: Request) -> Response:
        """`{}` for what is unknown, waits or runs."""
        prompt_id = request.path_params["id"]
        self._late = max(0, self._late - 1)
        found = self.history.get(prompt_id)
        return JSONResponse({} if found is None or self._late else {prompt_id: found})

    async def _upload(self, request: Request) -> Response:
        """Any bytes are taken; a name that is taken by other bytes gets " (1)" (source: `image_upload`).

        Videos go here, too: there is no `/upload/video`. A body that is too large is refused before it has all been
        sent (aiohttp's `client_max_size`).
        """
        if int(request.headers["Content-Length"]) > self.max_upload_bytes:
            return Response(f"Maximum request body size {self.max_upload_bytes} exceeded", 413)
        form = await request.form()
        file = form.get("image")
        if file is None or not file.filename:
            return Response(status_code=400)
        content, subfolder, kind = await file.read(), str(form.get("subfolder", "")), str(form.get("type", "input"))
        await form.close()
        root = (self.home / kind).resolve()
        path = (root / subfolder / file.filename).resolve()
        if not path.is_relative_to(root):
            return Response(status_code=400)
        path.parent.mkdir(parents=True, exist_ok=True)
        stem, suffix = path.stem, path.suffix
        for number in itertools.count(1):
            if form.get("overwrite") in {"true", "1"} or not path.exists() or path.read_bytes() == content:
                break
            path = path.with_name(f"{stem} ({number}){suffix}")
        path.write_bytes(content)
        return JSONResponse({"name": path.name, "subfolder": subfolder, "type": kind})

    async def _view(self, request: Request) -> Response:
        query = request.query_params
        root = self.home / query.get("type", "output")
        path = (root / query.get("subfolder", "") / PurePosixPath(query.get("filename", "")).name).resolve()
        if not path.is_relative_to(root.resolve()):
            return Response(status_code=403)
        if not path.is_file():
            return Response(status_code=404)
        media_type = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif"}
        headers = {"Content-Disposition": f'filename="{path.name}"'}
        kind = media_type.get(path.suffix, "application/octet-stream")
        return Response(path.read_bytes(), headers=headers, media_type=kind)

    async def _system_stats(self, _: Request) -> Response:
        device = {"name": "cpu", "type": "cpu", "index": None, "vram_total": 16_000_000_000, "vram_free": 8_000_000_000}
        return JSONResponse({"system": {"os": "posix", "comfyui_version": "0.3.75"}, "devices": [device]})

    async def _object_info(self, request: Request) -> Response:
        """Lists of files are the first entry of an input; `{}` for an unknown class (source: `node_info`)."""
        asked = request.path_params.get("class_type")
        names = [name for name in NODES if name not in self.missing and asked in {None, name}]
        return JSONResponse({name: self._node_info(name) for name in names})

    def _node_info(self, name: str) -> dict[str, Any]:
        inputs: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
        for key, spec in NODES[name].items():
            kind = "optional" if (name, key) in OPTIONAL else "required"
            inputs[kind][key] = self._spec(spec)
        order = {kind: list(found) for kind, found in inputs.items()}
        return {"input": inputs, "input_order": order, "name": name, "output_node": name in OUTPUTS}

    def _spec(self, spec: tuple[Any, ...]) -> list[Any]:
        """`[type or list of choices, options]`; models and input files are lists of what is there."""
        kind = spec[0]
        if kind == "FILES":  # only the top of the input folder is listed (source: `LoadImage.INPUT_TYPES`)
            kind = [name for name in self.uploads if "/" not in name]
        elif isinstance(kind, str):
            kind = self.models.get(kind, kind)
        return [kind, *spec[1:]]

    # Validation (source: `execution.py`; recordings `bad_class`, `missing_ckpt`, `no_outputs`).

    def validate(self, graph: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str], dict[str, Any]]:
        """The error of the whole, the outputs that may run, and what is wrong with which node."""
        for node_id, node in graph.items():
            class_type = node.get("class_type")
            if class_type is None:
                message = "Cannot execute because a node is missing the class_type property."
                return _error("invalid_prompt", message, f"Node ID '#{node_id}'"), [], {}
            if class_type not in NODES or class_type in self.missing:
                if self.names_missing_type:
                    title = node.get("_meta", {}).get("title", class_type)
                    message = f"Node '{title}' not found. The custom node may not be installed."
                    extra = {"node_id": node_id, "class_type": class_type, "node_title": title}
                    return _error("missing_node_type", message, f"Node ID '#{node_id}'", extra), [], {}
                message = f"Cannot execute because node {class_type} does not exist."
                return _error("invalid_prompt", message, f"Node ID '#{node_id}'"), [], {}
        outputs = [node_id for node_id, node in graph.items() if node["class_type"] in OUTPUTS]
        if not outputs:
            return _error("prompt_no_outputs", "Prompt has no outputs", ""), [], {}
        good, node_errors, own = [], {}, []
        for output in outputs:
            wrong = {node_id: self._wrong(graph, node_id) for node_id in _upstream(graph, output)}
            wrong = {node_id: errors for node_id, errors in wrong.items() if errors}
            if not wrong:
                good.append(output)
            own += [f"{error['message']}: {error['details']}" for error in wrong.get(output, [])]
            for node_id, errors in wrong.items():
                told = {"errors": errors, "dependent_outputs": [], "class_type": graph[node_id]["class_type"]}
                node_errors.setdefault(node_id, told)["dependent_outputs"].append(output)
        if good:
            return None, good, node_errors
        message = "Prompt outputs failed validation"
        return _error("prompt_outputs_failed_validation", message, "\n".join(own)), [], node_errors

    def _wrong(self, graph: dict[str, Any], node_id: str) -> list[dict[str, Any]]:
        node, found = graph[node_id], []
        for name, spec in NODES[node["class_type"]].items():
            config, is_file = self._spec(spec), spec[0] == "FILES"
            extra = {"input_name": name, "input_config": config}
            if name not in node["inputs"]:
                if (node["class_type"], name) not in OPTIONAL:
                    found.append(_error("required_input_missing", "Required input is missing", name, extra))
                continue
            value = node["inputs"][name]
            extra["received_value"] = value
            if isinstance(value, list):
                continue
            if is_file:  # VALIDATE_INPUTS of the loaders stands in for the list: subfolders are fine there
                path = (self.home / "input" / str(value).removesuffix(" [input]")).resolve()
                if not path.is_file():
                    said = f"{name} - Invalid image file: {value}"
                    named = {"input_name": name}
                    found.append(_error("custom_validation_failed", "Custom validation failed for node", said, named))
            elif isinstance(config[0], list) and value not in config[0]:
                listed = str(config[0]) if len(config[0]) <= 20 else f"(list of length {len(config[0])})"
                extra["input_config"] = config if len(config[0]) <= 20 else None
                said = f"{name}: '{value}' not in {listed}"
                found.append(_error("value_not_in_list", "Value not in list", said, extra))
            elif config[0] in ("INT", "FLOAT"):
                found += _number_errors(name, value, config, extra)
        return found

    # Execution (source: `execution.py`, `comfy_execution/progress.py`; every recording with messages).

    async def _execute(self) -> None:
        while True:
            if not self._waiting:
                await asyncio.sleep(STEP_S / 2)
                continue
            prompt = self._waiting.pop(0)
            self._running, prompt.state, self._interrupt = prompt, "running", False
            await self._run(prompt)

    async def _run(self, prompt: Prompt) -> None:
        run = _Run(self, prompt)
        await run.say("status", self._status())  # put
        await run.say("status", self._status())  # taken
        await run.say("execution_start", {}, kept=True)
        try:
            await self._nodes(run)
        except Interrupted:
            prompt.state = "interrupted"
            await run.say("execution_interrupted", run.position, kept=True)
        except Failed as error:
            prompt.state = "failed"
            told = {"exception_message": f"{error.args[1]}\n", "exception_type": error.args[0], "traceback": []}
            told |= {"current_inputs": {}, "current_outputs": [run.position["node_id"], *run.position["executed"]]}
            await run.say("execution_error", {**run.position, **told}, kept=True)
        else:
            prompt.state = "done"
            await run.say("execution_success", {}, kept=True)
        ended_well = prompt.state == "done"
        outputs, meta = (run.outputs, run.meta) if ended_well else ({}, {})
        status = {"status_str": "success" if ended_well else "error", "completed": ended_well, "messages": run.kept}
        self._late, self.history_late = self.history_late + 1 if self.history_late else 0, 0
        self.history[prompt.id] = {"prompt": prompt.item, "outputs": outputs, "status": status, "meta": meta}
        while self._late:  # it is in the queue until it is in the history: both change under one lock (source)
            await asyncio.sleep(STEP_S)
        self._running, self._last_node = None, None
        await run.say("status", self._status())
        if ended_well:
            await run.say("executing", {"node": None})

    async def _nodes(self, run: "_Run") -> None:
        """Every node that an output needs, once. A cached saver only repeats what it saved (contract)."""
        graph = run.prompt.graph
        order = list(dict.fromkeys(node for output in run.prompt.outputs for node in _upstream(graph, output)))
        signs = {node: _sign(graph, node) for node in order}
        cached = [node for node in order if signs[node] in self._cache]
        await run.say("execution_cached", {"nodes": cached}, kept=True)
        for node in order:
            run.position |= {"node_id": node, "node_type": graph[node]["class_type"]}
            if node not in cached:
                output = await self._node(run, node)
                self._cache[signs[node]] = output
            output = self._cache[signs[node]]
            if output is not None:
                run.outputs[node] = output
                run.meta[node] = {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
                await run.say("executed", {"node": node, "display_node": node, "output": output})
            if node not in cached:
                await run.state(node, 1.0, 1.0, "finished")
            run.position["executed"].insert(0, node)

    async def _node(self, run: "_Run", node: str) -> dict[str, Any] | None:
        graph, class_type = run.prompt.graph, run.prompt.graph[node]["class_type"]
        await run.state(node, 0.0, 1.0, "running")
        self._last_node = node
        await run.say("executing", {"node": node, "display_node": node})
        while class_type in self._held and not self._interrupt:
            await asyncio.sleep(STEP_S)
        if class_type == "KSampler":
            steps = graph[node]["inputs"]["steps"]
            for step in range(1, steps + 1):
                self._check()
                progress = {"value": step, "max": steps, "node": node}
                await run.say("progress", progress)
                await run.state(node, float(step), float(steps), "running")
                if self.previews:
                    await self._tell(run.prompt.client_id, struct.pack(">II", 1, 1) + b"\xff\xd8 a preview \xff\xd9")
        self._check()
        if self.out_of_memory.get(class_type):
            self.out_of_memory[class_type] -= 1
            said = "Allocation on device \nThis error means you ran out of memory on your GPU.\n\nTIPS: If the workflow"
            raise Failed("torch.OutOfMemoryError", f"{said} worked before you might have set the batch_size too large.")
        if class_type in self.errors:
            raise Failed(*self.errors[class_type])
        return self._save(graph, node) if class_type in OUTPUTS else None

    def _check(self) -> None:
        if self._interrupt:
            self._interrupt = False
            raise Interrupted

    def _save(self, graph: dict[str, Any], node: str) -> dict[str, Any]:
        """Writes what an output node makes, and says so as that node does."""
        class_type, inputs = graph[node]["class_type"], graph[node]["inputs"]
        width, height, frames, fps = _pictures(graph, node, self.home / "input")
        kind = "temp" if class_type == "PreviewImage" or inputs.get("save_output") is False else "output"
        suffix = {
            "SaveVideo": "mp4",
            "SaveWEBM": "webm",
            "SaveAnimatedWEBP": "webp",
            "SaveAnimatedPNG": "png",
            "VHS_VideoCombine": {"image/gif": "gif", "video/webm": "webm"}.get(inputs.get("format"), "mp4"),
        }.get(class_type, "png")
        if suffix == "mp4" and (width % 2 or height % 2):  # recording `runtime_error`
            said = "[Errno 542398533] Generic error in an external library: 'avcodec_open2(\"libx264\", {})'"
            raise Failed("av.error.ExternalError", said)
        prefix = PurePosixPath(inputs.get("filename_prefix", "ComfyUI_temp"))
        subfolder = "" if str(prefix.parent) == "." else str(prefix.parent)
        folder = (self.home / kind / subfolder).resolve()
        if not folder.is_relative_to((self.home / kind).resolve()):  # source: `get_save_image_path`
            said = "**** ERROR: Saving image outside the output folder is not allowed.\n full_output_folder: …"
            raise Failed("Exception", said)
        folder.mkdir(parents=True, exist_ok=True)
        counter = 1 + max((_counter(path, prefix.name) for path in folder.iterdir()), default=0)
        animated = class_type in OUTPUT_NAMES or class_type == "VHS_VideoCombine"
        listed = []
        for number in range(1 if animated else frames):
            name = f"{prefix.name}_{counter + number:05}_.{suffix}"
            (folder / name).write_bytes(picture_bytes(suffix, width, height, frames if animated else 1, fps))
            listed.append({"filename": name, "subfolder": subfolder, "type": kind})
        if class_type == "VHS_VideoCombine":
            listed[0] |= {"format": inputs["format"], "frame_rate": fps}
            return {"gifs": listed}
        return {"images": listed, "animated": [True]} if animated else {"images": listed}

    # The websocket (source: `websocket_handler`, `send_json`; contract).

    def _status(self) -> dict[str, Any]:
        remaining = len(self._waiting) + (self._running is not None)
        return {"status": {"exec_info": {"queue_remaining": remaining}}}

    async def _socket(self, scope: dict[str, Any], receive: Any, send: Any, *, refuse: bool) -> None:
        """A client's id belongs to its newest socket. Whose prompt runs is told at once which node that is."""
        await receive()
        self.requests.append("GET /ws")
        if refuse:
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "websocket.accept"})
        sid = parse_qs(scope["query_string"].decode()).get("clientId", [uuid.uuid4().hex])[0]

        async def tell(message: dict[str, Any] | bytes | None) -> None:
            if message is None:
                self._sockets.pop(sid, None)
                if not self.drop_silently:
                    send.__self__.transport.abort()
            elif isinstance(message, bytes):
                await send({"type": "websocket.send", "bytes": message})
            else:
                await send({"type": "websocket.send", "text": json.dumps(message)})

        self._sockets[sid] = tell
        await tell({"type": "status", "data": {**self._status(), "sid": sid}})
        if self._running is not None and self._running.client_id == sid and self._last_node is not None:
            await tell({"type": "executing", "data": {"node": self._last_node}})
        self.sockets_opened += 1  # from here on it hears everything
        try:
            while (await receive())["type"] != "websocket.disconnect":
                pass
        finally:
            if self._sockets.get(sid) is tell:
                del self._sockets[sid]

    async def _tell(self, client_id: str | None, kind: str | bytes, data: Mapping[str, Any] | None = None) -> None:
        """To one client, or to all. Nobody who is away hears it later."""
        message = kind if isinstance(kind, bytes) else {"type": kind, "data": data}
        told = list(self._sockets.values()) if client_id is None else [self._sockets.get(client_id)]
        for tell in told:
            if tell is not None:
                await tell(message)

    async def _cut(self, client_id: str | None) -> None:
        if client_id in self._sockets:
            await self._sockets[client_id](None)


class _Run:
    """The messages of one prompt."""

    def __init__(self, server: ComfyServer, prompt: Prompt) -> None:
        self.server, self.prompt = server, prompt
        self.kept: list[Any] = []  # those that the history repeats
        self.outputs: dict[str, Any] = {}  # what the savers made, by node
        self.meta: dict[str, Any] = {}
        self.position: dict[str, Any] = {"executed": []}  # where it is, as messages about its end say
        self._nodes: dict[str, Any] = {}
        ours = prompt.client_id != "somebody-else"
        self._drop_after = server.drop_after.pop(0) if server.drop_after and ours else None

    async def say(self, kind: str, data: dict[str, Any], *, kept: bool = False) -> None:
        """Status and `progress_state` go to everybody, all else to the client that sent the prompt (source)."""
        server, prompt = self.server, self.prompt
        if kind != "status":
            data = {**data, "prompt_id": prompt.id}
        if kept:
            data["timestamp"] = int(time.time() * 1000)
            self.kept.append([kind, data])
        prompt.sent.append({"type": kind, "data": copy.deepcopy(data)})
        await server._tell(None if kind in {"status", "progress_state"} else prompt.client_id, kind, data)
        await asyncio.sleep(server.pace_s)
        if server.drop_every or len(prompt.sent) == self._drop_after:
            await server._cut(prompt.client_id)
        while server.drop_every and prompt.state == "running" and prompt.client_id not in server._sockets:
            await asyncio.sleep(STEP_S)

    async def state(self, node: str, value: float, maximum: float, state: str) -> None:
        """A snapshot of every node that is not pending; cached ones never are in it (recording `savevideo`)."""
        if state == "finished" and node in self._nodes:
            value = maximum = self._nodes[node]["max"]
        named = {"node_id": node, "prompt_id": self.prompt.id, "display_node_id": node}
        named |= {"parent_node_id": None, "real_node_id": node}
        self._nodes[node] = {"value": value, "max": maximum, "state": state, **named}
        await self.say("progress_state", {"nodes": copy.deepcopy(self._nodes)})


def _error(kind: str, message: str, details: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra or {}}


def _number_errors(name: str, value: Any, config: list[Any], extra: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        message = f"Failed to convert an input value to a {config[0]} value"
        return [_error("invalid_input_type", message, f"{name}, {value}, {error}", extra)]
    if number < config[1].get("min", number):
        message = f"Value {value} smaller than min of {config[1]['min']}"
        return [_error("value_smaller_than_min", message, name, extra)]
    if number > config[1].get("max", number):
        message = f"Value {value} bigger than max of {config[1]['max']}"
        return [_error("value_bigger_than_max", message, name, extra)]
    return []


def _links(graph: dict[str, Any], node: str) -> Iterable[str]:
    return (value[0] for value in graph[node]["inputs"].values() if isinstance(value, list))


def _upstream(graph: dict[str, Any], node: str) -> list[str]:
    """A node and all it needs, in the order in which they run."""
    found: dict[str, None] = {}

    def visit(each: str) -> None:
        for link in _links(graph, each):
            visit(link)
        found.setdefault(each)

    visit(node)
    return list(found)


def _sign(graph: dict[str, Any], node: str) -> str:
    """What makes a result the same, so that it is cached: the class and all inputs, up to the roots."""
    told = [[graph[each]["class_type"], graph[each]["inputs"]] for each in _upstream(graph, node)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _pictures(graph: dict[str, Any], node: str, folder: Path) -> tuple[int, int, int, float]:
    """Width, height, frames and rate of what arrives at a node."""
    width, height, frames, fps = 64, 48, 1, 16.0
    for each in _upstream(graph, node):
        inputs, class_type = graph[each]["inputs"], graph[each]["class_type"]
        if class_type == "LoadImage":
            with Image.open(folder / inputs["image"].removesuffix(" [input]")) as image:
                width, height = image.size
        if isinstance(inputs.get("width"), int):
            width, height = inputs["width"], inputs["height"]
        frames = inputs.get("length", inputs.get("batch_size", frames))
        fps = float(inputs.get("fps", inputs.get("frame_rate", fps)))
    return width, height, frames, fps


def _counter(path: Path, prefix: str) -> int:
    """The number in `prefix_00012_.png` (source: `get_save_image_path`)."""
    number = path.name.removeprefix(f"{prefix}_").split("_")[0]
    return int(number) if path.name.startswith(f"{prefix}_") and number.isdigit() else 0


@functools.lru_cache
def picture_bytes(suffix: str, width: int, height: int, frames: int, fps: float) -> bytes:
    """A real file: an mp4 as SaveVideo writes it (H.264, index at the end, no colour tags), a webm, a picture."""
    if suffix in {"mp4", "webm"}:
        return _ffmpeg(suffix, width, height, frames, fps)
    pictures = [Image.new("RGB", (width, height), (number * 37 % 256, 80, 160)) for number in range(frames)]
    file = io.BytesIO()
    animation = {"save_all": True, "append_images": pictures[1:], "duration": 1000 / fps, "loop": 0}
    pictures[0].save(file, suffix.upper(), **(animation if frames > 1 else {}))
    return file.getvalue()


def _ffmpeg(suffix: str, width: int, height: int, frames: int, fps: float) -> bytes:
    codec = {"mp4": ["libx264", "-preset", "ultrafast"], "webm": ["libvpx-vp9", "-deadline", "realtime"]}[suffix]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"made.{suffix}"
        source = f"testsrc=size={width}x{height}:rate={fps:g}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", source]
        command += ["-frames:v", str(frames), "-pix_fmt", "yuv420p", "-c:v", *codec, str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return path.read_bytes()
