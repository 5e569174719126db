"""Shapes of models by their number of parameters, for the sizes of a sweep."""

from __future__ import annotations

import math
from typing import Any

from arfast.models import CausalLMConfig

_MAX_HIDDEN_SIZE = 1 << 15


def model_shape(parameters: float, **options: Any) -> CausalLMConfig:
    """The model of the ladder below whose number of parameters is nearest, by ratio, to ``parameters``.

    Head tied to the embedding, which is counted once; one shape per width, in steps of 16 and later of the head: heads
    of 16 or 32 (64 from a width of 512 on, 128 from 2048 on), as many keys as heads, I = 8 d / 3 in steps of 32, and
    layers in a ratio d / L that goes from 32 at d = 64 to 128 at d = 4096, which is that of Llama 3 8B. Within a factor
    of two that ratio hardly changes the loss (Kaplan et al., arXiv:2001.08361, section 3.1).

    Args:
        options: ``vocab_size``, and any other field of `CausalLMConfig`.

    Raises:
        ValueError: the nearest model is not within a factor of two.

    >>> shape = model_shape(1e6, vocab_size=1024)
    >>> shape.hidden_size, shape.num_hidden_layers, shape.num_parameters()
    (144, 3, 894960)
    """
    ladder = list(_ladder(options, up_to=4 * parameters))
    nearest = min(ladder, key=lambda shape: abs(math.log(shape.num_parameters() / parameters)), default=None)
    if nearest is None or not 0.5 <= nearest.num_parameters() / parameters <= 2:
        found = "none" if nearest is None else f"{nearest.num_parameters():,} as the nearest"
        vocab_size = options["vocab_size"]
        raise ValueError(
            f"model_shape: parameters must be near those of a model with vocab_size={vocab_size}, "
            f"got {parameters:,.0f} ({found})"
        )
    return nearest


def non_embedding_parameters(config: CausalLMConfig) -> int:
    """Parameters without the embedding and the head."""
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_parameters() - tables * config.vocab_size * config.hidden_size


def _ladder(options, up_to):
    hidden_size = 32
    while hidden_size <= _MAX_HIDDEN_SIZE:
        if hidden_size < 512:
            head_dim = 16 if hidden_size % 32 else 32
        else:
            head_dim = 64 if hidden_size < 2048 else 128
        fields = dict(
            hidden_size=hidden_size,
            intermediate_size=32 * math.ceil(hidden_size / 12),
            num_hidden_layers=max(1, round(hidden_size / (32 * (hidden_size / 64) ** (1 / 3)))),
            num_attention_heads=hidden_size // head_dim,
            tie_word_embeddings=True,
        )
        shape = CausalLMConfig(**fields | options)
        yield shape
        if shape.num_parameters() > up_to:
            return
        hidden_size += 16 if hidden_size < 256 else head_dim
