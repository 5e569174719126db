"""Rows of a mixture-of-experts layer into the order by expert, and back as weighted sums.

Shazeer et al. 2017, arXiv 1701.06538, equation 1: out_t = sum_j w_tj expert_out[position_tj].
"""

import torch

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.moe_routing import Routing

_ops = torch.ops.arfast


def moe_permute(hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The rows of `hidden` in the order by expert: out[r] = hidden[routing.source_token[r]].

    Args:
        hidden: [T, d], float32, bfloat16, float16, or float64 on the CPU.
        routing: from `moe_route`.

    Returns:
        [T * K, d], the dtype of `hidden`; expert e owns the rows [offsets[e], offsets[e + 1]).

    Raises:
        RuntimeError: `moe_permute: <argument> must <rule>, got <actual>`.

    Gradient of hidden: the sum over a token's K rows, taken in float32 (float64).

    Example:
        >>> routing = moe_route(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1)
        >>> moe_permute(torch.tensor([[10.0], [20.0]]), routing).tolist()
        [[20.0], [10.0]]
    """
    tokens = list(routing.position.shape[:1])
    if list(hidden.shape[:1]) != tokens:
        raise RuntimeError(f"moe_permute: hidden must have shape [T, d] with [T] = {tokens}, got {list(hidden.shape)}")
    if needs_grad(hidden):
        return _MoePermute.apply(hidden, routing.source_token, routing.position)
    return _ops.moe_permute(hidden, routing.source_token)


def moe_combine(expert_out: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The weighted sum of every token's K rows: out[t] = sum_j expert_weights[t, j] * expert_out[position[t, j]].

    Args:
        expert_out: [T * K, d] in the order by expert, float32, bfloat16, float16, or float64 on the CPU.
        routing: from `moe_route`; float64 weights go with float64 rows.

    Returns:
        [T, d], the dtype of `expert_out`, summed over j in order in float32 (float64) and rounded once.

    Raises:
        RuntimeError: `moe_combine: <argument> must <rule>, got <actual>`.

    Gradients of expert_out and routing.expert_weights.

    Example:
        >>> routing = moe_route(torch.tensor([[0.0, 0.0]]), 2)
        >>> moe_combine(torch.tensor([[10.0], [20.0]]), routing).tolist()
        [[15.0]]
    """
    if needs_grad(expert_out, routing.expert_weights):
        return _MoeCombine.apply(expert_out, routing.expert_weights, routing.position)
    return _ops.moe_combine_forward(expert_out, routing.expert_weights, routing.position)


def moe_permute_reference(hidden, routing):
    """The specification of `moe_permute` in plain torch."""
    return hidden[routing.source_token.long()]


def moe_combine_reference(expert_out, routing):
    """The specification of `moe_combine` in plain torch."""
    rows = expert_out[routing.position.long()].to(routing.expert_weights.dtype)
    return (rows * routing.expert_weights[..., None]).sum(1).to(expert_out.dtype)


class _MoePermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, source_token, position):
        ctx.save_for_backward(position)
        return _ops.moe_permute(hidden, source_token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _ops.moe_combine_forward(dout, None, *ctx.saved_tensors), None, None


class _MoeCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, expert_out, expert_weights, position):
        ctx.save_for_backward(expert_out, expert_weights, position)
        return _ops.moe_combine_forward(expert_out, expert_weights, position)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *_ops.moe_combine_backward(dout, *ctx.saved_tensors), None


@register_fake("moe_permute")
def _(hidden, source_token):
    return hidden.new_empty((source_token.shape[0], hidden.shape[1]))


@register_fake("moe_combine_forward")
def _(expert_out, expert_weights, position):
    return expert_out.new_empty((position.shape[0], expert_out.shape[1]))


@register_fake("moe_combine_backward")
def _(dout, expert_out, expert_weights, position):
    return expert_out.new_empty(expert_out.shape), expert_weights.new_empty(expert_weights.shape)
