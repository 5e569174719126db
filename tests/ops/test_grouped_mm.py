"""grouped_mm against its reference in float64, and with it the matrix product of the CPU implementations."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import grouped_mm, grouped_mm_reference

pytestmark = pytest.mark.sixteen_bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (sizes of the groups, K, N): edges of the register tile, of the packed blocks (256), of a GPU's tiles (128) and steps
# (64), and of the groups
SIZES = [
    ([0, 0], 3, 4),
    ([1], 1, 1),
    ([5, 0, 1, 31], 17, 33),
    ([0, 32, 33, 0], 64, 16),
    ([129], 65, 130),
    ([257], 31, 15),
    ([3, 260], 257, 96),
    ([16, 8, 4], 600, 32),
    ([5, 40], 20, 300),
    ([40], 0, 8),
    ([1] * 140, 32, 8),  # more groups than a warp looks at together
]


def inputs(groups, inner, columns, dtype):
    offsets = torch.tensor([0, *groups]).cumsum(0).int()
    a = torch.randn(sum(groups), inner).to(dtype)
    return a, torch.randn(len(groups), inner, columns).to(dtype), offsets, torch.randn(sum(groups), columns).to(dtype)


def run(function, a, b, offsets, dout):
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    out = function(*leaves, offsets)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(a, b, offsets, dout):
    actual = run(grouped_mm, a, b, offsets, dout)
    exact = run(grouped_mm_reference, a.double(), b.double(), offsets, dout)
    baseline = run(grouped_mm_reference, a, b, offsets, dout)
    for name, x, e, y in zip(["out", "da", "db"], actual, exact, baseline, strict=True):
        assert_accurate(x, e, y, name=name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups,inner,columns", SIZES, ids=str)
def test_forward_and_backward(groups, inner, columns, dtype, device, poisoned):
    check(*inputs(groups, inner, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weights(dtype, device, poisoned):
    a, b, offsets, dout = inputs([130, 0, 5], 72, 24, dtype)
    weight = b.transpose(1, 2).contiguous()
    *_, db = check(a, weight.transpose(1, 2), offsets, dout)
    assert db.stride() == weight.transpose(1, 2).stride()
    assert_bitwise_equal(db[1], torch.zeros_like(db[1]))


# By matrix units (tile_matmul_cpu.cpp), where the CPU has them: edges of tiles (16, pairs over a depth of 32), strips
# (32), panels (64), slices (64, of bfloat16 256), blocks of rows (320, 512) and of depth (512, 1024).
TILED = [(64, 64, 64), (65, 100, 67), (80, 129, 128), (200, 513, 144), (256, 512, 129), (321, 1056, 260)]
TILED += [(150, 3000, 70), (513, 1024, 65), (515, 1025, 31), (1, 1, 1), (2, 300, 17), (15, 257, 16), (17, 255, 15)]
TILED += [(33, 16, 63), (48, 31, 200), (16, 33, 1)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,inner,columns", TILED)
def test_large_products(rows, inner, columns, dtype, transposed):
    a, b, offsets, dout = inputs([rows], inner, columns, dtype)
    a = a * a.exp()  # over several orders of magnitude
    check(a, b.transpose(1, 2).contiguous().transpose(1, 2) if transposed else b, offsets, dout)


NAN, INF = float("nan"), float("inf")
# Rounding its bits to bfloat16 carries into the sign: a part of a number cannot tell it from zero.
NAN_OF_ONES = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize(
    "of_a,of_b",
    [(0, 1), (1e-30, 1), (1e-30, 1e30), (1e-42, 1e38), (1e-20, 1e-20), (3e38, 1e-10), (3.4028235e38, 1e-38), (1e30, 1)],
)
def test_float_products_of_every_magnitude(of_a, of_b):
    """Also where parts of the numbers are subnormal, or none of their bfloat16 neighbours is finite."""
    x, y = torch.randn(80, 96).tanh(), torch.randn(96, 70)
    for a, b in ((x * of_a, y * of_b), (y.t().tanh() * of_a, x.t() * of_b)):
        product = grouped_mm(a, b[None], torch.tensor([0, len(a)]).int())
        assert_accurate(product, a.double() @ b.double(), a @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [NAN, NAN_OF_ONES, INF, -INF], ids=["nan", "nan of ones", "inf", "-inf"])
def test_products_of_what_is_not_finite(value, dtype):
    """It reaches its row or its column, and no other."""
    a, b, offsets, _ = inputs([150], 600, 200, dtype)
    for tensor, index in ((a, (70, 520)), (a, (70, 599)), (b, (0, 3, 130)), (b, (0, 599, 199))):
        before = tensor[index].item()
        tensor[index] = value
        assert value is not NAN_OF_ONES or dtype != torch.float32 or tensor[index].view(torch.int32) == 0x7FFFFFFF
        product, expected = grouped_mm(a, b, offsets), a.float() @ b[0].float()
        reached = ~expected.isfinite()
        assert reached.any() and torch.equal(product.isfinite(), ~reached)
        torch.testing.assert_close(product[reached].float(), expected[reached], rtol=0, atol=0, equal_nan=True)
        exact = (a.double() @ b[0].double())[~reached]
        assert_accurate(product[~reached], exact, expected[~reached].to(dtype))
        tensor[index] = before


def test_equals_torch():
    a, b, offsets, _ = inputs([16, 0, 48], 32, 64, torch.float32)
    torch.testing.assert_close(grouped_mm(a, b, offsets), torch.nn.functional.grouped_mm(a, b, offs=offsets[1:]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_infinity_stays_in_its_group(dtype, device):
    a, b, offsets, dout = inputs([20, 20, 20], 16, 8, dtype)
    a[25] = float("inf")
    dout[30] = float("nan")
    out, da, db = run(grouped_mm, a, b, offsets, dout)
    for result in (out.split(20), da.split(20), db):
        assert result[0].isfinite().all() and result[2].isfinite().all()
    assert not out[25].isfinite().any() and out[20:25].isfinite().all() and not db[1].isfinite().any()


@pytest.mark.random_schedules
@pytest.mark.older_gpu
def test_schedules(device):
    check(*inputs([140, 0, 70], 200, 140, torch.bfloat16))


@pytest.mark.parametrize("wrong", [[0, 1 << 30, 38], [0, -5, 38], [30, 10, 60]], ids=str)
def test_offsets_out_of_range_touch_nothing_outside(wrong, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the memory of the matrices is not left."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("the CPU refuses them")
    a, b, _, dout = inputs([20, 18], 48, 40, torch.bfloat16)
    run(grouped_mm, a, b, torch.tensor(wrong, dtype=torch.int32), dout)


def test_gradcheck():
    a, b, offsets, _ = inputs([3, 0, 4], 5, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: grouped_mm(x, y, offsets), (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs_give_the_same_bits(dtype, device):
    a, b, offsets, dout = inputs([20, 13, 5], 50, 40, dtype)
    expected = run(grouped_mm, a, b, offsets, dout)
    strided = torch.full((38, 77), float("nan"), dtype=dtype)[:, 3:53].copy_(a)
    for view in (strided, a.t().contiguous().t()):
        for weights in (b, b.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
            for x, y in zip(run(grouped_mm, view, weights, offsets, dout), expected, strict=True):
                assert_bitwise_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_that_is_nan_stays_alone(dtype, device):
    a, b, offsets, _ = inputs([20, 13, 5], 50, 40, dtype)
    expected = grouped_mm(a, b, offsets)
    a[5] = float("nan")
    out = grouped_mm(a, b, offsets)
    assert out[5].isnan().all()
    out[5] = expected[5]
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_number_of_threads(dtype):
    arguments = inputs([300, 5, 0, 270], 64, 96, dtype)
    same_for_any_threads(lambda: run(grouped_mm, *arguments))


def test_only_the_gradients_that_are_asked_for():
    a, b, offsets, dout = inputs([4, 4], 8, 8, torch.float32)
    out, da, db = run(grouped_mm, a, b, offsets, dout)
    for leaf, other, expected in ((a, b, da), (b, a, db)):
        leaf.requires_grad_(), other.requires_grad_(False)
        assert_bitwise_equal(torch.autograd.grad(grouped_mm(a, b, offsets), leaf, dout)[0], expected)


def test_opcheck():
    a, b, offsets, dout = inputs([4, 0, 3], 5, 6, torch.float32)
    torch.library.opcheck(torch.ops.arfast.grouped_mm, (a, b, offsets))
    torch.library.opcheck(torch.ops.arfast.grouped_mm_transposed, (a, dout, offsets))


def test_compile():
    arguments = inputs([4, 0, 3], 5, 6, torch.float32)
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, *arguments), run(grouped_mm, *arguments), strict=True):
        assert_bitwise_equal(x, y)


def test_autocast():
    a, b, offsets, _ = inputs([4, 3], 16, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(grouped_mm(a.float(), b.float(), offsets), grouped_mm(a, b, offsets))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(a=torch.zeros(6)), r"a must have shape \[M, K\] = \[\*, \*\], got \[6\]"),
        (dict(a=torch.zeros(6, 4).int()), "a must be float32, bfloat16, float16 or float64, got int32"),
        (dict(b=torch.zeros(2, 5, 3)), r"b must have shape \[E, K, N\] = \[2, 4, \*\], got \[2, 5, 3\]"),
        (dict(b=torch.zeros(2, 4, 3).half()), r"b must have the dtype of a \(float32\), got float16"),
        (dict(offsets=torch.tensor([0, 6])), "offsets must be int32, got int64"),
        (dict(offsets=torch.zeros(0).int()), r"offsets must have shape \[E \+ 1\], got \[0\]"),
        (dict(offsets=[1, 3, 6]), "offsets must rise from 0 to the number of rows, 6, without .* got 1 at index 0"),
        (dict(offsets=[0, 7, 6]), "offsets must rise .* 6, without decreasing, got 7 at index 1"),
        (dict(offsets=[0, 4, 3]), "offsets must rise .* 6, without decreasing, got 3 at index 2"),
        (dict(offsets=[0, -1, 6]), "offsets must rise .* 6, without decreasing, got -1 at index 1"),
        (dict(offsets=[0, 3, 5]), "offsets must rise .* 6, without decreasing, got 5 at index 2"),
    ],
)
def test_errors(change, message):
    arguments = dict(a=torch.zeros(6, 4), b=torch.zeros(2, 4, 3), offsets=[0, 3, 6]) | change
    if isinstance(arguments["offsets"], list):
        arguments["offsets"] = torch.tensor(arguments["offsets"], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="grouped_mm: " + message):
        grouped_mm(**arguments)
