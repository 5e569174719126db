"""What a model under training makes of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig


def continuations(
    model: nn.Module, tokenizer: Any, config: TrainConfig, step: int, generate: Callable[..., Tensor] | None
) -> Iterator[dict[str, str]]:
    """``{"prompt": str, "text": str}`` for each of ``config.sample_prompts``, the same for the same step.

    Args:
        generate: called as ``arfast.generate.generate``; None: that.
    """
    if generate is None:
        from arfast.generate import generate
    device, greedy = next(model.parameters()).device, config.sample_temperature == 0
    for prompt in config.sample_prompts:
        prompt_ids = tokenizer.encode(prompt)
        tokens = generate(
            model,
            torch.tensor([prompt_ids], device=device),
            max_new_tokens=config.sample_tokens,
            do_sample=not greedy,
            temperature=1.0 if greedy else config.sample_temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=config.seed + step,
        )
        # A model may have more rows than the tokenizer has tokens; an untrained one draws them.
        new = [token for token in tokens[0, len(prompt_ids) :].tolist() if token < tokenizer.vocab_size]
        yield {"prompt": prompt, "text": tokenizer.decode(new)}
