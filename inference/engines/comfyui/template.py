"""The operator's graph for tasks that bring a photo and no graph: where photo, prompt, length, size and seed go in it.

A place is one input of one node. The operator names places in ComfyUI's editor, by the titles of nodes:

    i2v:photo                  the input is found by the role and by what inputs the node has
    Length i2v:frames,size     several roles on one node, beside other words
    i2v:seconds=duration       this input and no other

or in a mapping file, where `52.image` is the input `image` of node 52, and `52` leaves the input to be found:

    {"photo": "52.image", "prompt": ["6.text"], "frames": "50.length", "size": "50", "fps": 16, "frame_step": 4}

A role of the mapping replaces the same role of titles.
"""

import copy
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import structlog

from inference.engines.comfyui.graph import named
from inference.engines.comfyui.places import (
    MAX_FPS,
    MAX_PROBLEM_CHARS,
    MAX_SHOWN_CHARS,
    MIN_FPS,
    ROLES,
    SETTINGS,
    SIZE,
    Place,
    Search,
    Wrong,
    is_text,
)
from inference.errors import InvalidRequest, SettingsError, one_line
from inference.media.photo import fit
from inference.task import LAST_PHOTO, PHOTO, GenerationRequest

log = structlog.get_logger(__name__)

MAX_FILE_BYTES = 20_000_000
"""Graphs are some 10 KB. Those with an embedded picture are larger, and none is as large as this."""

DEFAULT_FPS = 16.0
"""Where neither graph nor mapping says how fast frames are shown: the rate that Wan's 14B models were trained on."""

DEFAULT_FRAME_STEP = 4
"""Wan and Hunyuan make 4k + 1 frames: their VAEs turn one frame, and then four at a time, into one latent."""

SIZE_MULTIPLE = 16
"""Sides are multiples of this: 8 of the VAE times 2 of the patches of Wan's and Hunyuan's 14B models."""

MAX_SIDE_PX = 16384
"""The largest that ComfyUI's own nodes take (`MAX_RESOLUTION` in nodes.py)."""

EXPORT = "export it in ComfyUI with Workflow → Export (API)"

MAX_NAMED_NODES = 3
"""How many nodes a hint names."""


class Line(NamedTuple):
    """What there is to say about one role."""

    role: str
    text: str
    is_place: bool = True  # False: what follows from the places, or from their absence


class Template:
    """A graph and the places in it. It is never changed: `fill` makes a copy.

    `problems`: what keeps it from being used. `load` raises them, `read` leaves them to be looked at.
    """

    def __init__(self, graph: Mapping[str, Any], mapping: Mapping[str, Any] | None = None) -> None:
        self.graph = copy.deepcopy(dict(graph))
        search = Search(self.graph)
        search.titles()
        if mapping is not None:
            search.mapping(mapping)
        self.problems = search.problems
        self.places = {role: search.places[role] for role in ROLES if role in search.places}
        self.frame_step = int(search.numbers.get("frame_step", DEFAULT_FRAME_STEP))
        self.fps, self.fps_said_by = DEFAULT_FPS, "as nothing says otherwise"
        if "fps" in search.numbers:
            self.fps, self.fps_said_by = search.numbers["fps"], "as the mapping says"
        self._judge_numbers()
        self._judge_places()
        for role in ROLES:
            if ROLES[role].required and role not in self.places and role not in search.misnamed:
                self._problem(self._missing(role))

    @property
    def filled(self) -> set[Place]:
        """The inputs that tasks replace."""
        return {place for places in self.places.values() for place in places}

    @classmethod
    def read(cls, path: Path, mapping: Path | None = None) -> Self:
        """Reads a graph and its mapping. Raises SettingsError where a file is no such thing."""
        try:
            graph = _graph(_json(path))
        except Wrong as error:
            raise SettingsError(f"{_file(path)}: {error}") from None
        try:
            said = None if mapping is None else _mapping(_json(mapping))
        except Wrong as error:
            raise SettingsError(f"{_file(mapping or path)}: {error}") from None
        try:
            return cls(graph, said)
        except RecursionError:
            raise SettingsError(f"{_file(path)}: is nested too deeply") from None

    @classmethod
    def load(cls, path: Path, mapping: Path | None = None) -> Self:
        """As `read`. Raises SettingsError also where the places do not suffice, with a line for each problem."""
        template = cls.read(path, mapping)
        if template.problems:
            raise SettingsError("\n".join(f"{_file(path)}: {problem}" for problem in template.problems))
        return template

    def refuse(self, request: GenerationRequest, names: Collection[str] | None = None) -> None:
        """Refuses what this template cannot make, before anything is uploaded. Raises InvalidRequest.

        `names` are those of the task's inputs, where they are known by then.
        """
        for field in ("steps", "guidance"):
            if getattr(request, field) is not None:
                raise InvalidRequest(f"{field}: the workflow of this worker decides it")
        if request.negative_prompt and "negative_prompt" not in self.places:
            raise InvalidRequest("negative_prompt: the workflow of this worker has no place for one")
        for name in (PHOTO, LAST_PHOTO):
            if names is not None and name in self.places and name not in names:
                raise InvalidRequest(f"{name}: the workflow of this worker needs one, and the task has none")

    def fill(
        self, request: GenerationRequest, uploaded: Mapping[str, str], photo_size: tuple[int, int], seed: int
    ) -> dict[str, Any]:
        """A copy of the graph with what a task brings in its places, and nothing else changed.

        `uploaded` has the name on ComfyUI's server of each of the task's files, `photo_size` is width and height of the
        photo in pixels, upright. What a request leaves open stays as the operator set it: an empty prompt, no negative
        prompt, a length that is only the queue's default.
        Raises InvalidRequest.
        """
        self.refuse(request, uploaded)
        if ignored := sorted(uploaded.keys() - self.places.keys()):
            log.info("ignored", inputs=ignored, why="the workflow of this worker has no place for them")
        values: dict[str, Any] = {name: uploaded[name] for name in (PHOTO, LAST_PHOTO) if name in self.places}
        values["seed"] = seed
        if request.prompt:
            values["prompt"] = request.prompt
        if request.negative_prompt is not None:
            values["negative_prompt"] = request.negative_prompt
        if request.names_duration:
            seconds = request.duration_s
            values["seconds"] = int(seconds) if seconds == int(seconds) else seconds
            values["frames"] = self.frames(seconds)
        if "width" in self.places:
            values["width"], values["height"] = self.size(photo_size, request.max_area_px)
        graph = copy.deepcopy(self.graph)
        for role, places in self.places.items():
            for place in places if role in values else ():
                graph[place.node_id]["inputs"][place.input] = values[role]
        return graph

    def frames(self, duration_s: float) -> int:
        """The number of frames nearest to a length that the model can make: k times `frame_step`, and one."""
        steps = math.floor((duration_s * self.fps - 1) / self.frame_step + 0.5)
        return max(1, steps) * self.frame_step + 1

    def size(self, photo_size: tuple[int, int], max_area_px: int | None) -> tuple[int, int]:
        """Width and height of the video: the photo's shape, in the template's own area or less.

        Raises InvalidRequest.
        """
        area_px = int(self._value(self.places["width"][0])) * int(self._value(self.places["height"][0]))
        if max_area_px is not None and max_area_px < area_px:
            area_px = max_area_px
        try:
            return fit(*photo_size, max_area_px=area_px, multiple=SIZE_MULTIPLE)
        except ValueError as error:
            raise InvalidRequest(f"size: {error}") from None

    def describe(self) -> Iterator[Line]:
        """For each role, where it goes and what is there now; and what follows where a role has no place."""
        for role, places in self.places.items():
            for place in places:
                value = one_line(json.dumps(self._value(place), ensure_ascii=False), MAX_SHOWN_CHARS)
                yield Line(role, f"{place.input} of {named(self.graph, place.node_id)}, now {value}")
        if LAST_PHOTO in self.places:
            yield Line(LAST_PHOTO, "every task has to bring one; tasks with a photo alone are refused", is_place=False)
        if "frames" in self.places:
            rate = f"{self.fps:g} frames a second, {self.fps_said_by}"
            yield Line("frames", f"{self.frame_step}k + 1 at {rate}: 5 s are {self.frames(5)}", is_place=False)
        if not {"frames", "seconds"} & self.places.keys():
            yield Line(
                "frames", "no place for it or for seconds: the workflow's length is every video's", is_place=False
            )
        if "width" not in self.places:
            yield Line(
                SIZE, "no place for it: the workflow's size is every video's, whatever the photo's", is_place=False
            )
        if "seed" not in self.places:
            yield Line("seed", "no place for it: the same photo and prompt give the same video again", is_place=False)
        if "negative_prompt" not in self.places:
            yield Line("negative_prompt", "no place for it: the workflow's own stays", is_place=False)

    def _value(self, place: Place) -> Any:
        return self.graph[place.node_id]["inputs"][place.input]

    def _first(self, role: str) -> Place | None:
        return next(iter(self.places.get(role, ())), None)

    def _judge_numbers(self) -> None:
        """Takes over the graph's frame rate. What is read from the graph has to make sense."""
        for role, least, most in (
            ("width", SIZE_MULTIPLE, MAX_SIDE_PX),
            ("height", SIZE_MULTIPLE, MAX_SIDE_PX),
            ("fps", MIN_FPS, MAX_FPS),
        ):
            place = self._first(role)
            if place is None:
                continue
            if not least <= self._value(place) <= most:
                self._problem(f"{place} is {self._value(place)}: the {role} must be from {least} to {most}")
            elif role == "fps":
                self.fps, self.fps_said_by = float(self._value(place)), f"as {named(self.graph, place.node_id)} says"

    def _judge_places(self) -> None:
        seen: dict[Place, str] = {}
        for role, places in self.places.items():
            for place in places:
                if place in seen:
                    self._problem(f"{place} cannot be both {seen[place]} and {role}")
                seen[place] = role
        for one, other in (("width", "height"), ("height", "width")):
            if one in self.places and other not in self.places:
                self._problem(f"there is a place for the {one}, and none for the {other}")

    def _missing(self, role: str) -> str:
        """How to name a place for a role that needs one."""
        names = set(ROLES[role].inputs) - {"value", "string"}
        likely = [
            named(self.graph, node_id)
            for node_id, node in self.graph.items()
            if any(is_text(value) for name, value in node["inputs"].items() if name in names)
        ]
        which = f", such as {' or '.join(likely[:MAX_NAMED_NODES])}" if likely else ""
        return (
            f"no node is named for {ROLES[role].about}: give one the title i2v:{role}{which}, then {EXPORT} "
            "(or write a mapping)"
        )

    def _problem(self, text: str) -> None:
        self.problems.append(one_line(text, MAX_PROBLEM_CHARS))


def _file(path: Path) -> str:
    return one_line(str(path), MAX_PROBLEM_CHARS)


def _json(path: Path) -> Any:
    """What a JSON file holds. Raises Wrong."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Wrong(f"cannot be read: {error.strerror}") from None
    if not content.strip():
        raise Wrong("is empty")
    if len(content) > MAX_FILE_BYTES:
        raise Wrong(f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
    try:
        return json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        where = f": {error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Wrong(f"is not JSON{where}") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _graph(said: Any) -> dict[str, Any]:
    """A graph in API format. Raises Wrong."""
    if not isinstance(said, dict) or not said:
        raise Wrong(f"is no workflow: {EXPORT}")
    if isinstance(said.get("nodes"), list):
        raise Wrong(f"is in the format of ComfyUI's editor: {EXPORT}")
    for node_id, node in said.items():
        if not (
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        ):
            raise Wrong(f"{one_line(node_id, MAX_SHOWN_CHARS)!r} is no node with class_type and inputs: {EXPORT}")
    return said


def _mapping(said: Any) -> dict[str, Any]:
    """A mapping. Raises Wrong."""
    if not isinstance(said, dict):
        raise Wrong('is no mapping: it looks like {"photo": "52.image", "prompt": "6.text"}')
    unknown = [name for name in said if name not in {*ROLES, SIZE, *SETTINGS}]
    if unknown:
        known = ", ".join([*ROLES, SIZE, "frame_step"])
        raise Wrong(f"{one_line(unknown[0], MAX_SHOWN_CHARS)!r} is none of {known}")
    return said
