"""Loading: LoRAs in the weights, dtypes where they belong, damage told, switches that change nothing visible."""

import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from inference.engines.base import Job
from inference.engines.wan import speed, vae
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.loading import load
from inference.engines.wan.lora import fuse
from inference.engines.wan.placement import Offload
from inference.engines.wan.presets import PRESETS
from inference.engines.wan.speed import Float8Linear, Switches, _narrowed, to_fp8
from inference.errors import CancelRequested, SettingsError, WeightsError
from tests.engines.wan.conftest import SMALL, make_engine, tiny_weights
from tests.engines.wan.test_against_diffusers import our_latents
from tests.engines.wan.test_engine import frames_of
from tests.support.processes import environment

CPU = torch.device("cpu")


@pytest.fixture
def own_weights(tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_weights(), tmp_path / "weights")


@pytest.mark.parametrize("expert, noise", [("transformer", "high"), ("transformer_2", "low")])
def test_loras_are_in_the_weights(weights_dir, expert, noise):
    """W + alpha/rank · up · down for each layer of each expert."""
    models = load(PRESETS["tiny-a14b"], weights_dir, CPU, Switches())
    fused = models.experts[expert == "transformer_2"]._model
    plain = WanTransformer3DModel.from_pretrained(weights_dir / "tiny-a14b" / expert)
    update = load_file(weights_dir / "tiny-a14b" / "loras" / f"{noise}_noise_model.safetensors")
    names = [("attn1.to_q", "self_attn.q"), ("attn2.to_out.0", "cross_attn.o"), ("ffn.net.0.proj", "ffn.0")]
    for ours, theirs in names:
        prefix = f"diffusion_model.blocks.1.{theirs}"
        down, up, alpha = (update[f"{prefix}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        before = plain.blocks[1].get_submodule(ours).weight
        after = fused.blocks[1].get_submodule(ours).weight
        assert torch.allclose(after, before + alpha / 4 * up @ down, atol=1e-6)
        assert (after - before).abs().max() > 1e-3


def test_each_component_has_its_dtype(weights_dir):
    """bf16 transformer with fp32 norms and time embedding, fp32 encoder, bf16 decoder: as production loads them."""
    preset = PRESETS["tiny-a14b"]
    components = {name: replace(part, dtype="bf16") for name, part in preset.components.items()}
    models = load(replace(preset, components=components), weights_dir, CPU, Switches())
    for expert in models.experts:
        dtypes = {name: parameter.dtype for name, parameter in expert._model.named_parameters()}
        assert dtypes["blocks.0.ffn.net.2.weight"] == torch.bfloat16
        assert dtypes["blocks.0.norm2.weight"] == torch.float32
        assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert {p.dtype for p in models.vae.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in models.vae.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models.text_encoder._model.parameters()} == {torch.bfloat16}


def lora_file(path, change):
    """The tiny high-noise LoRA with something done to its tensors."""
    tensors = change(load_file(tiny_weights() / "tiny-a14b" / "loras" / "high_noise_model.safetensors"))
    save_file(tensors, path)
    return path


@pytest.fixture
def expert(weights_dir):
    """The high-noise transformer, as saved."""
    return WanTransformer3DModel.from_pretrained(weights_dir / "tiny-a14b" / "transformer")


def test_a_lora_is_read_by_either_name_and_scaled(expert, tmp_path):
    """With a prefix or without; half the scale is half the update; without alpha, it is the rank."""
    before = expert.blocks[0].attn1.to_q.weight.clone()
    bare = lora_file(tmp_path / "bare", lambda t: {name.removeprefix("diffusion_model."): t[name] for name in t})
    fuse(expert, bare, 0.5)
    half = expert.blocks[0].attn1.to_q.weight - before
    fuse(expert, lora_file(tmp_path / "same", lambda t: t), 0.5)
    assert torch.allclose(expert.blocks[0].attn1.to_q.weight - before, 2 * half, atol=1e-6)
    no_alpha = lora_file(tmp_path / "no", lambda t: {name: t[name] for name in t if "alpha" not in name})
    fuse(expert, no_alpha, -0.5)  # alpha 2 of rank 4 was half of it
    assert torch.allclose(expert.blocks[0].attn1.to_q.weight, before, atol=1e-6)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {f"model.{name}": t[name] for name in t}, "no layer for model"),
        (lambda t: t | {"diffusion_model.head.head.diff": torch.zeros(1)}, "no layer for diffusion_model.head"),
        (lambda t: {n: t[n] for n in t if "blocks.2" not in n}, "no update of block 2, self_attn.q"),
        (lambda t: {n: t[n] for n in t if not n.endswith("ffn.2.lora_up.weight")}, "block 0, ffn.2"),
        (lambda t: {n: t[n][:, :3].contiguous() if "down" in n else t[n] for n in t}, "another shape"),
    ],
    ids=["prefix", "leftover", "block", "half", "shape"],
)
def test_a_lora_that_does_not_fit_is_refused(expert, tmp_path, change, said):
    """Not fused in part, or not at all, with a warning: that would be 4 steps of a model trained for 40."""
    path = lora_file(tmp_path / "lora.safetensors", change)
    with pytest.raises(WeightsError, match=said):
        fuse(expert, path, 1.0)


def in_bf16(preset):
    """A tiny preset in the dtypes of production."""
    return replace(preset, components={name: replace(part, dtype="bf16") for name, part in preset.components.items()})


def distance(engine, exact, photo) -> float:
    """Between the latents of two engines, relative to the second's."""
    plan = exact._plan(SMALL, {"photo": photo})
    ours, theirs = (our_latents(each, SMALL, {"photo": photo}, plan) for each in (engine, exact))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.anyio
async def test_bf16_makes_what_fp32_does(shape, weights_dir, photo, folder):
    """The dtypes of production, on the CPU: latents within rounding, far from those of another prompt; and a clip."""
    engine, exact = WanEngine.load(in_bf16(PRESETS[shape]), weights_dir, device=CPU), make_engine(shape)
    off = distance(engine, exact, photo)
    assert 0 < off < 0.02
    assert (await engine.generate(SMALL, {"photo": photo}, folder, Job())).frames > 1


def test_shared_timesteps_change_nothing(photo):
    """Told once or to every token: the same latents."""
    assert distance(make_engine("tiny", shared_timesteps=False), make_engine("tiny"), photo) < 1e-3


SWITCHES = [
    {"plain_upsampling": False},
    {"zeros_in_convolutions": False},
    {"fewer_copies": False},
    {"fused_norms": "eager"},
    {"channels_last": True},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_how_the_decoder_works_is_not_seen(shape, switch):
    """Each is another way to the same picture, but for a rounding here and there."""
    usual, other = make_engine(shape)._models.vae, make_engine(shape, **switch)._models.vae
    latents = torch.randn(1, usual.config.z_dim, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, frames = (torch.cat(list(vae.decode(each, latents))).int() for each in (usual, other))
    assert (frames - expected).abs().max() <= 1


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.MODELS])
def test_fp8_is_close(shape, offload, photo):
    """A byte a weight in the blocks, embeddings and output as they were; latents near those of full weights."""
    engine = make_engine(shape, fp8=True, offload=offload)
    model = engine._models.experts[0]._model
    assert model.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert type(model.proj_out) is torch.nn.Linear
    assert 0 < distance(engine, make_engine(shape), photo) < 0.05


def test_products_in_fp8_are_those_of_what_was_narrowed():
    """Tokens and weights each lose bits, and nothing else does: the sum of their products is in bf16."""
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 32)
    values = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[None, :, None]  # tokens of very different size
    layer = Float8Linear(linear, multiply=True)
    tokens, scale = _narrowed(values.reshape(-1, 64))
    narrowed = (tokens.float() * scale) @ (layer.weight.float() * layer.scale).t() + linear.bias
    with torch.inference_mode():
        got = layer(values)
    assert got.shape == (2, 5, 32)
    off = (got.reshape(-1, 32) - narrowed).norm(dim=-1) / narrowed.norm(dim=-1)
    assert off.max() < 2**-8  # half of bf16's last place
    off = (got - linear(values)).norm(dim=-1) / linear(values).norm(dim=-1)
    assert off.max() < 0.08  # of each token, however small it is beside the others


def test_a_model_that_multiplies_in_fp8_is_close(shape, photo):
    """Latents stay near those of full weights; further away than with narrow weights alone."""
    exact, narrow, multiplied = make_engine(shape), make_engine(shape, fp8=True), make_engine(shape, fp8=False)
    for expert in multiplied._models.experts:
        to_fp8(expert._model, multiply=True)
    kept, products = distance(narrow, exact, photo), distance(multiplied, exact, photo)
    assert 0 < kept < products < 0.05


@pytest.mark.parametrize("sides, in_eight", [((64, 32), True), ((64, 24), False), ((40, 32), False)])
def test_layers_that_cuda_would_refuse_are_widened(sides, in_eight):
    """Its products of 8 bits want sides that are multiples of 16."""
    block = torch.nn.Module()
    block.layer = torch.nn.Linear(*sides)
    to_fp8(SimpleNamespace(blocks=[block]), multiply=True)
    assert block.layer._multiply == in_eight


@pytest.mark.parametrize("offload", [Offload.MODELS, Offload.BLOCKS], ids=lambda level: level.name.lower())
def test_compiled_and_offloaded(offload, photo):
    """Compiled blocks that visit, and, as out-of-memory would have it, ones that follow one another."""
    torch.compiler.reset()
    engine = make_engine("tiny", area_px=64 * 64, compile="eager", offload=offload)
    assert distance(engine, make_engine("tiny"), photo) < 1e-4
    if engine._models.offload_more():
        assert distance(engine, make_engine("tiny"), photo) < 1e-4


def test_attention_is_chosen_from_what_is_there():
    """Torch's own on the CPU; what is asked for by name is taken at its word, or told by the name of its setting."""
    assert speed.choose_attention("auto", CPU, torch.bfloat16) == "native"
    assert speed.choose_attention("_flash_3", CPU, torch.float32) == "_flash_3"
    with pytest.raises(SettingsError, match="I2V_WAN_ATTENTION"):
        make_engine("tiny", attention="nonsense")
    with pytest.raises(SettingsError, match="I2V_WAN_ATTENTION"):
        make_engine("tiny", attention="_flash_3")
    with pytest.raises(SettingsError, match="I2V_WAN_ATTENTION"):
        make_engine("tiny", attention="_flash_3_hub")  # would be fetched


@pytest.mark.parametrize(
    "file, damage, said",
    [
        ("vae/config.json", lambda path: path.write_text("{"), "vae"),
        ("vae/diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000]), "vae"),
        ("text_encoder/model.safetensors", lambda path: path.write_bytes(b"x" * 100), "text_encoder"),
        ("transformer/config.json", lambda path: path.write_text(path.read_text().replace("256", "8")), "transformer"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text("[]"), "tokenizer"),
    ],
)
def test_damage_is_told_by_its_component(own_weights, file, damage, said):
    """Cut short, garbled: a WeightsError of one line."""
    damage(own_weights / "tiny" / file)
    with pytest.raises(WeightsError, match=said) as caught:
        load(PRESETS["tiny"], own_weights, CPU, Switches())
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_an_error(own_weights):
    """Not a warning and whatever the memory held in their place."""
    path = own_weights / "tiny" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"vae .*lack tensors"):
        load(PRESETS["tiny"], own_weights, CPU, Switches())


def test_a_missing_file_names_the_step_that_makes_it(own_weights):
    """So that whoever built the image knows what it lacks."""
    (own_weights / "tiny" / "vae" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config.json is missing.*i2v weights fetch tiny"):
        load(PRESETS["tiny"], own_weights, CPU, Switches())


def test_loading_can_be_stopped(weights_dir):
    """Between components: nobody waits a minute for Ctrl-C."""
    job = Job()
    job.cancel(CancelRequested("stop"))
    with pytest.raises(CancelRequested):
        WanEngine.load(PRESETS["tiny"], weights_dir, device=CPU, check=job.raise_if_cancelled)


def test_nothing_is_asked_of_the_network(shape, weights_dir, monkeypatch):
    """Loading, with every connection refused at the socket and the hub not told to be offline."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(PRESETS[shape], weights_dir, CPU, Switches())


@pytest.mark.anyio
async def test_two_shapes_warm_up_for_all(shape, weights_dir, photo, folder):
    """After them, a clip of another shape and length runs what was compiled, block by block; and it is the usual one.

    Counting what is compiled would not show it: an engine that is ready runs eagerly what nothing compiled fits.
    """
    usual = frames_of(await make_engine(shape).generate(SMALL, {"photo": photo}, folder, Job())).float()
    torch.compiler.reset()
    runs = []

    def compiler(graph, _inputs):
        def run(*inputs):
            runs.append(graph)
            return graph(*inputs)

        return run

    switches = Switches(compile=compiler, offload=Offload.MODELS)  # nor does it matter that experts come and go
    engine = WanEngine.load(PRESETS[shape], weights_dir, device=CPU, switches=switches, area_px=64 * 64)
    runs.clear()
    clip = frames_of(await engine.generate(SMALL, {"photo": photo}, folder, Job())).float()
    blocks = {len(expert._model.blocks) for expert in engine._models.experts}
    assert blocks == {len(runs) // engine.preset.schedule.steps}
    assert (clip - usual).abs().mean() < 1


@pytest.mark.parametrize("chosen, spins", [({}, torch.cuda.is_available()), ({"OMP_WAIT_POLICY": "ACTIVE"}, True)])
def test_idle_threads_do_not_spin(chosen, spins):
    """As OpenMP itself tells when it is loaded: spinning cost several times the work. A person's choice stays."""
    [openmp] = Path(torch.__file__).parent.glob("lib/libgomp*")
    program = f"import ctypes, inference.engines.wan; ctypes.CDLL({str(openmp)!r})"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(OMP_DISPLAY_ENV="VERBOSE", **chosen),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ("GOMP_SPINCOUNT = '0'" not in ran.stderr) == spins
    assert "GOMP_SPINCOUNT" in ran.stderr
