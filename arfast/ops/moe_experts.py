"""The routed SwiGLU experts of a mixture-of-experts layer as one op.

Shazeer 2020, arXiv 2002.05202, equation 6, per expert e, and the weighted sum of Shazeer et al. 2017, arXiv 1701.06538,
equation 1: out_t = sum_j w_tj W_down[e] (silu(W_gate[e] x_t) * W_up[e] x_t) with e = expert_ids[t, j].
"""

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake
from arfast.ops.moe_routing import Routing

_ops = torch.ops.arfast


def moe_experts(hidden: torch.Tensor, routing: Routing, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """Send every token through its experts and add up their weighted outputs.

    Args:
        hidden: [T, d], on the CPU float32, bfloat16, float16 or float64; on a GPU bfloat16 or float16.
        routing: from `moe_route`; float64 weights go with float64 hidden.
        w_gate_up: [E, 2 I, d], the I gate rows of an expert before its I up rows, the dtype of `hidden`.
        w_down: [E, d, I], the dtype of `hidden`. Under autocast all three are cast to its dtype.

    Returns:
        [T, d], the dtype of `hidden`, summed over the experts in float32 (float64).

    Raises:
        RuntimeError: `moe_experts: <argument> must <rule>, got <actual>`.

    Gradients of hidden, routing.expert_weights, w_gate_up and w_down. An expert sees its own rows alone: an infinity in
    one does not reach another. Deterministic: the same bits for every number of threads.

    Example:
        >>> hidden, w_gate_up, w_down = torch.randn(5, 16), torch.randn(4, 2 * 8, 16), torch.randn(4, 16, 8)
        >>> moe_experts(hidden, moe_route(torch.randn(5, 4), 2), w_gate_up, w_down).shape
        torch.Size([5, 16])
    """
    if in_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, w_gate_up, w_down = (t.to(dtype) for t in (hidden, w_gate_up, w_down))
    tables = (routing.position, routing.source_token, routing.offsets)
    arguments = (hidden, routing.expert_weights, *tables, w_gate_up, w_down)
    if needs_grad(hidden, routing.expert_weights, w_gate_up, w_down):
        return _MoeExperts.apply(*arguments)
    return _ops.moe_experts_forward(*arguments, False)[0]


def moe_experts_reference(hidden, routing, w_gate_up, w_down):
    """The specification of `moe_experts` in plain torch."""
    out = hidden.new_zeros(hidden.shape, dtype=routing.expert_weights.dtype)
    for expert, (gate_up, down) in enumerate(zip(w_gate_up.unbind(), w_down.unbind())):
        tokens, choice = (routing.expert_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[tokens] @ gate_up.T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ down.T
        out = out.index_add(0, tokens, rows * routing.expert_weights[tokens, choice, None])
    return out.to(hidden.dtype)


class _MoeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down):
        out, h = _ops.moe_experts_forward(
            hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down, True
        )
        ctx.save_for_backward(hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down, h)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        needs_hidden, _, _, _, _, *needs_experts = ctx.needs_input_grad
        dhidden, dexpert_weights, dw_gate_up, dw_down = _ops.moe_experts_backward(
            dout, *ctx.saved_tensors, needs_hidden, any(needs_experts)
        )
        if not any(needs_experts):
            dw_gate_up = dw_down = None
        return dhidden if needs_hidden else None, dexpert_weights, None, None, None, dw_gate_up, dw_down


@register_fake("moe_experts_forward")
def _(hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down, save_h):
    rows = expert_weights.numel() if save_h else 0
    return hidden.new_empty(hidden.shape), hidden.new_empty((rows, w_gate_up.shape[1]))


@register_fake("moe_experts_backward")
def _(dout, hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down, h, needs_hidden, needs_experts):
    experts = w_down.shape[0] if needs_experts else 0
    return (
        hidden.new_empty((hidden.shape[0] if needs_hidden else 0, hidden.shape[1])),
        expert_weights.new_empty(expert_weights.shape),
        hidden.new_empty((experts, *w_gate_up.shape[1:])),
        hidden.new_empty((experts, *w_down.shape[1:])),
    )
