"""The Wan engine at its true sizes: every stage, against stock diffusers, each switch, and a start from cold.

    python -m tests.bench.wan [--shape 5b a14b-480p a14b-720p tiny tiny-a14b mid] [--part flops compare start switches]
                              [--rounds N] [--budget-s 540] [--out PATH]

Weights are random, which does not change speed, so nothing is fetched. Without a CUDA device the tiny shapes run on
the CPU: the same program, and figures that say nothing about a GPU. What the budget has no time for is left out and
said so; results are written after each part.

    flops     the FLOP counter on meta tensors beside the formula of performance.md
    compare   ours and the stock WanImageToVideoPipeline with export_to_video: same weights, schedule and photo
    start     from process start to the first step, weights on local disk (5b and tiny)
    switches  one by one against the default
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import needs

needs.end_if(needs.packages())  # before what they are imported by

import torch  # noqa: E402
from diffusers.utils import is_flash_attn_3_available  # noqa: E402

from inference import logs  # noqa: E402
from inference.engines.wan import tiny  # noqa: E402
from inference.engines.wan.loading import dtype_of, quiet_libraries  # noqa: E402
from inference.engines.wan.placement import GB, Offload  # noqa: E402
from inference.engines.wan.speed import Switches, choose_attention  # noqa: E402
from tests.bench.wan_measure import ROOT, Budget, Side, Subject, race  # noqa: E402
from tests.bench.wan_models import SHAPES, by_formula, count_tflop  # noqa: E402

TARGETS = {"5b": (8.0, 5.2), "a14b-480p": (12.0, 9.1), "a14b-720p": (42.0, 34.3)}
"""Seconds from photo in to mp4 out on one H100, and their floor (performance.md)."""

TARGET_RATIO = 1.6
TARGET_START_S = 10.0

STARTED = {"5b": 25.5, "tiny": 0.0}
"""Shapes whose start is measured, and GB of disk for their weights; the A14B's would take 70."""

SCRATCH_GB = 0.5
"""Of disk for the tiny checkpoints, photos and clips."""

# Guesses, to know whether there is time.
SAVED_GB_PER_S = 0.5
COMPILE_S = 90.0

SLOW_S = {"compile inductor": COMPILE_S, "fused_norms on": COMPILE_S}
"""Of switches whose first run compiles."""


def compare(subject: Subject, rounds: int, budget: Budget) -> dict[str, Any]:
    """Ours against stock."""
    parts, shape = subject.parts, subject.shape
    codec = parts.vae.config
    count, tflop = by_formula(parts.experts["transformer"], shape.latents(codec.scale_factor_spatial, codec.z_dim))
    sides: dict[str, Side] = {"ours": subject.ours(Switches())}
    if parts.offload <= Offload.TEXT:
        sides["stock"] = subject.stock()
    measured = race(subject, sides, shape.preset, rounds, budget)
    result = {"tokens": count, "forward_tflop": tflop, "offload": parts.offload.name.lower(), **measured}
    for side in sides:
        if "total_s" in measured.get(side, {}):
            tflop_per_s = {"step": tflop / median(measured[side]["steps_s"])}
            if shape.decode_tflop:
                tflop_per_s["decode"] = shape.decode_tflop / measured[side]["decode_s"]
            result[side]["tflop_per_s"] = tflop_per_s
    if all("total_s" in measured.get(side, {}) for side in ("ours", "stock")):
        compared = ("total_s", "denoise_s", "decode_s", "peak_gb")
        result["ratio"] = {name: measured["stock"][name] / measured["ours"][name] for name in compared}
    return result


def switches(subject: Subject, rounds: int, budget: Budget) -> dict[str, Any]:
    """Each switch against the default: those of the transformer up to the latents, those of the VAE with one step."""
    preset, device = subject.shape.preset, subject.device
    before: dict[str, Switches] = {}
    if preset.first_frame_is_clean:
        before["shared_timesteps off"] = Switches(shared_timesteps=False)
    if device.type == "cuda":
        there = ["native", "_native_cudnn", *(["_flash_3"] if is_flash_attn_3_available() else [])]
        taken = choose_attention("auto", device, dtype_of(preset, "transformer"))
        before |= {f"attention {name}": Switches(attention=name) for name in there if name != taken}
        before["compile inductor"] = Switches(compile="inductor")
        before["fp8"] = Switches(fp8=True)
        for offload in (Offload.TEXT, Offload.MODELS):
            if offload > subject.parts.offload:
                before[f"offload {offload.name.lower()}"] = Switches(offload=offload)
    after = {
        "plain_upsampling off": Switches(plain_upsampling=False),
        "zeros_in_convolutions off": Switches(zeros_in_convolutions=False),
        "fewer_copies off": Switches(fewer_copies=False),
        "fused_norms on": Switches(fused_norms="inductor"),
        "yuv_on_device changed": Switches(yuv_on_device=device.type == "cpu"),
        "channels_last on": Switches(channels_last=True),
    }
    short = replace(preset, schedule=replace(preset.schedule, steps=1, sigmas=(1.0,)))
    result = {}
    for stage, cases, until, whole in (("denoise", before, "latents", preset), ("decode", after, "mp4", short)):
        if cases:
            sides = {name: subject.ours(each, until) for name, each in {"default": Switches(), **cases}.items()}
            result[stage] = race(
                subject,
                sides,
                whole,
                rounds,
                budget,
                slow_s=SLOW_S,
            )
    return result


def start(subject: Subject, folder: Path, budget: Budget) -> dict[str, Any]:
    """From process start to the first step: `cold` with the weights on disk, `warm` with them in the system's cache."""
    shape, weights_dir = subject.shape, folder / "weights" if subject.shape.true_size else folder
    expected_s = 60.0 + STARTED[shape.name] / SAVED_GB_PER_S
    if not budget.allows(f"start {shape.name}", expected_s):
        return {}
    if shape.true_size:
        subject.parts.save(weights_dir)
        subject.forget()
    command = [sys.executable, "-m", "tests.bench.wan_start", "--weights-dir", str(weights_dir)]
    command += ["--preset", shape.preset.name, "--photo", str(subject.photo), "--folder", str(folder)]
    command += ["--request", subject.request().model_dump_json()]
    result: dict[str, Any] = {}
    for cache in ("cold", "warm"):
        if cache == "cold":
            _drop_from_cache(weights_dir)
        ran = subprocess.run(
            [*command, "--spawned-at", str(time.monotonic())],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(budget.left(), 60),
        )
        if ran.returncode:
            raise RuntimeError(ran.stderr[-200:])
        result[cache] = json.loads(ran.stdout.splitlines()[-1])
    return result


def _drop_from_cache(folder: Path) -> None:
    os.sync()  # what is not written yet would stay
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# What it prints


def print_flops(name: str, row: Mapping[str, Any]) -> None:
    """The counter beside the formula and performance.md."""
    shape = SHAPES[name]
    said = {"forward stock": shape.forward_tflop, "decode": shape.decode_tflop, "encode": shape.encode_tflop}
    cells = (f"{key} {value:.1f}" + (f" ({said[key]})" if said.get(key) else "") for key, value in row.items())
    print(f"\n{name}, TFLOP by the counter, in brackets as performance.md has it: " + ", ".join(cells))
    print(f"  formula / ours: {row['formula'] / row.get('forward ours', row['forward stock']):.4f}")


def print_compare(name: str, row: Mapping[str, Any]) -> None:
    """A line a side, then the ratios."""
    shape = SHAPES[name]
    print(
        f"\n{name}: {shape.width}x{shape.height}, {shape.frames} frames, {row['tokens']:,} tokens, "
        f"{row['forward_tflop']:.4g} TFLOP a step, offload {row['offload']}; seconds"
    )
    stages = ("text", "image", "denoise", "decode", "mp4", "other", "total")
    print(f"{'':6}" + "".join(f"{stage:>9}" for stage in stages) + f"{'peak GB':>9}{'TFLOP/s: step':>15}{'decode':>8}")
    for side in ("ours", "stock"):
        figures = row.get(side, {"failed": "not run"})
        if "failed" in figures:
            print(f"{side:6} {figures['failed']}")
            continue
        rates = figures["tflop_per_s"]
        print(
            f"{side:6}" + "".join(f"{figures[f'{stage}_s']:9.3f}" for stage in stages) + f"{figures['peak_gb']:9.2f}"
            f"{rates['step']:15.4g}{rates.get('decode', math.nan):8.4g}"
        )
        print(f"{'':6}  steps " + " ".join(f"{step:.3f}" for step in figures["steps_s"]))
    if row.get("stock", {}).get("text") == "embeddings":
        print("stock was given its text embeddings: the text encoder does not fit beside the rest")
    if "ratio" in row:
        print("stock / ours: " + ", ".join(f"{key} {value:.2f}" for key, value in row["ratio"].items()))


def print_switches(name: str, row: Mapping[str, Any]) -> None:
    """A line a switch, each beside the default of its stage."""
    print(f"\n{name}, switches; x: times the default's")
    print(f"{'':22}{'to latents':>17}{'step':>17}{'decode':>17}{'peak GB':>9}{'prepared':>11}")
    for stage, cases in row.items():
        keys = ("latents_s", "steps_s") if stage == "denoise" else ("decode_s",)
        for case, figures in cases.items():
            if "failed" in figures:
                print(f"{case:22} {figures['failed']}")
                continue
            cells = []
            for key in ("latents_s", "steps_s", "decode_s"):
                value, base = (_number(side.get(key)) for side in (figures, cases.get("default", {})))
                cells.append(f"{value:8.3f} s {value / base:4.2f} x" if key in keys else "")
            print(
                f"{case:22}" + "".join(f"{cell:>17}" for cell in cells) + f"{figures['peak_gb']:9.2f}"
                f"{figures['warm_up']['prepared_s']:9.2f} s"
            )


def _number(value: Any) -> float:
    return median(value) if isinstance(value, list) else math.nan if value is None else value


def print_start(name: str, row: Mapping[str, Any]) -> None:
    """A line a start."""
    print(f"\n{name}, from process start to the first step; seconds")
    for cache, phases in row.items():
        print(f"  {cache}: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items()))


def print_targets(result: Mapping[str, Any]) -> None:
    """Every target of performance.md with what this run says of it."""
    rows = []
    for name, (wanted_s, floor_s) in TARGETS.items():
        row = result["compare"].get(name, {})
        took_s = row.get("ours", {}).get("total_s")
        rows.append((f"{name}: photo in → mp4 out, s (floor {floor_s})", "≤", wanted_s, took_s))
        rows.append((f"{name}: stock / ours", "≥", TARGET_RATIO, row.get("ratio", {}).get("total_s")))
    cold_s = result["start"].get("5b", {}).get("cold", {}).get("to the first step")
    rows.append(("5b: process start → first step, weights on disk, s", "≤", TARGET_START_S, cold_s))
    print(f"\n{'for one H100; here: ' + result['conditions']['device']:52}{'wanted':>8}{'measured':>10}")
    for what, sign, wanted, measured in rows:
        if measured is None:
            print(f"{what:52}{f'{sign} {wanted:g}':>8}  not measured")
        else:
            met = measured <= wanted if sign == "≤" else measured >= wanted
            print(f"{what:52}{f'{sign} {wanted:g}':>8}{measured:10.2f}  {'met' if met else 'missed'}")


def conditions(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {os.cpu_count()} cores",
        "gpu_memory_gb": torch.cuda.get_device_properties(device).total_memory / GB if on_gpu else None,
        "attention": choose_attention("auto", device, torch.bfloat16),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def main() -> None:
    """Runs what fits into the budget, prints tables and writes JSON."""
    on_gpu = torch.cuda.is_available()
    parts = {"flops": print_flops, "compare": print_compare, "start": print_start, "switches": print_switches}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = list(TARGETS) if on_gpu else ["tiny", "tiny-a14b"]
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=shapes)
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts)[on_gpu:])  # a GPU has better to do
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 2, help="one does on a GPU, after a short run")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of wall time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wan.json")
    asked = parser.parse_args()
    without_gpu = [] if on_gpu else [name for name in asked.shape if SHAPES[name].true_size]
    disk_gb = SCRATCH_GB + max(STARTED.get(name, 0) for name in asked.shape) * ("start" in asked.part)
    needs.end_if(
        [f"{name} needs a CUDA device, and torch finds none: --shape tiny does not" for name in without_gpu]
        + needs.room(Path(tempfile.gettempdir()), disk_gb, "models")
        + needs.room(asked.out.parent, 0, "results")
    )
    budget = Budget(asked.budget_s)
    logs.configure("warning")
    quiet_libraries()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.set_num_threads(1)  # the engine has a thread of its own: OpenMP's two pools would fight, 4 times slower
    result: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(),
        "conditions": conditions(device) | {"rounds": asked.rounds, "budget_s": asked.budget_s},
        "skipped": budget.skipped,
        **{part: {} for part in parts},
    }
    print(json.dumps(result["conditions"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("tiny", "tiny-a14b"):
            tiny.build(name, folder)
        subjects = {name: Subject(SHAPES[name], device, folder) for name in asked.shape}
        measure = {
            "flops": lambda name: count_tflop(SHAPES[name], folder),
            "compare": lambda name: compare(subjects[name], asked.rounds, budget),
            "start": lambda name: start(subjects[name], folder, budget),
            "switches": lambda name: switches(subjects[name], asked.rounds, budget),
        }
        order = [("flops", name) for name in TARGETS]
        order += [(part, name) for name in asked.shape for part in ("compare", "start")]
        order += [("switches", name) for name in asked.shape]  # last: the targets are not about them
        for part, name in order:
            if part not in asked.part or (part == "start" and name not in STARTED):
                continue
            try:
                result[part][name] = measure[part](name)
                parts[part](name, result[part][name])
            except Exception as error:  # noqa: BLE001 - the next part may work, and device time is dear
                traceback.print_exc()
                budget.skipped.append(f"{part} {name}: {type(error).__name__}: {error}"[:300])
            for subject in subjects.values():
                subject.forget()
            asked.out.parent.mkdir(exist_ok=True)
            asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print_targets(result)
    if not on_gpu:
        print("There is no CUDA device here: the table of the true sizes is empty. Above is the same program, tiny.")
    for line in budget.skipped:
        print(f"not run: {line}")


if __name__ == "__main__":
    main()
