"""The tiny checkpoints: the classes, folder layout and tensor names of the real ones, with random numbers in them.

They are built, never downloaded: 0.6 and 0.8 million parameters, the same bytes each time. Their videos are noise. They
let tests, and a first trial on any machine, run all the code that production runs.

    tiny        as TI2V-5B: timesteps per token, VAE with patches and residual shortcuts, stride 16
    tiny-a14b   as I2V-A14B: two experts conditioned by channels, a LoRA file for each, VAE of stride 8
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import UMT5Config, UMT5EncoderModel

from inference.engines.wan.loading import quiet_libraries
from inference.engines.wan.lora import LAYERS

SEED = 22
MAX_SHARD_SIZE = "600KB"  # so that the transformers come in several files with an index, as the real ones do
LORA_RANK = 4
LORA_ALPHA = 2.0  # not the rank: an update that forgot to divide would show
TEXT_DIM = 64

# What both transformers share; the sizes that differ are z_dim of their VAEs (48 and 16) and what is concatenated.
_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

# Wan2.2's VAE, https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers/blob/main/vae/config.json, but for the widths.
_VAE_5B: dict[str, Any] = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "num_res_blocks": 1,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.02 * (channel % 7 - 3) for channel in range(48)],
    "latents_std": [0.5 + 0.05 * (channel % 5) for channel in range(48)],
}
_VAE_A14B: dict[str, Any] = {
    "base_dim": 4,
    "num_res_blocks": 1,
    "z_dim": 16,
}


def build(name: str, weights_dir: Path) -> Path:
    """Builds `tiny` or `tiny-a14b` in `weights_dir` and returns its folder; leaves one that is there alone.

    The folder appears whole or not at all, and anybody may read it. Raises ValueError for another name, OSError.
    """
    folder = weights_dir / name
    if folder.is_dir():
        return folder
    make = {"tiny": _build_5b, "tiny-a14b": _build_a14b}.get(name)
    if make is None:
        raise ValueError(f"{name} is not built here, but fetched")
    quiet_libraries()
    weights_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=weights_dir))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            make(staging)
        for path in (staging, *staging.rglob("*")):  # mkdtemp and save_file let nobody else read
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody was quicker, with the same bytes
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _build_5b(folder: Path) -> None:
    _save_shared(folder, _VAE_5B)
    _transformer(in_channels=48, out_channels=48).save_pretrained(folder / "transformer", max_shard_size=MAX_SHARD_SIZE)
    _save_index(folder, experts=("transformer",), boundary_ratio=None, expand_timesteps=True)


def _build_a14b(folder: Path) -> None:
    _save_shared(folder, _VAE_A14B)
    experts = {"transformer": "high", "transformer_2": "low"}
    (folder / "loras").mkdir()
    for expert, noise in experts.items():
        # Latents, a mask of four channels for the four frames of each latent one, and the latents of the photo.
        model = _transformer(in_channels=16 + 4 + 16, out_channels=16)
        model.save_pretrained(folder / expert, max_shard_size=MAX_SHARD_SIZE)
        save_file(_lora(model), folder / "loras" / f"{noise}_noise_model.safetensors")
    _save_index(folder, experts=tuple(experts), boundary_ratio=0.9, expand_timesteps=False)


def _transformer(**channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(**_TRANSFORMER, **channels)


def _save_shared(folder: Path, vae: dict[str, Any]) -> None:
    tokenizer = _tokenizer()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    config = UMT5Config(
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=False,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    AutoencoderKLWan(**vae).save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    ).save_pretrained(folder / "scheduler")


def _tokenizer() -> Tokenizer:
    """A Unigram over the bytes of UTF-8, so that it reads every prompt; ids 0 to 2 as UMT5's."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = Tokenizer(
        Unigram([*special, *((f"<0x{byte:02X}>", -4.0) for byte in range(256))], 2, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _lora(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """Low-rank updates of the attention and FFN layers under the names that lightx2v's files use."""
    tensors = {}
    for number, block in enumerate(model.blocks):
        for theirs, ours in LAYERS.items():
            weight = block.get_submodule(ours).weight
            prefix = f"diffusion_model.blocks.{number}.{theirs}"
            tensors[f"{prefix}.lora_down.weight"] = torch.randn(LORA_RANK, weight.shape[1]) * 0.1
            tensors[f"{prefix}.lora_up.weight"] = torch.randn(weight.shape[0], LORA_RANK) * 0.1
            tensors[f"{prefix}.alpha"] = torch.tensor(LORA_ALPHA)
    return tensors


def _save_index(folder: Path, *, experts: tuple[str, ...], **config: Any) -> None:
    """`model_index.json`, by which diffusers' own pipeline loads the same folder."""
    index = {
        "_class_name": "WanImageToVideoPipeline",
        **config,
        "image_encoder": [None, None],
        "image_processor": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if "transformer_2" in experts else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
