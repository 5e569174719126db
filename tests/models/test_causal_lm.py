"""CausalLM by itself: the loss against torch, accumulation, low precision, auxiliary losses, arguments; on a
GPU against the same model on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY, TINY_EXPERTS

from arfast.generate import generate
from arfast.models import CausalLM, CausalLMConfig
from arfast.models.causal_lm import shift_labels
from arfast.nn import StaticKVCache

EXPERTS = TINY_EXPERTS.replace(router_score="sigmoid")


@pytest.fixture(params=[TINY, EXPERTS], ids=["dense", "experts"])
def model(request) -> CausalLM:
    return CausalLM(request.param, seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))


def test_shift_labels():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert shift_labels(labels, offsets).tolist() == [[2, -100, 4], [-100, 6, -100]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss(model, ids, reduction):
    labels = ids.clone()
    labels[1, 5:9] = -100
    out = model(ids, labels=labels, label_smoothing=0.1, z_loss=1e-2, reduction=reduction)
    assert out.logits is None
    logits = model(ids).logits.flatten(0, 1)
    targets = shift_labels(labels).flatten()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    expected = expected + 1e-2 * torch.where(targets == -100, 0.0, logits.logsumexp(-1) ** 2)
    expected = {"mean": expected.sum() / 44, "sum": expected.sum(), "none": expected.view(3, 17)}[reduction]
    torch.testing.assert_close(out.loss, expected)
    assert out.num_tokens == 3 * 16 - 4


@pytest.mark.parametrize("kind", [int, torch.as_tensor], ids=["number", "tensor"])
def test_accumulation_is_exact(ids, kind):
    """Micro-batches with different numbers of targets, one with none, give the gradient of the whole batch."""
    model = CausalLM(TINY, seed=3)
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[2] = -100
    whole = model(ids, labels=labels)
    whole.loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    num_items = kind(whole.num_tokens)
    losses = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items=num_items).loss for i in range(3)]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole.loss)
    for (name, parameter), gradient in zip(model.named_parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_future_tokens_do_not_leak(model, ids):
    before = model(ids).logits
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    after = model(changed).logits
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-5)
    assert (after[:, 9:] - before[:, 9:]).abs().amax(-1).min() > 1e-4


def test_logits_to_keep(model, ids):
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    rows = torch.tensor([16, 20, 50])
    torch.testing.assert_close(model(ids, logits_to_keep=rows).logits, logits.flatten(0, 1)[rows][None])


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-parameters", "autocast"])
def test_bfloat16(model, ids, autocast):
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, labels=ids).loss
    if not autocast:
        model = model.to(torch.bfloat16)
        assert model.model.rotary.cos.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids, labels=ids)
        assert model(ids).logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert abs(out.loss.item() - exact) < 0.02 * exact
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.abs().max() > 0, name


def test_same_seed_same_parameters():
    first, second, other = (CausalLM(TINY, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name


def test_initial_scale():
    model = CausalLM(CausalLMConfig.preset("tiny-moe", num_shared_experts=1, num_hidden_layers=2, vocab_size=999))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
            continue
        scale = 0.02 / 4**0.5 if "o_proj" in name or "down_proj" in name else 0.02
        assert parameter.std().item() == pytest.approx(scale, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * scale / parameter.numel() ** 0.5, name


def test_aux_loss(ids):
    """One layer of experts: the load-balancing loss of transformers, and the mean over layers with two."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    options = dict(num_experts=4, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    for config in (TINY.replace(num_hidden_layers=1, **options), TINY.replace(**options)):
        model = CausalLM(config, seed=3)
        logits = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, out, logits=logits: logits.append(out))
        aux_loss = model(ids, labels=ids).aux_loss
        balance = [modeling.load_balancing_loss_func((layer,), 4, 2) for layer in logits]
        z_loss = [layer.logsumexp(-1).square().mean() for layer in logits]
        expected = sum(0.5 * b + 0.25 * z for b, z in zip(balance, z_loss)) / len(logits)
        torch.testing.assert_close(aux_loss, expected)
    aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_no_aux_loss(ids):
    assert CausalLM(TINY)(ids, labels=ids).aux_loss is None
    assert CausalLM(EXPERTS)(ids).aux_loss is None


def test_meta_device_then_materialise(ids):
    """The way of a sharded run: shapes first, values later, the same model in the end."""
    model = CausalLM(TINY, device="meta")
    assert model.head_weight.is_meta
    model.to_empty(device="cpu")
    model.init_parameters(seed=3)
    assert torch.equal(model(ids).logits, CausalLM(TINY, seed=3)(ids).logits)


def bad_calls():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    yield (
        "float ids",
        TypeError,
        "input_ids must be torch.int64 [B, T], got torch.float32 (2, 5)",
        dict(input_ids=ids.float()),
    )
    yield "one row", TypeError, "input_ids must be torch.int64 [B, T], got torch.int64 (5,)", dict(input_ids=ids[0])
    yield "empty", ValueError, "input_ids must not be empty, got shape (2, 0)", dict(input_ids=ids[:, :0])
    yield "too large", IndexError, "input_ids must be in [0, vocab_size=61), got 61", dict(input_ids=ids + 61)
    yield "negative", IndexError, "input_ids must be in [0, vocab_size=61), got -1", dict(input_ids=ids - 1)
    yield "labels", ValueError, "labels must have the shape of input_ids, (2, 5), got (2, 4)", dict(labels=ids[:, :4])
    yield "positions", TypeError, "position_ids must be torch.int64", dict(position_ids=ids.int())
    yield "keep", ValueError, "logits_to_keep must be at least 0, or integers [M], got -1", dict(logits_to_keep=-1)
    yield (
        "kept",
        IndexError,
        "logits_to_keep must be in [0, B * T = 10), got 10",
        dict(logits_to_keep=torch.tensor([3, 10])),
    )
    yield "keep type", TypeError, "logits_to_keep must be torch.int64 [M], got", dict(logits_to_keep=torch.zeros(2))
    yield "items", ValueError, "num_items must be a number or a scalar, got shape (1,)", dict(num_items=torch.ones(1))
    yield "cache", TypeError, "cache must be a KVCache, got dict", dict(cache={})
    yield "offsets type", TypeError, "cu_seqlens must be torch.int32 [documents + 1]", dict(cu_seqlens=offsets.long())
    yield (
        "offsets end",
        ValueError,
        "cu_seqlens must rise from 0 to the number of tokens, 10",
        dict(cu_seqlens=offsets[:2]),
    )
    wrong = torch.tensor([0, 7, 4, 10], dtype=torch.int32)
    yield "offsets order", ValueError, "cu_seqlens must rise from 0 to the number of tokens, 10", dict(cu_seqlens=wrong)


@pytest.mark.parametrize(("kind", "message", "arguments"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_wrong_arguments(kind, message, arguments):
    arguments = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)} | arguments
    with pytest.raises(kind) as error:
        CausalLM(TINY)(**arguments)
    assert str(error.value).startswith(f"CausalLM: {message}")


def test_wrong_config():
    with pytest.raises(TypeError, match="CausalLM: config must be a CausalLMConfig, got dict"):
        CausalLM({})


def test_cache_arguments(ids):
    model = CausalLM(TINY)
    cache = StaticKVCache(TINY, batch_size=2, max_length=8)
    with pytest.raises(ValueError, match="CausalLM: cache must be used under torch.no_grad"):
        model(ids[:2], cache=cache)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="CausalLM: input_ids must have the cache's batch size 2, got 3"),
    ):
        model(ids, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 17 .*, got 8"):
        model(ids[:2], cache=cache)
    half = StaticKVCache(TINY, batch_size=3, max_length=32, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(TypeError, match="StaticKVCache: dtype must be the model's"):
        model(ids, cache=half)
    assert half.lengths.tolist() == [0, 0, 0]


def relative_error(a, b):
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


def on_both(config):
    """In bfloat16 on the GPU, and the same numbers in float32 on the CPU."""
    model = CausalLM(config, seed=3).to(torch.bfloat16)
    return copy.deepcopy(model).cuda(), model.float()


@pytest.fixture
def models():
    return on_both(TINY)


@pytest.mark.gpu
def test_gpu_loss_and_gradients(models):
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


@pytest.mark.gpu
def test_gpu_experts():
    """Rounding lets a few tokens choose other experts: the loss is near, gradients are there."""
    on_gpu, on_cpu = on_both(EXPERTS)
    ids = torch.randint(0, 61, (3, 40))
    loss = on_gpu(ids.cuda(), labels=ids.cuda()).loss
    assert relative_error(loss.detach(), on_cpu(ids, labels=ids).loss.detach()) < 0.05
    loss.backward()
    for name, parameter in on_gpu.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


@pytest.mark.gpu
def test_gpu_packed_documents(models):
    on_gpu, on_cpu = models
    ids, ends = torch.randint(0, 61, (1, 40)), torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    logits = on_gpu(ids.cuda(), cu_seqlens=ends.cuda()).logits
    assert relative_error(logits.detach(), on_cpu(ids, cu_seqlens=ends).logits.detach()) < 0.03


@pytest.mark.gpu
def test_gpu_generate(models):
    """The cache and the decode kernel: each token is the likeliest one of a forward pass over all before it."""
    on_gpu, _ = models
    ids = torch.randint(0, 61, (2, 9)).cuda()
    tokens = generate(on_gpu, ids, max_new_tokens=12, eos_token_id=[])
    logits = on_gpu(tokens[:, :-1]).logits[:, 8:].float()
    chosen = logits.gather(-1, tokens[:, 9:, None]).squeeze(-1)
    assert (logits.max(-1).values - chosen < 0.05).all()
