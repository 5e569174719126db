"""linear_cross_entropy with label smoothing, forward and backward, against the head and torch's loss, eager and
compiled, and on a GPU Liger's."""

import pytest
import torch
import torch.nn.functional as F
from harness import Case, accurate, compiled
from peers import gpu_peer

from arfast.ops import linear_cross_entropy, linear_cross_entropy_reference


def torch_form(hidden, weight, targets, **options):
    return F.cross_entropy(F.linear(hidden, weight), targets, **options).float()


def with_gradients(function):
    def run(hidden, weight, targets):
        loss = function(hidden, weight, targets, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    return run


def case(rows, size, classes, dtype):
    def make_inputs(device):
        hidden = torch.randn(rows, size, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(classes, size, device=device) / size**0.5).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(0, classes, (rows,), device=device)

    def liger(function):
        return with_gradients(lambda *arguments, **options: function(*arguments, **options).float())

    eager = with_gradients(torch_form)
    return Case(
        name=f"{rows}x{size}x{classes}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=with_gradients(linear_cross_entropy),
        peers={"torch": eager, "torch.compile": compiled(eager)},
        gpu_peers={
            "Liger": gpu_peer("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy", liger),
        },
        check=accurate(with_gradients(linear_cross_entropy_reference)),
        flops=6 * rows * size * classes,
        gates={"torch": 2.0, "torch.compile": 1.3} if dtype == torch.bfloat16 and classes == 32000 else {},
    )


CASES = [
    case(rows, size, classes, dtype)
    for rows, size, classes in ((2048, 512, 32000), (2048, 256, 4096))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_linear_cross_entropy(compare, case):
    compare(case)
