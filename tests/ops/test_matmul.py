"""The matrix products of the CPU implementations, over every layout and the edges of every block, against float64."""

import pytest
import torch
from accuracy import assert_bitwise_equal
from threads import same_for_any_threads

matmul_ = torch.ops.arfast.matmul_
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# (M, K, N): single elements; the tile and one beyond; odd K; several blocks of K; several blocks of rows and columns;
# what oneDNN would multiply on one thread.
SIZES = [(1, 1, 1), (8, 2, 48), (9, 3, 49), (7, 33, 16), (5, 31, 65), (3, 512, 64), (17, 513, 100), (40, 1031, 33)]
SIZES += [(1025, 9, 20), (20, 7, 1601), (31, 0, 5), (515, 1056, 259)]


def layouts(rows, columns, dtype):
    """The same kind of matrix dense along columns, dense along rows, and dense along neither."""
    yield torch.randn(rows, columns).to(dtype)
    yield torch.randn(columns, rows).to(dtype).t()
    yield torch.randn(rows, 2 * columns + 3).to(dtype)[:, ::2][:, :columns]


def multiply(a, b, out=None):
    """a b, or out + a b; None if that is left to torch."""
    product = torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=a.dtype) if out is None else out.clone()
    return product if matmul_(product, a, b, out is not None) else None


def skip_if_left_to_torch(product, dtype):
    if product is None:
        pytest.skip(f"this machine multiplies {dtype} by torch's own product")


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(dtype, size, add):
    rows, depth, columns = size
    product = None
    for a in layouts(rows, depth, dtype):
        for b in layouts(depth, columns, dtype):
            start = torch.randn(rows, columns).to(dtype) if add else None
            exact = a.double() @ b.double() + (start.double() if add else 0.0)
            terms = a.double().abs() @ b.double().abs() + (start.double().abs() if add else 0.0)
            result = multiply(a, b, start)
            if result is None:
                continue
            product, error = result, (result.double() - exact).abs()
            sums = torch.float32 if dtype == torch.bfloat16 else dtype
            # One rounding, and the probabilistic bound of a sum of n products, 4 sqrt(n) u (Higham and Mary 2019).
            bound = 0.5 * exact.abs() * torch.finfo(dtype).eps + 2 * (depth + 1) ** 0.5 * terms * torch.finfo(sums).eps
            assert (error <= bound).all(), f"{(error - bound).max()} over the bound"
    skip_if_left_to_torch(product, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_neighbours(dtype):
    a, b = torch.randn(301, 700).to(dtype), torch.randn(700, 333).to(dtype)
    skip_if_left_to_torch(multiply(a, b), dtype)
    whole = same_for_any_threads(lambda: multiply(a, b))
    # Fewer rows may take another road through float32's product, never through another order of the sum.
    for rows in (1, 7, 8, 100):
        assert_bitwise_equal(multiply(a[:rows], b), whole[:rows])
        assert_bitwise_equal(multiply(a[:rows], b.t().contiguous().t()), whole[:rows])
    assert_bitwise_equal(multiply(a, b[:, 5:18]), whole[:, 5:18])


@pytest.mark.parametrize("depth", (30, 600))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype, depth):
    a, b = torch.randn(20, depth).to(dtype), torch.randn(depth, 70).to(dtype)
    clean = multiply(a, b)
    skip_if_left_to_torch(clean, dtype)
    a[3, 4], b[5, 6] = float("nan"), float("inf")
    spoilt = multiply(a, b)
    assert spoilt[3].isnan().all() and not spoilt[[0, 1, 2, 4], 6].isfinite().any()
    kept = torch.ones_like(clean, dtype=torch.bool)
    kept[3], kept[:, 6] = False, False
    assert_bitwise_equal(spoilt[kept], clean[kept])


def test_float16_is_left_to_torch():
    ones = torch.ones(2, 2, dtype=torch.float16)
    assert not matmul_(ones, ones, ones, False)


def test_wrong_arguments():
    a, out = torch.ones(2, 3), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"matmul_: b must have shape \[K, N\] = \[3, \*\], got \[2, 4\]"):
        matmul_(out, a, torch.ones(2, 4), False)
    with pytest.raises(RuntimeError, match="matmul_: b must have the dtype of out"):
        matmul_(out, a, torch.ones(3, 4).double(), False)
    with pytest.raises(RuntimeError, match="matmul_: out must have dense rows"):
        matmul_(torch.ones(4, 2).t(), a, torch.ones(3, 4), False)
