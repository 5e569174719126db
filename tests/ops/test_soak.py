"""The same calls again and again: the same bits every time, on a GPU also while it works on something else."""

import pytest
import torch

from arfast.nn import MoE
from arfast.ops import attention, attention_decode, cross_entropy, linear_cross_entropy

# A call without arguments for every op, and random inputs of a size in tokens; forward and backward where there is one.


def attention_call(tokens, device):
    shapes = [(2, tokens, heads, 128) for heads in (8, 2, 2, 8)]
    *inputs, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    inputs = [x.requires_grad_() for x in inputs]

    def call():
        out = attention(*inputs, deterministic=True)
        return out, *torch.autograd.grad(out, inputs, dout)

    return call


def decode_call(tokens, device):
    q = torch.randn(4, 1, 32, 128, device=device, dtype=torch.bfloat16)
    caches = torch.randn(2, 4, tokens, 8, 128, device=device, dtype=torch.bfloat16)
    seqlens = torch.tensor([tokens, tokens // 2, 1, tokens - 1], dtype=torch.int32, device=device)
    return lambda: (attention_decode(q, *caches, seqlens),)


def moe_call(tokens, device):
    layer = MoE(128, 96, 16, 4, num_shared_experts=1, balance_coef=0.01, z_loss_coef=0.01)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer = layer.to(device, torch.bfloat16)
    hidden = torch.randn(tokens, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(hidden)

    def call():
        out, aux_loss, _ = layer(hidden, with_aux_loss=True)
        wanted = [hidden, *layer.parameters()]
        return out, aux_loss, *torch.autograd.grad([out, aux_loss], wanted, [dout, torch.ones_like(aux_loss)])

    return call


def cross_entropy_call(tokens, device):
    logits = torch.randn(tokens, 5003, device=device, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5003, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(5003, (tokens,), device=device)

    def call():
        plain = cross_entropy(logits, targets, label_smoothing=0.1)
        fused = linear_cross_entropy(hidden, weight, targets, z_loss=1e-3, chunk_bytes=1 << 20)
        return plain, fused, *torch.autograd.grad(plain + fused, (logits, hidden, weight))

    return call


CALLS = {"attention": attention_call, "decode": decode_call, "moe": moe_call, "cross_entropy": cross_entropy_call}


def check(calls, repetitions, between=lambda: None):
    """Every call in turn, compared with its first results; the host waits at the end alone."""
    expected = [call() for call in calls]
    assert all(tensor.isfinite().all() for results in expected for tensor in results)
    differing = torch.zeros((), dtype=torch.int64, device=expected[0][0].device)
    for i in range(repetitions):
        between()
        for actual, first in zip(calls[i % len(calls)](), expected[i % len(calls)], strict=True):
            differing += (actual != first).sum()
    assert differing.item() == 0, f"{differing.item()} elements differ from the first run"


@pytest.mark.slow
@pytest.mark.not_emulated
@pytest.mark.parametrize("op", CALLS)
def test_same_bits_in_100_runs(op, device):
    check([CALLS[op](4096 if device == "cuda" else 70, device)], 100 if device == "cuda" else 2)


@pytest.mark.slow
@pytest.mark.not_emulated
@pytest.mark.parametrize("op", CALLS)
def test_1000_runs_beside_other_work(op, device):
    """Of several sizes, so that blocks of every op meet blocks of others on a multiprocessor in ever new orders."""
    calls = [CALLS[op](tokens, device) for tokens in (2, 33, 129, 600)]
    if device == "cpu":
        check(calls, 4)
        return
    other, matrix = torch.cuda.Stream(), torch.randn(1024, 1024)
    other.wait_stream(torch.cuda.current_stream())

    def between():
        with torch.cuda.stream(other):
            matrix @ matrix

    check(calls, 1000, between)
    torch.cuda.synchronize()
