"""The mixture of experts against a loop over tokens in float64."""

import pytest
import torch
import torch.nn.functional as F

from arfast.nn import MoE


def naive(layer: MoE, hidden: torch.Tensor, renormalize: bool, score: str, scale: float) -> torch.Tensor:
    rows = []
    for x in hidden:
        logits = layer.gate.weight @ x
        probabilities = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        weights, chosen = probabilities.topk(layer.top_k)
        weights = weights / weights.sum() if renormalize else weights
        y = 0
        for weight, expert in zip(weights, chosen):
            gate, up = (layer.experts.gate_up_proj[expert] @ x).chunk(2)
            y = y + scale * weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(y if layer.shared_experts is None else y + layer.shared_experts(x))
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("score", "renormalize"), [("softmax", True), ("softmax", False), ("sigmoid", True)])
def test_forward_and_gradients(score, renormalize, shared):
    layer = MoE(24, 16, 5, 2, num_shared_experts=shared, score=score, renormalize=renormalize, scale=1.5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hidden = torch.randn(13, 24, requires_grad=True)
    out, aux_loss, _ = layer(hidden)
    assert aux_loss is None
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, [hidden, *layer.parameters()], dout)

    exact_layer, exact_hidden = layer.double(), hidden.detach().double().requires_grad_()
    exact = naive(exact_layer, exact_hidden, renormalize, score, 1.5)
    expected = torch.autograd.grad(exact, [exact_hidden, *exact_layer.parameters()], dout.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_aux_loss_pushes_towards_balance():
    layer = MoE(8, 4, 4, 1, balance_coef=1.0)
    torch.nn.init.zeros_(layer.gate.weight)
    hidden = torch.ones(64, 8)
    layer.gate.weight.data[2] = 1.0  # every token to expert 2
    _, aux_loss, _ = layer(hidden, with_aux_loss=True)
    assert aux_loss.item() == pytest.approx(4 * F.softmax(layer.gate.weight @ hidden[0], -1)[2].item(), rel=1e-5)
    aux_loss.backward()
    assert (layer.gate.weight.grad[2] >= 0).all()
    assert layer.gate.weight.grad[2].max() > 0
