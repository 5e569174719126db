"""rms_norm against its reference in float64, over the checklist that every op has."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import far_apart, misaligned, with_gaps

from arfast.ops import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 64), (1, 1), (1, 31), (31, 32), (32, 33), (33, 257), (70, 1000), (5, 4099)]


def inputs(rows, size, dtype, device, *, scale=1.0, residual=True):
    x = (torch.randn(rows, size) * scale).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(size)).to(device, dtype)
    return x, weight, (torch.randn(rows, size) * scale).to(device, dtype) if residual else None


def run(function, x, weight, residual, douts=None):
    """Outputs and gradients of `function` on the inputs as they lie in memory."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    result = function(leaves[0], leaves[1], 1e-5, residual=leaves[2] if residual is not None else None)
    outs = result if isinstance(result, tuple) else (result,)
    douts = [d.to(o.dtype) for d, o in zip(douts, outs, strict=False)]
    return [*outs, *torch.autograd.grad(outs, leaves, douts)]


def check(x, weight, residual):
    douts = [torch.randn(x.shape).to(x.device, x.dtype) for _ in range(2)]
    wide = [None if t is None else t.double() for t in (x, weight, residual)]
    actual = run(rms_norm, x, weight, residual, douts)
    exact = run(rms_norm_reference, *wide, douts)
    baseline = run(rms_norm_reference, x, weight, residual, douts)
    for name, a, e, b in zip(["out", "sum", "dx", "dweight", "dresidual"], actual, exact, baseline, strict=False):
        assert_accurate(a, e, b, name=name)


@pytest.mark.random_schedules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,size", SIZES)
@pytest.mark.parametrize("residual", [False, True])
def test_forward_and_backward(rows, size, dtype, residual, device, poisoned):
    check(*inputs(rows, size, dtype, device, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", [16, 17, 128, 129, 512, 513, 1024, 1025])
def test_around_the_lengths_where_the_gpu_changes_its_plan(vectors, dtype, device, poisoned):
    """By vectors of 16 bytes: half a warp, a warp or a block per row; the longest rows do not fit its registers."""
    check(*inputs(10, vectors * 16 // dtype.itemsize, dtype, device))


def test_equals_torch(device):
    x, weight, _ = inputs(17, 96, torch.float32, device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (96,), weight, 1e-6))


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_values(scale, device):
    check(*inputs(9, 65, torch.float32, device, scale=scale))


@pytest.mark.parametrize("size", [40, 4200])
def test_nan_and_infinity_stay_in_their_row(size, device):
    x, weight, residual = inputs(4, size, torch.float32, device)
    x[2, 3], x[1, -1] = float("nan"), float("inf")
    out, _, dx, dweight, _ = run(rms_norm, x, weight, residual, [torch.ones_like(x), torch.ones_like(x)])
    assert out[2].isnan().all() and dx[2].isnan().all() and dweight.isnan().any()
    assert out[1, -1].isnan() and (out[1, :-1] == 0).all()
    assert out[[0, 3]].isfinite().all() and dx[[0, 3]].isfinite().all()


def test_gradcheck():
    x, weight, residual = inputs(3, 19, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda a, w, r: rms_norm(a, w, 1e-3, residual=r), leaves)


@pytest.mark.parametrize("size", [50, 64, 1000, 4104])
@pytest.mark.parametrize("fused", [False, True])
def test_strided_and_misaligned_inputs_give_the_same_bits(size, fused, device):
    x, weight, residual = inputs(12, size, torch.bfloat16, device, residual=fused)
    douts = [torch.randn_like(x), torch.randn_like(x)][: 1 + fused]
    expected = run(rms_norm, x, weight, residual, douts)
    for view in (misaligned, lambda t: with_gaps(t, 3), lambda t: with_gaps(t, 8), lambda t: t.t().contiguous().t()):
        views = view(x), misaligned(weight), view(residual) if fused else None, [view(d) for d in douts]
        for a, b in zip(run(rms_norm, *views), expected, strict=True):
            assert_bitwise_equal(a, b)


def test_leading_dimensions(device):
    x, weight, residual = inputs(12, 50, torch.bfloat16, device)
    out, total = rms_norm(x.view(3, 4, 50), weight, residual=residual.view(3, 4, 50))
    for a, b in zip((out, total), rms_norm(x, weight, residual=residual), strict=True):
        assert_bitwise_equal(a.view(12, 50), b)


def test_offsets_beyond_2_31(device):
    x, weight, _ = inputs(3, 72, torch.bfloat16, device)
    dout = torch.randn_like(x)
    expected = run(rms_norm, x, weight, None, [dout])
    for a, b in zip(run(rms_norm, far_apart(x), weight, None, [far_apart(dout)]), expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("rows,size", [(6500, 5), (3200, 140), (3300, 8)])
def test_many_rows(rows, size, device):
    """More than every block takes when there are few."""
    check(*inputs(rows, size, torch.bfloat16, device))


@pytest.mark.random_schedules
@pytest.mark.parametrize("size", [24, 300, 1500])
def test_same_bits_at_every_run(size, device):
    x, weight, residual = inputs(50, size, torch.float32, device)
    douts = [torch.randn_like(x), torch.randn_like(x)]
    for a, b in zip(*(run(rms_norm, x, weight, residual, douts) for _ in range(2)), strict=True):
        assert_bitwise_equal(a, b)


def test_same_bits_for_every_number_of_threads():
    x, weight, residual = inputs(301, 640, torch.float32, "cpu")
    douts = [torch.randn_like(x), torch.randn_like(x)]
    same_for_any_threads(lambda: run(rms_norm, x, weight, residual, douts))


def test_opcheck():
    x, weight, residual = inputs(6, 24, torch.float32, "cpu")
    torch.library.opcheck(torch.ops.arfast.rms_norm_forward, (x, residual, weight, 1e-6))
    torch.library.opcheck(torch.ops.arfast.rms_norm_forward, (x, None, weight, 1e-6))
    _, total, rstd = torch.ops.arfast.rms_norm_forward(x, residual, weight, 1e-6)
    torch.library.opcheck(torch.ops.arfast.rms_norm_backward, (torch.randn_like(x), None, total, weight, rstd))


def test_compile():
    x, weight, residual = inputs(6, 24, torch.float32, "cpu")
    douts = [torch.randn_like(x), torch.randn_like(x)]
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, weight, residual, douts), run(rms_norm, x, weight, residual, douts), strict=True):
        assert_bitwise_equal(a, b)


def test_autocast_casts_the_weight():
    x, weight, _ = inputs(4, 32, torch.bfloat16, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(rms_norm(x, weight.float()), rms_norm(x, weight))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(4, 32, dtype=torch.int64)), "x must be float32, bfloat16, float16 or float64, got int64"),
        (dict(weight=torch.zeros(31)), r"weight must have shape \[D\] = \[32\], got \[31\]"),
        (
            dict(weight=torch.zeros(32, dtype=torch.float64)),
            r"weight must have the dtype of x \(float32\), got float64",
        ),
        (dict(residual=torch.zeros(3, 32)), r"residual must have shape \[N, D\] = \[4, 32\], got \[3, 32\]"),
        (dict(residual=torch.zeros(4, 32).half()), r"residual must have the dtype of x \(float32\), got float16"),
        (dict(eps=-1.0), r"eps must be in \[0, 1\), got -1"),
        (dict(eps=float("nan")), r"eps must be in \[0, 1\), got nan"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(4, 32), weight=torch.zeros(32), residual=None, eps=1e-6) | change
    with pytest.raises(RuntimeError, match="rms_norm: " + message):
        rms_norm(**arguments)
