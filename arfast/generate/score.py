"""Log-probabilities of given text: log p(y | x) = sum over t of z_t[y_t] - logsumexp(z_t)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.generate.options import describe

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class SequenceScores:
    """What `score` returns.

    token_logprobs: float32 [B, T], aligned with input_ids: the natural log-probability of each token given those before
        it, 0 where none is scored.
    mask: bool [B, T], which tokens are scored.
    sums: float64 [B], their sums per sequence.
    num_tokens: int64 [B], their number.
    perplexity: float64 [B], exp(-sums / num_tokens); NaN for a sequence with none.
    """

    token_logprobs: Tensor
    mask: Tensor
    sums: Tensor
    num_tokens: Tensor
    perplexity: Tensor

    @property
    def corpus_perplexity(self) -> float:
        """Perplexity of all scored tokens together, which is not the mean of the sequences' perplexities."""
        return float(torch.exp(-self.sums.sum() / self.num_tokens.sum()))


@torch.no_grad()
def score(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> SequenceScores:
    """How likely a model finds each token of given sequences.

    The logits are never held whole: see `arfast.ops.linear_cross_entropy`. Logarithms are taken in float32 and added up
    in float64. A sequence longer than the context that the model was made for is refused: transformers runs on, and the
    numbers then mean little. `corpus_perplexity` slides a window over a long text.

    Args:
        model: a CausalLM.
        input_ids: int64 [B, T], in [0, vocab_size), at most max_position_embeddings per sequence; padding not counted.
        prompt_lengths: [B], how many tokens at the start of each sequence, padding not counted, are given and not
            scored. None: all but the first, which nothing predicts, are scored.
        attention_mask: [B, T], 0 for padding, on either side. None: no padding.

    Raises:
        ValueError: `score: <argument> must <rule>, got <actual>`; also when a log-probability is NaN.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> scores = score(model, torch.tensor([[1, 2, 3, 4]]), prompt_lengths=[2])
        >>> scores.num_tokens.tolist()
        [2]
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.dim() != 2:
        raise ValueError(f"score: input_ids must be an int64 tensor [B, T], got {describe(input_ids)}")
    real = _real_tokens(input_ids, attention_mask)
    _check_tokens(input_ids[real], real.sum(-1), model.config)
    position = real.cumsum(-1) - 1
    mask = real & (position >= _prompt_lengths(prompt_lengths, real).clamp(min=1)[:, None])
    labels = input_ids.masked_fill(~mask, _IGNORED)
    logprobs = torch.zeros(input_ids.shape, device=input_ids.device)
    # the loss of predicting a token is reported at the token before it
    if bool(real.all()):
        loss = model(input_ids, labels=labels, reduction="none").loss
        logprobs[:, 1:] -= loss[:, :-1]
    else:
        offsets = F.pad(real.sum(-1).cumsum(0), (1, 0)).int()
        loss = model(input_ids[real][None], labels=labels[real][None], cu_seqlens=offsets, reduction="none").loss
        logprobs[real] -= F.pad(loss, (1, -1)).flatten()
    sums = logprobs.double().sum(-1)
    broken = sums.isnan().nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"score: logits must not be NaN, got NaN in sequences {broken}")
    num_tokens = mask.sum(-1)
    return SequenceScores(logprobs, mask, sums, num_tokens, torch.exp(-sums / num_tokens))


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool [B, T]: what is not padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(input_ids.shape)}, got {list(attention_mask.shape)}"
        raise ValueError(f"score: attention_mask must have the shape of input_ids, {shapes}")
    return attention_mask.to(input_ids.device) != 0


def _check_tokens(tokens: Tensor, lengths: Tensor, config: Any) -> None:
    """tokens [N], what is not padding; lengths [B]."""
    longest, limit = int(lengths.max()) if len(lengths) else 0, config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"score: input_ids must have at most max_position_embeddings={limit} tokens, got {longest}")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(wrong) > 0:
        raise ValueError(f"score: input_ids must be in [0, vocab_size={config.vocab_size}), got {int(wrong[0])}")


def _prompt_lengths(lengths: Tensor | Sequence[int] | None, real: Tensor) -> Tensor:
    batch = len(real)
    if lengths is None:
        return torch.ones(batch, dtype=torch.int64, device=real.device)
    lengths = torch.as_tensor(lengths, device=real.device)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"score: prompt_lengths must be one integer per sequence, [{batch}], got {describe(lengths)}")
    if bool(((lengths < 0) | (lengths > real.sum(-1))).any()):
        limits = real.sum(-1).tolist()
        raise ValueError(f"score: prompt_lengths must be in [0, number of tokens], {limits}, got {lengths.tolist()}")
    return lengths
