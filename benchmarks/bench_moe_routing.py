"""moe_route against torch: softmax, topk, stable argsort by expert and bincount, forward and with the backward pass."""

import pytest
import torch
from accuracy import assert_accurate
from harness import Case, compiled, with_gradients

from arfast.ops import moe_route, moe_route_reference

TABLES = ("expert_weights", "expert_ids", "tokens_per_expert", "offsets", "source_token", "position")


def tables(function):
    def run(router_logits, top_k):
        routing = function(router_logits, top_k)
        return tuple(getattr(routing, name) for name in TABLES)

    return run


def torch_route(router_logits, top_k):
    probabilities = torch.softmax(router_logits.float(), -1)
    weights, expert_ids = probabilities.topk(top_k)
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=router_logits.shape[1])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return weights / weights.sum(-1, keepdim=True), expert_ids, counts, offsets, order // top_k


def make_logits(tokens, experts, dtype, device):
    """Every row a permutation of numbers exact in bfloat16: torch breaks ties in an order of its own."""
    return ((torch.rand(tokens, experts, device=device).argsort(-1) - experts // 2) * (8 / experts)).to(dtype)


def check(outputs, router_logits, top_k):
    exact = tables(moe_route_reference)(router_logits.double(), top_k)
    baseline = tables(moe_route_reference)(router_logits, top_k)
    assert_accurate(outputs[0], exact[0], baseline[0], name=TABLES[0])
    for name, a, e in zip(TABLES[1:], outputs[1:], exact[1:], strict=True):
        assert torch.equal(a, e), name


def forward_case(tokens, experts, top_k, dtype):
    def make_inputs(device):
        return make_logits(tokens, experts, dtype, device), top_k

    return Case(
        name=f"forward-{tokens}x{experts}-k{top_k}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=tables(moe_route),
        peers={"torch": torch_route, "torch.compile": compiled(torch_route)},
        check=check,
        bytes=tokens * experts * dtype.itemsize + 20 * tokens * top_k,
        gates={"torch": 3.0} if (tokens, experts) == (4096, 64) else {},
    )


def gradient_case(tokens, experts, top_k, dtype):
    def make_inputs(device):
        logits = make_logits(tokens, experts, dtype, device).requires_grad_()
        return logits, top_k, torch.randn(tokens, top_k, device=device)

    def check_gradient(outputs, router_logits, top_k, dout):
        exact = gradients(moe_route_reference)(router_logits.detach().double().requires_grad_(), top_k, dout.double())
        baseline = gradients(moe_route_reference)(router_logits, top_k, dout)
        for name, a, e, b in zip(("expert_weights", "drouter_logits"), outputs, exact, baseline, strict=True):
            assert_accurate(a, e, b, name=name)

    def gradients(function):
        return with_gradients(lambda *inputs: function(*inputs).expert_weights)

    return Case(
        name=f"forward-backward-{tokens}x{experts}-k{top_k}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=gradients(moe_route),
        peers={"torch": with_gradients(lambda *inputs: torch_route(*inputs)[0])},
        check=check_gradient,
        bytes=3 * tokens * experts * dtype.itemsize,
    )


SIZES = [(1, 64, 8), (4096, 64, 8), (8192, 128, 8), (4096, 256, 8)]
CASES = [
    make(*size, dtype)
    for make in (forward_case, gradient_case)
    for size in SIZES
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_moe_route(compare, case):
    compare(case)
