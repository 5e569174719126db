"""The mixture-of-experts layer, moe_route and moe_experts, against torch's grouped_mm, forward and with backward, and
against the experts of transformers' Mixtral, which go one by one.

On a GPU a layer of Qwen3-30B-A3B: 8192 tokens as in training, and a few as in decoding, where reading the weights of
the experts that are hit is all there is to do.
"""

import functools

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


def chosen_experts(router_logits):
    weights, expert_ids = torch.softmax(router_logits, -1).topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), expert_ids


@functools.cache
def mixtral_experts(experts, size, inner):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(hidden_size=size, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        return mixtral.MixtralExperts(config)


def mixtral_layer(hidden, router_logits, w_gate_up, w_down):
    weights, expert_ids = chosen_experts(router_logits)
    module = mixtral_experts(*w_down.shape)
    parameters = {"gate_up_proj": w_gate_up, "down_proj": w_down}
    return torch.func.functional_call(module, parameters, (hidden, expert_ids, weights.to(hidden.dtype)))


def grouped_mm_layer(hidden, router_logits, w_gate_up, w_down):
    """Sort, gather, grouped_mm, SwiGLU, grouped_mm, index_add: the fastest form in plain torch. It does not wait for
    the host, as bincount would."""
    weights, expert_ids = chosen_experts(router_logits)
    experts, order = expert_ids.flatten().sort(stable=True)
    tokens = order // TOP_K
    ends = torch.searchsorted(experts, torch.arange(len(w_down), device=experts.device), right=True, out_int32=True)
    h = F.grouped_mm(hidden[tokens], w_gate_up.transpose(1, 2), offs=ends)
    gate, up = h.chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(hidden).index_add_(0, tokens, rows)


def forward_case(tokens, size, inner, experts, dtype, **options):
    def make_inputs(device):
        hidden = torch.randn(tokens, size, device=device).to(dtype)
        w_gate_up = (torch.randn(experts, 2 * inner, size, device=device) / size**0.5).to(dtype)
        w_down = (torch.randn(experts, size, inner, device=device) / inner**0.5).to(dtype)
        return hidden, torch.randn(tokens, experts, device=device), w_gate_up, w_down

    hit = experts * (1 - (1 - TOP_K / experts) ** tokens)  # expected, when all are as likely
    return Case(
        name=f"forward-{tokens}x{size}-I{inner}-E{experts}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=layer,
        peers={"grouped_mm": grouped_mm_layer},
        check=accurate(layer_reference),
        bytes=int(3 * hit * size * inner + 2 * tokens * size) * dtype.itemsize,
        flops=6 * tokens * TOP_K * size * inner,
        **options,
    )


def gradient_case(tokens, size, inner, experts, dtype, transformers=False, **options):
    forward = forward_case(tokens, size, inner, experts, dtype)
    peers = {"grouped_mm": grouped_mm_layer} | ({"transformers": mixtral_layer} if transformers else {})

    def make_inputs(device):
        arguments = forward.make_inputs(device)
        return *(t.requires_grad_() for t in arguments), torch.randn_like(arguments[0])

    return Case(
        name=forward.name.replace("forward", "forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(layer),
        peers={name: with_gradients(peer) for name, peer in peers.items()},
        check=accurate(with_gradients(layer_reference)),
        flops=3 * forward.flops,
        **options,
    )


SIZE = (512, 512, 64)
QWEN3_30B_A3B = (2048, 768, 128)
CASES = []
for dtype, devices in ((torch.float32, ("cpu",)), (torch.bfloat16, ("cpu", "cuda"))):
    CASES += [forward_case(tokens, *SIZE, dtype, devices=devices) for tokens in (1, 16, 4096)]
    CASES += [gradient_case(256, *SIZE, dtype, devices=devices)]
    gates = {"grouped_mm": 1.5, "transformers": 6.0}
    CASES += [gradient_case(4096, *SIZE, dtype, transformers=True, devices=("cpu",), gates=gates)]
CASES += [gradient_case(4096, *SIZE, torch.bfloat16, devices=("cuda",), gates={"grouped_mm": 1.3})]
ON_GPU = (*QWEN3_30B_A3B, torch.bfloat16)
CASES += [forward_case(tokens, *ON_GPU, devices=("cuda",)) for tokens in (1, 16, 64)]
CASES += [make(8192, *ON_GPU, devices=("cuda",), gates={"grouped_mm": 1.0}) for make in (forward_case, gradient_case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_moe_experts(compare, case):
    compare(case)
