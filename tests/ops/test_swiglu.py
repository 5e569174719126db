"""swiglu against its reference in float64."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(function, gate, up, dout):
    leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(gate, up):
    dout = torch.randn(gate.shape).to(gate.dtype)
    exact = run(swiglu_reference, gate.double(), up.double(), dout)
    baseline = run(swiglu_reference, gate, up, dout)
    for name, a, e, b in zip(["out", "dgate", "dup"], run(swiglu, gate, up, dout), exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,size", [(0, 8), (1, 1), (31, 33), (33, 257), (64, 704)])
def test_forward_and_backward(rows, size, dtype, poisoned):
    check(torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype))


@pytest.mark.parametrize("scale", [30.0, 1e4, 0.0])
def test_extreme_values(scale):
    check(torch.randn(9, 65) * scale, torch.randn(9, 65))


def test_gradcheck():
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, leaves)


def test_strided_inputs_and_threads_give_the_same_bits():
    both = torch.randn(60, 2 * 500)
    gate, up = both.chunk(2, -1)
    expected = run(swiglu, gate.contiguous(), up.contiguous(), torch.ones(60, 500))
    assert_bitwise_equal(same_for_any_threads(lambda: swiglu(gate, up)), expected[0])
    assert_bitwise_equal(swiglu(gate.view(6, 10, 500), up.view(6, 10, 500)).view(60, 500), expected[0])


def test_opcheck_and_compile():
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    torch.library.opcheck(torch.ops.arfast.swiglu_forward, (gate, up))
    torch.library.opcheck(torch.ops.arfast.swiglu_backward, (torch.randn(4, 6), gate, up))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, gate, up, torch.ones(4, 6)), run(swiglu, gate, up, torch.ones(4, 6)), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    "gate,up,message",
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), "gate must be float32, bfloat16, float16 or float64, got int64"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"up must have shape \[N, I\] = \[2, 3\], got \[2, 4\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), r"up must have the dtype of gate \(float32\), got float16"),
        (torch.zeros(3), torch.zeros(4), r"up must have the shape of gate \[3\], got \[4\]"),
        (torch.zeros(()), torch.zeros(()), r"gate must have at least one dimension, got \[\]"),
    ],
)
def test_errors(gate, up, message):
    with pytest.raises(RuntimeError, match="swiglu: " + message):
        swiglu(gate, up)
