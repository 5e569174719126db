"""Where fine-tuning starts: a model directory's weights, configuration and tokenizer, checked against each other."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .adapter import load_base
from .data.files import read_file, write_file
from .data.tokenizer import MAX_FILE_BYTES, Tokenizer
from .models.causal_lm import CausalLM
from .models.config import CausalLMConfig
from .nn.lora import LoraConfig, apply_lora

# What transformers reads beside tokenizer.json: kept as they are, so that a fine-tuned chat model still chats.
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a model directory, which is saved with the files that stood beside it.

    >>> Tokenizer.train(["to be or not to be"], vocab_size=260).save("model")  # doctest: +SKIP
    >>> PretrainedTokenizer.load("model").vocab_size  # doctest: +SKIP
    260
    """

    side_files: dict[str, bytes] = {}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PretrainedTokenizer":
        """As `Tokenizer.load`.

        Raises:
            ValueError: a file beside tokenizer.json is not JSON, or too large.
        """
        tokenizer = super().load(path)
        present = [name for name in _SIDE_FILES if Path(path, name).is_file()]
        tokenizer.side_files = {name: _side_file(Path(path, name)) for name in present}
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        super().save(path)
        for name, content in self.side_files.items():
            write_file(Path(path) / name, content)


def _side_file(path: Path) -> bytes:
    """The content, without what would make transformers run code of others."""
    content = read_file(path.resolve(), MAX_FILE_BYTES)
    if path.suffix != ".json":
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"PretrainedTokenizer: {path.name} must be JSON, got: {error!s:.100}") from None
    if isinstance(value, dict) and value.pop("auto_map", None) is not None:
        content = json.dumps(value, indent=2, ensure_ascii=False).encode()
    return content


def load_pretrained(
    path: str | os.PathLike,
    *,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    seed: int = 0,
) -> tuple[CausalLM, PretrainedTokenizer]:
    """A model to train further, and its tokenizer.

    Args:
        path: a Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE directory with a tokenizer.json.
        lora: None trains all parameters, which are float32; else they are frozen, and `apply_lora` adds adapters.
        dtype: of the frozen parameters.
        seed: of the adapters.

    Raises:
        FileNotFoundError, ValueError: the directory lacks a file, or model and tokenizer do not fit.
    """
    tokenizer = PretrainedTokenizer.load(path)
    model = load_base(path, torch.float32 if lora is None else dtype, device)
    check_tokenizer(model.config, tokenizer)
    if lora is not None:
        apply_lora(model, **asdict(lora), seed=seed)
    return model, tokenizer


def check_tokenizer(config: CausalLMConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the tokenizer yields ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"load_pretrained: tokenizer must have at most the {config.vocab_size} tokens of the model, got "
            f"{tokenizer.vocab_size}"
        )
