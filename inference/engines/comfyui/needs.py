"""What a graph needs of a ComfyUI: node types, models and other choices, compared with what the server has."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.graph import is_link, named
from inference.engines.comfyui.places import Place
from inference.engines.comfyui.refusals import MODEL_SUFFIXES, said

MAX_CHOICES_TOLD = 5

UPLOADS = ("image_upload", "video_upload", "audio_upload")
"""Marks of inputs that name a file of ComfyUI's input folder, of which the server lists only the top (nodes.py)."""


REMOTE = ("remote", "remote_combo")
"""Marks of inputs whose choices the editor's page fetches from elsewhere; servers check nothing then (execution.py)."""


async def lacking(api: ComfyApi, graph: Mapping[str, Any], filled: Collection[Place] = ()) -> list[str]:
    """What a server lacks for a graph, a line each; empty where it has all. `filled` are inputs that tasks replace.

    Raises ProviderUnavailable, EngineFailed, SettingsError where no ComfyUI is there.
    """
    return list(compare(graph, await api.get("object_info"), filled))


def compare(graph: Mapping[str, Any], has: Mapping[str, Any], filled: Collection[Place] = ()) -> Iterator[str]:
    """As `lacking`, with the answer of `/object_info`: for each node type, its inputs and their choices."""
    unknown = set()
    if not any(
        isinstance(info := has.get(node["class_type"]), dict) and info.get("output_node") for node in graph.values()
    ):
        yield "the graph has no output node that this server knows, such as SaveVideo: nothing would be saved"
    for node_id, node in graph.items():
        class_type = node["class_type"]
        if class_type not in has:
            if class_type not in unknown:
                yield f"no node type {said(class_type)}, which {named(graph, node_id)} needs"
            unknown.add(class_type)
            continue
        for name, value in node["inputs"].items():
            if Place(node_id, name) in filled or is_link(value, graph):
                continue
            spec = _spec(has[class_type], name)
            choices = _choices(spec)
            if choices is None or _is_among(value, choices, spec):
                continue
            where = f"{said(name)} of {named(graph, node_id)}"
            if isinstance(value, str) and value.lower().endswith(MODEL_SUFFIXES):
                yield f"no model {said(value)} for {where}"
            elif _is_upload(spec):
                yield f"no file {said(value)} in ComfyUI's input folder, for {where}"
            else:
                few = ", ".join(said(each) for each in choices[:MAX_CHOICES_TOLD]) or "nothing"
                more = ", …" if len(choices) > MAX_CHOICES_TOLD else ""
                yield f"{where} is {said(value)}, and not one of {few}{more}"


def _spec(node: Any, name: str) -> list[Any]:
    """An input's type and options as the server tells them; empty where it tells none."""
    inputs = node.get("input") if isinstance(node, dict) else None
    for kind in ("required", "optional"):
        known = inputs.get(kind) if isinstance(inputs, dict) else None
        spec = known.get(name) if isinstance(known, dict) else None
        if isinstance(spec, list):
            return spec
    return []


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _choices(spec: list[Any]) -> list[Any] | None:
    """What an input may be; None where that is no list. Newer nodes write `["COMBO", {"options": […]}]`."""
    choices = spec[0] if spec else None
    if choices == "COMBO":
        is_elsewhere = any(_options(spec).get(mark) for mark in REMOTE)
        choices = None if is_elsewhere else _options(spec).get("options")
    return choices if isinstance(choices, list) else None


def _is_among(value: object, choices: list[Any], spec: list[Any]) -> bool:
    """Whether a value is one of the choices, or may be: of a file in a subfolder the server says nothing."""
    if _is_upload(spec) and isinstance(value, str) and "/" in value:
        return True
    several = value if isinstance(value, list) and _options(spec).get("multiselect") else [value]
    return all(each in choices for each in several)


def _is_upload(spec: list[Any]) -> bool:
    return any(_options(spec).get(mark) for mark in UPLOADS)
