"""Held-out loss in nats, as perplexity, and in bits per byte, which does not depend on the tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from arfast.generate.perplexity import CorpusScores, corpus_scores

from .inputs import model_inputs


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, ``model.eval()``, and the mode that was before at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bytes_per_token: float | None = None,
    max_tokens: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> CorpusScores | None:
    """Score batches (``input_ids, labels, cu_seqlens``) without label smoothing or z-loss.

    Args:
        bytes_per_token: bytes of text per target token over the whole split.
        max_tokens: end after the batch that reaches this many targets.
        stop: asked before each batch; when it says so, evaluation ends and None is returned.

    Raises:
        ValueError: there is no target token, or an argument is not positive.

    bits_per_byte = loss / (ln 2 * bytes_per_token).
    """
    for name, value in (("bytes_per_token", bytes_per_token), ("max_tokens", max_tokens)):
        if value is not None and not value > 0:
            raise ValueError(f"evaluate: {name} must be > 0, got {value}")
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            if stop():
                return None
            output = model(**model_inputs(batch, device), reduction="sum")
            total += float(output.loss)
            num_tokens += int(output.num_tokens)
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    if num_tokens == 0:
        raise ValueError("evaluate: batches must hold at least one target token, got none")
    return corpus_scores(total / num_tokens, num_tokens, bytes_per_token)
