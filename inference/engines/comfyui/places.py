"""Where in a graph something of a task goes: places, named by the titles of nodes or by a mapping.

See template.py for how an operator writes them. Only a node's own value is a place, never what comes from another node.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from inference.engines.comfyui.graph import is_link, named
from inference.errors import one_line

MAX_NUMBER = 2**64
"""Seeds of ComfyUI end below it."""

MAX_SHOWN_CHARS = 60
MAX_PROBLEM_CHARS = 400

MIN_FPS, MAX_FPS = 1, 240

MAX_FRAME_STEP = 64


class Role(NamedTuple):
    """What a task brings for the graph."""

    about: str
    inputs: tuple[str, ...]  # names under which nodes have it, the likeliest first
    is_text: bool = False
    required: bool = False


# Names of inputs are those of ComfyUI's own nodes (nodes.py, comfy_extras) and of the packs that most video workflows
# use (KJNodes, VideoHelperSuite, WanVideoWrapper). Primitives call theirs `value`.
ROLES = {
    "photo": Role("the photo", ("image",), is_text=True, required=True),
    "last_photo": Role("the photo at the end", ("image",), is_text=True),
    "prompt": Role("the prompt", ("text", "prompt", "positive_prompt", "value", "string"), is_text=True, required=True),
    "negative_prompt": Role(
        "the negative prompt", ("negative_prompt", "text", "prompt", "value", "string"), is_text=True
    ),
    "seconds": Role("the length in seconds", ("seconds", "duration", "value")),
    "frames": Role("the number of frames", ("length", "num_frames", "frames", "frame_count", "video_frames", "value")),
    "fps": Role("frames a second, which are read", ("fps", "frame_rate", "value")),
    "width": Role("the width in pixels", ("width", "value")),
    "height": Role("the height in pixels", ("height", "value")),
    "seed": Role("the seed", ("seed", "noise_seed", "value")),
}

SIZE = "size"
"""Stands for width and height of one node."""

TITLE = re.compile(r"(?<!\w)i2v:(\S*)", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """One input of one node."""

    node_id: str
    input: str

    def __str__(self) -> str:
        return f"{self.node_id}.{self.input}"


class Wrong(Exception):
    """What is wrong with a place, or with a file. It becomes a problem of the template."""


SETTINGS = {"fps": (MIN_FPS, MAX_FPS), "frame_step": (1, MAX_FRAME_STEP)}
"""What a mapping may say besides places: numbers, and their limits. `fps` may be a place, too."""


class Search:
    """The places that were found in a graph, and what was wrong where none was.

    `misnamed` are the roles for which a place was named that is none, `numbers` the settings of a mapping.
    """

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self._graph = graph
        self.places: dict[str, tuple[Place, ...]] = {}
        self.problems: list[str] = []
        self.misnamed: set[str] = set()
        self.numbers: dict[str, float] = {}

    def titles(self) -> None:
        """Looks for places in the titles of nodes."""
        for node_id, node in self._graph.items():
            meta = node.get("_meta")
            title = meta.get("title") if isinstance(meta, dict) else None
            for words in TITLE.findall(title) if isinstance(title, str) else ():
                for word in words.split(","):
                    said, _, name = word.partition("=")
                    role = said.lower().replace("-", "_")
                    try:
                        self._add([*self._found(role, node_id, name)])
                    except Wrong as error:
                        self._failed(role, f"{named(self._graph, node_id)}: i2v:{word}: {error}")

    def mapping(self, mapping: Mapping[str, Any]) -> None:
        """Takes over the places and numbers of a mapping; a role's places replace those of titles."""
        for role in mapping:
            for each in ("width", "height") if role == SIZE else (role,):
                self.places.pop(each, None)
        for role, said in mapping.items():
            try:
                if role in SETTINGS and not isinstance(said, str | list):
                    self.numbers[role] = _setting(role, said)
                    continue
                for node_id, name in self._entries(said):
                    self._add([*self._found(role, node_id, name)])
            except Wrong as error:
                self._failed(role, f"mapping: {role}: {error}")

    def _add(self, found: Iterable[tuple[str, Place]]) -> None:
        for role, place in found:
            self.places[role] = tuple(dict.fromkeys((*self.places.get(role, ()), place)))

    def _failed(self, role: str, problem: str) -> None:
        self.misnamed.add(role)
        self.problems.append(one_line(problem, MAX_PROBLEM_CHARS))

    def _entries(self, said: object) -> Iterator[tuple[str, str]]:
        """The node and the input, which may be empty, of each entry of a mapping. Raises Wrong."""
        for entry in said if isinstance(said, list) and said else [said]:
            if not isinstance(entry, str):
                raise Wrong('must be a place such as "52.image", or a list of them')
            node_id, _, name = entry.partition(".")
            if node_id not in self._graph:
                raise Wrong(f"there is no node {one_line(node_id, MAX_SHOWN_CHARS)!r}")
            yield node_id, name

    def _found(self, role: str, node_id: str, name: str) -> Iterator[tuple[str, Place]]:
        """The places of a role in a node, in its input of that name or else in the likeliest. Raises Wrong."""
        if role == SIZE and not name:
            yield "width", self._place("width", node_id, "width")
            yield "height", self._place("height", node_id, "height")
        elif role in ROLES:
            yield role, self._place(role, node_id, name)
        elif role == SIZE:
            raise Wrong("stands for two inputs: name them with width= and height=")
        else:
            raise Wrong(f"is none of {', '.join([*ROLES, SIZE])}")

    def _place(self, role: str, node_id: str, name: str) -> Place:
        inputs: dict[str, Any] = self._graph[node_id]["inputs"]
        is_right = is_text if ROLES[role].is_text else is_number
        kind = "text" if ROLES[role].is_text else "number"
        own = [each for each, value in inputs.items() if is_right(value)]
        if name and name not in inputs:
            raise Wrong(f"it has no input {one_line(name, MAX_SHOWN_CHARS)!r}, but {_listed(inputs)}")
        if not name:
            name = next((each for each in ROLES[role].inputs if each in inputs), "")
        if not name and len(own) > 1:
            raise Wrong(f"which of its inputs? Write i2v:{role}= and one of {_listed(own)}")
        if not name and own:
            name = own[0]
        if not name:
            raise Wrong(f"it has no {kind} of its own")
        value = inputs[name]
        if is_link(value, self._graph):
            raise Wrong(f"its {name} comes from {named(self._graph, value[0])}: give that node the title")
        if not is_right(value):
            raise Wrong(f"its {name} is {one_line(json.dumps(value), MAX_SHOWN_CHARS)}, and no {kind}")
        return Place(node_id, name)


def is_text(value: object) -> bool:
    """Whether it can hold a prompt or the name of a file."""
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """Whether it is a number and finite; `1e999` in JSON is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _setting(name: str, value: Any) -> float:
    """A number of a mapping. Raises Wrong."""
    least, most = SETTINGS[name]
    if not is_number(value) or not least <= value <= most or (name == "frame_step" and value != int(value)):
        raise Wrong(f"must be a {'whole ' if name == 'frame_step' else ''}number from {least} to {most}")
    return float(value)


def _listed(names: Collection[str]) -> str:
    return one_line(", ".join(names), MAX_PROBLEM_CHARS // 2) or "none"
