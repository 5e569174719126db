"""Held-out loss in nats, as perplexity, and in bits per byte, which does not depend on the tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from arfast.generate.perplexity import CorpusScores, corpus_scores

from .strategy import OneProcess


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
    strategy: OneProcess | None = None,
) -> CorpusScores | None:
    """Score batches (``input_ids, labels, cu_seqlens``) without label smoothing or z-loss.

    Args:
        bytes_per_token: bytes of text per target token over the whole split.
        max_tokens: end after the batch that reaches this many targets.
        stop: asked before each batch; when it says so, evaluation ends and None is returned.
        strategy: spreads the batches over ranks, each of which returns the scores of all; None: one process.

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
        scores = (strategy or OneProcess()).score_batches(model, batches, device)
        while max_tokens is None or num_tokens < max_tokens:
            if stop():
                return None
            if (score := next(scores, None)) is None:
                break
            total += score[0]
            num_tokens += score[1]
    if num_tokens == 0:
        raise ValueError("evaluate: batches must hold at least one target token, got none")
    return corpus_scores(total / num_tokens, num_tokens, bytes_per_token)
