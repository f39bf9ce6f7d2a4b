"""Beside the plain diffusers pipeline on the same weights, seed and schedule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from inference.engines.base import Job
from inference.engines.wan import vae
from inference.engines.wan.engine import WanEngine
from inference.engines.wan.presets import PRESETS, Schedule
from inference.media import photo as photos
from inference.task import GenerationRequest
from tests.engines.contract import landscape
from tests.engines.wan.conftest import shared_models, tiny_weights

EULER = Schedule("euler", 4, 5.0, (1.0, 0.75, 0.5, 0.25))
DMD = Schedule("dmd", 3, 1.0, (1.0, 0.757, 0.522))
UNIPC = Schedule("unipc", 6, 5.0)
NONE, STRONG = (1.0, 1.0), (3.5, 5.0)

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


def force_sigmas(scheduler, sigmas) -> None:
    """The pipeline can only say how many steps; this says which."""
    spread = scheduler.set_timesteps
    scheduler.set_timesteps = lambda _steps, device=None: spread(sigmas=np.asarray(sigmas), device=device)


def stock_pipeline(preset) -> WanImageToVideoPipeline:
    """Diffusers' own, from the same folder; LoRAs loaded and fused its way."""
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_weights() / preset.name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for lora in preset.loras:
        second = lora.expert == "transformer_2"
        path = tiny_weights() / lora.repository.folder / lora.path
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=lora.expert, load_into_transformer_2=second
        )
        pipeline.fuse_lora(components=[lora.expert], adapter_names=[lora.expert])
    if preset.loras:
        pipeline.unload_lora_weights()
    schedule = preset.schedule
    if schedule.solver == "unipc":
        config = pipeline.scheduler.config
        pipeline.scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=schedule.shift)
        force_sigmas(pipeline.scheduler, np.linspace(0.999, 0, schedule.steps + 1)[:-1])
    else:
        stochastic = schedule.solver == "dmd"
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift, stochastic_sampling=stochastic)
        force_sigmas(pipeline.scheduler, schedule.sigmas)
    return pipeline


def stock_latents(preset, request, photo, plan, last=None) -> torch.Tensor:
    """What the pipeline makes of a request: [1, z, T, h, w]."""

    def picture(path):
        return Image.fromarray(photos.load(path, (plan.width, plan.height)))

    pipeline = stock_pipeline(preset)
    config = pipeline.vae.config
    stride = config.scale_factor_spatial
    generator = torch.Generator().manual_seed(plan.seed)
    size = (1, config.z_dim, (plan.frames - 1) // 4 + 1, plan.height // stride, plan.width // stride)
    noise = torch.randn(size, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # the pipeline draws a stochastic solver's noise from here
        return pipeline(
            image=picture(photo),
            last_image=None if last is None else picture(last),
            prompt=request.prompt,
            negative_prompt=plan.negative_prompt,
            width=plan.width,
            height=plan.height,
            num_frames=plan.frames,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance[0],
            guidance_scale_2=plan.guidance[1] if preset.boundary else None,
            latents=noise,
            output_type="latent",
        ).frames


def our_latents(engine, request, inputs, plan) -> torch.Tensor:
    """The same from the engine, up to where it decodes."""
    job = Job()
    with torch.inference_mode():
        guide = engine._guide(request, plan)
        condition = engine._condition(inputs, plan, job)
        generator = torch.Generator().manual_seed(plan.seed)
        return engine._denoise(plan, guide, condition, engine._noise(plan, generator), generator=generator, job=job)


@pytest.mark.parametrize(
    "schedule, guidance", [(DMD, NONE), (EULER, NONE), (UNIPC, STRONG)], ids=["dmd", "euler", "unipc+cfg"]
)
def test_latents_are_those_of_the_pipeline(shape, schedule, guidance, photo):
    """Both shapes, every solver, with guidance and without; Korean, entities and double spaces in the prompt."""
    preset = replace(PRESETS[shape], schedule=schedule, guidance=guidance)
    engine = WanEngine(preset, shared_models(shape))
    request = GenerationRequest(prompt="천천히  줌인 &amp; pan\nleft", duration_s=0.5, max_area_px=96 * 64, seed=7)
    plan = engine._plan(request, {"photo": photo})
    ours = our_latents(engine, request, {"photo": photo}, plan)
    stock = stock_latents(preset, request, photo, plan)
    assert ours.shape == stock.shape
    assert stock.std() > 0.1
    assert (ours - stock).abs().max() < 2e-4 * stock.abs().max()


def test_a_last_photo_is_where_the_clip_ends(photo, tmp_path):
    """First and last frame: the A14B's shape can be told both, as the pipeline does it."""
    preset = PRESETS["tiny-a14b"]
    engine = WanEngine(preset, shared_models("tiny-a14b"))
    last = landscape(tmp_path / "last.jpg", (180, 320))
    request = GenerationRequest(prompt="", duration_s=0.5, max_area_px=96 * 64, seed=0)
    inputs = {"photo": photo, "last_photo": last}
    plan = engine._plan(request, inputs)
    ours = our_latents(engine, request, inputs, plan)
    stock = stock_latents(preset, request, photo, plan, last)
    assert (ours - stock).abs().max() < 2e-4 * stock.abs().max()
    without = our_latents(engine, request, {"photo": photo}, plan)
    assert (ours - without).abs().max() > 1e-3


@pytest.mark.parametrize("decode_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_streamed_frames_are_those_of_a_whole_decode(shape, decode_dtype):
    """Chunk by chunk, or all at once through diffusers' own decode: the same bytes."""
    model = stock_pipeline(PRESETS[shape]).vae.to(decode_dtype)
    latents = torch.randn(1, model.config.z_dim, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        chunks = list(vae.decode(model, latents))
        mean, std = vae._statistics(model, latents)
        whole = model.decode((latents * std + mean).to(decode_dtype), return_dict=False)[0]
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(chunks), vae.to_frames(whole))
    assert torch.cat(chunks).float().std() > 5  # pictures, not one colour


def test_a_photo_is_encoded_as_the_pipeline_does(shape):
    """The blank clip after it too, without ever holding it."""
    model = stock_pipeline(PRESETS[shape]).vae
    first, last = (torch.rand(1, 3, 1, 64, 96, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (1, 2))
    clip = torch.cat([first, torch.zeros(1, 3, 11, 64, 96), last], dim=2)
    with torch.inference_mode():
        ours = vae.encode(model, first, last, 13)
        mean, std = vae._statistics(model, ours)
        theirs = (model.encode(clip).latent_dist.mode() - mean) / std
    assert torch.allclose(ours, theirs, atol=1e-5)
