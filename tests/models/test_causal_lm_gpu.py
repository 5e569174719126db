"""CausalLM on a GPU against the same model on the CPU: its ops are kernels of ours there, too."""

import copy

import pytest
import torch
from test_causal_lm import CONFIG, EXPERTS

from arfast.generate import generate
from arfast.models import CausalLM

pytestmark = pytest.mark.gpu


def relative_error(a, b):
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


def on_both(config):
    """In bfloat16 on the GPU, and the same numbers in float32 on the CPU."""
    model = CausalLM(config, seed=3).to(torch.bfloat16)
    return copy.deepcopy(model).cuda(), model.float()


@pytest.fixture
def models():
    return on_both(CONFIG)


def test_loss_and_gradients(models):
    on_gpu, on_cpu = models
    ids = torch.randint(0, 61, (3, 40))
    loss, expected = (
        model(x, labels=x, label_smoothing=0.1).loss for model, x in ((on_gpu, ids.cuda()), (on_cpu, ids))
    )
    assert relative_error(loss.detach(), expected.detach()) < 0.01
    loss.backward()
    expected.backward()
    for (name, a), b in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 0.05, name


def test_experts():
    """Rounding lets a few tokens choose other experts: the loss is near, gradients are there."""
    on_gpu, on_cpu = on_both(EXPERTS)
    ids = torch.randint(0, 61, (3, 40))
    loss = on_gpu(ids.cuda(), labels=ids.cuda()).loss
    assert relative_error(loss.detach(), on_cpu(ids, labels=ids).loss.detach()) < 0.05
    loss.backward()
    for name, parameter in on_gpu.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_packed_documents(models):
    on_gpu, on_cpu = models
    ids, ends = torch.randint(0, 61, (1, 40)), torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    logits = on_gpu(ids.cuda(), cu_seqlens=ends.cuda()).logits
    assert relative_error(logits.detach(), on_cpu(ids, cu_seqlens=ends).logits.detach()) < 0.03


def test_generate(models):
    """The cache and the decode kernel: each token is the likeliest one of a forward pass over all before it."""
    on_gpu, _ = models
    ids = torch.randint(0, 61, (2, 9)).cuda()
    tokens = generate(on_gpu, ids, max_new_tokens=12, eos_token_id=[])
    logits = on_gpu(tokens[:, :-1]).logits[:, 8:].float()
    chosen = logits.gather(-1, tokens[:, 9:, None]).squeeze(-1)
    assert (logits.max(-1).values - chosen < 0.05).all()
