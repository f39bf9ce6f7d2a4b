"""Graphs in API format: `{"3": {"class_type": "SaveVideo", "inputs": {…}, "_meta": {"title": …}}, …}` by node id.

A link is a list of a node id and the number of one of its outputs; every other value is the node's own.
"""

import copy
from collections.abc import Mapping
from typing import Any

from inference.errors import InvalidRequest, one_line

MAX_TITLE_CHARS = 60

Graph = dict[str, Any]

INPUT_MARK = " [input]"
"""What a name may carry to say that it is in ComfyUI's input folder (`folder_paths.annotated_filepath`)."""


def checked(workflow: Mapping[str, Any]) -> Graph:
    """A copy of a task's workflow. Raises InvalidRequest where it is no graph in API format."""
    if isinstance(workflow.get("nodes"), list):
        raise InvalidRequest("workflow: it is in the editor's format; export it with Workflow → Export (API)")
    if not workflow:
        raise InvalidRequest("workflow: it has no nodes")
    for node_id, node in workflow.items():
        is_node = isinstance(node, dict) and isinstance(node.get("class_type"), str)
        if not is_node or not isinstance(node.get("inputs"), dict):
            raise InvalidRequest(
                f"workflow: {one_line(node_id, MAX_TITLE_CHARS)!r} is no node with class_type and inputs; "
                "export it with Workflow → Export (API)"
            )
    return copy.deepcopy(dict(workflow))


def rename(graph: Graph, names: Mapping[str, str]) -> set[str]:
    """Replaces every value that is one of `names`, in place. Returns the names that were found."""
    found: set[str] = set()

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            bare = value.removesuffix(INPUT_MARK)
            if bare in names:
                found.add(bare)
                return names[bare]
            return value
        if isinstance(value, list):
            return [renamed(each) for each in value]
        if isinstance(value, dict):
            return {key: renamed(each) for key, each in value.items()}
        return value

    for node in graph.values():
        for key, value in node["inputs"].items():
            if not is_link(value, graph):
                node["inputs"][key] = renamed(value)
    return found


def load_there(graph: Graph, name: str, uploaded: str) -> bool:
    """Puts a photo that the graph does not name where it belongs without a doubt, in place; False if that is nowhere.

    It is the node titled `i2v:<name>`, or the only one that loads an image. An older form of GmAnimato's tasks brings
    the photo by its address alone, and a graph whose loader names a file of its author.
    """
    loaders = [
        node
        for node in graph.values()
        if node["class_type"] == "LoadImage" and isinstance(node["inputs"].get("image"), str)
    ]
    titled = [node for node in loaders if f"i2v:{name}" in str((node.get("_meta") or {}).get("title", "")).split()]
    candidates = titled or loaders
    if len(candidates) != 1:
        return False
    candidates[0]["inputs"]["image"] = uploaded
    return True


def is_link(value: object, graph: Mapping[str, Any]) -> bool:
    """Whether a value is what another node makes."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    node, output = value
    return isinstance(node, str) and node in graph and isinstance(output, int)


def save_under(graph: Graph, folder: str) -> None:
    """Makes every node that saves files do so below `folder`, in place; what it calls them stays.

    Savers have an input `filename_prefix`, which may have folders in it (`folder_paths.get_save_image_path`). ComfyUI
    lets `..` lead to anywhere in its output folder, where a stranger's workflow has no business.
    """
    for node in graph.values():
        prefix = node["inputs"].get("filename_prefix")
        if isinstance(prefix, str):
            parts = [part for part in prefix.replace("\\", "/").split("/") if part not in {"", ".", ".."}]
            node["inputs"]["filename_prefix"] = "/".join([folder, *(parts or ["ComfyUI"])])


def named(graph: Mapping[str, Any], node_id: object, class_type: object = None) -> str:
    """A node for people: `node 3 "Save the clip" (SaveVideo)`."""
    node = graph.get(str(node_id))
    node = node if isinstance(node, dict) else {}
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    kind = str(class_type or node.get("class_type") or "unknown")
    quoted = f' "{one_line(title, MAX_TITLE_CHARS)}"' if isinstance(title, str) and title not in {"", kind} else ""
    return f"node {one_line(str(node_id), MAX_TITLE_CHARS)}{quoted} ({one_line(kind, MAX_TITLE_CHARS)})"
