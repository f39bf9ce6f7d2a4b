"""The tiny checkpoints: built here, always the same, and in the layout of the real ones."""

import hashlib
import json
import os
import stat

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from inference.engines.wan import tiny
from inference.engines.wan.placement import Placed
from inference.engines.wan.presets import MAX_PROMPT_TOKENS, PRESETS
from inference.engines.wan.text import PromptEncoder, clean
from inference.errors import WeightsError

CLASSES = {
    "text_encoder": UMT5EncoderModel,
    "vae": AutoencoderKLWan,
    "transformer": WanTransformer3DModel,
    "transformer_2": WanTransformer3DModel,
}


def digests(folder) -> dict[str, str]:
    """What every file holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_bytes_each_time(shape, weights_dir, tmp_path):
    """Whatever was drawn before, and without touching what is drawn after."""
    torch.manual_seed(4)
    before = torch.get_rng_state()
    torch.rand(3)
    drawn = torch.get_rng_state()
    again = tiny.build(shape, tmp_path)
    assert digests(again) == digests(weights_dir / shape)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(before, drawn)
    assert sorted(path.name for path in tmp_path.iterdir()) == [shape]


def test_one_that_is_there_stays(tmp_path):
    """Building twice is building once."""
    folder = tiny.build("tiny", tmp_path)
    config = folder / "vae" / "config.json"
    config.write_text("changed")
    assert tiny.build("tiny", tmp_path) == folder
    assert config.read_text() == "changed"


def test_others_may_read_it(tmp_path):
    """Built by one user, such as root in an image, and run by another; whatever the umask was."""
    umask = os.umask(0o077)
    try:
        folder = tiny.build("tiny-a14b", tmp_path)
    finally:
        os.umask(umask)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (folder, *folder.rglob("*"))}
    assert modes == {(True, 0o755), (False, 0o644)}


def test_a_real_preset_is_not_built(tmp_path):
    """Only the tiny ones are made of nothing."""
    with pytest.raises(ValueError, match="a14b-fast is not built here"):
        tiny.build("a14b-fast", tmp_path)


def test_the_classes_and_the_layout_of_the_real_ones(shape, weights_dir):
    """About a million parameters; transformers in shards with an index; every component of the preset."""
    total = 0
    for name in PRESETS[shape].components:
        folder = weights_dir / shape / name
        if name == "tokenizer":
            assert (folder / "tokenizer.json").is_file()
            continue
        assert json.loads((folder / "config.json").read_text()).get("_class_name", "x")
        total += sum(parameter.numel() for parameter in CLASSES[name].from_pretrained(folder).parameters())
    assert 5e5 < total < 2e6
    shards = list((weights_dir / shape / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1


def test_the_text_encoder_is_loaded_whole(shape, weights_dir):
    """Its embedding table too: tied weights have been lost between versions of transformers."""
    from safetensors.torch import load_file

    saved = load_file(weights_dir / shape / "text_encoder" / "model.safetensors")
    model = UMT5EncoderModel.from_pretrained(weights_dir / shape / "text_encoder")
    assert torch.equal(model.get_input_embeddings().weight, saved["shared.weight"])


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("  slow\n\tdolly-in ", "slow dolly-in"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("천천히  줌인", "천천히 줌인"),
        ("caf\u00c3\u00a9", "café"),  # UTF-8 read as Latin-1, which ftfy mends
    ],
)
def test_prompts_are_cleaned_as_in_training(prompt, cleaned):
    """As wan/modules/tokenizers.py does it."""
    assert clean(prompt) == cleaned


class TestPromptEncoder:
    """Prompts into embeddings."""

    @pytest.fixture
    def prompts(self, weights_dir):
        """Over the tiny text encoder."""
        folder = weights_dir / "tiny"
        model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        return PromptEncoder(folder / "tokenizer", Placed("text_encoder", model, torch.device("cpu")))

    def encode(self, prompts, prompt) -> torch.Tensor:
        """In fp32 on the CPU."""
        with torch.inference_mode():
            return prompts.encode(prompt, device=torch.device("cpu"), dtype=torch.float32)

    def test_zeros_after_the_last_token(self, prompts):
        """512 places, whatever the prompt; an empty prompt is one token, the end."""
        for prompt, tokens in (("", 1), ("abc", 5)):
            embedded = self.encode(prompts, prompt)
            assert embedded.shape == (1, MAX_PROMPT_TOKENS, tiny.TEXT_DIM)
            assert (embedded[0].abs().sum(1) > 0).tolist() == [True] * tokens + [False] * (MAX_PROMPT_TOKENS - tokens)

    def test_a_long_prompt_is_cut_and_said_to_be(self, prompts, capsys):
        """After 512 tokens, the last of them the end."""
        embedded = self.encode(prompts, "word " * 1000)
        assert (embedded[0].abs().sum(1) > 0).all()
        assert "prompt_cut" in capsys.readouterr().out

    def test_the_same_prompt_only_once(self, prompts):
        """The least recently used is forgotten when there are too many."""
        for number in range(70):
            self.encode(prompts, f"prompt {number}")
        assert len(prompts._remembered) == 64
        assert "prompt 69" in prompts._remembered
        assert "prompt 0" not in prompts._remembered

    def test_a_damaged_tokenizer_is_a_weights_error(self, tmp_path):
        """Named by its path."""
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(WeightsError, match=r"tokenizer\.json"):
            PromptEncoder(tmp_path, None)
