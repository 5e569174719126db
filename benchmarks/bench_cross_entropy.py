"""Label-smoothed cross_entropy, forward and backward, against torch: eager, compiled, and in place. On a GPU also
against Liger, which always writes the gradient over the logits, and QuACK, which does not smooth."""

import pytest
import torch
import torch.nn.functional as F
from harness import Case, accurate, compiled
from peers import gpu_peer

from arfast.ops import cross_entropy, cross_entropy_reference


def with_gradient(function, **options):
    """(loss, gradient of the logits) for an upstream gradient of 1, as a training step asks for it."""

    def run(logits, targets):
        loss = function(logits, targets, **options)
        return loss, torch.autograd.grad(loss, logits)[0]

    return run


def wide_loss(function):
    """The peer's loss in float32, so that outputs can be compared: torch rounds it to the dtype of the logits."""

    def run(logits, targets):
        loss, gradient = function(logits, targets)
        return loss.float(), gradient

    return run


def liger(**options):
    path = "liger_kernel.transformers.functional:liger_cross_entropy"
    return gpu_peer(path, lambda function: wide_loss(with_gradient(function, **options)))


def quack(**options):
    return gpu_peer("quack.cross_entropy:cross_entropy", lambda function: wide_loss(with_gradient(function, **options)))


def case(rows, classes, dtype, inplace, smoothing=0.1, **options):
    name = f"{'inplace-' if inplace else ''}{rows}x{classes}-{str(dtype).removeprefix('torch.')}"

    def make_inputs(device):
        logits = torch.randn(rows, classes, device=device).mul_(3).to(dtype).requires_grad_()
        return logits, torch.randint(0, classes, (rows,), device=device)

    torch_ce = wide_loss(with_gradient(F.cross_entropy, label_smoothing=smoothing))
    if (rows, dtype) == (1024, torch.bfloat16):
        options["gates"] = {"torch": 8.0 if inplace else 3.0}
    return Case(
        name=name if smoothing else f"plain-{name}",
        make_inputs=make_inputs,
        ours=with_gradient(cross_entropy, label_smoothing=smoothing, inplace=inplace),
        peers={"torch": torch_ce, "torch.compile": compiled(torch_ce)},
        gpu_peers={
            "Liger": liger(label_smoothing=smoothing) if inplace else None,
            "QuACK": None if smoothing else quack(inplace_backward=inplace),
        },
        check=accurate(with_gradient(cross_entropy_reference, label_smoothing=smoothing)),
        bytes=2 * rows * classes * dtype.itemsize,
        **options,
    )


CASES = [
    case(rows, classes, dtype, inplace)
    for rows, classes in ((2048, 32000), (1024, 128256))
    for dtype in (torch.float32, torch.bfloat16)
    for inplace in (False, True)
]
CASES += [
    case(8192, 128256, torch.bfloat16, inplace, smoothing, devices=("cuda",), gates={"torch": 2.5, "Liger": 1.25})
    for inplace in (False, True)
    for smoothing in (0.1, 0.0)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_cross_entropy(compare, case):
    compare(case)
