"""The Wan bench: what it counts, what it plans, what it keeps, and that stock is stock."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.nn import functional

from inference.engines.wan import tiny
from inference.engines.wan.placement import Offload
from inference.engines.wan.speed import Switches
from tests.bench import wan_plan, wan_vae
from tests.bench.wan import Bench, print_compare, run
from tests.bench.wan_floors import FORMS, Traffic, Work, _counted, floors, rates_of, touched_bytes, whole
from tests.bench.wan_measure import Budget, Terms, race
from tests.bench.wan_models import SHAPES, Parts
from tests.bench.wan_plan import ALTERNATIVES, Case, Expected, Host

ROOT = Path(__file__).parents[2]
META = torch.device("meta")
GPU = Host(on_gpu=True, attention="_native_cudnn", attentions=["native", "_native_cudnn"], offload=Offload.NONE)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    """Both tiny checkpoints."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("tiny", "tiny-a14b"):
        tiny.build(name, folder)
    return folder


def empty(*size, dtype=torch.bfloat16):
    """A tensor without contents."""
    return torch.empty(size, device=META, dtype=dtype)


def test_views_are_free_and_every_other_operation_moves_what_it_reads_and_writes():
    """Values are read once where they are repeated, in whole sectors where they lie apart, and copies are counted."""
    x = empty(10, 64)
    assert _counted(lambda: x.view(640).unflatten(0, (64, 10)).transpose(0, 1)).moved_bytes == 0
    assert _counted(lambda: x.transpose(0, 1).contiguous()).moved_bytes == 2 * 1280
    assert _counted(lambda: x + empty(64)).moved_bytes == 2 * 1280 + 128
    assert _counted(x.float).moved_bytes == 1280 + 2560
    assert _counted(x.zero_).moved_bytes == 1280
    assert _counted(lambda: x.mul_(2)).moved_bytes == 2 * 1280
    assert _counted(lambda: functional.rms_norm(x, (64,))).moved_bytes == 2 * 1280
    assert touched_bytes(x.expand(5, 10, 64)) == 1280
    assert touched_bytes(x[:, ::2]) == 1280
    assert touched_bytes(x[:, ::64]) == 10 * 32


def test_products_count_their_arithmetic_or_their_bytes_whichever_takes_longer():
    """A large product is bound by its FLOPs, one with few rows by reading its weights."""
    rates = rates_of("H100")
    linear = nn.Linear(4096, 4096, bias=False, device=META, dtype=torch.bfloat16)
    large, small = (_counted(lambda rows=rows: linear(empty(rows, 4096))) for rows in (8192, 1))
    assert large.tflop == pytest.approx(2 * 8192 * 4096**2 / 1e12)
    assert large.seconds(rates) == pytest.approx(large.tflop / 790)
    assert small.seconds(rates) == pytest.approx(2 * 4096 * (4096 + 2) / 3e12)
    assert large.moved_bytes == 0
    [convolution] = _counted(
        lambda: functional.conv3d(empty(1, 3, 4, 8, 8, dtype=torch.float32), empty(8, 3, 1, 1, 1, dtype=torch.float32))
    ).products
    [attention] = _counted(lambda: functional.scaled_dot_product_attention(*[empty(1, 2, 9, 8)] * 3)).products
    assert (convolution.arithmetic, attention.arithmetic) == ("tf32", "bf16")
    assert attention.flop == 4 * 2 * 9 * 9 * 8


class Chain(nn.Module):
    """Three operations, a product, two more with what was before it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False, device=META, dtype=torch.bfloat16)

    def forward(self, x):
        """[n, 64] → the same."""
        before = (x * 2 + 1).relu()
        return before + self.linear(before).sigmoid()


def test_in_a_compiled_region_only_what_crosses_a_product_is_read_and_written():
    """Eager: 2 + 2 + 2 + 2 + 3 times the tensor.

    Compiled: x is read and `before` written; then that and the product's result are read, and the end is written.
    """
    chain, x = Chain(), empty(100, 64)
    size = 100 * 64 * 2
    assert _counted(lambda: chain(x)).moved_bytes == 11 * size
    assert _counted(lambda: chain(x), [chain]).moved_bytes == 5 * size


def test_what_was_counted_is_the_same_after_reading_it_again_and_adds_up():
    """For plans, from the file."""
    traffic = Traffic()
    with torch.inference_mode(), traffic:
        Chain()(empty(100, 64))
    assert Work.read(json.loads(json.dumps(traffic.work.saved()))) == traffic.work
    twice = whole({"step": traffic.work}, 2)
    assert (twice.tflop, twice.moved_bytes) == (2 * traffic.work.tflop, 2 * traffic.work.moved_bytes)
    row = floors({"ours": {"step": traffic.work}}, 3, rates_of("NVIDIA H200"))["ours"]
    assert row["total"]["floor_s"] == pytest.approx(3 * row["step"]["floor_s"])
    assert rates_of("NVIDIA H200").tb_per_s > rates_of("H100").tb_per_s == 3.0


def test_stock_is_stock_after_every_switch_that_can_be_undone(tiny_dir):
    """The same classes, types, layouts and attention as freshly made models."""

    def described(parts):
        modules = [parts.vae, *parts.experts.values()]
        return (
            [[(name, type(each)) for name, each in model.named_modules()] for model in modules],
            [[(name, each.dtype, each.stride()) for name, each in model.named_parameters()] for model in modules],
            {
                getattr(each.processor, "_attention_backend", None)
                for each in parts.experts["transformer"].modules()
                if hasattr(each, "processor")
            }
            - {None, "native"},
        )

    for name in ("tiny", "tiny-a14b"):
        parts = Parts.make(SHAPES[name], torch.device("cpu"), tiny_dir)
        before = described(parts)
        parts.dress(Switches(channels_last=True, yuv_on_device=True))
        assert described(parts) != before
        parts.undress()
        assert described(parts) == before
        assert type(parts.vae) is AutoencoderKLWan
        assert {type(each) for each in parts.experts.values()} == {WanTransformer3DModel}


def test_every_switch_is_measured_alone_and_all_are_together():
    """A new switch that nobody measures would stay a guess."""
    assert ALTERNATIVES.keys() == {field.name for field in fields(Switches)} - wan_plan.NOT_OF_SPEED
    lines = list(wan_plan.switched(SHAPES["5b"], GPU))
    named = {case.name.split()[0] for cases in lines for case in cases}
    assert ALTERNATIVES.keys() <= named
    assert {"default", "all"} <= named
    assert all(cases[0].switches == Switches() for cases in lines)
    a14b = [case for cases in wan_plan.switched(SHAPES["a14b-480p"], GPU) for case in cases]
    assert [case.name for case in a14b if not case.steady] == ["steady encode off", "all exact off"]
    assert [case.name for case in wan_plan.compared(GPU)] == ["ours", "together", "stock"]


def test_a_plan_says_what_the_budget_cuts(capsys):
    """From made-up sums: a step of a second."""
    step = Work(moved_bytes=3 * 10**12)
    sums = {
        form: {"text": Work(), "encode": Work(), "step": step, "decode": step}
        for form in ("stock", "ours", "ours, compiled")
    }
    shape = SHAPES["5b"]
    order = wan_plan.lines([shape], ["compare", "start"], {"5b": GPU})
    wan_plan.print_plan(order, {"5b": sums}, rates_of("H100"), 1, 100)
    told = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    # ours: models, a first run of one step, a run of four, each with its decode, and half a second beside each
    assert told[0][-2:] == [str(15 + 2 * 2 + 2 * 5 + 1)] * 2
    assert [row[-1] for row in told[1:4]] == ["cut", "45", "cut"]


class Made:
    """A subject whose runs are made up: in the third the process is told to end."""

    device = torch.device("cpu")
    shape = SHAPES["tiny"]
    runs = 0

    def side(self, _case):
        """Any case's form."""
        return lambda: self.run

    def run(self, preset):
        """Half a second a step."""
        self.runs += 1
        if self.runs > 2:
            raise KeyboardInterrupt
        return {"latents_s": 1.0, "denoise_s": 0.5, "steps_s": [0.5] * preset.schedule.steps}


def test_what_was_measured_is_kept_when_the_next_run_ends_the_process():
    """Whoever is stopped keeps what there was."""
    kept = []
    terms = Terms(2, Budget(60), lambda _case: Expected(0, 0, 0))
    made = Made()
    with pytest.raises(KeyboardInterrupt):
        race(made, [Case("first", "denoise", Switches())], terms, kept.append)
    assert len(kept[-1]["first"]["runs"]) == 1
    assert kept[-1]["first"]["steps_s"] == [0.5] * made.shape.preset.schedule.steps


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    """Whatever became of it, there is nothing of it to print."""

    def fails(_rounds):
        raise RuntimeError("no room")

    monkeypatch.setattr(wan_vae, "encode", fails)
    monkeypatch.setattr(wan_vae, "decode", fails)
    asked = Namespace(part=["encode", "decode"], shape=[], rounds=1, budget_s=60, out=tmp_path / "wan.json")
    run(Bench(torch.device("cpu"), tmp_path, rates_of("H100"), 1, Budget(60)), asked)
    skipped = json.loads(asked.out.read_text())["skipped"]
    assert skipped == ["encode: RuntimeError: no room", "decode: RuntimeError: no room"]
    assert "not run: encode: RuntimeError: no room" in capsys.readouterr().out


SAVING = """
import itertools, json, sys
from pathlib import Path
from tests.bench.keeping import replace_file
for n in itertools.count(1):
    replace_file(Path(sys.argv[1]), json.dumps(list(range(1000 + n % 7))))
"""


def test_a_killed_run_leaves_a_whole_file(tmp_path):
    """However often it is killed, in whatever moment."""
    path = tmp_path / "new" / "wan.json"
    for _ in range(3):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", SAVING, str(path)], cwd=ROOT)
        while not path.exists():
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(json.loads(path.read_text())) >= 1000


class Summed(Bench):
    """A bench on a GPU, with sums that are quick to make."""

    def counted(self, _name):
        """A step of a second in every form."""
        step = Work(moved_bytes=3 * 10**12)
        return {form: dict.fromkeys(("text", "encode", "step", "decode"), step) for form in FORMS}


def test_on_a_gpu_what_was_measured_stands_beside_both_floors(tmp_path, capsys):
    """Of every stage, and of the whole; for a tiny model they would say nothing."""
    bench = Summed(torch.device("cuda"), tmp_path, rates_of("H100"), 1, Budget(60))
    took = {f"{stage}_s": 2.0 for stage in ("text", "image", "denoise", "decode", "mp4", "other")}
    took |= {"total_s": 9.0, "steps_s": [1.5] * 4, "peak_gb": 30.0}
    cases = wan_plan.compared(GPU)
    measured = {"ours": took, "together": took, "stock": {"failed": "no time"}}
    row = bench.beside(measured, "5b", cases)
    assert "ratio" not in row
    assert row["floors"]["ours"]["total_s"]["floor_s"] == 7.0
    head = {"tokens": 27280, "forward_tflop": 520.7, "offload": "none"}
    print_compare("5b", head | measured | row)
    told = capsys.readouterr().out
    assert "step 1.500 / 1.000 (0.000 + 1.000), 1.50 x" in told
    assert "total 9.000 / 7.000 (0.000 + 7.000), 1.29 x" in told
    assert "floors" not in bench.beside(measured, "tiny", cases)
