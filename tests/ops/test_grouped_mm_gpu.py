"""grouped_mm in the dtypes that GPUs have, on every device, against its reference in float64."""

import pytest
import torch
from accuracy import assert_bitwise_equal
from test_grouped_mm import check, inputs, run

from arfast.ops import grouped_mm

DTYPES = [torch.bfloat16, torch.float16]
# (sizes of the groups, K, N): edges of the tiles of 128, of the steps of 64 and of the groups
SIZES = [
    ([0, 0], 3, 4),
    ([1], 1, 1),
    ([5, 0, 1, 31], 17, 33),
    ([0, 32, 33, 0], 64, 16),
    ([129], 65, 130),
    ([3, 260], 256, 96),
    ([16, 8, 4], 200, 32),
    ([5, 40], 20, 300),
    ([40], 0, 8),
    ([1] * 40, 32, 8),  # more groups than lanes
]


def on(device, tensors):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups,inner,columns", SIZES, ids=str)
def test_forward_and_backward(groups, inner, columns, dtype, device, poisoned):
    check(*on(device, inputs(groups, inner, columns, dtype)))


@pytest.mark.random_schedules
@pytest.mark.older_gpu
def test_schedules(device):
    check(*on(device, inputs([140, 0, 70], 200, 140, torch.bfloat16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weights(dtype, device, poisoned):
    a, b, offsets, dout = on(device, inputs([130, 0, 5], 72, 24, dtype))
    weight = b.transpose(1, 2).contiguous()
    *_, db = check(a, weight.transpose(1, 2), offsets, dout)
    assert db.stride() == weight.transpose(1, 2).stride()
    assert_bitwise_equal(db[1], torch.zeros_like(db[1]))


def test_infinity_stays_in_its_group(device):
    a, b, offsets, dout = on(device, inputs([20, 20, 20], 16, 8, torch.bfloat16))
    a[25] = float("inf")
    dout[30] = float("nan")
    out, da, db = run(grouped_mm, a, b, offsets, dout)
    for result in (out.split(20), da.split(20), db):
        assert result[0].isfinite().all() and result[2].isfinite().all()
    assert not out[25].isfinite().any() and out[20:25].isfinite().all() and not db[1].isfinite().any()


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    a, b, offsets, dout = on(device, inputs([20, 13, 5], 48, 40, torch.bfloat16))
    expected = run(grouped_mm, a, b, offsets, dout)
    strided = torch.full((38, 77), float("nan"), dtype=a.dtype, device=a.device)[:, 3:51].copy_(a)
    for view in (strided, a.t().contiguous().t()):
        for weights in (b, b.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
            for x, y in zip(run(grouped_mm, view, weights, offsets, dout), expected, strict=True):
                assert_bitwise_equal(x, y)


@pytest.mark.parametrize("wrong", [[0, 1 << 30, 38], [0, -5, 38], [30, 10, 60]], ids=str)
def test_offsets_out_of_range_touch_nothing_outside(wrong, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the memory of the matrices is not left."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("the CPU refuses them")
    a, b, _, dout = on(device, inputs([20, 18], 48, 40, torch.bfloat16))
    run(grouped_mm, a, b, torch.tensor(wrong, dtype=torch.int32).to(a.device), dout)
