"""The two losses of a router against transformers, their values at balance, and masks."""

import pytest
import torch

from arfast.ops import load_balancing_loss, moe_route, router_z_loss


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
