"""The image with Wan2.2 in it: packages, then weights at their pinned revisions, then compiled code, settings, code.

A layer is built again when it or one below it changes. Weights, the largest by far, depend on packages and pins alone:
a change of code or of a setting moves no gigabyte. The transformer is compiled again, some minutes of the GPU, where
its own code has changed, or a setting of the engine, or the GPU.
"""

import modal

from images import BASE, with_code, with_packages
from inference.engines.wan.compiled import traced_code
from inference.engines.wan.presets import PRESETS
from inference.on_modal.bake import compile_kernels, fetch_weights
from inference.settings import Settings

WEIGHTS = "/weights"
HOURS = 3600

COMPILE_LIMIT_S = 1800
"""Weights are read, and two graphs are compiled: minutes. Longer than that, and the image does without."""

NOT_COMPILED_FOR = {"I2V_WAN_COMPILE", "I2V_WAN_PRESET"}
"""Settings of the engine that change nothing in what is compiled, or are told in another way."""


def wan_image(settings: Settings) -> modal.Image:
    """The image of one preset. The build gets no key but HF_TOKEN, if there is one; public weights need none."""
    preset, token = PRESETS[settings.wan_preset], settings.hf_token
    base = modal.Image.from_registry(BASE).apt_install("gcc", "libc6-dev")  # Triton compiles its launchers
    image = (
        with_packages(base, "wan")
        .env({"I2V_WEIGHTS_DIR": WEIGHTS})
        .run_function(
            fetch_weights,
            args=(preset.name, preset.pins),
            kwargs={"accept_non_commercial": True} if settings.accept_non_commercial else {},
            secrets=[modal.Secret.from_dict({"HF_TOKEN": token.get_secret_value()})] if token else [],
            timeout=4 * HOURS,
            cpu=4,
            memory=32 * 1024,  # MiB: weights published larger than they are run are saved again
        )
        .env({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    )
    if settings.wan_compile != "off" and not preset.built_here:
        switches = {
            name: value
            for name, value in settings.for_containers().items()
            if name.startswith("I2V_WAN_") and name not in NOT_COMPILED_FOR
        }
        image = image.run_function(
            compile_kernels,
            args=(preset.name, switches, traced_code()),
            kwargs={"limit_s": COMPILE_LIMIT_S},
            gpu=_exactly(settings.modal_gpu),
            timeout=COMPILE_LIMIT_S + 600,
            cpu=4,
            memory=32 * 1024,
        )
    return with_code(image, settings)


def _exactly(gpu: str) -> str:
    """The GPU that is asked for and no better one: an H100 may be an H200 (modal.com/docs/guide/gpu, 2026-11).

    What is compiled on an H200 fits no H100. Where a container gets a better one, it runs without, and says so.
    """
    kind, colon, count = gpu.partition(":")
    return f"{kind}!{colon}{count}" if kind.upper() == "H100" else gpu
