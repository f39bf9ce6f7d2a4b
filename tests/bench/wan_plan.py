"""What is measured of the Wan engine, in what order, and how long that should take.

First what decides whether targets are met, then what decides defaults. `python -m tests.bench.wan --plan` prints it, on
any machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from inference.engines.wan.placement import Offload
from inference.engines.wan.speed import Switches
from tests.bench.wan_floors import Form, Rates, Work
from tests.bench.wan_models import Shape

Stage = Literal["encode", "denoise", "decode", "whole"]
Part = Literal["compare", "switches", "start"]

SLACK = 2.0
"""Times the floor that a run is expected to take: diffusers was seen at 344 of 790 TFLOP/s, the best at 655."""

COMPILE_S = 45.0
"""To compile the blocks for two clips, or the VAE's norms for a dozen shapes; a guess."""

CACHED_S = 15.0
"""The same where inductor has it in its cache on disk; a guess."""

MODELS_S = 15.0
"""To make random models of a shape on a GPU, and the first allocations; a guess."""

TEXT_S = 0.5
"""Of a clip beside its floor: the photo is read, the last frames are encoded; a guess."""

START_S = 30.0
"""Of a start beside reading its weights: importing torch and diffusers twice; 7 to 9 s each on a slow CPU."""

SAVED_GB_PER_S = 0.5
STARTED = {"5b": 25.5, "tiny": 0.0}
"""Shapes whose start is measured, and GB of disk for their weights; the A14B's would take 70."""

ALTERNATIVES: Mapping[str, tuple[Any, ...]] = {
    "compile": ("inductor", None),
    "fused_norms": ("inductor", None),
    "fp8": (True, False),
    "attention": ("native", "_native_cudnn", "_flash_3"),
    "channels_last": (True, False),
    "yuv_on_device": (True, False),
    "zeros_in_convolutions": (False, True),
    "fewer_copies": (False, True),
    "plain_upsampling": (False, True),
    "shared_timesteps": (False, True),
    "offload": (Offload.TEXT, Offload.MODELS),
}
"""Of each switch, what it can be, the most telling first. What is the default is left out."""

NOT_OF_SPEED = frozenset({"only_compiled_ahead"})
"""Switches that say when something is made, not how a clip is."""

MEASURED_IN: Mapping[str, Stage] = {
    "compile": "denoise",
    "attention": "denoise",
    "fp8": "denoise",
    "shared_timesteps": "denoise",
    "offload": "whole",
}
"""The stage that a switch is about, where it is not the decode."""

EXACT_OFF: Mapping[str, Any] = {
    "shared_timesteps": False,
    "plain_upsampling": False,
    "zeros_in_convolutions": False,
    "fewer_copies": False,
    "yuv_on_device": False,
}
"""The engine without anything that leaves the pictures as they are."""

TOGETHER: Mapping[str, Any] = {"compile": "inductor", "fused_norms": "inductor"}
"""What would be run in production, beside the defaults: to tolerance, but not lossy."""


@dataclass(frozen=True)
class Host:
    """What cases depend on."""

    on_gpu: bool
    attention: str  # that `auto` takes
    attentions: Sequence[str]  # that are installed
    offload: Offload  # with which the models fit


@dataclass(frozen=True)
class Case:
    """One way to run the engine, or stock; and the stage that it is about."""

    name: str
    stage: Stage
    switches: Switches | None = None  # None: the stock pipeline
    steady: bool = True  # whether blank frames that repeat are encoded once

    @property
    def form(self) -> Form:
        """What its floor was counted for."""
        if self.switches is None:
            return "stock"
        return "ours, compiled" if self.switches.compile else "ours"

    @property
    def compiles(self) -> tuple[str, ...]:
        """What its first run compiles."""
        if self.switches is None:
            return ()
        blocks = "8-bit blocks" if self.switches.fp8 else "blocks"
        return (blocks,) * bool(self.switches.compile) + ("norms",) * bool(self.switches.fused_norms)


@dataclass(frozen=True)
class Line:
    """Cases of one shape that are measured together, against the first of them."""

    part: Part
    shape: Shape
    cases: tuple[Case, ...]
    rest: bool = False  # of a stage whose telling cases have a line of their own

    @property
    def key(self) -> str:
        """What its results are kept under: that of its stage."""
        return self.cases[0].stage + ", exact" * self.rest


def compared(host: Host) -> tuple[Case, ...]:
    """The default, all that is for production together, and stock."""
    together = (Case("together", "whole", Switches(**TOGETHER)),) if host.on_gpu else ()
    stock = (Case("stock", "whole"),) if host.offload <= Offload.TEXT else ()
    return (Case("ours", "whole", Switches()), *together, *stock)


def switched(shape: Shape, host: Host) -> Iterator[tuple[Case, ...]]:
    """Each switch alone, and all together, each stage with its default first; what decides most comes first."""
    by_stage: dict[Stage, list[Case]] = {"encode": [], "denoise": [], "decode": [], "whole": []}
    for name, values in ALTERNATIVES.items():
        stage = MEASURED_IN.get(name, "decode")
        for value in values:
            if _applies(name, value, shape, host):
                case = Case(f"{name} {_said(value)}", stage, replace(Switches(), **{name: value}))
                by_stage[stage].append(case)
    steady = not shape.preset.first_frame_is_clean
    if steady:
        by_stage["encode"].append(Case("steady encode off", "encode", Switches(), steady=False))
    if host.on_gpu:
        by_stage["whole"].append(Case("together, fp8", "whole", Switches(**TOGETHER, fp8=True)))
    by_stage["whole"].append(Case("all exact off", "whole", Switches(**EXACT_OFF), steady=not steady))
    for stage, cases in by_stage.items():
        if cases:
            yield (Case("default", stage, Switches()), *cases)


def _said(value: Any) -> str:
    """The value of a switch in a word."""
    if isinstance(value, Offload):
        return value.name.lower()
    return "on" if value is True else value or "off"


def _applies(name: str, value: Any, shape: Shape, host: Host) -> bool:
    """Whether it differs from the default, and can be."""
    match name:
        case "attention":
            return host.on_gpu and value in host.attentions and value != host.attention
        case "offload":
            return host.on_gpu and value > host.offload
        case "shared_timesteps" if not shape.preset.first_frame_is_clean:
            return False
        case "yuv_on_device":
            return bool(value != host.on_gpu)
        case "compile" | "fp8" if not host.on_gpu:
            return False
    default = next(field.default for field in fields(Switches) if field.name == name)
    return bool(value != default)


def lines(shapes: Sequence[Shape], parts: Sequence[Part], hosts: Mapping[str, Host]) -> list[Line]:
    """What is run, the most valuable first.

    The first shape against stock and with each of its switches, then what the other shapes take, then the rest. The
    others' switches say little more, but for the encode, which the 5B hardly has: who wants them names that shape.
    """
    order: list[Line] = []
    later: list[Line] = []
    for shape in shapes:
        host = hosts[shape.name]
        order.append(Line("compare", shape, compared(host)))
        switching = [Line("switches", shape, cases) for cases in switched(shape, host)]
        if shape is shapes[0]:
            told = [each for line in switching for each in _exact_apart(line)]
            order += [line for line in told if not (line.rest or line.cases[0].stage == "whole")]
            later += [line for line in told if line.rest or line.cases[0].stage == "whole"]
        else:
            order += [line for line in switching if line.cases[0].stage == "encode"]
        if shape.name in STARTED:
            later.append(Line("start", shape, ()))
    return [line for line in (*order, *later) if line.part in parts]


def _exact_apart(line: Line) -> list[Line]:
    """The cases whose default is not in doubt, as they only leave out copies, in a line of their own."""
    default, *cases = line.cases
    if default.stage != "decode":
        return [line]
    exact = [case for case in cases if case.name.split()[0] in EXACT_OFF and not case.name.startswith("yuv")]
    telling = [case for case in cases if case not in exact]
    return [replace(line, cases=(default, *telling)), replace(line, cases=(default, *exact), rest=True)]


@dataclass(frozen=True)
class Expected:
    """Seconds of a case: until it can be run, its short first run, and each measured one."""

    prepare_s: float
    first_s: float
    run_s: float

    def total_s(self, rounds: int, *, warms_up: bool = True) -> float:
        """Of all."""
        return self.prepare_s + (self.first_s if warms_up else 0) + rounds * self.run_s


def expected(
    case: Case, steps: int, counted: Mapping[Form, Mapping[str, Work]], rates: Rates, compiled: set[str]
) -> Expected:
    """From the floors of what it runs, times SLACK. `compiled`: what was compiled before, for this shape."""
    floor_s = {name: work.seconds(rates) for name, work in counted[case.form].items()}
    if not case.steady:
        floor_s["encode"] = counted["stock"]["encode"].seconds(rates)
    before_s, after_s = floor_s["text"] + floor_s["encode"], floor_s["decode"]
    if case.stage in {"encode", "denoise"}:
        after_s = 0.0
    ran = 1 if case.stage in {"encode", "decode"} else steps
    first_s, run_s = (SLACK * (before_s + n * floor_s["step"] + after_s) + TEXT_S for n in (1, ran))
    prepare_s = sum(CACHED_S if what in compiled else COMPILE_S for what in case.compiles)
    return Expected(prepare_s, first_s, run_s)


def warms_up(case: Case, line: Sequence[Case]) -> bool:
    """Whether its short first run does not count. It does where another case has loaded nearly the same kernels."""
    return case.stage in {"whole", "denoise"} or bool(case.compiles) or case is line[0]


def start_s(shape: Shape) -> float:
    """Seconds of a cold and a warm start, with what saving the weights takes."""
    return 2 * START_S + STARTED[shape.name] / SAVED_GB_PER_S


def print_plan(
    order: Sequence[Line],
    counted: Mapping[str, Mapping[Form, Mapping[str, Work]]],
    rates: Rates,
    rounds: int,
    budget_s: float,
) -> None:
    """A line a case, with what is left out for want of time."""
    print(
        f"What would run on an {rates.name}, in this order; seconds from floors times {SLACK:g}, compiling "
        f"{COMPILE_S:g} s (again {CACHED_S:g}) and making models {MODELS_S:g} s each, both guessed\n"
        f"{'':6}{'part':10}{'shape':11}{'case':28}{'stage':9}{'seconds':>8}{'by then':>9}"
    )
    spent_s, cut_s, made = 0.0, 0.0, ""
    compiled: dict[str, set[str]] = {}
    for line in order:
        shape = line.shape
        done = compiled.setdefault(shape.name, set())
        for case in line.cases or (None,):
            if case is None:
                name, stage, cost_s = "cold and warm", "start", start_s(shape)
            else:
                name, stage = case.name, str(case.stage)
                steps, sums = shape.preset.schedule.steps, counted[shape.name]
                cost_s = expected(case, steps, sums, rates, done).total_s(rounds, warms_up=warms_up(case, line.cases))
            cost_s += MODELS_S if shape.name != made else 0
            fits = spent_s + cost_s <= budget_s
            if fits:
                spent_s, made = spent_s + cost_s, shape.name
                done.update(case.compiles if case else ())
            else:
                cut_s += cost_s
            then = f"{spent_s:9.0f}" if fits else "      cut"
            print(f"{'' if fits else '  - ':6}{line.part:10}{shape.name:11}{name:28}{stage:9}{cost_s:8.0f}{then}")
    print(f"{spent_s:.0f} of {budget_s:.0f} s; another {cut_s:.0f} s would be needed for what is cut")
