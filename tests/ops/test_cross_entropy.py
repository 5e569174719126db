"""cross_entropy against its reference in float64 and against torch, over the checklist that every op has."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import cross_entropy, cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 2), (1, 31), (31, 32), (32, 33), (33, 257), (3, 2048), (5, 5001)]
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "all": dict(label_smoothing=0.2, z_loss=1e-3, softcap=8.0, weight=True),
    "weight": dict(weight=True, z_loss=1e-3),
    "softcap": dict(softcap=3.0),
    "certain": dict(label_smoothing=1.0),
}


def inputs(rows, classes, dtype, *, scale=3.0, ignored=True, device="cpu"):
    logits = (torch.randn(rows, classes) * scale).to(device, dtype)
    targets = torch.randint(0, classes, (rows,), device=device)
    if ignored:
        targets[1::4] = -100
    return logits, targets


def with_weight(options, classes, dtype, device="cpu"):
    if not options.get("weight"):
        return options
    weight = torch.rand(classes)
    weight[classes // 2] = 0
    return options | dict(weight=weight.to(device, torch.float64 if dtype == torch.float64 else torch.float32))


def run(function, logits, targets, options, upstream=None):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, targets, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), gradient


def check(logits, targets, options):
    reduction = options.get("reduction", "mean")
    upstream = (torch.randn(logits.shape[0]) if reduction == "none" else torch.tensor(1.7)).to(logits.device)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    actual = run(cross_entropy, logits, targets, options, upstream)
    exact = run(cross_entropy_reference, logits.double(), targets, wide, upstream)
    baseline = run(cross_entropy_reference, logits, targets, options, upstream)
    for name, a, e, b in zip(["loss", "dlogits"], actual, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,classes", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward(name, rows, classes, dtype, reduction, poisoned, device):
    options = with_weight(OPTIONS[name], classes, dtype, device) | dict(reduction=reduction)
    check(*inputs(rows, classes, dtype, device=device), options)


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize(
    "dtype,classes",
    [(torch.bfloat16, 20011), (torch.float32, 9001), (torch.bfloat16, 80011), (torch.float32, 70001)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_rows(dtype, classes, reduction, device, poisoned):
    """On a GPU: by clusters (test_cross_entropy_ring.py); before sm_90 in a block's shared memory, or read twice."""
    options = with_weight(OPTIONS["all"], classes, dtype, device) | dict(reduction=reduction)
    check(*inputs(3, classes, dtype, device=device), options)


@pytest.mark.parametrize("name", ["plain", "smoothing", "softcap"])
def test_a_single_class_is_certain(name, device):
    loss, gradient = run(
        cross_entropy, torch.randn(3, 1, device=device), torch.zeros(3, dtype=torch.int64, device=device), OPTIONS[name]
    )
    assert loss == 0 and gradient.abs().max() < 1e-15


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_torch(weighted, label_smoothing, device):
    logits, targets = inputs(40, 300, torch.float32, device=device)
    options = dict(label_smoothing=label_smoothing, weight=torch.rand(300, device=device) if weighted else None)
    actual = run(cross_entropy, logits, targets, options)
    expected = run(torch.nn.functional.cross_entropy, logits, targets, options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_and_all_ignored(reduction, device):
    for logits, targets in [
        (torch.randn(0, 7, device=device), torch.zeros(0, dtype=torch.int64, device=device)),
        (torch.randn(3, 7, device=device), torch.full((3,), -100, device=device)),
    ]:
        upstream = torch.ones(logits.shape[0], device=device) if reduction == "none" else torch.tensor(1.0)
        loss, gradient = run(cross_entropy, logits, targets, dict(reduction=reduction, label_smoothing=0.1), upstream)
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
        assert_bitwise_equal(loss, expected)
        assert gradient.shape == logits.shape and not gradient.any()


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_values(scale, device):
    for options in (dict(), dict(label_smoothing=0.1)):
        check(*inputs(9, 65, torch.float32, scale=scale, device=device), options)


def test_infinite_logits(device):
    logits, targets = inputs(4, 40, torch.float32, ignored=False, device=device)
    logits[:, 30:] = float("-inf")
    targets %= 30
    check(logits, targets, dict())
    loss, gradient = run(cross_entropy, logits, targets, dict(label_smoothing=0.1))
    assert loss == float("inf") and gradient.isfinite().all()
    logits[1] = float("-inf")
    losses, gradient = run(cross_entropy, logits, targets, dict(reduction="none"), torch.ones(4, device=device))
    assert losses.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False, False]


def test_a_whole_tile_of_masked_logits(device):
    logits, targets = inputs(2, 6000, torch.float32, ignored=False, device=device)
    logits[:, :4500] = float("-inf")
    targets = 4500 + targets % 1500
    check(logits, targets, dict())


def test_nan_stays_in_its_row_and_ignored_rows_are_not_read(device):
    logits, targets = inputs(4, 40, torch.float32, ignored=False, device=device)
    logits[1, 3] = logits[2, 5] = float("nan")
    targets[2] = -100
    losses, gradient = run(
        cross_entropy, logits, targets, dict(reduction="none", label_smoothing=0.1), torch.ones(4, device=device)
    )
    assert losses.isnan().tolist() == [False, True, False, False]
    assert losses[2] == 0 and not gradient[2].any()


def test_gradient_of_a_nearly_certain_target_survives_bfloat16(device):
    """p - 1 is formed in float and rounded once: rounding p first would lose all of it."""
    logits = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    logits[0, 2] = 9.0
    check(logits, torch.tensor([2]), dict())
    _, gradient = run(cross_entropy, logits, torch.tensor([2]), dict())
    expected = torch.softmax(logits.double(), -1)[0, 2] - 1
    assert abs(gradient[0, 2].double() / expected - 1) < 2**-8


def test_num_items_makes_accumulation_exact():
    logits, targets = inputs(12, 50, torch.float64)
    whole = run(cross_entropy, logits, targets, dict(label_smoothing=0.1))
    items = int((targets != -100).sum())
    parts = [
        run(cross_entropy, x, t, dict(label_smoothing=0.1, num_items=items))
        for x, t in zip(logits.split(5), targets.split(5), strict=True)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction):
    logits, targets = inputs(5, 11, torch.float64)
    options = with_weight(OPTIONS[name], 11, torch.float64) | dict(reduction=reduction)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, **options), logits.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gives_the_same_bits_in_the_logits_memory(dtype, device):
    logits, targets = inputs(7, 333, dtype, device=device)
    expected = run(cross_entropy, logits, targets, dict(label_smoothing=0.1))
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1
    loss = cross_entropy(produced, targets, label_smoothing=0.1, inplace=True)
    (gradient,) = torch.autograd.grad(loss, produced)
    assert gradient.data_ptr() == produced.data_ptr()
    assert_bitwise_equal(loss.detach(), expected[0])
    assert_bitwise_equal(gradient, expected[1])


def test_inplace_reports_a_later_use_of_the_logits():
    produced = torch.randn(3, 9, requires_grad=True) * 1
    exponential = produced.exp().sum() + produced.square().sum()
    loss = cross_entropy(produced, torch.tensor([1, 2, 3]), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + exponential).backward()


def test_second_backward():
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 2, 3])
    loss = cross_entropy(logits, targets)
    first, second = (torch.autograd.grad(loss, logits, torch.tensor(s), retain_graph=True)[0] for s in (1.0, 2.0))
    assert_bitwise_equal(first * 2, second)
    produced = logits * 1
    loss = cross_entropy(produced, targets, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    upstream = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets), logits, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.sum() + upstream).backward()


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    logits, targets = inputs(12, 50, torch.bfloat16, device=device)
    options = dict(label_smoothing=0.1)
    expected = run(cross_entropy, logits, targets, options)
    strided = torch.empty(12, 77, dtype=logits.dtype)[:, 3:53].copy_(logits)
    transposed = logits.t().contiguous().t()
    spread = torch.empty(12, 2, dtype=torch.int64)[:, 1].copy_(targets)
    for view in (strided, transposed):
        leaf = view.detach().requires_grad_()
        loss = cross_entropy(leaf, spread, **options)
        assert_bitwise_equal(loss.detach(), expected[0])
        assert_bitwise_equal(torch.autograd.grad(loss, leaf)[0], expected[1])


def test_same_bits_for_every_number_of_threads_and_every_batch():
    logits, targets = inputs(90, 3001, torch.float32)
    options = dict(label_smoothing=0.1, reduction="none")
    together = same_for_any_threads(lambda: run(cross_entropy, logits, targets, options, torch.ones(90)))
    alone = run(cross_entropy, logits[42:43], targets[42:43], options, torch.ones(1))
    for whole, part in zip(together, alone, strict=True):
        assert_bitwise_equal(whole[42:43], part)


def test_opcheck():
    logits, targets = inputs(6, 24, torch.float32)
    options = (-100, 0.1, 1e-3, 0.0)
    for reduction, with_gradient in ((0, False), (1, True), (2, True)):
        arguments = (logits, targets, None, *options, reduction, None, with_gradient)
        torch.library.opcheck(torch.ops.arfast.cross_entropy_forward, arguments)
    torch.library.opcheck(torch.ops.arfast.cross_entropy_forward_, (logits.clone(), targets, None, *options, 1, 3.0))
    torch.library.opcheck(torch.ops.arfast.cross_entropy_totals, (logits, targets, None, 24, -100, 1, None))
    _, statistics, _ = torch.ops.arfast.cross_entropy_forward(logits, targets, None, *options, 0, None, False)
    torch.library.opcheck(
        torch.ops.arfast.cross_entropy_backward, (torch.randn(6), logits, targets, None, statistics, *options)
    )
    torch.library.opcheck(torch.ops.arfast.scale_gradient_, (logits.clone(), torch.tensor(2.0)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    logits, targets = inputs(6, 24, torch.float32)
    options = dict(label_smoothing=0.1, reduction=reduction)
    upstream = torch.ones(6) if reduction == "none" else torch.tensor(0.5)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    expected = run(cross_entropy, logits, targets, options, upstream)
    for a, b in zip(run(compiled, logits, targets, options, upstream), expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.slow
def test_more_than_2_31_elements():
    """Rows past 2^31 elements: a bfloat16 tensor of 4.3 GB in place."""
    rows, classes = 16800, 128256
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    logits[-1, -1] = 5.0
    targets = torch.full((rows,), -100)
    targets[-1] = classes - 1
    loss = cross_entropy(logits, targets)
    expected = torch.nn.functional.cross_entropy(logits[-1:].double(), targets[-1:])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(logits=torch.zeros(4, 8, dtype=torch.int64)),
            "logits must be float32, bfloat16, float16 or float64, got int64",
        ),
        (dict(logits=torch.zeros(4)), r"logits must have shape \[N, V\] = \[\*, \*\], got \[4\]"),
        (dict(logits=torch.zeros(4, 0)), "logits must have at least one class, got 0 classes"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"targets must have shape \[N\] = \[4\], got \[3\]"),
        (dict(targets=torch.zeros(4, dtype=torch.int32)), "targets must be int64, got int32"),
        (dict(targets=torch.tensor([0, 1, 8, 2])), r"targets must be in \[0, 8\) or -100, got 8 at row 2"),
        (dict(targets=torch.tensor([0, 1, -1, 2])), r"targets must be in \[0, 8\) or -100, got -1 at row 2"),
        (dict(weight=torch.zeros(7)), r"weight must have shape \[V\] = \[8\], got \[7\]"),
        (dict(weight=torch.zeros(8, dtype=torch.int64)), "weight must be float32, got int64"),
        (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (dict(label_smoothing=float("nan")), r"label_smoothing must be in \[0, 1\], got nan"),
        (dict(z_loss=-1.0), "z_loss must be finite and at least 0, got -1"),
        (dict(softcap=0.0), "softcap must be finite and positive, or None, got 0.0"),
        (dict(reduction="max"), r"reduction must be one of \['mean', 'none', 'sum'\], got 'max'"),
        (dict(num_items=0), "num_items must be finite and positive, or None, got 0"),
        (dict(inplace=True, reduction="none"), "inplace must be False with reduction='none', got True"),
        (
            dict(logits=torch.zeros(8, 4, requires_grad=True).t() * 1, inplace=True),
            "logits must have a dense last dimension for inplace=True, got stride 4",
        ),
        (
            dict(logits=torch.zeros(8, requires_grad=True).expand(4, 8), inplace=True),
            "logits must not overlap itself for inplace=True, got row stride 0",
        ),
    ],
)
def test_errors(change, message):
    arguments = dict(logits=torch.zeros(4, 8), targets=torch.tensor([0, 1, 7, -100])) | change
    with pytest.raises((RuntimeError, ValueError), match="cross_entropy: " + message):
        cross_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)
