"""What the backward pass computes again: the same bits, less memory, and the errors that autograd itself would give."""

import doctest

import pytest
import torch
from storages import Storages
from tiny_models import TINY, TINY_EXPERTS

from arfast.models import CausalLM
from arfast.nn import recompute
from arfast.nn.recompute import checkpoint, recomputed


@pytest.fixture
def kept(monkeypatch):
    """Switches the module off: everything is kept."""
    return lambda: monkeypatch.setattr(recompute._thread, "in_checkpoint", True, raising=False)


IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, ids, cu_seqlens, autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(ids, labels=ids, cu_seqlens=cu_seqlens)
        loss = output.loss + (0 if output.aux_loss is None else output.aux_loss)
    loss.backward()
    return [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("dtype, autocast", [(F32, False), (BF16, False), (F64, False), (F32, True), (BF16, True)])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("config", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
def test_gradients_have_the_same_bits(config, packed, dtype, autocast, kept):
    model = CausalLM(config, dtype=dtype)
    ends = torch.tensor([0, 7, 40, 48], dtype=torch.int32)
    given = (IDS.view(1, -1), ends, autocast) if packed else (IDS, None, autocast)
    ours = loss_and_gradients(model, *given)
    kept()
    expected = loss_and_gradients(model, *given)
    assert len(ours) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_neither_norms_nor_activations_are_kept(dtype, kept):
    model, alive = CausalLM(TINY, dtype=dtype), []
    for switch in (lambda: None, kept):
        switch()
        with Storages() as storages:
            output = model(IDS, labels=IDS)
        alive.append(storages.alive())
        del output
    per_token = TINY.num_hidden_layers * (2 * TINY.hidden_size + TINY.intermediate_size)
    assert alive[1] - alive[0] == IDS.numel() * per_token * dtype.itemsize


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.sin()


@pytest.fixture
def case():
    function, x = Counted(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    layers = [torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(3)]
    return function, x, layers


def apply(function, x, layers):
    output = function(x)
    with recomputed(output, function, x):
        return sum(layer(output) for layer in layers).sum()


def test_once_for_all_layers_and_again_in_every_pass(case):
    function, x, layers = case
    loss = apply(*case)
    wanted = (x, *(parameter for layer in layers for parameter in layer.parameters()))
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert function.calls == 2  # forward and backward
    second = torch.autograd.grad(loss, wanted)
    assert function.calls == 3
    output = x.sin()
    expected = torch.autograd.grad(sum(layer(output) for layer in layers).sum(), wanted)
    for tensors in zip(first, second, expected):
        assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[0], tensors[2])


@pytest.mark.parametrize("changed", ["argument", "weight"])
def test_what_is_needed_must_not_change(case, changed):
    _, x, layers = case
    loss = apply(*case)
    with torch.no_grad():
        (x if changed == "argument" else layers[0].weight).add_(1)
    with pytest.raises(RuntimeError, match=r"recomputed: what the backward pass needs must not be modified in place"):
        loss.backward()


def test_views_and_other_tensors_are_kept_as_they_are(case):
    function, x, _ = case
    output = function(x)
    with recomputed(output, function, x):
        loss = (output[1:] * output[:-1].exp()).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert function.calls == 1
    output = x.sin()
    (expected,) = torch.autograd.grad((output[1:] * output[:-1].exp()).sum(), x)
    assert torch.equal(gradient, expected)


def test_without_gradients_nothing_is_kept_to_begin_with(case):
    function, x, layers = case
    with torch.no_grad(), Storages() as storages:
        apply(*case)
    assert function.calls == 1 and storages.alive() == 0


def test_a_checkpoint_keeps_its_arguments_alone(case):
    function, x, layers = case
    with Storages() as storages:
        loss = checkpoint(apply, *case)
    assert storages.alive() == loss.nbytes
    loss.backward()
    assert function.calls == 2  # forward, and once in all of the backward pass
    assert not recompute._thread.in_checkpoint


def test_a_checkpoint_that_fails_leaves_the_thread_as_it_was(case):
    function, x, _ = case
    with pytest.raises(RuntimeError, match="shapes"):
        checkpoint(apply, function, x, [torch.nn.Linear(9, 8, dtype=torch.float64)])
    assert not recompute._thread.in_checkpoint


def test_example_runs():
    assert doctest.testmod(recompute).failed == 0
