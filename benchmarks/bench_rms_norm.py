"""rms_norm against torch.nn.functional.rms_norm, eager and compiled: forward alone, with the backward pass, and both
with the residual addition before it, as in a layer of a model."""

import pytest
import torch
import torch.nn.functional as F
from harness import Case, accurate, compiled, with_gradients

from arfast.ops import rms_norm, rms_norm_reference


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def forward_case(rows, size, dtype):
    def make_inputs(device):
        return torch.randn(rows, size, device=device).to(dtype), 1 + 0.1 * torch.randn(size, device=device).to(dtype)

    return Case(
        name=f"forward-{rows}x{size}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=rms_norm,
        peers={"torch": torch_rms_norm, "torch.compile": compiled(torch_rms_norm)},
        check=accurate(rms_norm_reference),
        bytes=2 * rows * size * dtype.itemsize,
    )


def gradient_case(rows, size, dtype):
    forward = forward_case(rows, size, dtype)

    def make_inputs(device):
        x, weight = forward.make_inputs(device)
        return x.requires_grad_(), weight.requires_grad_(), torch.randn_like(x)

    return Case(
        name=forward.name.replace("forward", "forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(rms_norm),
        peers={name: with_gradients(peer) for name, peer in forward.peers.items()},
        check=accurate(with_gradients(rms_norm_reference)),
        bytes=5 * rows * size * dtype.itemsize,
    )


def fused(x, residual, weight):
    return rms_norm(x, weight, residual=residual)


def fused_reference(x, residual, weight):
    return rms_norm_reference(x, weight, residual=residual)


def torch_fused(x, residual, weight):
    total = x + residual
    return torch_rms_norm(total, weight), total


def layer_case(rows, size, dtype):
    forward = forward_case(rows, size, dtype)

    def make_inputs(device):
        x, weight = forward.make_inputs(device)
        residual, *douts = (torch.randn_like(x) for _ in range(3))
        return x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), tuple(douts)

    return Case(
        name=forward.name.replace("forward", "residual-forward-backward"),
        make_inputs=make_inputs,
        ours=with_gradients(fused),
        peers={"torch": with_gradients(torch_fused), "torch.compile": with_gradients(compiled(torch_fused))},
        check=accurate(with_gradients(fused_reference)),
        bytes=8 * rows * size * dtype.itemsize,
    )


SIZES = [(1, 4096), (2048, 512), (2048, 4096)]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [make(*size, dtype) for make in (forward_case, gradient_case, layer_case) for size in SIZES for dtype in DTYPES]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rms_norm(compare, case):
    compare(case)
