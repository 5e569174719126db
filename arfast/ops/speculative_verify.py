"""Verification of drafted tokens: which of them a larger model accepts, and the token that follows them.

Speculative sampling: Leviathan, Kalman and Matias 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv
2302.01318, algorithm 2.
"""

import itertools

import torch
from torch import Tensor

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.sample import kept_weights, random_bits

_ops = torch.ops.arfast


def speculative_verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept drafts so that tokens are distributed as if each had been drawn from the target's own distribution.

    p is the distribution that `sample` draws from, given target_logits and the filters, and q the same of draft_logits,
    which must be what the draft was drawn from, with the same filters. Drafts are accepted in turn, x with probability
    min(1, p(x) / q(x)); instead of the first that is not, a token is drawn from max(0, p - q) / sum max(0, p - q).
    Behind a row's last draft a token is drawn from p. Without drafts this is `sample`; with temperature 0 drafts are
    accepted while they are the best token.

    All of it is arithmetic on the integer weights of `sample`, without rounding: a row gives the same tokens alone, in
    any batch, with any number of threads and on every device. Drafts with p = q are always accepted, those with p = 0
    never; with q = 0, not drawn from q, if p > 0. A draft row of nothing but -inf and NaN counts as q = 1.

    Args:
        target_logits: [B, G + 1, V], float32, bfloat16 or float16, or float64 on the CPU, which is rounded to float32;
            V < 2^24. Position i predicts the token at the place of draft i; rows behind a rejected draft are not used.
        draft_tokens: int64 [B, G]. The drafts of a row end at the first token outside [0, V), such as -1.
        draft_logits: [B, G, V], like target_logits; None: the drafts had probability 1, as those looked up in a text.
        temperature, top_k, top_p, min_p: as in `sample`, for target and draft.
        generator_state: [B, 3] int64, a row's (seed, sample, step), as in `sample`. Position i takes two random numbers
            that belong to step + i. The call adds the number of new tokens to the step, on the device. Drafts must be
            drawn from another stream, such as (seed, -1 - sample, step).

    Returns:
        tokens [B, G + 1] int64: accepted drafts, the token drawn, then -1; num_accepted [B] int32; logprobs
        [B, G + 1] float32, natural log-probabilities under the model's own distribution, log_softmax of target_logits,
        then 0. A row of logits with nothing but -inf and NaN gives token 0; with a NaN or +inf in it, NaN as
        log-probability. No gradient.

    Raises:
        RuntimeError: an argument does not fit: `speculative_verify: <argument> must <rule>, got <actual>`.

    Example:
        >>> target_logits, draft_logits = torch.randn(2, 4, 100), torch.randn(2, 3, 100)
        >>> draft_tokens = draft_logits.softmax(-1).view(-1, 100).multinomial(1).view(2, 3)
        >>> state = torch.tensor([[seed, 0, 0] for seed in (7, 8)])
        >>> tokens, *_ = speculative_verify(target_logits, draft_tokens, draft_logits, generator_state=state)
        >>> bool((state[:, 2] == (tokens >= 0).sum(1)).all())
        True
    """
    if needs_grad(target_logits, draft_logits):
        target_logits, draft_logits = (None if x is None else x.detach() for x in (target_logits, draft_logits))
    filters = (temperature, top_k, top_p, min_p)
    return _ops.speculative_verify(target_logits, draft_tokens, draft_logits, *filters, generator_state)


def speculative_verify_reference(target_logits, draft_tokens, draft_logits=None, *, generator_state, **filters):
    """The specification of `speculative_verify` in integers of any size, for V < 2^23; `generator_state` stays."""
    batch, num_positions, vocab_size = target_logits.shape
    tokens = torch.full((batch, num_positions), -1, device=target_logits.device)
    for b, (seed, sample, step) in enumerate(generator_state.tolist()):
        for i in range(num_positions):
            bits, x = random_bits(seed, sample, step + i), int(draft_tokens[b, i]) if i < num_positions - 1 else -1
            p = rest = kept_weights(target_logits[b, i : i + 1], **filters)[0].tolist()
            if 0 <= x < vocab_size:
                q = [] if draft_logits is None else kept_weights(draft_logits[b, i : i + 1], **filters)[0].tolist()
                q = q if any(q) else [int(v == x) for v in range(vocab_size)]
                p_mass, q_mass = sum(p), sum(q)
                if random_bits(seed, sample, step + i, 1) * q[x] * p_mass >> 48 < p[x] * q_mass:
                    tokens[b, i] = x
                    continue
                rest = [max(0, p_v * q_mass - q_v * p_mass) for p_v, q_v in zip(p, q)]
            tokens[b, i] = _draw(rest if any(rest) else p, bits)
            break
    wide = target_logits.float().to(torch.promote_types(target_logits.dtype, torch.float32))
    logprobs = torch.log_softmax(wide, -1).gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
    return tokens, (tokens >= 0).sum(-1, dtype=torch.int32) - 1, logprobs.masked_fill(tokens < 0, 0)


def _draw(weights, bits):
    """The first token at which the running sum of the weights exceeds the random number; 0 if all are 0."""
    number, running = bits * sum(weights) >> 48, itertools.accumulate(weights)
    return next((token for token, mass in enumerate(running) if mass > number), 0)


@register_fake("speculative_verify")
def _(target_logits, draft_tokens, *arguments):
    batch, num_positions = target_logits.shape[:2]
    return (
        target_logits.new_empty((batch, num_positions), dtype=torch.int64),
        target_logits.new_empty(batch, dtype=torch.int32),
        target_logits.new_empty((batch, num_positions), dtype=torch.float32),
    )
