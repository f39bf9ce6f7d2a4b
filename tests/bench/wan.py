"""The Wan engine at its true sizes: every stage, against stock diffusers, each switch, and a start from cold.

    python -m tests.bench.wan [--shape 5b a14b-480p a14b-720p tiny tiny-a14b mid] [--plan] [--rounds N]
                              [--part floors encode decode compare switches start] [--budget-s 540] [--out PATH]
                              [--gpu H200] [--tflops 790] [--tb-per-s 3.0]

Weights are random, which does not change speed, so nothing is fetched. Without a CUDA device the tiny shapes run on
the CPU: the same program, and figures that say nothing about a GPU. What the budget has no time for is left out and
said so; results are written after each run, so whoever is stopped keeps what there was.

    floors    the least time that each stage can take, counted from products and bytes; for any GPU, without one
    encode    A14B's encode on this CPU: with and without what is steady
    decode    A14B's decode on this CPU: each exact change of the VAE
    compare   ours and the stock WanImageToVideoPipeline with export_to_video: same weights, schedule and photo
    switches  each alone against the default, and all together
    start     from process start to the first step, weights on local disk (5b and tiny)

`--plan` prints what of the last three would run, in which order and for how long, and runs nothing.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import needs

needs.end_if(needs.packages() if needs.packages(needs.IMPORTED) else [])  # before what they are imported by

import torch  # noqa: E402
from diffusers.utils import is_flash_attn_3_available  # noqa: E402

from inference import logs  # noqa: E402
from inference.engines.wan import tiny  # noqa: E402
from inference.engines.wan.loading import dtype_of, quiet_libraries  # noqa: E402
from inference.engines.wan.placement import GB, Offload  # noqa: E402
from inference.engines.wan.speed import choose_attention  # noqa: E402
from tests.bench import wan_plan, wan_vae  # noqa: E402
from tests.bench.keeping import replace_file  # noqa: E402
from tests.bench.wan_floors import (  # noqa: E402
    Form,
    Rates,
    Work,
    floors,
    known,
    print_floors,
    rates_of,
    whole,
)
from tests.bench.wan_measure import ROOT, Budget, Subject, Terms, race  # noqa: E402
from tests.bench.wan_models import SHAPES, by_formula  # noqa: E402
from tests.bench.wan_plan import STARTED, Case, Expected, Host, Line, expected  # noqa: E402

TARGETS = {"5b": 8.0, "a14b-480p": 12.0, "a14b-720p": 42.0}
"""Seconds from photo in to mp4 out on one H100 (performance.md)."""

TARGET_RATIO = 1.6
TARGET_START_S = 10.0

SCRATCH_GB = 0.5
"""Of disk for the tiny checkpoints, photos and clips."""

PARTS = ("floors", "encode", "decode", "compare", "switches", "start")
ON_A_GPU = ("compare", "switches", "start")
EAGER_AND_COMPILED: tuple[Form, Form] = ("ours", "ours, compiled")

GPU_GB = 40.0
"""The least memory that the true sizes are measured with: less would measure copies from the host."""

LEAST_S = 120.0
"""Under this budget no comparison of the 5B ends, with what imports and models take before it."""

Row = dict[str, Any]
Keep = Callable[[Row], None]


@dataclass
class Bench:
    """One run of this program: what it measures on, and how long it may take."""

    device: torch.device
    folder: Path  # for models and clips
    rates: Rates
    rounds: int
    budget: Budget

    def counted(self, name: str) -> Mapping[Form, Mapping[str, Work]]:
        """The floors' sums of a shape."""
        return known(SHAPES[name], self.folder)

    def terms(self, name: str) -> Terms:
        """How a shape is measured. Sums of tiny models say nothing of their time, which is Python's."""
        shape = SHAPES[name]
        if not shape.true_size:
            each_s = wan_plan.COMPILE_S
            return Terms(self.rounds, self.budget, lambda case: Expected(each_s * len(case.compiles), 5.0, 5.0))
        counted = self.counted(name)
        return Terms(
            self.rounds,
            self.budget,
            lambda case: expected(case, shape.preset.schedule.steps, counted, self.rates, set()),
        )

    def compare(self, subject: Subject, line: Line, keep: Keep) -> Row:
        """Ours against stock."""
        parts, shape = subject.parts, subject.shape
        codec = parts.vae.config
        size = shape.latents(codec.scale_factor_spatial, codec.z_dim)
        tokens, tflop = by_formula(parts.experts["transformer"], size)
        result = {"tokens": tokens, "forward_tflop": tflop, "offload": parts.offload.name.lower()}

        def told(measured: Row) -> Row:
            return result | measured | self.beside(measured, shape.name, line.cases)

        return told(race(subject, line.cases, self.terms(shape.name), lambda measured: keep(told(measured))))

    def beside(self, measured: Row, name: str, cases: Sequence[Case]) -> Row:
        """Stock to ours, and on a GPU what each stage took beside both of its floors."""
        done = {case.name: case for case in cases if "total_s" in measured[case.name]}
        extra: Row = {}
        if {"ours", "stock"} <= done.keys():
            compared = ("total_s", "denoise_s", "decode_s", "peak_gb")
            extra["ratio"] = {key: measured["stock"][key] / measured["ours"][key] for key in compared}
        if self.device.type == "cuda" and SHAPES[name].true_size:
            rows = floors(self.counted(name), SHAPES[name].preset.schedule.steps, self.rates)
            keys = {"text_s": "text", "image_s": "encode", "step_s": "step", "decode_s": "decode", "total_s": "total"}
            extra["floors"] = {
                side: {
                    key: {
                        "took_s": measured[side][key] if key in measured[side] else median(measured[side]["steps_s"]),
                        **rows[case.form][stage],
                    }
                    for key, stage in keys.items()
                }
                for side, case in done.items()
            }
        return extra

    def switches(self, subject: Subject, line: Line, keep: Keep) -> Row:
        """Cases of one stage beside its default."""
        return race(subject, line.cases, self.terms(subject.shape.name), keep)


def start(subject: Subject, folder: Path, budget: Budget) -> dict[str, Any]:
    """From process start to the first step: `cold` with the weights on disk, `warm` with them in the system's cache."""
    shape, weights_dir = subject.shape, folder / "weights" if subject.shape.true_size else folder
    if not budget.allows(f"start {shape.name}", wan_plan.start_s(shape)):
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


def print_compare(name: str, row: Mapping[str, Any]) -> None:
    """A line a side, then the ratios, then what each stage took beside its floors."""
    shape = SHAPES[name]
    print(
        f"\n{name}: {shape.width}x{shape.height}, {shape.frames} frames, {row['tokens']:,} tokens, "
        f"{row['forward_tflop']:.4g} TFLOP a step, offload {row['offload']}; seconds"
    )
    stages = ("text", "image", "denoise", "decode", "mp4", "other", "total")
    print(f"{'':9}" + "".join(f"{stage:>9}" for stage in stages) + f"{'peak GB':>9}")
    for side in ("ours", "together", "stock"):
        figures = row.get(side, {"failed": "not run"})
        if "failed" in figures:
            print(f"{side:9} {figures['failed']}")
            continue
        print(f"{side:9}" + "".join(f"{figures[f'{each}_s']:9.3f}" for each in stages) + f"{figures['peak_gb']:9.2f}")
        print(f"{'':9}  steps " + " ".join(f"{step:.3f}" for step in figures["steps_s"]))
    if row.get("stock", {}).get("text") == "embeddings":
        print("stock was given its text embeddings: the text encoder does not fit beside the rest")
    if "ratio" in row:
        print("stock / ours: " + ", ".join(f"{key} {value:.2f}" for key, value in row["ratio"].items()))
    if "floors" not in row:
        print("No floors beside it: they are for a GPU and the true sizes.")
    for side, figures in row.get("floors", {}).items():
        print(
            f"{side}: took / floor (products + bytes): "
            + ", ".join(
                f"{key.removesuffix('_s')} {cell['took_s']:.3f} / {cell['floor_s']:.3f} "
                f"({cell['product_s']:.3f} + {cell['moved_s']:.3f}), {cell['took_s'] / cell['floor_s']:.2f} x"
                for key, cell in figures.items()
            )
        )


COLUMNS = {
    "encode": ("image_s",),
    "denoise": ("latents_s", "steps_s"),
    "decode": ("decode_s",),
    "whole": ("image_s", "steps_s", "decode_s", "total_s"),
}
"""What is shown of a stage's cases."""


def print_switches(name: str, row: Mapping[str, Any]) -> None:
    """A line a switch, each beside the default of its stage."""
    shown = list(dict.fromkeys(key for stage in row for key in COLUMNS[stage.split(",")[0]]))
    print(f"\n{name}, switches; x: times the default's")
    heads = {"image_s": "encode", "latents_s": "to latents", "steps_s": "step", "decode_s": "decode", "total_s": "all"}
    print(f"{'':26}" + "".join(f"{heads[key]:>18}" for key in shown) + f"{'peak GB':>9}{'prepared':>11}")
    for stage, cases in row.items():
        for case, figures in cases.items():
            if "failed" in figures:
                print(f"{case:26} {figures['failed']}")
                continue
            cells = []
            for key in shown:
                value, base = (_number(side.get(key)) for side in (figures, cases.get("default", {})))
                cells.append(f"{value:9.3f} s {value / base:4.2f} x" if key in COLUMNS[stage.split(",")[0]] else "")
            print(
                f"{case:26}" + "".join(f"{cell:>18}" for cell in cells) + f"{figures['peak_gb']:9.2f}"
                f"{figures['warm_up']['prepared_s']:9.2f} s"
            )


def _number(value: Any) -> float:
    return median(value) if isinstance(value, list) else math.nan if value is None else value


def print_start(name: str, row: Mapping[str, Any]) -> None:
    """A line a start."""
    print(f"\n{name}, from process start to the first step; seconds")
    for cache, phases in row.items():
        print(f"  {cache}: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items()))


def print_targets(result: Mapping[str, Any], floor_s: Mapping[str, tuple[float, float]]) -> None:
    """Every target of performance.md with what this run says of it; `floor_s`: of a shape, eager and compiled."""
    rows = []
    for name, wanted_s in TARGETS.items():
        row = result["compare"].get(name, {})
        least = " (floors {:.1f}, compiled {:.1f})".format(*floor_s[name]) if name in floor_s else ""
        rows.append((f"{name}: photo in → mp4 out, s{least}", "≤", wanted_s, row.get("ours", {}).get("total_s")))
        rows.append((f"{name}: the same, all together", "≤", wanted_s, row.get("together", {}).get("total_s")))
        rows.append((f"{name}: stock / ours", "≥", TARGET_RATIO, row.get("ratio", {}).get("total_s")))
    cold_s = result["start"].get("5b", {}).get("cold", {}).get("to the first step")
    rows.append(("5b: process start → first step, weights on disk, s", "≤", TARGET_START_S, cold_s))
    print(f"\n{'for one H100; here: ' + result['conditions']['device']:66}{'wanted':>8}{'measured':>10}")
    for what, sign, wanted, measured in rows:
        if measured is None:
            print(f"{what:66}{f'{sign} {wanted:g}':>8}  not measured")
        else:
            met = measured <= wanted if sign == "≤" else measured >= wanted
            print(f"{what:66}{f'{sign} {wanted:g}':>8}{measured:10.2f}  {'met' if met else 'missed'}")


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


def host_of(subject: Subject) -> Host:
    """What decides which cases there are: here, or on the GPU that a plan is for."""
    shape, device = subject.shape, subject.device
    taken = choose_attention("auto", device, dtype_of(shape.preset, "transformer"))
    return Host(device.type == "cuda", taken, attentions(), subject.offload)


def planned_host() -> Host:
    """One GPU of 80 GB and more, with what is installed here."""
    installed = attentions()
    return Host(on_gpu=True, attention=installed[-1], attentions=installed, offload=Offload.NONE)


def attentions() -> list[str]:
    """The attention backends that are installed, the fastest on an H100 last."""
    return ["native", "_native_cudnn", *(["_flash_3"] if is_flash_attn_3_available() else [])]


def asked_for(on_gpu: bool) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES))
    parser.add_argument("--part", nargs="+", choices=PARTS)
    parser.add_argument("--plan", action="store_true", help="say what would run, and end")
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 2, help="one does on a GPU, after a short run")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of wall time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wan.json")
    parser.add_argument("--gpu", help="for whose rates floors are: H100 or H200; by default the one here, or an H100")
    parser.add_argument("--tflops", type=float, help="dense bf16 TFLOP/s that it attains")
    parser.add_argument("--tb-per-s", type=float, help="TB/s that its memory attains")
    asked = parser.parse_args()
    asked.part = asked.part or (ON_A_GPU if on_gpu or asked.plan else PARTS)
    asked.shape = asked.shape or (list(TARGETS) if on_gpu or asked.plan else ["tiny", "tiny-a14b"])
    return asked


def main() -> None:
    """Runs what fits into the budget, prints tables and writes JSON."""
    on_gpu = torch.cuda.is_available()
    asked = asked_for(on_gpu)
    shapes = [SHAPES[name] for name in asked.shape]
    device = torch.device("cuda" if on_gpu else "cpu")
    gpu = asked.gpu or (torch.cuda.get_device_name(device) if on_gpu else "H100")
    rates = rates_of(gpu, asked.tflops, asked.tb_per_s)
    disk_gb = SCRATCH_GB + max(STARTED.get(name, 0) for name in asked.shape) * ("start" in asked.part)
    runs = not asked.plan and bool(set(asked.part) & set(ON_A_GPU))
    needs.end_if(
        (needs.packages() if "compare" in asked.part and not asked.plan else [])
        + (needs.gpu([shape.name for shape in shapes if shape.true_size], GPU_GB, "--shape tiny") if runs else [])
        + (needs.compiler() if runs and on_gpu else [])
        + (needs.time(asked.budget_s, LEAST_S) if runs and on_gpu else [])
        + needs.room(Path(tempfile.gettempdir()), 0 if asked.plan else disk_gb, "models")
        + needs.room(asked.out.parent, 0, "results")
    )
    logs.configure("warning")
    quiet_libraries()
    if not on_gpu:
        torch.set_num_threads(1)  # the engine has a thread of its own: OpenMP's two pools would fight, 4 times slower
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("tiny", "tiny-a14b"):
            tiny.build(name, folder)
        bench = Bench(device, folder, rates, asked.rounds, Budget(asked.budget_s))
        if asked.plan:
            order = wan_plan.lines(shapes, asked.part, {shape.name: planned_host() for shape in shapes})
            counted = {shape.name: bench.counted(shape.name) for shape in shapes}
            wan_plan.print_plan(order, counted, rates, asked.rounds, asked.budget_s)
        else:
            run(bench, asked)


@dataclass
class Results:
    """What is known so far, in a file that is whole at any moment."""

    path: Path
    content: dict[str, Any]

    def save(self) -> None:
        """Replaces the file."""
        replace_file(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measures, and goes on after whatever failed: the next part may work, and device time is dear."""
        try:
            measure()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            self.content["skipped"].append(f"{what}: {type(error).__name__}: {error}"[:300])
        self.save()


def run(bench: Bench, asked: argparse.Namespace) -> None:
    """Everything that was asked for, in the plan's order."""
    results = Results(
        asked.out,
        {
            "at": datetime.now(UTC).isoformat(),
            "conditions": conditions(bench.device) | {"rounds": asked.rounds, "budget_s": asked.budget_s},
            "skipped": bench.budget.skipped,
            **{part: {} for part in PARTS},
        },
    )
    print(json.dumps(results.content["conditions"]), flush=True)
    if "floors" in asked.part:
        for name in TARGETS:
            results.attempt(f"floors {name}", lambda name=name: run_floors(bench, name, results))
    if "encode" in asked.part:
        results.attempt("encode", lambda: run_encode(asked.rounds, results))
    if "decode" in asked.part:
        results.attempt("decode", lambda: run_decode(asked.rounds, results))
    if set(asked.part) & set(ON_A_GPU):
        run_lines(bench, asked, results)
    for text in bench.budget.skipped:
        print(f"not run: {text}")


def run_floors(bench: Bench, name: str, results: Results) -> None:
    """Counts a shape anew, for the table and for plans to come."""
    shape = SHAPES[name]
    row = floors(known(shape, bench.folder, again=True), shape.preset.schedule.steps, bench.rates)
    results.content["floors"][name] = row
    print_floors(shape, row, bench.rates)


def run_encode(rounds: int, results: Results) -> None:
    """Measures the steady encode."""
    row = results.content["encode"] = wan_vae.encode(rounds)
    wan_vae.print_encode(row)


def run_decode(rounds: int, results: Results) -> None:
    """Measures the exact decode."""
    row = results.content["decode"] = wan_vae.decode(rounds)
    wan_vae.print_decode(row)


def run_lines(bench: Bench, asked: argparse.Namespace, results: Results) -> None:
    """What runs models, line by line; those of a shape are made once where its lines follow one another."""
    subjects = {name: Subject(SHAPES[name], bench.device, bench.folder) for name in asked.shape}
    shapes = [subject.shape for subject in subjects.values()]
    hosts = {name: host_of(subject) for name, subject in subjects.items()}
    made: list[Subject] = []
    for line in wan_plan.lines(shapes, [part for part in asked.part if part in ON_A_GPU], hosts):
        subject = subjects[line.shape.name]
        while made and made[-1] is not subject:
            made.pop().forget()
        made = [subject]
        results.attempt(
            f"{line.part} {line.shape.name}",
            lambda line=line, subject=subject: run_line(bench, subject, line, results),
        )
    steps = {name: SHAPES[name].preset.schedule.steps for name in TARGETS}
    totals = {
        name: tuple(whole(bench.counted(name)[form], steps[name]).seconds(bench.rates) for form in EAGER_AND_COMPILED)
        for name in TARGETS.keys() & subjects.keys()
    }
    print_targets(results.content, totals)
    if bench.device.type == "cpu":
        print("There is no CUDA device here: the table of the true sizes is empty. Above is the same program, tiny.")


def run_line(bench: Bench, subject: Subject, line: Line, results: Results) -> None:
    """Measures one line, and shows it."""
    name, part = line.shape.name, line.part
    rows, key = results.content[part], name
    if part == "switches":
        rows, key = rows.setdefault(name, {}), line.key

    def keep(row: Row) -> None:
        rows[key] = row
        results.save()

    match part:
        case "compare":
            keep(bench.compare(subject, line, keep))
            print_compare(name, rows[key])
        case "switches":
            keep(bench.switches(subject, line, keep))
            print_switches(name, {key: rows[key]})
        case "start":
            keep(start(subject, bench.folder, bench.budget))
            print_start(name, rows[key])


if __name__ == "__main__":
    main()
