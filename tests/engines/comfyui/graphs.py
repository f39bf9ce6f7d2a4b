"""Graphs that tests send, in API format, and one as a template."""

from typing import Any

from inference.engines.comfyui.template import Template

FPS = 16


def wan(image: str = "x.png", *, steps: int = 3, prefix: str = "video/clip") -> dict[str, Any]:
    """A photo to a clip of 64 x 48 pixels, as Wan's own graph does it."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "wan.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "slow push", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["1", 1]}},
        "4": {"class_type": "LoadImage", "inputs": {"image": image}, "_meta": {"title": "The photo"}},
        "5": {
            "class_type": "WanImageToVideo",
            "inputs": {
                "positive": ["2", 0],
                "negative": ["3", 0],
                "vae": ["1", 2],
                "start_image": ["4", 0],
                "width": 64,
                "height": 48,
                "length": 9,
            },
        },
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["5", 0],
                "negative": ["5", 1],
                "latent_image": ["5", 2],
                "seed": 7,
                "steps": steps,
                "cfg": 5.0,
                "sampler_name": "uni_pc",
                "scheduler": "simple",
                "denoise": 1.0,
            },
            "_meta": {"title": "Sampling"},
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "CreateVideo", "inputs": {"images": ["7", 0], "fps": float(FPS)}},
        "9": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["8", 0], "filename_prefix": prefix, "format": "mp4", "codec": "h264"},
            "_meta": {"title": "Save the clip"},
        },
    }


def still(saver: str = "SaveImage", **inputs: Any) -> dict[str, Any]:
    """Pictures out of nothing, saved by one node: nine of 64 x 48 pixels."""
    empty = {"width": 64, "height": 48, "batch_size": 9, "color": 255}
    given = {"images": ["1", 0], "filename_prefix": "t", **inputs}
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": saver, "inputs": given},
    }


def template(**wrong: Any) -> Template:
    """`wan` as an operator prepares it: titles say what goes where. `wrong` replaces inputs of its sampler."""
    graph = wan()
    graph["5"]["inputs"] |= {"width": 160, "height": 96}
    graph["6"]["inputs"] |= wrong
    for node, title in {"2": "i2v:prompt", "4": "i2v:photo", "5": "i2v:frames i2v:size", "6": "i2v:seed"}.items():
        graph[node]["_meta"] = {"title": title}
    return Template(graph)
