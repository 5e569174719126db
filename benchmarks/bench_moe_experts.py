"""The mixture-of-experts layer, moe_route and moe_experts, against torch's grouped_mm, forward and with backward."""

import pytest
import torch
import torch.nn.functional as F
from harness import Case, accurate, with_gradients

from arfast.ops import moe_experts, moe_experts_reference, moe_route, moe_route_reference

TOP_K = 8


def layer(hidden, router_logits, w_gate_up, w_down):
    return moe_experts(hidden, moe_route(router_logits, TOP_K), w_gate_up, w_down)


def layer_reference(hidden, router_logits, w_gate_up, w_down):
    return moe_experts_reference(hidden, moe_route_reference(router_logits, TOP_K), w_gate_up, w_down)


def grouped_mm_layer(hidden, router_logits, w_gate_up, w_down):
    """Sort, gather, grouped_mm, SwiGLU, grouped_mm, index_add: the fastest form in plain torch."""
    weights, expert_ids = torch.softmax(router_logits, -1).topk(TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    tokens = order // TOP_K
    ends = torch.bincount(flat, minlength=w_down.shape[0]).cumsum(0).int()
    h = F.grouped_mm(hidden[tokens], w_gate_up.transpose(1, 2), offs=ends)
    gate, up = h.chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(hidden).index_add_(0, tokens, rows)


def forward_case(tokens, size, inner, experts, dtype):
    def make_inputs(device):
        hidden = torch.randn(tokens, size, device=device).to(dtype)
        w_gate_up = (torch.randn(experts, 2 * inner, size, device=device) / size**0.5).to(dtype)
        w_down = (torch.randn(experts, size, inner, device=device) / inner**0.5).to(dtype)
        return hidden, torch.randn(tokens, experts, device=device), w_gate_up, w_down

    touched = min(experts, tokens * TOP_K)
    return Case(
        name=f"forward-{tokens}x{size}-I{inner}-E{experts}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=layer,
        peers={"grouped_mm": grouped_mm_layer},
        check=accurate(layer_reference),
        bytes=(3 * touched * size * inner + 2 * tokens * size) * dtype.itemsize,
        flops=6 * tokens * TOP_K * size * inner,
        devices=("cpu", "cuda") if dtype == torch.bfloat16 else ("cpu",),
    )


def gradient_case(tokens, size, inner, experts, dtype):
    forward = forward_case(tokens, size, inner, experts, dtype)

    def make_inputs(device):
        arguments = forward.make_inputs(device)
        return *(t.requires_grad_() for t in arguments), torch.randn_like(arguments[0])

    return Case(
        name=forward.name.replace("forward", "forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(layer),
        peers={"grouped_mm": with_gradients(grouped_mm_layer)},
        check=accurate(with_gradients(layer_reference)),
        flops=3 * forward.flops,
        gates={"grouped_mm": 1.3} if tokens == 4096 else {},
        devices=("cpu", "cuda") if dtype == torch.bfloat16 else ("cpu",),
    )


DTYPES = [torch.float32, torch.bfloat16]
SIZE = (512, 512, 64)
CASES = [forward_case(tokens, *SIZE, dtype) for tokens in (1, 16, 4096) for dtype in DTYPES]
CASES += [gradient_case(tokens, *SIZE, dtype) for tokens in (256, 4096) for dtype in DTYPES]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_moe_experts(compare, case):
    compare(case)
