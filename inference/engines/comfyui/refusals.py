"""Why ComfyUI runs a graph not at all, or not to its end: whose fault it is, in one line for people."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from inference.engines.comfyui.graph import named
from inference.errors import (
    EngineFailed,
    I2VError,
    InvalidRequest,
    MachineFault,
    PartsMissing,
    SettingsError,
    one_line,
)

MAX_CHARS = 300
MAX_NODES_TOLD = 3

# `supported_pt_extensions` of ComfyUI's folder_paths.py, and what widely used nodes load beside them.
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".gguf", ".onnx", ".engine")

NO_SUCH_NODE = re.compile(r"because node (.+) does not exist")
"""How an older server that lacks a node type says so, under `invalid_prompt`. Newer ones say `missing_node_type`, with
the type beside it: their message has the title of the node instead."""

# Exceptions that the machine is to blame for, whatever the workflow. After a CUDA error every later call fails too.
OF_THE_MACHINE = re.compile(
    r"CUDA error|HIP error|device-side assert|No space left on device|CUDA driver", re.IGNORECASE
)

# torch.OutOfMemoryError and torch.cuda.OutOfMemoryError; "CUDA out of memory"; comfy's allocator says "Allocation on
# device". What the system says where main memory is gone counts as well.
NO_MEMORY = re.compile(r"OutOfMemory|out of memory|Allocation on device|^MemoryError$|not enough memory", re.IGNORECASE)

DATA_URI = re.compile(r"data:[\w/+.-]*;base64,[A-Za-z0-9+/=]{16,}")


class OutOfMemory(Exception):
    """A run ended for want of memory. It has left the server usable."""


def said(text: object) -> str:
    """What a server said, as error messages hold it: one line, and no file inside."""
    return one_line(DATA_URI.sub("data:…", str(text)), MAX_CHARS)


def blame(message: str, *, of_task: bool) -> InvalidRequest | SettingsError:
    """The error for a graph that cannot work: the task's, or else the operator's, whose template it is."""
    return InvalidRequest(f"workflow: {message}") if of_task else SettingsError(f"I2V_COMFY_WORKFLOW: {message}")


def refused(graph: Mapping[str, Any], payload: object, *, of_task: bool) -> I2VError:
    """The error for the 400 that answers a prompt."""
    payload = payload if isinstance(payload, dict) else {}
    error = payload.get("error")
    error = error if isinstance(error, dict) else {"message": error}
    message, kind = str(error.get("message") or ""), error.get("type")
    if (found := NO_SUCH_NODE.search(message)) or kind == "missing_node_type":
        extra = error.get("extra_info")
        extra = extra if isinstance(extra, dict) else {}
        class_type = extra.get("class_type") or (found[1] if found else "unknown")
        node = str(error.get("details") or "").rpartition("#")[2].strip("'")
        where = named(graph, node, class_type) if node in graph else f"node type {said(class_type)}"
        return PartsMissing(f"this ComfyUI has no node type {said(class_type)}, which {where} needs: install it there")
    wrong = list(_wrong(payload.get("node_errors")))
    if not wrong:
        details = str(error.get("details") or "")
        what = "it has no output node, so ComfyUI would save nothing" if kind == "prompt_no_outputs" else message
        return blame(said(f"{what} {details}".strip()) or "ComfyUI refuses it and says nothing", of_task=of_task)
    missing = [(node, name, value) for node, name, value, _, is_model in wrong if is_model]
    if missing:
        told = "; ".join(f"{said(value)} for {name} of {named(graph, node)}" for node, name, value in _few(missing))
        return PartsMissing(f"this ComfyUI has no model {told}: put it into ComfyUI's models folder")
    told = "; ".join(f"{named(graph, node)}: {text}" for node, _, _, text, _ in _few(wrong))
    return blame(told, of_task=of_task)


def failed(graph: Mapping[str, Any], data: Mapping[str, Any], *, of_task: bool) -> I2VError | OutOfMemory:
    """The error for a run that ended in `execution_error`."""
    kind, message = str(data.get("exception_type") or ""), str(data.get("exception_message") or "")
    told = f"{named(graph, data.get('node_id'), data.get('node_type'))}: {said(message or kind or 'it failed')}"
    if NO_MEMORY.search(kind) or NO_MEMORY.search(message):
        return OutOfMemory(told)
    if OF_THE_MACHINE.search(message) or OF_THE_MACHINE.search(kind):
        return MachineFault(f"ComfyUI cannot go on: {told}")
    # A template works for other photos, so that one failure of it says nothing about the task yet.
    return InvalidRequest(f"workflow: {told}") if of_task else EngineFailed(told)


def _few(wrong: list[Any]) -> list[Any]:
    return wrong[:MAX_NODES_TOLD]


def _wrong(node_errors: object) -> Iterator[tuple[str, str, Any, str, bool]]:
    """Each wrong input: node, its name, its value, why, and whether it is a model that the server lacks."""
    for node, found in node_errors.items() if isinstance(node_errors, dict) else []:
        errors = found.get("errors") if isinstance(found, dict) else None
        for error in errors if isinstance(errors, list) else []:
            if not isinstance(error, dict):
                continue
            extra = error.get("extra_info")
            extra = extra if isinstance(extra, dict) else {}
            details, value = str(error.get("details") or ""), extra.get("received_value")
            text = said(": ".join(part for part in (str(error.get("message") or ""), details) if part))
            yield node, str(extra.get("input_name") or "an input"), value, text, _is_model(error, extra)


def _is_model(error: Mapping[str, Any], extra: Mapping[str, Any]) -> bool:
    """Whether a value that is not in its list is the file of a model, and not a word such as a sampler's name.

    Longer lists are left out of the answer (`execution.py`: over 20 entries), so the value itself is looked at first.
    """
    if error.get("type") != "value_not_in_list":
        return False
    config = extra.get("input_config")
    choices = config[0] if isinstance(config, list) and config and isinstance(config[0], list) else []
    names = [extra.get("received_value"), *choices]
    return any(isinstance(name, str) and name.lower().endswith(MODEL_SUFFIXES) for name in names)
