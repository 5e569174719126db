"""swiglu against silu and a product in torch, eager and compiled, forward alone and with the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from harness import Case, accurate, compiled, with_gradients

from arfast.ops import swiglu, swiglu_reference


def torch_swiglu(gate, up):
    return F.silu(gate) * up


def forward_case(rows, size, dtype):
    def make_inputs(device):
        return tuple(torch.randn(rows, size, device=device).to(dtype) for _ in range(2))

    return Case(
        name=f"forward-{rows}x{size}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=swiglu,
        peers={"torch": torch_swiglu, "torch.compile": compiled(torch_swiglu)},
        check=accurate(swiglu_reference),
        bytes=3 * rows * size * dtype.itemsize,
    )


def gradient_case(rows, size, dtype):
    forward = forward_case(rows, size, dtype)

    def make_inputs(device):
        gate, up = forward.make_inputs(device)
        return gate.requires_grad_(), up.requires_grad_(), torch.randn_like(gate)

    return Case(
        name=forward.name.replace("forward", "forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(swiglu),
        peers={name: with_gradients(peer) for name, peer in forward.peers.items()},
        check=accurate(with_gradients(swiglu_reference)),
        bytes=8 * rows * size * dtype.itemsize,
    )


SIZES = [(1, 11008), (2048, 1408), (2048, 11008)]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [make(*size, dtype) for make in (forward_case, gradient_case) for size in SIZES for dtype in DTYPES]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_swiglu(compare, case):
    compare(case)
