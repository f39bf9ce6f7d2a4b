"""Saves shards that were published as fp32 again as bf16, in which they are run: half as large."""

import json
import os
import re
from pathlib import Path

from inference.engines.wan.weights import Report, bytes_at, read_index, shards_of, weights_error

KEPT_IN_FP32 = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Parts of the names of tensors that stay as published (diffusers, WanTransformer3DModel._keep_in_fp32_modules)."""


def save_shard(published: Path, new: Path, report: Report) -> None:
    """As loading with torch_dtype=bfloat16 leaves the tensors. Takes memory for half of what was published.

    Reports "convert", in bytes of tensors as published. Raises WeightsError for what is no safetensors file, OSError.
    """
    import torch  # noqa: PLC0415 - an extra, and seconds
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    done_bytes = 0
    tensors = {}
    try:
        with safe_open(published, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                tensor = shard.get_tensor(name)
                kept = not tensor.is_floating_point() or not KEPT_IN_FP32.isdisjoint(name.split("."))
                tensors[name] = tensor if kept else tensor.to(torch.bfloat16)
                done_bytes += tensor.nbytes
                report("convert", done_bytes)
            save_file(tensors, new, metadata=shard.metadata() or {"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # such as a full disk, in words
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(new)) from None
        raise weights_error(f"{published} is no safetensors file: {error}") from None
    new.chmod(published.stat().st_mode)  # save_file lets nobody else read it


def save_index(published: Path, folder: Path, new: Path) -> None:
    """The published index of shards, with their size as they lie in `folder`. Raises WeightsError, OSError."""
    index = read_index(published)
    total_bytes = 0
    for shard in shards_of(index):
        with (folder / shard).open("rb") as file:  # the length of the header, the header, the tensors
            total_bytes += bytes_at(folder / shard) - 8 - int.from_bytes(file.read(8), "little")
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_bytes}
    new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
