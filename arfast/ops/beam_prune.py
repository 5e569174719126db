"""One step of beam search: the best continuations of all beams of a group, straight from the logits.

Log-softmax, addition of the running scores and top-k in one pass: the online normaliser of Milakov and Gimelshein 2018,
arXiv 1805.02867, section 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.ops._library import needs_grad, register_fake

_ops = torch.ops.arfast


def beam_prune(
    logits: Tensor, scores: Tensor, *, num_candidates: int, banned: Tensor | None = None, log_probs: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `num_candidates` best continuations of each group of K beams, in a total order.

    Token v after beam k scores (logits[b*K + k, v] - lse[b, k]) + scores[b, k], computed in float32 in this order. The
    larger score goes first; equal scores go by the smaller k * V + v. A score of -inf or NaN is no candidate: so a beam
    with a NaN or +inf among its logits, or with nothing but -inf, has none. When fewer than `num_candidates` are left,
    the rest of the output is (score -inf, parent 0, token 0).

    Args:
        logits: [B*K, V], float32, bfloat16 or float16, or float64, which is rounded to float32; K * V < 2^31.
        scores: [B, K] float32, the running log-probabilities of the beams.
        num_candidates: M >= 1.
        banned: [B*K, V], [1, V] or [V] bool, the last two for all beams; true keeps a token out of the candidates but
            not out of lse, as transformers' processors do in beam search.
        log_probs: whether the logits already are log-probabilities, which something may have changed since: they are
            not normalised again, and a finite lse counts and is returned as 0.

    Returns:
        scores [B, M] float32, descending; parents [B, M] int32, the beam in [0, K); tokens [B, M] int32 in [0, V);
        lse [B, K] float32, the natural log-sum-exp of the logits. No gradient.

    Raises:
        RuntimeError: an argument does not fit: `beam_prune: <argument> must <rule>, got <actual>`.

    The result of a group has the same bits for every number of threads and whatever the other groups are.

    Example:
        >>> logits, scores = torch.randn(2 * 4, 1000), torch.zeros(2, 4)
        >>> scores, parents, tokens, lse = beam_prune(logits, scores, num_candidates=8)
        >>> tokens.shape, lse.shape
        (torch.Size([2, 8]), torch.Size([2, 4]))
    """
    if needs_grad(logits, scores):
        logits, scores = logits.detach(), scores.detach()
    return _ops.beam_prune(logits, scores, num_candidates, banned, log_probs)


def beam_prune_reference(logits, scores, *, num_candidates, banned=None, log_probs=False, noise=0.0):
    """The specification of `beam_prune` in plain torch; in float64 when `scores` is float64. `noise` [B*K, V] is added
    to the logits for the order of the candidates, not for their scores."""
    (groups, beams), vocab_size = scores.shape, logits.shape[1]
    logits = logits.to(torch.float32).to(scores.dtype)
    lse = torch.logsumexp(logits, -1)
    if log_probs:
        lse = torch.where(lse.isfinite(), 0, lse)
    total, order = ((x - lse[:, None]) + scores.reshape(-1, 1) for x in (logits, logits + noise))
    allowed = order > -torch.inf if banned is None else (order > -torch.inf) & ~banned
    missing = max(0, num_candidates - beams * vocab_size)
    total, order = (
        F.pad(torch.where(allowed, x, -torch.inf).view(groups, beams * vocab_size), (0, missing), value=-torch.inf)
        for x in (total, order)
    )
    index = order.sort(dim=-1, descending=True, stable=True).indices[:, :num_candidates]
    best = total.gather(1, index)
    index = torch.where(best > -torch.inf, index, 0).int()
    return best, index // vocab_size, index % vocab_size, lse.view(groups, beams)


@register_fake("beam_prune")
def _(logits, scores, num_candidates, banned, log_probs):
    shape = (scores.shape[0], num_candidates)
    integers = [scores.new_empty(shape, dtype=torch.int32) for _ in range(2)]
    return scores.new_empty(shape), *integers, scores.new_empty(scores.shape)
