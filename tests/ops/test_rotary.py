"""rotary against its reference in float64."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import rotary, rotary_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(rows, head_dim):
    angles = torch.randn(rows, head_dim // 2) * 10
    return angles.cos(), angles.sin()


def run(function, x, cos, sin, dout):
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf, cos, sin)
    return [out.detach(), *torch.autograd.grad(out, leaf, dout.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 1, 2), (7, 3, 62), (33, 4, 64), (2, 31, 3, 80), (3, 5, 1, 256)])
def test_forward_and_backward(shape, dtype, poisoned):
    x, dout = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    cos, sin = tables(shape[-3], shape[-1])
    exact = run(rotary_reference, x.double(), cos, sin, dout)
    baseline = run(rotary_reference, x, cos, sin, dout)
    for name, a, e, b in zip(["out", "dx"], run(rotary, x, cos, sin, dout), exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


def test_equals_complex_multiplication():
    x, (cos, sin) = torch.randn(9, 2, 8), tables(9, 8)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin).unsqueeze(1)
    torch.testing.assert_close(rotary(x, cos, sin), torch.cat((z.real, z.imag), -1))


def test_gradcheck():
    x, (cos, sin) = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True), tables(2, 6)
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos, sin), x)


def test_strided_inputs_and_threads_give_the_same_bits():
    x, (cos, sin) = torch.randn(200, 12, 64), tables(100, 64)
    view = x[:, 3:7]
    expected = rotary(view.contiguous(), cos, sin)
    assert_bitwise_equal(same_for_any_threads(lambda: rotary(view, cos, sin)), expected)


def test_opcheck_and_compile():
    x, (cos, sin) = torch.randn(6, 2, 8), tables(3, 8)
    torch.library.opcheck(torch.ops.arfast.rotary, (x, cos, sin, True))
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, cos, sin, x), run(rotary, x, cos, sin, x), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(4, 2, 8).long()), "x must be float32, bfloat16, float16 or float64, got int64"),
        (dict(x=torch.zeros(4, 8)), r"x must have shape \[..., H, D\] with at least 3 dimensions, got \[4, 8\]"),
        (dict(x=torch.zeros(4, 2, 7)), r"x must have an even head dimension, got \[4, 2, 7\]"),
        (dict(cos=torch.zeros(4, 3)), r"cos must have shape \[P, D / 2\] = \[\*, 4\], got \[4, 3\]"),
        (dict(sin=torch.zeros(3, 4)), r"sin must have shape \[P, D / 2\] = \[4, 4\], got \[3, 4\]"),
        (dict(cos=torch.zeros(4, 4).double()), "cos must be float32, got float64"),
        (dict(x=torch.zeros(6, 2, 8)), "cos must have rows that divide the 6 rows of x, got 4"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(4, 2, 8), cos=torch.zeros(4, 4), sin=torch.zeros(4, 4)) | change
    with pytest.raises(RuntimeError, match="rotary: " + message):
        rotary(**arguments)
