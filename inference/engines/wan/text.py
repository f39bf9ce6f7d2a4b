"""UMT5 embeddings of prompts, cached by prompt."""

import html
from collections import OrderedDict
from pathlib import Path

import ftfy
import structlog
import torch
from tokenizers import Tokenizer

from inference.engines.wan.placement import Placed
from inference.engines.wan.presets import MAX_PROMPT_TOKENS
from inference.errors import WeightsError

REMEMBERED = 64
"""Prompts whose embeddings are kept: 8 kB a token for UMT5-XXL, so at most 270 MB, as a rule a few."""

log = structlog.get_logger(__name__)


class PromptEncoder:
    """Turns prompts into embeddings, the same prompt only once.

    The tokenizer is read from its own file and nothing else: transformers' wrappers have changed what they make of
    it between major versions.
    """

    def __init__(self, tokenizer_folder: Path, encoder: Placed) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises the bare class
            raise WeightsError(f"{tokenizer_folder / 'tokenizer.json'} cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_PROMPT_TOKENS)
        self._encoder = encoder
        self._remembered: OrderedDict[str, torch.Tensor] = OrderedDict()  # prompt → [tokens, d] in host memory

    def encode(self, prompt: str, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[1, 512, d]: the embeddings of the prompt's tokens, then zeros."""
        embedding = self.read(prompt)
        padded = torch.zeros(1, MAX_PROMPT_TOKENS, embedding.shape[1], device=device, dtype=dtype)
        padded[0, : len(embedding)] = embedding.to(device=device, dtype=dtype)
        return padded

    def read(self, prompt: str) -> torch.Tensor:
        """[tokens, d] in host memory: the embeddings of the prompt's tokens. One call at a time."""
        prompt = clean(prompt)
        embedding = self._remembered.get(prompt)
        if embedding is None:
            embedding = self._remembered[prompt] = self._embed(prompt)
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(prompt)
        return embedding

    def _embed(self, prompt: str) -> torch.Tensor:
        encoding = self._tokenizer.encode(prompt)
        if encoding.overflowing:
            log.warning("prompt_cut", tokens=sum(map(len, (encoding, *encoding.overflowing))), kept=MAX_PROMPT_TOKENS)
        # No padding: it would be masked out, and 512 tokens cost 25 times those of an ordinary prompt.
        with self._encoder.on_device() as encoder:
            tokens = torch.tensor([encoding.ids], device=self._encoder.device)
            hidden: torch.Tensor = encoder(tokens, torch.ones_like(tokens)).last_hidden_state
            return hidden[0].cpu()


def clean(prompt: str) -> str:
    """A prompt as the model was trained on them: mended, unescaped, single spaces (wan/modules/tokenizers.py)."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
