"""rotary against its reference in float64."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import far_apart, misaligned, with_gaps

from arfast.ops import rotary, rotary_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 2, 4), (1, 1, 2), (7, 3, 62), (33, 4, 64), (2, 31, 3, 80), (3, 5, 1, 256), (2, 3, 9, 16), (5, 6, 34)]


def tables(rows, head_dim, device="cpu"):
    angles = torch.randn(rows, head_dim // 2) * 10
    return angles.cos().to(device), angles.sin().to(device)


def run(function, x, cos, sin, dout):
    """Output and gradient of `function` on the inputs as they lie in memory."""
    leaf = x.detach().requires_grad_()
    out = function(leaf, cos, sin)
    return [out.detach(), *torch.autograd.grad(out, leaf, dout.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, device, poisoned):
    x, dout = (torch.randn(shape).to(device, dtype) for _ in range(2))
    cos, sin = tables(shape[-3], shape[-1], device)
    exact = run(rotary_reference, x.double(), cos, sin, dout)
    baseline = run(rotary_reference, x, cos, sin, dout)
    for name, a, e, b in zip(["out", "dx"], run(rotary, x, cos, sin, dout), exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


def test_equals_complex_multiplication(device):
    x, (cos, sin) = torch.randn(9, 2, 8).to(device), tables(9, 8, device)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin).unsqueeze(1)
    torch.testing.assert_close(rotary(x, cos, sin), torch.cat((z.real, z.imag), -1))


@pytest.mark.not_emulated
def test_float64(device):
    """On a GPU, by the reference."""
    x, (cos, sin) = torch.randn(9, 2, 8, dtype=torch.float64).to(device), tables(9, 8, device)
    torch.testing.assert_close(rotary(x, cos, sin), rotary_reference(x, cos, sin), rtol=1e-14, atol=1e-14)


def test_gradcheck():
    x, (cos, sin) = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True), tables(2, 6)
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos, sin), x)


def test_same_bits_for_every_number_of_threads():
    x, (cos, sin) = torch.randn(200, 4, 64), tables(100, 64)
    same_for_any_threads(lambda: run(rotary, x, cos, sin, x))


@pytest.mark.parametrize("head_dim", [64, 62, 48])
def test_strided_and_misaligned_inputs_give_the_same_bits(head_dim, device):
    x, dout = (torch.randn(20, 5, head_dim).to(device, torch.bfloat16) for _ in range(2))
    cos, sin = tables(10, head_dim, device)
    expected = run(rotary, x, cos, sin, dout)
    among_heads = torch.randn(20, 12, head_dim, device=device).to(x.dtype)[:, 3:8].copy_(x)
    for views in (
        (among_heads, cos, sin, dout),
        (misaligned(x), cos, sin, with_gaps(dout, 8)),
        (with_gaps(x, 1), misaligned(cos), sin, dout),
        (x.transpose(0, 1).contiguous().transpose(0, 1), cos, misaligned(sin), misaligned(dout)),
    ):
        for a, b in zip(run(rotary, *views), expected, strict=True):
            assert_bitwise_equal(a, b)


def test_offsets_beyond_2_31(device):
    x, (cos, sin) = torch.randn(3, 5, 16).to(device, torch.bfloat16), tables(1, 16, device)
    expected = rotary(x, cos, sin)
    assert_bitwise_equal(rotary(far_apart(x), cos, sin), expected)
    heads = far_apart(x[:, :3].transpose(0, 1)).transpose(0, 1)
    assert_bitwise_equal(rotary(heads, cos, sin), expected[:, :3])


def test_more_vectors_than_threads(device, implementation, request):
    rows = 120_000 if implementation == "cuda" else 1500
    if implementation == "emulated":
        request.getfixturevalue("emulator_library").configure(multiprocessors=1)
    x, (cos, sin) = torch.randn(rows, 9, 16).to(device), tables(rows, 16, device)
    assert_bitwise_equal(rotary(x, cos, sin)[-7:], rotary(x[-7:], cos[-7:], sin[-7:]))


def test_nan_and_infinity_stay_in_their_pair(device):
    x, (cos, sin) = torch.randn(3, 6, 16).to(device), tables(3, 16, device)
    x[1, 4, 3], x[2, 0, 9] = float("nan"), float("inf")
    finite = torch.ones_like(x, dtype=torch.bool)
    finite[1, 4, [3, 11]] = finite[2, 0, [1, 9]] = False
    out = rotary(x, cos, sin)
    assert torch.equal(out.isfinite(), finite)
    assert out[1, 4, [3, 11]].isnan().all() and out[2, 0, [1, 9]].isinf().all()


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
