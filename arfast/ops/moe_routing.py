"""Top-k routing of tokens to experts, and the two losses that keep a router healthy.

Shazeer et al. 2017, arXiv 1701.06538, section 2.1; sigmoid scores, bias and groups: DeepSeek-V3, arXiv 2412.19437,
equations 12 to 16. Losses: Fedus et al. 2021, arXiv 2101.03961, equation 4; Zoph et al. 2022, arXiv 2202.08906,
equation 5.
"""

from typing import NamedTuple

import torch

from arfast.ops._library import needs_grad, register_fake

_ops = torch.ops.arfast


class Routing(NamedTuple):
    """Which experts every token goes to, and the order that groups the T * K choices by expert, and by token within.

    Row r of that order belongs to token source_token[r]; choice (t, j) is row position[t, j]; expert e owns the rows
    [offsets[e], offsets[e + 1]).
    """

    expert_ids: torch.Tensor  # [T, K] int32, best first
    expert_weights: torch.Tensor  # [T, K] float32, differentiable
    tokens_per_expert: torch.Tensor  # [E] int32
    offsets: torch.Tensor  # [E + 1] int32
    source_token: torch.Tensor  # [T * K] int32
    position: torch.Tensor  # [T, K] int32
    lse: torch.Tensor  # [T] float32: log-sum-exp of the logits, differentiable


def moe_route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    scale: float = 1.0,
) -> Routing:
    """Choose `top_k` experts per token, weigh them, and sort the choices by expert.

    Args:
        router_logits: [T, E], float32, bfloat16, float16, or float64 on the CPU; scores are taken in float32 (float64).
        top_k: K, in [1, E].
        score: "softmax" over the row or "sigmoid" of each logit.
        renormalize: divide the K scores by their sum (sigmoid: plus 1e-20).
        bias: [E], added to the scores for the choice alone, not for the weights; no gradient.
        num_groups: the experts form this many groups of consecutive ones; all choices come from the best `top_groups`.
            A group is ranked by its best score (softmax) or by the sum of its two best (sigmoid).
        top_groups: see num_groups; both or neither.
        scale: factor on the weights, positive.

    Returns:
        Routing. The lowest index wins ties. NaN and -inf count as the lowest finite score in the choice, so that the
        ids are unique and in range whatever the logits are; the weights of a row with a NaN (softmax: or without a
        finite log-sum-exp) are NaN.

    Raises:
        RuntimeError: `moe_route: <argument> must <rule>, got <actual>`.

    Gradients of router_logits, from expert_weights and lse. Deterministic: the same bits for every number of threads.

    Example:
        >>> routing = moe_route(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), 2)
        >>> routing.expert_ids.tolist(), routing.offsets.tolist()
        ([[1, 2], [0, 1]], [0, 1, 3, 4])
    """
    if (num_groups is None) != (top_groups is None):
        raise RuntimeError(f"moe_route: top_groups must come with num_groups, got {top_groups} and {num_groups}")
    groups = (1, 1) if num_groups is None else (num_groups, top_groups)
    selection = (score, renormalize, bias, *groups, float(scale))
    if needs_grad(router_logits):
        return Routing(*_MoeRoute.apply(router_logits, top_k, *selection))
    return Routing(*_ops.moe_route_forward(router_logits, top_k, *selection))


def moe_route_reference(
    router_logits, top_k, *, score="softmax", renormalize=True, bias=None, num_groups=None, top_groups=None, scale=1.0
):
    """The specification of `moe_route` in plain torch."""
    wide = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    num_experts, lowest, sigmoid = wide.shape[1], torch.finfo(wide.dtype).min, score == "sigmoid"
    lse = wide.logsumexp(-1)
    scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
    by_logit = bias is None and (num_groups is None or not sigmoid)
    choice = (wide if by_logit else scores + (0 if bias is None else bias)).detach()
    choice = choice.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
    if num_groups is not None:
        members = choice.unflatten(-1, (num_groups, -1))
        group_scores = members.topk(min(1 + sigmoid, members.shape[-1])).values.sum(-1).clamp(min=lowest)
        dropped = group_scores.argsort(dim=-1, descending=True, stable=True)[:, top_groups:]
        choice = members.scatter(1, dropped[..., None].expand(-1, -1, members.shape[-1]), -torch.inf).flatten(1)
    expert_ids = choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(-1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0))
    weights = (weights * scale).masked_fill(lse.isnan()[:, None], torch.nan)
    order = expert_ids.flatten().argsort(stable=True)
    counts = expert_ids.flatten().bincount(minlength=num_experts)
    integers = (counts, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order // top_k, order.argsort())
    counts, offsets, source_token, position = (t.int() for t in integers)
    return Routing(expert_ids.int(), weights, counts, offsets, source_token, position.view(expert_ids.shape), lse)


class _MoeRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, router_logits, top_k, *selection):
        outputs = _ops.moe_route_forward(router_logits, top_k, *selection)
        expert_ids, expert_weights, *integers, lse = outputs
        score, renormalize, *_, scale = selection
        ctx.save_for_backward(router_logits, expert_ids, expert_weights, lse)
        ctx.selection = score, renormalize, scale
        ctx.mark_non_differentiable(expert_ids, *integers)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _ids, dexpert_weights, *rest):
        router_logits, expert_ids, expert_weights, lse = ctx.saved_tensors
        drouter_logits = _ops.moe_route_backward(
            dexpert_weights, rest[-1], router_logits, expert_ids, expert_weights, lse, *ctx.selection
        )
        return drouter_logits, *(None,) * 7


def _statistics_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@register_fake("moe_route_forward")
def _(router_logits, top_k, score, renormalize, bias, num_groups, top_groups, scale):
    tokens, experts = router_logits.shape
    integer = lambda *sizes: router_logits.new_empty(sizes, dtype=torch.int32)
    wide = lambda *sizes: router_logits.new_empty(sizes, dtype=_statistics_dtype(router_logits))
    rows = tokens * top_k
    choices = (integer(tokens, top_k), wide(tokens, top_k))
    return *choices, integer(experts), integer(experts + 1), integer(rows), integer(tokens, top_k), wide(tokens)


@register_fake("moe_route_backward")
def _(dexpert_weights, dlse, router_logits, expert_ids, expert_weights, lse, score, renormalize, scale):
    return router_logits.new_empty(router_logits.shape)
