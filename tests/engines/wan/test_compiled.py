"""Code compiled ahead: found where it belongs, refused with a reason where it does not, and never a reason to wait."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs
from torch._dynamo.utils import counters
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from inference import doctor
from inference.build.engines import compile_ahead
from inference.engines.base import Job
from inference.engines.wan import compiled
from inference.engines.wan.compiler import facts_of, nothing_new_compiled
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.placement import Offload, Placed
from inference.engines.wan.presets import PRESETS
from inference.engines.wan.speed import Switches
from inference.engines.wan.warming import warm_up
from inference.errors import CancelRequested, EngineFailed, EngineLost
from inference.settings import Settings
from tests.engines.wan.conftest import SMALL, make_engine, shared_models, tiny_weights
from tests.engines.wan.test_engine import frames_of
from tests.support.processes import environment

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own compiler

CPU = torch.device("cpu")
AREA_PX = 64 * 64
FACTS = {"torch": "2.13.0", "gpu": "NVIDIA H100 80GB HBM3", "code": "aa"}
AHEAD = Switches(compile="eager", only_compiled_ahead=True)  # of a compiler that has nothing to save
EMPTY = AppendingByteSerializer(serialize_fn=lambda *_: None).to_bytes()
"""A cache of torch's with nothing in it."""


def load(folder, switches, name="tiny", check=lambda: None) -> WanEngine:
    """An engine that looks for compiled code in `folder`."""
    torch.compiler.reset()
    counters.clear()
    return WanEngine.load(
        PRESETS[name],
        tiny_weights(),
        device=CPU,
        switches=switches,
        area_px=AREA_PX,
        compiled_dir=folder,
        check=check,
    )


def keep(folder, switches, artifacts=EMPTY, **other):
    """As a build does that has compiled for this machine, or for one that differs in something."""
    facts = facts_of(PRESETS["tiny"], CPU, switches, AREA_PX)
    return compiled.keep(folder, "tiny", facts | other, artifacts)


def test_what_was_kept_is_found(tmp_path):
    """By those for whom it was compiled."""
    compiled.keep(tmp_path / "new", "tiny", FACTS, b"cache")
    assert compiled.find(tmp_path / "new", "tiny", FACTS) == compiled.Found(b"cache")
    assert compiled.find(tmp_path / "new", "tiny-a14b", FACTS).artifacts is None


@pytest.mark.parametrize(
    "fact, here, said",
    [
        ("torch", "2.14.0", "torch 2.13.0, which is 2.14.0 here"),
        ("gpu", "NVIDIA H200", "gpu NVIDIA H100 80GB HBM3, which is NVIDIA H200 here"),
        ("code", "bb", "code aa, which is bb here"),
        ("fp8", "products", "fp8 ?, which is products here"),
    ],
)
def test_what_was_compiled_for_something_else_is_not_taken(tmp_path, fact, here, said):
    """And what differs is told, of the one that is nearest."""
    compiled.keep(tmp_path, "tiny", FACTS, b"cache")
    compiled.keep(tmp_path, "tiny", {"torch": "1", "gpu": "x", "code": "y"}, b"cache")
    found = compiled.find(tmp_path, "tiny", FACTS | {fact: here})
    assert found == compiled.Found(None, f"what {tmp_path} has was compiled for {said}", surprising=True)


def test_another_preset_is_not_taken_for_this_one(tmp_path):
    """Though its name begins with this one's: nothing was promised here, and nothing is told of it."""
    compiled.keep(tmp_path, "tiny-a14b", FACTS, b"cache")
    found = compiled.find(tmp_path, "tiny", FACTS)
    assert found == compiled.Found(None, f"nothing was compiled ahead in {tmp_path}")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),  # a disk that was full
        (lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[0]), "is damaged"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"{\ncache"), "cannot be read"),
        (lambda path: path.write_bytes(b"[]\ncache"), "is damaged"),
        (lambda path: path.unlink(), "nothing was compiled ahead"),
    ],
)
def test_damage_is_told(tmp_path, damage, said):
    """Not given to the compiler."""
    damage(compiled.keep(tmp_path, "tiny", FACTS, b"cache"))
    found = compiled.find(tmp_path, "tiny", FACTS)
    assert found.artifacts is None
    assert said in found.why


def test_those_who_compile_at_once_leave_what_is_whole(tmp_path):
    """As the first workers of a fleet do on a volume they share: what each saves differs a little."""
    contents = [bytes([number]) * 100_000 for number in range(4)]
    compiled.keep(tmp_path, "tiny", FACTS, contents[0])
    with ThreadPoolExecutor() as pool:
        keeping = [pool.submit(compiled.keep, tmp_path, "tiny", FACTS, content) for content in contents * 5]
        while not all(it.done() for it in keeping):
            assert compiled.find(tmp_path, "tiny", FACTS).artifacts in contents
    assert {it.result() for it in keeping} == set(tmp_path.iterdir())


def test_nothing_half_written_is_left(tmp_path):
    """Where it cannot be kept: here a folder is in its place."""
    path = compiled.keep(tmp_path, "tiny", FACTS, b"cache")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        compiled.keep(tmp_path, "tiny", FACTS, b"cache")
    assert list(tmp_path.iterdir()) == [path]


def test_a_build_that_could_not_says_why(tmp_path):
    """Until one can."""
    compiled.tell_failed(tmp_path, "tiny", "no GPU\nat all")
    found = compiled.find(tmp_path, "tiny", FACTS)
    assert found == compiled.Found(None, "compiling it ahead failed: no GPU at all", surprising=True)
    compiled.keep(tmp_path, "tiny", FACTS, b"cache")
    assert compiled.find(tmp_path, "tiny", FACTS).artifacts == b"cache"
    assert "compiled for" in compiled.find(tmp_path, "tiny", {}).why


def test_each_switch_that_changes_the_code_is_a_fact():
    """As are the preset and the size of its clips."""
    usual = Switches(compile="inductor")
    facts = facts_of(PRESETS["tiny"], CPU, usual, AREA_PX)
    others = [replace(usual, attention="math"), replace(usual, fp8=True), replace(usual, shared_timesteps=False)]
    differ = [facts_of(PRESETS["tiny"], CPU, each, AREA_PX) for each in others]
    differ += [facts_of(PRESETS["tiny-a14b"], CPU, usual, AREA_PX)]
    differ += [facts_of(PRESETS["tiny"], CPU, usual, None)]
    assert all(each != facts for each in differ)
    assert facts == facts_of(PRESETS["tiny"], CPU, replace(usual, only_compiled_ahead=True), AREA_PX)
    json.dumps(facts)


def test_with_nothing_compiled_ahead_nothing_is_compiled(tmp_path):
    """One line, which is no warning: nobody had promised anything."""
    with capture_logs() as logs:
        engine = load(tmp_path, AHEAD)
    assert (engine.compiled, dict(counters["stats"])) == (False, {})
    [told] = [it for it in logs if it["event"] == "runs_eagerly"]
    assert told["log_level"] == "info"
    assert engine.eager_because == told["why"] == f"nothing was compiled ahead in {tmp_path}"
    assert "warmed_up" not in {it["event"] for it in logs}


@pytest.mark.parametrize(
    "artifacts, other, said",
    [
        (EMPTY, {"torch": "2.12.0"}, "torch 2.12.0, which is"),
        (b"nonsense", {}, "the compiler cannot read what was compiled ahead: it is of another kind"),
    ],
)
def test_what_cannot_be_used_is_one_warning(tmp_path, artifacts, other, said):
    """And the engine runs without."""
    keep(tmp_path, AHEAD, artifacts, **other)
    with capture_logs() as logs:
        engine = load(tmp_path, AHEAD)
    [told] = [it for it in logs if it["log_level"] != "info"]
    assert said in told["why"]
    assert (engine.compiled, dict(counters["stats"])) == (False, {})


@pytest.mark.anyio
async def test_a_clip_that_nobody_foresaw_does_not_wait_for_the_compiler(tmp_path, photo, folder):
    """It runs eagerly: here as if nothing that was compiled fitted."""
    usual = frames_of(await make_engine("tiny").generate(SMALL, {"photo": photo}, folder, Job())).float()
    keep(tmp_path, AHEAD)
    engine = load(tmp_path, AHEAD)
    assert engine.compiled
    assert counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    counters.clear()
    clip = frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())).float()
    assert counters["stats"]["unique_graphs"] == 0
    assert (clip - usual).abs().mean() < 1


def test_a_compiler_that_fails_is_done_without(tmp_path):
    """One warning; the blocks of both experts are as they were."""

    def broken(*_):
        raise RuntimeError("no such instruction")

    with capture_logs() as logs:
        engine = load(tmp_path, Switches(compile=broken), "tiny-a14b")
    [told] = [it for it in logs if it["log_level"] != "info"]
    assert "compiling failed" in told["why"]
    assert told["why"].endswith("no such instruction")  # without torch's advice to its developers
    assert not engine.compiled
    for expert in engine._models.experts:
        assert all(block._compiled_call_impl is None for block in expert._model.blocks)
    assert list(tmp_path.iterdir()) == []
    warm_up(engine._models, engine.preset, AREA_PX)  # as a step would


def test_too_little_memory_to_warm_up_is_no_reason_to_give_up(tmp_path):
    """A clip that runs out of it is tried again with more offload; so the engine starts, without a compiler."""

    def short_of_memory(*_):
        def run(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return run

    engine = load(tmp_path, Switches(compile=short_of_memory))
    assert "CUDA out of memory" in engine.eager_because


def test_nothing_moves_to_be_run_eagerly():
    """Weights that visit the GPU are tens of gigabytes."""
    model = shared_models("tiny").experts[0]._model
    placed = Placed("transformer", model, torch.device("meta"))  # to which nothing can be moved and come back
    model.blocks[0].compile(backend="eager")
    placed.send_home()
    placed.run_eagerly()
    assert model.blocks[0]._compiled_call_impl is None


def test_a_way_out_is_told_where_there_is_one(tmp_path):
    """Compiling ahead would find the same obstacle that compiling has just met."""

    def told(switches):
        with capture_logs() as logs:
            load(tmp_path, switches)
        [line] = [it for it in logs if it["event"] == "runs_eagerly"]
        return line

    def broken(*_):
        raise RuntimeError("no such instruction")

    assert "i2v weights compile" in told(AHEAD)["way_out"]
    ahead = Switches(compile=broken, only_compiled_ahead=True)
    keep(tmp_path, ahead)
    unfit = told(ahead)
    assert unfit["why"].startswith("what was compiled ahead does not run here: ")
    assert "i2v weights compile" in unfit["way_out"]
    assert "way_out" not in told(Switches(compile=broken))
    assert "way_out" not in told(Switches(compile="eager", offload=Offload.BLOCKS))


def test_a_gpu_that_is_lost_meanwhile_is_no_failure_of_the_compiler(tmp_path):
    """Nothing would run there without it either."""

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(EngineLost, match="the GPU does not work any more"):
        load(tmp_path, Switches(compile=broken))


def test_compiling_can_be_stopped(tmp_path):
    """Between two graphs; that is no failure of the compiler's either."""
    asked = iter([False] * 3 + [True])  # the three components have been read

    def check():
        if next(asked):
            raise CancelRequested("stop")

    with pytest.raises(CancelRequested):
        load(tmp_path, Switches(compile="eager"), check=check)


def test_blocks_that_come_and_go_are_not_compiled(tmp_path):
    """Nor warmed up, which would move all of them for nothing."""
    with capture_logs() as logs:
        engine = load(tmp_path, Switches(compile="eager", offload=Offload.BLOCKS))
    assert "come and go" in engine.eager_because
    assert not {"warmed_up"} & {it["event"] for it in logs}


def test_what_is_not_in_the_cache_is_not_compiled(tmp_path, monkeypatch):
    """By the real compiler, for a graph that it does not know."""
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plus_one = torch.compile(lambda x: x + 1, backend="inductor")
    with nothing_new_compiled(), pytest.raises(Exception, match="does not find in its cache"):
        plus_one(torch.zeros(3))


def test_what_was_not_kept_was_not_compiled_ahead(tmp_path):
    """Told by whoever was to compile it, not by the next start. This compiler has nothing to save."""
    torch.compiler.reset()
    settings = Settings.isolated(
        wan_preset="tiny", weights_dir=tiny_weights(), wan_area_px=AREA_PX, wan_compiled_dir=tmp_path
    )
    with (
        torch.compiler.set_stance("default", force_backend="eager"),
        pytest.raises(
            EngineFailed, match=f"it compiled, but nothing was kept: nothing was compiled ahead in {tmp_path}"
        ),
    ):
        compile_ahead(settings)


async def finding(**settings):
    """What the doctor says of it."""
    given = Settings.isolated(engine="wan", wan_preset="tiny", weights_dir=tiny_weights(), **settings)
    return {it.name: it async for it in doctor.examine(lambda: given)}["compiled"]


@pytest.mark.anyio
async def test_the_doctor_says_whether_a_start_runs_compiled(tmp_path):
    """And why not; without it everything works, so that is no failure."""
    settings = {"wan_area_px": AREA_PX, "wan_compiled_dir": tmp_path}
    missing = await finding(**settings)
    assert (missing.verdict, f"nothing was compiled ahead in {tmp_path}" in missing.text) == ("skip", True)
    assert (await finding(**settings, wan_compile="off")).text.endswith("I2V_WAN_COMPILE is off")
    assert "takes minutes" in (await finding(**settings, wan_compile="on")).text
    keep(tmp_path, Switches(compile="inductor"))
    assert (await finding(**settings)).verdict == "ok"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_one_process_compiles_the_next_one_runs(tmp_path):
    """The real compiler: `i2v weights compile`, then a start that compiles nothing, and one that could not."""
    weights_dir = shutil.copytree(tiny_weights(), tmp_path / "weights")
    program = """
import json
from torch._dynamo.utils import counters
from inference.build.engines import build_engine
from inference.settings import Settings
engine = build_engine(Settings.load(engine="wan", wan_preset="tiny"))
print(json.dumps([engine.compiled, engine.eager_because, counters["inductor"], counters["stats"]]))
"""

    def run(number: int, *arguments: str, **settings: object) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments],
            env=environment(
                I2V_WEIGHTS_DIR=weights_dir,
                I2V_WAN_AREA=AREA_PX,
                TORCHINDUCTOR_CACHE_DIR=tmp_path / f"cache-{number}",  # what is found is what was kept
            )
            | {name: str(value) for name, value in settings.items()},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=400,
        )
        return ran.stdout.splitlines()[-1] if ran.stdout else ""

    run(1, "-m", "inference.commands.main", "weights", "compile", "tiny")
    is_compiled, why, inductor, stats = json.loads(run(2, "-c", program))
    assert (is_compiled, why) == (True, "")
    assert inductor["fxgraph_cache_hit"] == stats["unique_graphs"] > 0
    assert "fxgraph_cache_miss" not in inductor
    [path] = (weights_dir / "compiled").glob("*.bin")
    described = json.loads(path.read_bytes().partition(b"\n")[0])
    compiled.keep(path.parent, "tiny", described["facts"], EMPTY)  # as if the compiler had changed its mind
    is_compiled, why, inductor, _ = json.loads(run(3, "-c", program))
    assert not is_compiled
    assert "does not find in its cache" in why
    assert "fxgraph_cache_hit" not in inductor
