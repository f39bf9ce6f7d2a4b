"""The least time that a clip can take: counted from its products and from the bytes that everything else moves.

`python -m tests.bench.wan --part floors` prints it, on any machine in a minute: the true classes run on tensors without
contents, and every operation is counted as the kernel that a GPU runs for it. Views are free. A product (linear layer,
convolution, attention) takes the longer of its arithmetic (torch's FLOP counter) and of reading and writing what it has
to. Every other operation takes the time of the bytes it reads and writes, as activations of hundreds of megabytes do
not stay in a cache of fifty.

What torch.compile makes one kernel of is counted as well: in a region that is compiled, operations between two products
read what they need once and write what others need once. That is what a perfect compiler would reach.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from inference.engines.wan import lean, steady, tokens, vae, yuv
from inference.engines.wan.presets import MAX_PROMPT_TOKENS
from inference.engines.wan.speed import Switches
from tests.bench.keeping import replace_file
from tests.bench.wan_models import TERA, Parts, Shape

Arithmetic = Literal["bf16", "tf32", "3xtf32", "fp32"]
Form = Literal["stock", "stock, bf16", "ours", "ours, compiled"]
FORMS: tuple[Form, ...] = ("stock", "stock, bf16", "ours", "ours, compiled")
STAGES = ("text", "encode", "step", "decode")

COUNTED = Path(__file__).parent / "results" / "wan_floors.json"

PROMPT_TOKENS = 32
"""Of a prompt of two dozen words. Ours encodes these, stock all 512."""

SECTOR_BYTES = 32
"""What a GPU reads at least (docs.nvidia.com/cuda/cuda-c-best-practices-guide, "Coalesced access to global memory")."""


@dataclass(frozen=True)
class Rates:
    """What a GPU can attain."""

    name: str
    tflop_per_s: float  # bf16, dense
    tb_per_s: float  # of its memory

    def of(self, arithmetic: Arithmetic) -> float:
        """TFLOP/s. TF32 has half of bf16's rate, three TF32 products make an fp32 one, and plain fp32 is slow."""
        share = {"bf16": 1.0, "tf32": 1 / 2, "3xtf32": 1 / 6, "fp32": 67 / 989}
        return self.tflop_per_s * share[arithmetic]


ATTAINABLE = {"H100": (790.0, 3.0), "H200": (790.0, 4.3)}
"""TFLOP/s in bf16 and TB/s that long products and copies reach on SXM modules: four fifths of 989, and nine tenths of
3.35 and 4.8 (performance.md; nominal figures: nvidia.com/en-us/data-center/h100 and h200)."""


def rates_of(gpu: str, tflop_per_s: float | None = None, tb_per_s: float | None = None) -> Rates:
    """Those of a GPU by its name, an H100's where it is not known; or those given."""
    name = next((known for known in ATTAINABLE if known in gpu), "H100")
    return Rates(name, tflop_per_s or ATTAINABLE[name][0], tb_per_s or ATTAINABLE[name][1])


@dataclass(frozen=True)
class Product:
    """One product: what it computes in, its FLOPs, and the bytes that it reads and writes."""

    arithmetic: Arithmetic
    flop: int
    bytes: int


@dataclass
class Work:
    """What was counted."""

    products: Counter[Product] = field(default_factory=Counter)
    moved_bytes: int = 0  # by all that is no product, in compiled regions by what a perfect compiler leaves

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Work":
        """From `saved()`."""
        products = Counter({Product(kind, flop, moved): n for kind, flop, moved, n in saved["products"]})
        return cls(products, saved["moved_bytes"])

    def saved(self) -> dict[str, Any]:
        """For JSON."""
        products = [[each.arithmetic, each.flop, each.bytes, n] for each, n in self.products.items()]
        return {"products": products, "moved_bytes": self.moved_bytes}

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.moved_bytes + other.moved_bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(Counter({product: n * times for product, n in self.products.items()}), self.moved_bytes * times)

    @property
    def tflop(self) -> float:
        """Of all products."""
        return sum(product.flop * n for product, n in self.products.items()) / TERA

    def product_s(self, rates: Rates) -> float:
        """Seconds of the products alone."""
        return sum(
            n * max(product.flop / TERA / rates.of(product.arithmetic), product.bytes / TERA / rates.tb_per_s)
            for product, n in self.products.items()
        )

    def moved_s(self, rates: Rates) -> float:
        """Seconds of everything else."""
        return self.moved_bytes / TERA / rates.tb_per_s

    def seconds(self, rates: Rates) -> float:
        """The floor."""
        return self.product_s(rates) + self.moved_s(rates)


@dataclass
class _Kernel:
    """One operation of a compiled region, by what it touches: storage → distinct views of it → bytes."""

    reads: dict[int, dict[Any, int]]
    writes: dict[int, dict[Any, int]]
    is_product: bool
    level: int = 0  # how many products come before it


class Traffic(TorchDispatchMode):
    """Counts the operations that run under it, on tensors without contents."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self._flops: dict[Any, int] = {}
        self._kernels: list[_Kernel] | None = None  # of the region that is being recorded
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no number is given twice

    @contextmanager
    def fusing(self, regions: Iterable[nn.Module]) -> Iterator[None]:
        """Takes each of `regions` for a module that is compiled."""
        hooks = [
            add(hook)
            for region in regions
            for add, hook in (
                (region.register_forward_pre_hook, lambda *_: self._begin()),
                (region.register_forward_hook, lambda _module, _given, result: self._end(result)),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        flop, result = self._run(func, args, kwargs, given)
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            result = result.transpose(1, 2).contiguous().transpose(1, 2)  # as flash-attention and cuDNN lay it out
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        changed, only_written = _changed(func, args, kwargs)
        old = {_storage(tensor) for tensor in given}
        new = [tensor for tensor in made if _storage(tensor) not in old]
        if not (new or changed) or func.overloadpacket in _ALLOCATING:
            return result
        read = [tensor for tensor in given if not any(tensor is each for each in only_written)]
        if flop:
            self._add_product(flop, given, read, new)
        self._add(read, [*new, *changed], is_product=bool(flop))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> tuple[int, Any]:
        """FLOPs of an operation, and its result."""
        if len(given) < 2 or torch.Tag.pointwise in func.tags:
            return 0, func(*args, **kwargs)
        key = (func, *(tensor.shape for tensor in given), str(kwargs), *(arg for arg in args if isinstance(arg, list)))
        if (known := self._flops.get(str(key))) is not None:
            return known, func(*args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **kwargs)
        flop = self._flops[str(key)] = counter.get_total_flops()
        return flop, result

    def _add_product(
        self, flop: int, given: list[torch.Tensor], read: list[torch.Tensor], new: list[torch.Tensor]
    ) -> None:
        """A product, and the copy that it makes of activations that do not lie one after the other."""
        touched = sum(map(touched_bytes, (*read, *new)))
        self.work.products[Product(_arithmetic(given), flop, touched)] += 1
        values = given[0]
        if values.dim() == 5 and not _dense(values):
            self.work.moved_bytes += touched_bytes(values) + values.numel() * values.element_size()

    def _add(self, read: list[torch.Tensor], written: list[torch.Tensor], *, is_product: bool) -> None:
        if self._kernels is None:
            if not is_product:
                self.work.moved_bytes += sum(map(touched_bytes, (*read, *written)))
            return
        self._kernels.append(_Kernel(self._touched(read), self._touched(written), is_product))

    def _touched(self, tensors: list[torch.Tensor]) -> dict[int, dict[Any, int]]:
        touched: dict[int, dict[Any, int]] = {}
        for tensor in tensors:
            storage = _storage(tensor)
            self._storages[storage] = tensor.untyped_storage()
            view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            touched.setdefault(storage, {})[view] = touched_bytes(tensor)
        return touched

    def _begin(self) -> None:
        self._kernels = []

    def _end(self, result: Any) -> None:
        """Counts what a perfect compiler leaves of the region."""
        kernels, self._kernels = self._kernels or [], None
        _set_levels(kernels)
        needed = {_storage(leaf): math.inf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        readers: dict[int, set[float]] = {storage: {level} for storage, level in needed.items()}
        for kernel in kernels:
            for storage in kernel.reads:
                readers.setdefault(storage, set()).add(kernel.level + (0.5 if kernel.is_product else 0))
        made_at: dict[int, int] = {}
        reads: dict[tuple[int, int], dict[Any, int]] = {}
        writes: dict[tuple[int, int], dict[Any, int]] = {}
        for kernel in kernels:
            if kernel.is_product:
                continue
            for storage, views in kernel.reads.items():
                if made_at.get(storage) != kernel.level:
                    reads.setdefault((kernel.level, storage), {}).update(views)
            for storage, views in kernel.writes.items():
                made_at[storage] = kernel.level
                if readers.get(storage, set()) - {kernel.level}:
                    writes.setdefault((kernel.level, storage), {}).update(views)
        for (_, storage), views in chain(reads.items(), writes.items()):
            self.work.moved_bytes += min(sum(views.values()), self._storages[storage].nbytes())
        self._storages.clear()


def _set_levels(kernels: list[_Kernel]) -> None:
    """Puts all that is no product as late as its readers allow, so that what is used late is not kept in memory."""
    before: list[set[int]] = []
    writers: dict[int, list[int]] = {}
    for index, kernel in enumerate(kernels):
        earlier = set(chain.from_iterable(writers.get(storage, []) for storage in (*kernel.reads, *kernel.writes)))
        before.append(earlier)
        kernel.level = max((kernels[each].level + kernels[each].is_product for each in earlier), default=0)
        for storage in kernel.writes:
            writers.setdefault(storage, []).append(index)
    latest: dict[int, int] = {}
    for index in reversed(range(len(kernels))):
        kernel = kernels[index]
        if not kernel.is_product:
            kernel.level = max(kernel.level, latest.get(index, kernel.level))
        for each in before[index]:
            latest[each] = min(latest.get(each, kernel.level), kernel.level)


_ALLOCATING = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}

_WRITES_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""Operations that change a tensor without reading it."""


def touched_bytes(tensor: torch.Tensor) -> int:
    """What reading or writing a tensor moves: values that are repeated once, and whole sectors where it has gaps."""
    sides = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride and size > 1]
    gap = min((stride for _, stride in sides), default=1)
    item = tensor.element_size()
    return math.prod(size for size, _ in sides) * item * max(1, min(gap, SECTOR_BYTES // item))


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata  # tensors without contents all have their data at 0
    return address


def _dense(values: torch.Tensor) -> bool:
    return values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last_3d)


def _changed(func: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation writes into, and those of them that it does not read."""
    changed = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return changed, changed if func._schema.name in _WRITES_ONLY else []


def _arithmetic(given: list[torch.Tensor]) -> Arithmetic:
    """What a GPU computes a product in: convolutions of fp32 in TF32, which is cuDNN's default in torch.

    Attention in fp32 is torch's memory-efficient kernel, which adds up three TF32 products. Linear layers stay in fp32.
    """
    if given[0].dtype != torch.float32:
        return "bf16"
    if given[1].dim() > 3:
        return "3xtf32" if len(given) > 2 and given[2].dim() > 3 else "tf32"
    return "fp32"


# What is counted


@dataclass(frozen=True)
class _Clip:
    """The stages of a clip of one shape, on models without contents."""

    parts: Parts

    def text(self, prompt_tokens: int) -> None:
        self.parts.text_encoder(self._empty(1, prompt_tokens, dtype=torch.long))  # the mask is a thousandth more

    def encode(self, *, ours: bool) -> None:
        shape = self.parts.shape
        frames = 1 if shape.preset.first_frame_is_clean else shape.frames
        if ours:
            vae.encode(self.parts.vae, self._empty(1, 3, 1, shape.height, shape.width), None, frames)
        else:
            self.parts.vae.encode(self._empty(1, 3, frames, shape.height, shape.width))

    def step(self) -> None:
        model, clean = self.parts.experts["transformer"], self.parts.shape.preset.first_frame_is_clean
        shown = self._empty(1, model.config.in_channels, *self._latents()[2:], dtype=model.dtype)
        text = self._empty(1, MAX_PROMPT_TOKENS, model.config.text_dim, dtype=model.dtype)
        tokens.velocity(model, shown, self._empty(), text, clean=clean)

    def decode(self, *, ours: bool) -> None:
        codec = self.parts.vae
        if ours:
            for frames in vae.decode(codec, self._empty(*self._latents())):
                yuv.to_yuv420p(frames)
        else:
            codec.decode(self._empty(*self._latents(), dtype=codec.post_quant_conv.weight.dtype))

    def _latents(self) -> tuple[int, ...]:
        config = self.parts.vae.config
        return self.parts.shape.latents(config.scale_factor_spatial, config.z_dim)

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, device=self.parts.device, dtype=dtype)


def count(shape: Shape, tiny_dir: Path) -> dict[Form, dict[str, Work]]:
    """Every stage of a clip in every form; `step` is one of them.

    stock: as the example of diffusers runs it, VAE in fp32, the whole clip at once, the prompt padded. stock, bf16:
    the same with the decoder in bf16, which is what performance.md counted. ours: as the engine runs it, with its
    default switches and without compiled blocks. ours, compiled: with those and with fused norms.
    """
    parts = Parts.make(shape, torch.device("meta"), tiny_dir)
    clip = _Clip(parts)
    counted: dict[Form, dict[str, Work]] = {}
    parts.undress()
    counted["stock"] = {
        "text": _counted(lambda: clip.text(MAX_PROMPT_TOKENS)),
        "encode": _counted(lambda: clip.encode(ours=False)),
        "step": _counted(clip.step),
        "decode": _counted(lambda: clip.decode(ours=False)),
    }
    for part in (parts.vae.decoder, parts.vae.post_quant_conv):
        part.to(torch.bfloat16)
    counted["stock, bf16"] = counted["stock"] | {"decode": _counted(lambda: clip.decode(ours=False))}
    switches = replace(Switches(), compile=None, fused_norms=None)
    parts.dress(switches)
    counted["ours"] = {
        "text": _counted(lambda: clip.text(PROMPT_TOKENS)),
        "encode": _counted(lambda: clip.encode(ours=True)),
        "step": _counted(clip.step),
        "decode": _counted(lambda: clip.decode(ours=True)),
    }
    parts.dress(replace(switches, fused_norms="inductor"))
    norms = [module for module in parts.vae.modules() if isinstance(module, lean.FusedNorm)]
    blocks = list(parts.experts["transformer"].blocks)
    counted["ours, compiled"] = counted["ours"] | {
        "step": _counted(clip.step, blocks),
        "decode": _counted(lambda: clip.decode(ours=True), norms),
    }
    return counted


def _counted(run: Callable[[], None], regions: Iterable[nn.Module] = ()) -> Work:
    traffic = Traffic()
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), traffic.fusing(regions), traffic:
        run()
    return traffic.work


def whole(stages: Mapping[str, Work], steps: int) -> Work:
    """A clip of `steps` steps."""
    return sum((work * (steps if name == "step" else 1) for name, work in stages.items()), Work())


def floors(counted: Mapping[Form, Mapping[str, Work]], steps: int, rates: Rates) -> dict[str, Any]:
    """Form → stage → its TFLOP, the TB that are moved beside products, and seconds of both and at least."""
    return {
        form: {
            name: {
                "tflop": work.tflop,
                "moved_tb": work.moved_bytes / TERA,
                "product_s": work.product_s(rates),
                "moved_s": work.moved_s(rates),
                "floor_s": work.seconds(rates),
            }
            for name, work in (*stages.items(), ("total", whole(stages, steps)))
        }
        for form, stages in counted.items()
    }


SAID: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "5b": {"step": {"moved_s": 0.29, "compiled": 0.05}, "decode": {"moved_s": 1.84}, "total": {"floor_s": 8.2}},
    "a14b-480p": {
        "encode": {"moved_s": 0.55},
        "step": {"moved_s": 0.81, "compiled": 0.12},
        "decode": {"moved_s": 0.67},
        "total": {"floor_s": 13.7},
    },
    "a14b-720p": {
        "encode": {"moved_s": 1.27},
        "step": {"moved_s": 1.87, "compiled": 0.27},
        "decode": {"moved_s": 1.55},
        "total": {"floor_s": 45.1},
    },
}
"""What performance.md has, counted before: see `print_floors`."""


def known(shape: Shape, tiny_dir: Path, *, again: bool = False) -> dict[Form, dict[str, Work]]:
    """As `count`, but counted once: the file beside the results keeps it for the libraries' versions and our own code.

    So a machine that is lent by the minute does not count, and a plan is quick.
    """
    of = {name: version(name).split("+")[0] for name in ("torch", "diffusers", "transformers")}  # +cpu or +cu130
    sources = [Path(__file__), *map(Path, (module.__file__ for module in (lean, steady, tokens, vae, yuv)))]
    of["code"] = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    try:
        saved = json.loads(COUNTED.read_text())
    except (OSError, ValueError):
        saved = {}
    if saved.get("of") != of:
        saved = {"of": of, "shapes": {}}
    if again or shape.name not in saved["shapes"]:
        counted = count(shape, tiny_dir)
        saved["shapes"][shape.name] = {
            form: {name: work.saved() for name, work in stages.items()} for form, stages in counted.items()
        }
        if shape.true_size:
            replace_file(COUNTED, json.dumps(saved) + "\n")
        return counted
    return {
        form: {name: Work.read(work) for name, work in stages.items()}
        for form, stages in saved["shapes"][shape.name].items()
    }


def print_floors(shape: Shape, row: Mapping[str, Any], rates: Rates) -> None:
    """A block a shape: a line a stage, three figures a form."""
    steps = shape.preset.schedule.steps
    print(
        f"\n{shape.name}: {shape.width}x{shape.height}, {shape.frames} frames, {steps} steps. Counted; seconds as an "
        f"{rates.name} could do it:\nproducts {rates.tflop_per_s:g} TFLOP/s in bf16, {rates.of('tf32'):g} in TF32, and "
        f"all else {rates.tb_per_s:g} TB/s"
    )
    print(f"{'':8}" + "".join(f"{form:>34}" for form in FORMS))
    print(f"{'':8}" + f"{'TFLOP':>9}{'s':>8}{'moved s':>9}{'floor s':>8}" * len(FORMS))
    for name in (*STAGES, "total"):
        cells = "".join(
            f"{cell['tflop']:9.1f}{cell['product_s']:8.3f}{cell['moved_s']:9.3f}{cell['floor_s']:8.3f}"
            for cell in (row[form][name] for form in FORMS)
        )
        print(f"{name:8}{cells}")
    said = SAID.get(shape.name, {})
    told = [
        f"{name} {what} {value:g} ({row[form][name][key]:.2f})"
        for name, values in said.items()
        for what, value in values.items()
        for form, key in [("ours, compiled", "moved_s") if what == "compiled" else ("stock, bf16", what)]
    ]
    if told:
        print("performance.md (here): " + ", ".join(told))
