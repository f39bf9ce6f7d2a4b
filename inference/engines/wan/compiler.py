"""Torch's compiler, as the engine uses it: what its work depends on, and its cache between files and torch.

`compiled.py` has the files, `warming.py` what is compiled.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch

from inference.engines.wan import compiled
from inference.engines.wan.compiled import MAX_REASON_CHARS, Found, traced_code
from inference.engines.wan.loading import dtype_of
from inference.engines.wan.presets import Preset
from inference.engines.wan.speed import Switches, choose_attention, multiplies_in_fp8
from inference.errors import one_line

log = structlog.get_logger(__name__)


def facts_of(preset: Preset, device: torch.device, switches: Switches, area_px: int | None) -> dict[str, str]:
    """Everything on which it depends whether the compiler finds its own work again, each fact in words.

    For an engine that is loaded with the same arguments.
    """
    on_gpu = device.type == "cuda"
    fp8 = "products" if multiplies_in_fp8(device) else "weights"
    return {
        "area": str(area_px or preset.max_area_px),
        "attention": choose_attention(switches.attention, device, dtype_of(preset, "transformer")),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device)))
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
        "code": traced_code(),
        "compiler": str(switches.compile),
        "cuda": str(torch.version.cuda),
        "diffusers": diffusers.__version__,
        "fp8": fp8 if switches.fp8 else "no",
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none",
        "preset": preset.name,
        "python": platform.python_version(),
        "shared timesteps": str(switches.shared_timesteps),
        "torch": torch.__version__,
    }


def take(folder: Path, preset: Preset, facts: Mapping[str, str]) -> Found:
    """Fills the compiler's own cache with what was compiled ahead for `facts`; nothing where it cannot read it."""
    found = compiled.find(folder, preset.name, facts)
    if found.artifacts is None:
        return found
    try:
        taken = torch.compiler.load_cache_artifacts(found.artifacts) is not None
        why = "it is of another kind"
    except Exception as error:  # noqa: BLE001 - a full disk, or whatever is wrong with somebody's pickle
        taken, why = False, f"{type(error).__name__}: {error}"
    if taken:
        return found
    told = one_line(f"the compiler cannot read what was compiled ahead: {why}", MAX_REASON_CHARS)
    return Found(None, told, surprising=True)


def keep(folder: Path, preset: Preset, facts: Mapping[str, str], artifacts: bytes) -> None:
    """Keeps what was compiled for the next start, which costs minutes without it and nothing else."""
    try:
        path = compiled.keep(folder, preset.name, facts, artifacts)
    except OSError as error:
        log.warning("compiled_code_not_kept", path=str(folder), error=error.strerror or str(error))
    else:
        log.info("compiled_code_kept", path=str(path), megabytes=round(len(artifacts) / 1e6, 1))


@contextmanager
def nothing_new_compiled() -> Iterator[None]:
    """In this block the compiler takes what is in its cache, and raises NotCompiledAhead where it would compile.

    Torch has no switch for that. The function that is replaced is where every graph goes that no cache knows. Nor are
    processes started that would compile kernels side by side. The cache has kernels for a GPU, but no C++ for a CPU:
    that is built again, half a minute for the tiny presets (tests/bench/LOG.md).
    """
    from torch._inductor import compile_fx, config  # noqa: PLC0415 - seconds, for those who compile alone

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise NotCompiledAhead("the compiler does not find in its cache what was compiled ahead")

    before = compile_fx.fx_codegen_and_compile
    compile_fx.fx_codegen_and_compile = refuse
    try:
        with config.patch(compile_threads=1):  # one of the few options that are not in the key of the cache
            yield
    finally:
        compile_fx.fx_codegen_and_compile = before


class NotCompiledAhead(Exception):
    """A graph that no cache knows. The compiler wraps it into errors of its own."""
