"""moe_permute and moe_combine against torch's indexing: both move memory and little else."""

import pytest
import torch
from harness import Case, accurate

from arfast.ops import Routing, moe_combine, moe_combine_reference, moe_permute, moe_permute_reference, moe_route


def inputs(tokens, size, experts, top_k, dtype, device):
    routing = moe_route(torch.randn(tokens, experts, device=device), top_k)
    return torch.randn(tokens, size, device=device).to(dtype), *routing


def routed(function):
    """function(rows, routing), of a routing in its parts: the harness copies tensors."""
    return lambda rows, *routing: function(rows, Routing(*routing))


def torch_permute(hidden, routing):
    return hidden[routing.source_token]


def torch_combine(expert_out, routing):
    return (expert_out[routing.position] * routing.expert_weights[..., None]).sum(1).to(expert_out.dtype)


def permute_case(tokens, size, experts, top_k, dtype, **options):
    return Case(
        name=f"permute-{tokens}x{size}-E{experts}-k{top_k}-{str(dtype).removeprefix('torch.')}",
        make_inputs=lambda device: inputs(tokens, size, experts, top_k, dtype, device),
        ours=routed(moe_permute),
        peers={"torch": routed(torch_permute)},
        check=accurate(routed(moe_permute_reference)),
        bytes=(1 + top_k) * tokens * size * dtype.itemsize,
        **options,
    )


def combine_case(tokens, size, experts, top_k, dtype, **options):
    def make_inputs(device):
        _, *routing = inputs(tokens, size, experts, top_k, dtype, device)
        return torch.randn(tokens * top_k, size, device=device).to(dtype), *routing

    return Case(
        name=f"combine-{tokens}x{size}-E{experts}-k{top_k}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=routed(moe_combine),
        peers={"torch": routed(torch_combine)},
        check=accurate(routed(moe_combine_reference)),
        bytes=(1 + top_k) * tokens * size * dtype.itemsize,
        **options,
    )


CASES = [
    make(*size, torch.bfloat16, devices=(device,))
    for make in (permute_case, combine_case)
    for device, size in (("cpu", (1024, 512, 64, 8)), ("cuda", (8192, 2048, 128, 8)), ("cuda", (4096, 4096, 8, 2)))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_moe_permute(compare, case):
    compare(case)
