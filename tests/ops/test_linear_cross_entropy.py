"""linear_cross_entropy against its reference in float64, over the checklist that every op has."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal

from arfast.ops import cross_entropy, linear_cross_entropy, linear_cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["loss", "dhidden", "dweight", "dbias"]
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1, bias=True),
    "all": dict(label_smoothing=0.2, z_loss=1e-3, softcap=8.0, class_weight=True, bias=True),
}


def inputs(rows, size, classes, dtype, options):
    """On the device that the fixture `device` has made the default."""
    hidden, weight = torch.randn(rows, size).to(dtype), torch.randn(classes, size).to(dtype)
    targets = torch.randint(0, classes, (rows,))
    targets[1::4] = -100
    bias = torch.randn(classes).to(dtype) if options.get("bias") else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    class_weight = torch.rand(classes, dtype=wide) if options.get("class_weight") else None
    rest = {k: v for k, v in options.items() if k not in ("bias", "class_weight")}
    return hidden, weight, bias, targets, dict(class_weight=class_weight, **rest)


def run(function, hidden, weight, bias, targets, options, upstream=None):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = function(leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, None if upstream is None else upstream.to(loss.dtype))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,size,classes", [(1, 8, 2), (31, 17, 33), (40, 32, 257), (33, 24, 1000)])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward(name, rows, size, classes, dtype, reduction, poisoned, device):
    hidden, weight, bias, targets, options = inputs(rows, size, classes, dtype, OPTIONS[name])
    options |= dict(reduction=reduction)
    upstream = torch.randn(rows) if reduction == "none" else torch.tensor(1.7)
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    wide_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = run(linear_cross_entropy_reference, *wide, targets, wide_options, upstream)
    baseline = run(linear_cross_entropy_reference, hidden, weight, bias, targets, options, upstream)
    for chunk_bytes in (None, 9 * classes * hidden.element_size()):
        actual = run(
            linear_cross_entropy, hidden, weight, bias, targets, options | dict(chunk_bytes=chunk_bytes), upstream
        )
        for n, a, e, b in zip(NAMES, actual, exact, baseline, strict=False):
            assert_accurate(a, e, b, name=f"{n}, chunk_bytes={chunk_bytes}")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction):
    hidden, weight, bias, targets, options = inputs(6, 4, 9, torch.float64, OPTIONS[name])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    options |= dict(reduction=reduction, chunk_bytes=2 * 9 * 8)
    function = lambda h, w, b=None: linear_cross_entropy(h, w, targets, bias=b, **options)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_and_all_ignored(reduction, device):
    for rows in (0, 3):
        hidden, weight, _, targets, _ = inputs(rows, 5, 7, torch.float32, {})
        targets[:] = -100
        upstream = torch.ones(rows) if reduction == "none" else torch.tensor(1.0)
        loss, *gradients = run(linear_cross_entropy, hidden, weight, None, targets, dict(reduction=reduction), upstream)
        assert_bitwise_equal(loss, torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction=reduction))
        assert not any(g.any() for g in gradients)


def test_only_what_needs_a_gradient_gets_one(device):
    hidden, weight, _, targets, _ = inputs(12, 8, 20, torch.float32, {})
    both = run(linear_cross_entropy, hidden, weight, None, targets, {})
    weight_leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, weight_leaf, targets).backward()
    assert_bitwise_equal(weight_leaf.grad, both[2])
    hidden_leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(hidden_leaf, weight, targets).backward()
    assert_bitwise_equal(hidden_leaf.grad, both[1])
    with torch.no_grad():
        assert_bitwise_equal(linear_cross_entropy(hidden_leaf, weight_leaf, targets), both[0])


def test_blocks_of_different_calls_do_not_mix(device):
    """Gradients are made in the forward pass: a second call before the first backward must not disturb them."""
    calls = [inputs(9, 8, classes, torch.float32, {}) for classes in (50, 20)]
    expected = [run(linear_cross_entropy, h, w, None, t, o) for h, w, _, t, o in calls]
    leaves = [[c[0].clone().requires_grad_(), c[1].clone().requires_grad_()] for c in calls]
    losses = [linear_cross_entropy(*pair, call[3]) for pair, call in zip(leaves, calls, strict=True)]
    for loss, pair, e in zip(losses, leaves, expected, strict=True):
        for a, b in zip(torch.autograd.grad(loss, pair), e[1:], strict=True):
            assert_bitwise_equal(a, b)


def test_logits_never_exist_whole():
    """The largest tensor the op asks torch for is one block."""
    rows, size, classes = 256, 16, 4000
    hidden, weight, _, targets, _ = inputs(rows, size, classes, torch.float32, {})
    hidden.requires_grad_(), weight.requires_grad_()
    chunk_bytes = rows * classes * 4 // 8
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets, chunk_bytes=chunk_bytes).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < rows * classes * 4 // 2


def test_num_items():
    hidden, weight, _, targets, _ = inputs(12, 6, 30, torch.float64, {})
    items = int((targets != -100).sum())
    whole = run(linear_cross_entropy, hidden, weight, None, targets, dict(label_smoothing=0.1))
    parts = [
        run(linear_cross_entropy, h, weight, None, t, dict(label_smoothing=0.1, num_items=items))
        for h, t in zip(hidden.split(5), targets.split(5), strict=True)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])


def test_equals_cross_entropy_of_the_logits():
    hidden, weight, bias, targets, _ = inputs(20, 8, 60, torch.float32, OPTIONS["smoothing"])
    fused = linear_cross_entropy(hidden, weight, targets, bias=bias, label_smoothing=0.1)
    torch.testing.assert_close(fused, cross_entropy(hidden @ weight.t() + bias, targets, label_smoothing=0.1))


def test_deterministic():
    hidden, weight, _, targets, _ = inputs(64, 32, 500, torch.bfloat16, {})
    first = run(linear_cross_entropy, hidden, weight, None, targets, dict(chunk_bytes=20000))
    for a, b in zip(
        first, run(linear_cross_entropy, hidden, weight, None, targets, dict(chunk_bytes=20000)), strict=True
    ):
        assert_bitwise_equal(a, b)


def test_opcheck():
    hidden, weight, bias, targets, _ = inputs(6, 8, 20, torch.float32, OPTIONS["smoothing"])
    shared = (-100, 0.1, 1e-3, 0.0)
    for reduction, wants in ((1, (True, True, True)), (2, (True, False, False)), (0, (False, False, False))):
        arguments = (hidden, weight, bias, targets, None, *shared, reduction, None, 200, *wants)
        torch.library.opcheck(torch.ops.arfast.linear_cross_entropy_forward, arguments)
    arguments = (hidden, weight, bias, targets, None, *shared, 0, None, 200, False, False, False)
    statistics = torch.ops.arfast.linear_cross_entropy_forward(*arguments)[1]
    arguments = (torch.randn(6), hidden, weight, bias, targets, None, statistics, *shared, 200, True, True, True)
    torch.library.opcheck(torch.ops.arfast.linear_cross_entropy_backward, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    hidden, weight, bias, targets, options = inputs(6, 8, 20, torch.float32, OPTIONS["smoothing"])
    options |= dict(reduction=reduction)
    upstream = torch.ones(6) if reduction == "none" else torch.tensor(0.5)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = run(linear_cross_entropy, hidden, weight, bias, targets, options, upstream)
    for a, b in zip(run(compiled, hidden, weight, bias, targets, options, upstream), expected, strict=True):
        assert_bitwise_equal(a, b)


def test_autocast():
    hidden, weight, _, targets, _ = inputs(6, 8, 20, torch.bfloat16, {})
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_cross_entropy(hidden.float(), weight.float(), targets)
    assert_bitwise_equal(cast, linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(hidden=torch.zeros(4)), r"hidden must have shape \[N, d\], got \[4\]"),
        (dict(weight=torch.zeros(8, 4)), r"weight must have shape \[V, d\] = \[\*, 3\], got \[8, 4\]"),
        (
            dict(weight=torch.zeros(8, 3).double()),
            r"weight must have the dtype of hidden \(torch.float32\), got torch.float64",
        ),
        (dict(bias=torch.zeros(7)), r"bias must have shape \[V\] = \[8\], got \[7\]"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"targets must have shape \[N\] = \[4\], got \[3\]"),
        (dict(targets=torch.zeros(4)), "targets must be int64, got torch.float32"),
        (dict(targets=torch.tensor([0, 1, 8, 2])), r"targets must be in \[0, 8\) or -100, got 8 at row 2"),
        (dict(chunk_bytes=0), "chunk_bytes must be positive or None, got 0"),
        (dict(label_smoothing=-0.1), r"label_smoothing must be in \[0, 1\], got -0.1"),
        (dict(reduction="avg"), r"reduction must be one of"),
    ],
)
def test_errors(change, message):
    arguments = dict(hidden=torch.zeros(4, 3), weight=torch.zeros(8, 3), targets=torch.tensor([0, 1, 7, -100])) | change
    with pytest.raises((RuntimeError, ValueError), match="linear_cross_entropy: " + message):
        linear_cross_entropy(**arguments)
