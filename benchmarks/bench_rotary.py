"""rotary against the same in torch, eager and compiled, forward alone and with the backward pass."""

import pytest
import torch
from harness import Case, accurate, compiled, with_gradients

from arfast.ops import rotary, rotary_reference


def torch_rotary(x, cos, sin):
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def forward_case(rows, heads, head_dim, dtype):
    def make_inputs(device):
        angles = torch.randn(rows, head_dim // 2, device=device)
        return torch.randn(rows, heads, head_dim, device=device).to(dtype), angles.cos(), angles.sin()

    return Case(
        name=f"forward-{rows}x{heads}x{head_dim}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=rotary,
        peers={"torch": torch_rotary, "torch.compile": compiled(torch_rotary)},
        check=accurate(rotary_reference),
        bytes=rows * head_dim * (2 * heads * dtype.itemsize + 4),
    )


def gradient_case(rows, heads, head_dim, dtype):
    forward = forward_case(rows, heads, head_dim, dtype)

    def make_inputs(device):
        x, cos, sin = forward.make_inputs(device)
        return x.requires_grad_(), cos, sin, torch.randn_like(x)

    return Case(
        name=forward.name.replace("forward", "forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(rotary),
        peers={name: with_gradients(peer) for name, peer in forward.peers.items()},
        check=accurate(with_gradients(rotary_reference)),
        bytes=2 * forward.bytes,
    )


SIZES = [(1, 32, 128), (2048, 8, 64), (2048, 32, 128)]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [make(*size, dtype) for make in (forward_case, gradient_case) for size in SIZES for dtype in DTYPES]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rotary(compare, case):
    compare(case)
