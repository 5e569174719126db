"""The vocabulary split over ranks: its cross-entropy against linear_cross_entropy on one rank, and its embedding."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from arfast import ops
from arfast.distributed.collectives import Group, copy_to, reduce_from
from arfast.distributed.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_embedding

ROWS, WORDS, SIZE = 37, 48, 16
ONE = Group()


def _world():
    return Group(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",)), "tensor")


def _inputs(dtype):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(WORDS, SIZE, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(WORDS, (ROWS,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def _own(weight, group):
    return weight.chunk(group.size)[group.rank].clone()


def _whole(loss_function, hidden, weight, upstream):
    """Loss and gradients of one rank."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_function(hidden, weight)
    (loss.double() * upstream).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def _split(loss_function, hidden, weight, upstream, group):
    """The same of several ranks, each with its part of the weight; the parts are put together."""
    hidden, part = hidden.clone().requires_grad_(), _own(weight, group).requires_grad_()
    loss = loss_function(copy_to(hidden, group), part)
    (loss.double() * upstream).sum().backward()
    return loss.detach(), hidden.grad, group.gather(part.grad).flatten(0, 1)


def _check_options(group, dtype):
    hidden, weight, targets = _inputs(dtype)
    rows = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    smoothing, z_loss, softcap = (0.0, 0.1, 1.0), (0.0, 1e-2), (None, 3.0)
    reductions = (("mean", None), ("mean", 100.0), ("sum", None), ("none", None))
    for eps, z, cap, (reduction, num_items) in product(smoothing, z_loss, softcap, reductions):
        options = dict(label_smoothing=eps, z_loss=z, softcap=cap, reduction=reduction, num_items=num_items)
        upstream = rows if reduction == "none" else 1.7

        def reference(h, w, options=options):
            return ops.linear_cross_entropy_reference(h, w, targets, **options)

        def split(h, w, options=options):
            return vocab_parallel_cross_entropy(h, w, targets, group, chunk_bytes=900, **options)

        exact = _whole(reference, hidden.double(), weight.double(), upstream)
        baseline = _whole(reference, hidden, weight, upstream)
        actual = _split(split, hidden, weight, upstream, group)
        for name, *values in zip(("loss", "dhidden", "dweight"), actual, exact, baseline, strict=True):
            if dtype == torch.float64:  # there the baseline is the exact value
                torch.testing.assert_close(*values[:2], rtol=1e-12, atol=1e-13, msg=f"{name} of {options}")
            else:
                assert_accurate(*values, name=f"{name} of {options}")
        one_rank = ops.linear_cross_entropy(hidden, weight, targets, **options)
        torch.testing.assert_close(actual[0], one_rank)


def _check_corners(group):
    hidden, weight, targets = _inputs(torch.float32)
    part = _own(weight, group)

    def loss(h, w, t=targets, **options):
        return vocab_parallel_cross_entropy(h, w, t, group, **options)

    first = _split(loss, hidden, weight, 1.0, group)
    again = _split(loss, hidden, weight, 1.0, group)
    assert all(map(torch.equal, first, again)), "not the same bits in two runs"
    assert (group.gather(first[0]) == first[0]).all(), "not the same bits on every rank"
    blocks = _split(lambda h, w: loss(h, w, chunk_bytes=10**9), hidden, weight, 1.0, group)
    torch.testing.assert_close(blocks, first)

    nothing = torch.full_like(targets, -100)
    value, dhidden, dweight = _split(lambda h, w: loss(h, w, nothing), hidden, weight, 1.0, group)
    assert value.isnan() and not dhidden.any() and not dweight.any()
    assert loss(hidden, part, nothing, num_items=3.0) == 0 and loss(hidden, part, nothing, reduction="sum") == 0
    assert loss(hidden[:0], part, targets[:0]).isnan() and loss(hidden[:0], part, targets[:0], num_items=2.0) == 0
    assert loss(hidden[:0], part, targets[:0], reduction="none").shape == (0,)
    huge = hidden * 1e4
    torch.testing.assert_close(loss(huge, part), ops.linear_cross_entropy(huge, weight, targets))
    poisoned = hidden.clone()
    poisoned[::5] = torch.nan  # ignored rows
    assert torch.equal(loss(poisoned, part), loss(hidden, part))

    with torch.autocast("cpu", torch.bfloat16):
        mixed, one_rank = loss(hidden, part), ops.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(mixed, one_rank, rtol=2e-2, atol=0)


class _Largest(TorchDispatchMode):
    """The most elements that any tensor made within has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def _check_memory(group):
    """Neither the logits of all rows nor those of all words exist."""
    hidden, targets = torch.randn(512, 8), torch.randint(64 * group.size, (512,))
    weight = torch.randn(64, 8, requires_grad=True)
    for reduction in ("mean", "none"):
        with _Largest() as largest:
            options = dict(reduction=reduction, label_smoothing=0.1, softcap=5.0, chunk_bytes=4 * 64 * 32)
            vocab_parallel_cross_entropy(hidden.requires_grad_(), weight, targets, group, **options).sum().backward()
        assert largest.numel <= 512 * 8, f"a tensor of {largest.numel} elements"


def _check_embedding(group):
    _, weight, targets = _inputs(torch.float64)
    ids = targets.clamp(min=0)
    whole, part = weight.clone().requires_grad_(), _own(weight, group).requires_grad_()
    expected = torch.nn.functional.embedding(ids, whole)
    got = reduce_from(vocab_parallel_embedding(ids, part, group), group)
    assert torch.equal(got, expected)
    upstream = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(upstream)
    got.backward(upstream)
    assert torch.equal(group.gather(part.grad).flatten(0, 1), whole.grad)


def _all_checks(dtypes):
    group = _world()
    for dtype in dtypes:
        _check_options(group, dtype)
    _check_corners(group)
    _check_memory(group)
    _check_embedding(group)


def test_two_ranks():
    run_ranks(_all_checks, 2, (torch.float64, torch.float32, torch.bfloat16))


def test_four_ranks():
    run_ranks(_all_checks, 4, (torch.float32,))


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(hidden=torch.zeros(3)), RuntimeError, r"hidden must have shape \[N, d\], got \[3\]"),
        (
            dict(weight=torch.zeros(4, 3)),
            RuntimeError,
            r"weight must have shape \[V / R, d\] = \[\*, 2\], got \[4, 3\]",
        ),
        (dict(weight=torch.zeros(4, 2).double()), RuntimeError, "weight must have the dtype of hidden"),
        (dict(targets=torch.zeros(3)), RuntimeError, r"targets must be int64 \[N\] = \[3\], got torch.float32 \[3\]"),
        (dict(targets=torch.tensor([0, 4, 0])), RuntimeError, r"targets must be in \[0, 4\) or -100, got 4 at row 1"),
        (dict(chunk_bytes=0), ValueError, "chunk_bytes must be positive or None, got 0"),
        (dict(label_smoothing=2.0), ValueError, r"label_smoothing must be in \[0, 1\], got 2.0"),
        (dict(reduction="max"), ValueError, "reduction must be one of .*, got 'max'"),
    ],
)
def test_errors(changes, kind, message):
    tensors = dict(hidden=torch.zeros(3, 2), weight=torch.zeros(4, 2), targets=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(kind, match=f"vocab_parallel_cross_entropy: {message}"):
        vocab_parallel_cross_entropy(**{**tensors, **changes}, group=ONE)
