"""Adds LoRAs to the weights permanently.

A distillation trains all layers of a model, so a model to which only part of a LoRA file was applied would be useless.
Other loaders only warn of that; here every tensor of the file must match a layer, and every layer of the blocks must
have an update. The sum is made in fp32, as the authors make it (wan/utils/utils.py of
github.com/ModelTC/Wan2.2-Lightning).
"""

import re
from pathlib import Path

import structlog
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from inference.errors import WeightsError, one_line

# Layers of a block, as the authors of Wan name them and as diffusers does.
LAYERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
NAME = re.compile(
    r"(?:diffusion_model\.)?blocks\.(?P<block>\d+)\.(?P<layer>[a-z_]+\.\w+)\."
    r"(?P<part>lora_down\.weight|lora_up\.weight|lora_A\.weight|lora_B\.weight|alpha)"
)
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}  # the same by another name

log = structlog.get_logger(__name__)


@torch.no_grad()
def fuse(model: WanTransformer3DModel, path: Path, scale: float) -> None:
    """Adds scale·(alpha/rank)·up·down to the weights of every linear layer of the blocks of `model`.

    Raises WeightsError where file and model do not fit, OSError and SafetensorError where it cannot be read.
    """
    with safe_open(path, framework="pt", device=str(model.device)) as file:
        updates: dict[tuple[int, str], dict[str, str]] = {}  # (block, layer) → part → its name in the file
        for name in file.keys():  # noqa: SIM118 - not a mapping
            match = NAME.fullmatch(name)
            if match is None or match["layer"] not in LAYERS or int(match["block"]) >= len(model.blocks):
                raise _unfit(path, f"there is no layer for {name}")
            parts = updates.setdefault((int(match["block"]), match["layer"]), {})
            parts[PARTS.get(match["part"], match["part"])] = name
        for number, block in enumerate(model.blocks):
            for theirs, ours in LAYERS.items():
                parts = updates.get((number, theirs), {})
                if not {"lora_down.weight", "lora_up.weight"} <= parts.keys():
                    raise _unfit(path, f"it has no update of block {number}, {theirs}")
                down, up = (file.get_tensor(parts[f"lora_{part}.weight"]).float() for part in ("down", "up"))
                alpha = float(file.get_tensor(parts["alpha"])) if "alpha" in parts else len(down)
                weight = block.get_submodule(ours).weight
                if (up.shape[0], down.shape[1]) != tuple(weight.shape):
                    raise _unfit(path, f"the update of block {number}, {theirs} has another shape")
                weight.copy_(weight.float() + scale * alpha / len(down) * (up @ down))
    log.info("lora_fused", file=path.name, layers=len(updates), scale=scale)


def _unfit(path: Path, why: str) -> WeightsError:
    return WeightsError(one_line(f"{path} does not fit the model: {why}", 300))
