"""What a graph needs and a server lacks."""

from typing import Any

import pytest

from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.needs import compare, lacking
from inference.engines.comfyui.places import Place
from inference.errors import ProviderUnavailable
from tests.engines.comfyui.graphs import still, wan


async def asked(url: str, graph: dict[str, Any], *filled: Place) -> list[str]:
    """What a server lacks for a graph."""
    async with ComfyApi(url, patience_s=0) as api:
        return await lacking(api, graph, filled)


@pytest.mark.anyio
async def test_a_server_that_has_all_lacks_nothing(comfy):
    """The photo's own input is for tasks to fill, so what lies there now need not exist."""
    assert await asked(comfy.url, wan(), Place("4", "image")) == []
    assert await asked(comfy.url, wan()) == [
        'no file x.png in ComfyUI\'s input folder, for image of node 4 "The photo" (LoadImage)'
    ]


@pytest.mark.anyio
async def test_every_part_that_is_not_there_is_named(comfy):
    """A model, node types once each, and a choice that this server does not offer."""
    comfy.models["checkpoints"] = []
    comfy.missing.add("CLIPTextEncode")
    graph = wan(image="sub/x.png")  # a file in a subfolder may be there: the server lists the top alone
    graph["6"]["inputs"]["sampler_name"] = "res_2s"
    assert await asked(comfy.url, graph) == [
        "no model wan.safetensors for ckpt_name of node 1 (CheckpointLoaderSimple)",
        "no node type CLIPTextEncode, which node 2 (CLIPTextEncode) needs",
        'sampler_name of node 6 "Sampling" (KSampler) is res_2s, and not one of euler, uni_pc',
    ]
    comfy.missing.add("SaveVideo")
    assert (await asked(comfy.url, graph))[0].startswith("the graph has no output node that this server knows")


@pytest.mark.anyio
async def test_a_server_that_is_not_there_is_unavailable(comfy):
    """And not one that lacks everything."""
    comfy.stop()
    with pytest.raises(ProviderUnavailable):
        await asked(comfy.url, still())


@pytest.mark.parametrize(
    "spec, value, is_lacking",
    [
        (["COMBO", {"options": ["a.safetensors"]}], "a.safetensors", False),
        (["COMBO", {"options": ["a.safetensors"]}], "b.safetensors", True),
        (["COMBO", {"options": [], "remote": {"route": "/models"}}], "b.safetensors", False),
        (["COMBO", {"options": [], "remote_combo": {"route": "/models"}}], "b.safetensors", False),
        (["COMBO", {"options": ["a", "b"], "multiselect": True}], ["b", "a"], False),
        (["COMBO", {"options": ["a", "b"], "multiselect": True}], ["b", "c"], True),
        (["COMBO", {"options": ["a", "b"]}], ["b", "a"], True),
        ([["a"], {}], "a", False),
        ([[1, 2]], 3, True),
        (["STRING", {"default": ""}], "x", False),
        ([], "x", False),
        ("COMBO", "x", False),
        (None, "x", False),
    ],
)
def test_choices_are_read_in_every_form(spec, value, is_lacking):
    """Older nodes write a list, newer ones COMBO; whatever else a server says is no list of choices."""
    graph = {"1": {"class_type": "N", "inputs": {"x": value}}}
    has = {"N": {"input": {"optional": {"x": spec}}, "output_node": True}}
    assert bool(list(compare(graph, has))) == is_lacking


@pytest.mark.parametrize("node", [None, [], {"input": None}, {"input": {"required": []}}])
def test_an_answer_without_inputs_is_no_complaint(node):
    """A node that tells nothing of its inputs may be anything."""
    graph = {"1": {"class_type": "N", "inputs": {"x": 1}}}
    assert [line for line in compare(graph, {"N": node}) if "output node" not in line] == []
