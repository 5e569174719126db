"""swiglu against its reference in float64."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import far_apart, misaligned, with_gaps

from arfast.ops import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 60.0, -60.0, 0.0, -0.0, 1.0, -20.0]


def run(function, gate, up, dout):
    """Output and gradients of `function` on the inputs as they lie in memory."""
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def random(device, dtype, *shape):
    return torch.randn(shape).to(device, dtype)


def check(gate, up, dout=None):
    dout = torch.randn(gate.shape).to(gate) if dout is None else dout
    exact = run(swiglu_reference, gate.double(), up.double(), dout)
    baseline = run(swiglu_reference, gate, up, dout)
    for name, a, e, b in zip(["out", "dgate", "dup"], run(swiglu, gate, up, dout), exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,size", [(0, 8), (1, 1), (1, 7), (31, 33), (33, 257), (64, 704), (1000, 3)])
def test_forward_and_backward(rows, size, dtype, device, poisoned):
    check(random(device, dtype, rows, size), random(device, dtype, rows, size))


@pytest.mark.not_emulated
def test_float64(device):
    """On a GPU, by the reference."""
    check(random(device, torch.float64, 9, 65), random(device, torch.float64, 9, 65))


@pytest.mark.parametrize("scale", [30.0, 1e4, 0.0])
def test_extreme_values(scale, device):
    check(random(device, torch.float32, 9, 65) * scale, random(device, torch.float32, 9, 65))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_go_where_the_formula_says(dtype, device):
    gate, up = (
        t.flatten()[None].to(device, dtype) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * 2, indexing="ij")
    )
    check(gate, up, torch.ones_like(gate))


def test_gradcheck():
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, leaves)


def test_same_bits_for_every_number_of_threads():
    gate, up, dout = (torch.randn(60, 500) for _ in range(3))
    same_for_any_threads(lambda: run(swiglu, gate, up, dout))


@pytest.mark.parametrize("size", [48, 500, 77])
def test_strided_and_misaligned_inputs_give_the_same_bits(size, device):
    both, dout = random(device, torch.bfloat16, 12, 2 * size), random(device, torch.bfloat16, 12, size)
    gate, up = both.chunk(2, -1)
    expected = run(swiglu, gate.contiguous(), up.contiguous(), dout)
    for views in (
        (gate, up, dout),
        (misaligned(gate), up, with_gaps(dout, 1)),
        (with_gaps(gate, 8), misaligned(up), dout),
        (gate.contiguous(), up.t().contiguous().t(), misaligned(dout)),
        (gate.contiguous(), up.contiguous(), with_gaps(dout, 8)),
    ):
        for a, b in zip(run(swiglu, *views), expected, strict=True):
            assert_bitwise_equal(a, b)
    assert_bitwise_equal(swiglu(gate.view(3, 4, size), up.view(3, 4, size)).view(12, size), expected[0])


def test_offsets_beyond_2_31(device):
    gate, up, dout = (random(device, torch.bfloat16, 3, 72) for _ in range(3))
    expected = run(swiglu, gate, up, dout)
    for views in ((far_apart(gate), up, dout), (gate, far_apart(up), dout), (gate, up, far_apart(dout))):
        for a, b in zip(run(swiglu, *views), expected, strict=True):
            assert_bitwise_equal(a, b)


def test_more_vectors_than_threads(device, implementation, request):
    rows, size = (6000, 1001) if implementation == "cuda" else (150, 257)
    if implementation == "emulated":
        request.getfixturevalue("emulator_library").configure(multiprocessors=1)
    gate, up, dout = (random(device, torch.float32, rows, size) for _ in range(3))
    expected = run(swiglu, gate[-7:], up[-7:], dout[-7:])
    for views in ((gate, up, dout), (with_gaps(gate, 1), up, dout)):
        for a, b in zip(run(swiglu, *views), expected, strict=True):
            assert_bitwise_equal(a[-7:], b)


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
