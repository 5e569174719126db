"""The two losses of a router: against transformers and the reference, their values at balance, and masks."""

import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import (
    Routing,
    load_balancing_loss,
    load_balancing_loss_reference,
    moe_route,
    router_losses,
    router_z_loss,
    router_z_loss_reference,
)

OURS = load_balancing_loss, router_z_loss
REFERENCE = load_balancing_loss_reference, router_z_loss_reference


def test_load_balancing_loss_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, mask = torch.randn(60, 16), torch.rand(60) < 0.7
    routing = moe_route(logits, 4)
    for keep in (None, mask):
        theirs = load_balancing_loss_func((logits,), 16, 4, None if keep is None else keep.view(4, 15))
        torch.testing.assert_close(load_balancing_loss(logits, routing, normalize="hf", mask=keep), theirs)
        torch.testing.assert_close(load_balancing_loss(logits, routing, mask=keep), theirs / 4)


def test_losses_at_balance():
    logits = torch.zeros(24, 8)
    routing = moe_route(logits, 8)
    assert load_balancing_loss(logits, routing).item() == pytest.approx(1)
    assert load_balancing_loss(logits, routing, normalize="hf").item() == pytest.approx(8)
    assert router_z_loss(logits).item() == pytest.approx(torch.tensor(8.0).log().square().item())


def test_masked_tokens_do_not_count_in_the_losses():
    logits = torch.randn(30, 8)
    mask = torch.arange(30) % 3 != 0
    poisoned_logits = logits.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    kept = logits[mask].clone().requires_grad_()
    for dtype in (torch.bool, torch.int64, torch.float32):
        loss = load_balancing_loss(poisoned_logits, moe_route(poisoned_logits, 2), mask=mask.to(dtype))
        loss = loss + router_z_loss(poisoned_logits, mask.to(dtype))
        expected = load_balancing_loss(kept, moe_route(kept, 2)) + router_z_loss(kept)
        torch.testing.assert_close(loss, expected)
        gradient = torch.autograd.grad(loss, poisoned_logits)[0]
        torch.testing.assert_close(gradient[mask], torch.autograd.grad(expected, kept)[0])
        assert not gradient[~mask].any()


def test_losses_of_no_token_are_zero():
    for logits, mask in [(torch.zeros(0, 8), None), (torch.randn(5, 8), torch.zeros(5, dtype=torch.bool))]:
        routing = moe_route(logits, 2)
        assert load_balancing_loss(logits, routing, mask=mask) == 0 and router_z_loss(logits, mask) == 0


def test_losses_gradcheck():
    logits = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    routing, mask = moe_route(logits.detach(), 2), torch.arange(7) != 3
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, routing, mask=mask), logits)
    assert torch.autograd.gradcheck(lambda x: router_z_loss(x, mask), logits)


def test_compile():
    logits, mask = torch.randn(12, 8, requires_grad=True), torch.arange(12) % 2 == 0
    routing = moe_route(logits.detach(), 2)

    def losses(x):
        return load_balancing_loss(x, routing, mask=mask) + router_z_loss(x, mask)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected, actual = losses(logits), compiled(logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


def test_errors_of_the_losses():
    logits = torch.zeros(4, 8)
    routing = moe_route(logits, 2)
    with pytest.raises(RuntimeError, match="load_balancing_loss: normalize must be switch or hf, got mean"):
        load_balancing_loss(logits, routing, normalize="mean")
    with pytest.raises(RuntimeError, match=r"load_balancing_loss: mask must have shape \[T\] = \[4\], got \[5\]"):
        load_balancing_loss(logits, routing, mask=torch.ones(5))
    with pytest.raises(RuntimeError, match=r"router_z_loss: mask must have shape \[T\] = \[4\], got \[2, 2\]"):
        router_z_loss(logits, torch.ones(2, 2))


def values_and_gradients(logits, routing, mask, losses, dtype):
    """(balance, z, d balance, d z), computed in `dtype` where that is float64."""
    balance, z = losses
    logits = logits.detach().to(dtype or logits.dtype).requires_grad_()
    values = balance(logits, routing, mask=mask), z(logits, mask)
    return *(v.detach() for v in values), *(torch.autograd.grad(v, logits)[0] for v in values)


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(1, 1, 1), (31, 7, 2), (32, 8, 8), (33, 64, 3), (257, 33, 2), (70, 300, 4)]
)
def test_forward_and_backward(device, tokens, experts, top_k, dtype, masked):
    logits = (torch.randn(tokens, experts) * 2).to(dtype).to(device)
    routing = moe_route(logits, top_k)
    mask = (torch.rand(tokens) < 0.6).to(device) if masked else None
    exact = values_and_gradients(
        logits.cpu(), to_cpu(routing), mask.cpu() if masked else None, REFERENCE, torch.float64
    )
    baseline = values_and_gradients(logits.cpu(), to_cpu(routing), mask.cpu() if masked else None, REFERENCE, None)
    actual = values_and_gradients(logits, routing, mask, OURS, None)
    for name, *three in zip(("balance", "z", "dbalance", "dz"), actual, exact, baseline, strict=True):
        assert_accurate(three[0].cpu(), three[1], three[2], name=name)


def test_both_at_once_are_the_same(device):
    logits = torch.randn(50, 16).to(device).requires_grad_()
    routing = moe_route(logits.detach(), 4)
    alone = load_balancing_loss(logits, routing, normalize="hf"), router_z_loss(logits)
    for at_once, loss in zip(router_losses(logits, routing), alone, strict=True):
        assert_bitwise_equal(at_once.detach(), loss.detach())
        gradients = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (at_once, loss))
        assert_bitwise_equal(*gradients)


def test_float64():
    logits, mask = torch.randn(300, 33, dtype=torch.float64), torch.rand(300) < 0.6
    routing = moe_route(logits, 3)
    both = (values_and_gradients(logits, routing, mask, losses, None) for losses in (OURS, REFERENCE))
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected)


def to_cpu(routing):
    return Routing(*(t.cpu() for t in routing))


def test_a_row_that_is_not_finite_shows(device):
    for bad in (math.nan, math.inf):
        logits = torch.randn(40, 8)
        logits[35, 3] = bad
        routing, mask = moe_route(logits.to(device), 2), (torch.arange(40) != 35).to(device)
        assert load_balancing_loss(logits.to(device), routing).isnan()
        assert not router_z_loss(logits.to(device)).isfinite()
        assert load_balancing_loss(logits.to(device), routing, mask=mask).isfinite()
        assert router_z_loss(logits.to(device), mask).isfinite()


def test_experts_without_a_chance(device):
    """-inf keeps an expert out; its gradient is 0."""
    logits = torch.randn(40, 8)
    logits[:, 2] = -math.inf
    logits = logits.to(device).requires_grad_()
    routing = moe_route(logits.detach(), 2)
    loss = load_balancing_loss(logits, routing) + router_z_loss(logits)
    expected = load_balancing_loss_reference(logits, routing) + router_z_loss_reference(logits)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and not gradient[:, 2].any()


def test_strided_inputs_give_the_same_bits(device):
    wide = torch.randn(50, 40).to(device)
    logits = wide[:, 3:19]
    routing = moe_route(logits.contiguous(), 2)
    for contiguous, strided in zip(
        values_and_gradients(logits.contiguous(), routing, None, OURS, None),
        values_and_gradients(wide, routing, None, [lambda x, *a, f=f, **k: f(x[:, 3:19], *a, **k) for f in OURS], None),
        strict=True,
    ):
        assert_bitwise_equal(strided[:, 3:19] if strided.dim() == 2 else strided, contiguous)


def test_same_for_any_threads():
    logits, mask = torch.randn(3000, 64), torch.rand(3000) < 0.7
    routing = moe_route(logits, 4)
    same_for_any_threads(lambda: values_and_gradients(logits, routing, mask, OURS, None))


def test_poisoned_outputs_are_written(device, poisoned):
    logits = torch.randn(33, 9).to(device)
    routing = moe_route(logits, 2)
    for value in values_and_gradients(logits, routing, (torch.arange(33) % 4 > 0).to(device), OURS, None):
        assert value.isfinite().all()


def test_opcheck():
    logits, mask = torch.randn(5, 6), torch.arange(5) > 0
    routing = moe_route(logits, 2)
    torch.library.opcheck(torch.ops.arfast.router_losses_forward.default, (logits, routing.expert_ids, mask, 2.0))
    _, _, *saved = torch.ops.arfast.router_losses_forward(logits, routing.expert_ids, mask, 2.0)
    arguments = (torch.tensor(1.0), None, logits, mask, *saved)
    torch.library.opcheck(torch.ops.arfast.router_losses_backward.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(router_logits=torch.zeros(4)), r"router_logits must have shape \[T, E\]"),
        (dict(router_logits=torch.zeros(4, 0)), "router_logits must have T < 2\\^23 tokens and at least one expert"),
        (dict(router_logits=torch.zeros(4, 8, dtype=torch.int64)), "router_logits must be float32"),
        (dict(expert_ids=torch.zeros(5, 2, dtype=torch.int32)), r"expert_ids must have shape \[T, K\] = \[4, "),
        (dict(expert_ids=torch.zeros(4, 2)), "expert_ids must be int32, got float32"),
        (dict(mask=torch.zeros(4)), "mask must be bool, got float32"),
        (dict(mask=torch.zeros(3, dtype=torch.bool)), r"mask must have shape \[T\] = \[4\], got \[3\]"),
        (dict(divisor=0.0), "divisor must be positive, got 0"),
        (dict(mask=torch.zeros(4, dtype=torch.bool, device="meta")), "tensors must be on one device"),
    ],
)
def test_errors_of_the_op(change, message):
    arguments = dict(router_logits=torch.zeros(4, 8), expert_ids=torch.zeros(4, 2, dtype=torch.int32), mask=None)
    with pytest.raises(RuntimeError, match="router_losses: " + message):
        torch.ops.arfast.router_losses_forward(**(arguments | dict(divisor=1.0) | change))
