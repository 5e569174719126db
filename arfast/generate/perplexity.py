"""Perplexity of a text that is longer than a model's context: exp(-1/N sum over t of log p(y_t | window before t))."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arfast.data.checks import check_integer
from arfast.generate.options import describe
from arfast.generate.score import score
from arfast.models.checks import is_integer


@dataclass(frozen=True, slots=True)
class CorpusScores:
    """What `corpus_perplexity` returns.

    loss: mean negative log-likelihood in nats per scored token.
    perplexity: its exponential.
    bits_per_byte: None when the number of bytes is not known; it does not depend on the tokenizer.
    num_tokens: how many tokens were scored.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int


def corpus_perplexity(
    model: Any,
    token_ids: Tensor | Sequence[int],
    *,
    seqlen: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    num_bytes: int | None = None,
    progress: bool = False,
) -> CorpusScores:
    """Perplexity of one stream of tokens by a window that slides over it.

    Window i sees seqlen tokens from i * stride on. The first window scores all its tokens but the first, which nothing
    predicts; every other one scores the tokens that the window before it did not reach, its last `stride`, so that each
    has at least seqlen - stride tokens before it. A smaller stride gives more context and a lower perplexity, for more
    work. With stride = seqlen the windows lie side by side, and the first token of each is not scored.

    This is the recipe of "Perplexity of fixed-length models" in the documentation of transformers with every token
    counted once: earlier versions of the recipe average the windows' mean losses, and the present one weights windows
    after the first by one token too few.

    Args:
        model: a CausalLM.
        token_ids: int64 [N] or integers, N >= 2.
        seqlen: tokens per window, in [2, max_position_embeddings]; None: max_position_embeddings.
        stride: tokens from window to window, in [1, seqlen]; None: seqlen.
        batch_size: windows at a time; the result depends on it by rounding alone.
        num_bytes: size of the text in UTF-8.
        progress: show a bar on stderr.

    Returns:
        CorpusScores, added up in float64. bits_per_byte = loss * (N - 1) / (ln 2 * num_bytes): tokens that no window
        scored count as much as the others.

    Raises:
        ValueError: `corpus_perplexity: <argument> must <rule>, got <actual>`; also when a log-probability is NaN.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> corpus_perplexity(model, list(range(100)), seqlen=16, stride=8).num_tokens
        99
    """
    limit = model.config.max_position_embeddings
    tokens = _as_tokens(token_ids)
    seqlen = limit if seqlen is None else seqlen
    if not (is_integer(seqlen) and 2 <= seqlen <= limit):
        raise ValueError(f"corpus_perplexity: seqlen must be in [2, max_position_embeddings={limit}], got {seqlen}")
    stride = seqlen if stride is None else check_integer("corpus_perplexity: stride", stride, 1, seqlen)
    check_integer("corpus_perplexity: batch_size", batch_size, 1)
    if num_bytes is not None:
        check_integer("corpus_perplexity: num_bytes", num_bytes, 1)
    nats, num_tokens = 0.0, 0
    batches = _batches(len(tokens), seqlen, stride, batch_size)
    for windows in tqdm(batches, disable=not progress, file=sys.stderr, unit="batch"):
        rows = torch.stack([tokens[begin:end] for begin, end, _ in windows])
        scores = score(model, rows.to(model.head_weight.device), prompt_lengths=[given for *_, given in windows])
        nats -= float(scores.sums.sum())
        num_tokens += int(scores.num_tokens.sum())
    return corpus_scores(nats / num_tokens, num_tokens, num_bytes and num_bytes / (len(tokens) - 1))


def corpus_scores(loss: float, num_tokens: int, bytes_per_token: float | None) -> CorpusScores:
    """A mean loss in nats in all its forms; the perplexity of a loss above 700 is infinite."""
    return CorpusScores(
        loss=loss,
        perplexity=math.inf if loss > 700 else math.exp(loss),
        bits_per_byte=loss / (math.log(2) * bytes_per_token) if bytes_per_token else None,
        num_tokens=num_tokens,
    )


def _batches(num_tokens: int, seqlen: int, stride: int, batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Windows of equal length together, each (begin, end, how many of its tokens are only seen)."""
    windows, end = [], 0
    while end < num_tokens:
        begin = len(windows) * stride
        given = max(end - begin, 0)
        end = min(begin + seqlen, num_tokens)
        windows.append((begin, end, given))
    last = windows.pop()  # the only one that may be shorter
    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)] + [[last]]


def _as_tokens(token_ids: Tensor | Sequence[int]) -> Tensor:
    tokens = torch.as_tensor(token_ids)
    if tokens.dim() == 1 and len(tokens) < 2:
        raise ValueError(f"corpus_perplexity: token_ids must hold at least two tokens, got {len(tokens)}")
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"corpus_perplexity: token_ids must be integers [N], got {describe(tokens)}")
    return tokens.long()
