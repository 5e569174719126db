"""Adapters by themselves: the formula, what is frozen, dropout, dtypes, compilation, and every error."""

import doctest
import importlib
import tempfile

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, assert_bitwise_equal
from tiny_models import TINY, TINY_EXPERTS
from torch import nn

from arfast.models import CausalLM, CausalLMConfig
from arfast.nn import LoraConfig, apply_lora, merge_lora
from arfast.nn.lora import LINEAR_TARGETS, LoraLinear, adapter_parameters, count_parameters


def layer(dtype=torch.float32, bias=False, **options):
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype)
    lora = LoraLinear(linear, LoraConfig(rank=3, alpha=7.5, **options))
    for parameter in (lora.lora_A.weight, lora.lora_B.weight):
        parameter.data.normal_()
    return lora


def randomized(model):
    for _, parameter in adapter_parameters(model):
        parameter.data.normal_(0, 0.3)
    return model


def formula(x, W, bias, A, B, scale, dropped=None):
    return F.linear(x, W, bias) + F.linear(F.linear(x if dropped is None else dropped, A), B) * scale


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formula_and_gradients(dtype, bias):
    lora = layer(dtype, bias)
    lora.requires_grad_(False)
    for part in (lora.lora_A, lora.lora_B):
        part.requires_grad_(True)
    hidden = torch.randn(17, 24).to(dtype).requires_grad_()
    out = lora(hidden)
    dout = torch.randn(17, 40).to(dtype)
    wanted = (hidden, lora.lora_A.weight, lora.lora_B.weight)
    gradients = torch.autograd.grad(out, wanted, dout)

    def run(wide):
        tensors = [t.detach().to(wide).requires_grad_() for t in wanted]
        b = None if lora.bias is None else lora.bias.to(wide)
        expected = formula(tensors[0], lora.weight.to(wide), b, *tensors[1:], 2.5)
        return expected, torch.autograd.grad(expected, tensors, dout.to(wide))

    (exact, exact_gradients), (baseline, baseline_gradients) = run(torch.float64), run(dtype)
    assert_accurate(out, exact, baseline, name="out")
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]
    for name, *tensors in zip(("dhidden", "dA", "dB"), gradients, exact_gradients, baseline_gradients):
        # The adapters are kept in float32, their products are in the dtype of the activations.
        assert_accurate(tensors[0].to(dtype), *tensors[1:], name=name)


def test_autocast():
    lora, hidden = layer(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora(hidden)
    assert out.dtype == torch.bfloat16
    exact = formula(hidden.double(), lora.weight.double(), None, *(w.double() for w in weights(lora)), 2.5)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def weights(lora):
    return lora.lora_A.weight, lora.lora_B.weight


def test_dropout_is_of_the_adapter_alone():
    lora = layer(dropout=0.5)
    hidden = torch.randn(4000, 24)
    assert_bitwise_equal(lora.eval()(hidden), layer_without_dropout(lora)(hidden))
    torch.manual_seed(5)
    out = lora.train()(hidden)
    torch.manual_seed(5)
    dropped = F.dropout(hidden, 0.5)
    torch.testing.assert_close(out, formula(hidden, lora.weight, None, *weights(lora), 2.5, dropped))


def test_recomputed_activations_drop_the_same():
    models = [apply_lora(CausalLM(TINY), rank=2, dropout=0.5) for _ in range(2)]
    models[1].model.activation_checkpointing = True
    ids = torch.randint(0, 61, (2, 19))
    for model in models:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
        torch.manual_seed(5)
        model.train()(ids, labels=ids).loss.backward()
    for plain, recomputed in zip(*(model.parameters() for model in models), strict=True):
        assert plain.grad is None or torch.equal(plain.grad, recomputed.grad)


def layer_without_dropout(lora):
    other = layer()
    other.load_state_dict(lora.state_dict())
    return other


@pytest.mark.parametrize("config", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("targets", [LINEAR_TARGETS, ("q_proj",), ("lm_head",), ("gate_proj", "up_proj")], ids=str)
def test_only_adapters_get_gradients(config, targets):
    model = apply_lora(CausalLM(config), rank=2, targets=targets)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 61, (2, 19))
    model(ids, labels=ids).loss.backward()
    adapters = dict(adapter_parameters(model))
    assert all((p.grad is not None) == (name in adapters) for name, p in model.named_parameters())
    assert all(adapters[name].grad.count_nonzero() > 0 for name in adapters if "lora_B" in name)
    trainable, total = count_parameters(model)
    assert trainable == sum(p.numel() for p in adapters.values()) and total == sum(p.numel() for p in before.values())


@pytest.mark.parametrize("config", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
def test_head_is_fused_with_the_loss(config):
    """The head's adapter in logits and loss, which does not hold the logits, is the same."""
    model = randomized(apply_lora(CausalLM(config, dtype=torch.float64), rank=2, targets=(*LINEAR_TARGETS, "lm_head")))
    ids = torch.randint(0, 61, (2, 19))
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    with torch.no_grad():
        whole = model(ids, logits_to_keep=1).logits
        torch.testing.assert_close(whole, logits[:, -1:])
        torch.testing.assert_close(merge_lora(model)(ids).logits, logits)


def test_starts_at_zero_with_the_variance_of_peft():
    config = TINY.replace(hidden_size=256, num_attention_heads=4, head_dim=64)
    model = apply_lora(CausalLM(config), rank=64, targets=("q_proj", "down_proj"), seed=3)
    again = apply_lora(CausalLM(config), rank=64, targets=("q_proj", "down_proj"), seed=3)
    other = apply_lora(CausalLM(config), rank=64, targets=("q_proj", "down_proj"), seed=4)
    for name, parameter in adapter_parameters(model):
        assert torch.equal(parameter, again.get_parameter(name))
        if "lora_B" in name:
            assert parameter.count_nonzero() == 0
        else:
            reference = nn.init.kaiming_uniform_(torch.empty_like(parameter), a=5**0.5)
            assert parameter.std().item() == pytest.approx(reference.std().item(), rel=0.05)
            assert not torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TINY, TINY_EXPERTS], ids=["dense", "experts"])
def test_merge(config, dtype):
    model = randomized(apply_lora(CausalLM(config, dtype=dtype), rank=2))
    names = [name for name, _ in CausalLM(config).named_parameters()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_lora(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())
    A, B = (before[f"model.layers.1.self_attn.v_proj.lora_{part}.weight"] for part in "AB")
    weight = before["model.layers.1.self_attn.v_proj.weight"]
    exact = weight.double() + 8 * B.double() @ A.double()
    assert_accurate(model.model.layers[1].self_attn.v_proj.weight, exact, exact.to(dtype))
    assert "lora" not in str(model).lower()


def test_bfloat16_model_with_float32_adapters():
    model = randomized(apply_lora(CausalLM(TINY, dtype=torch.bfloat16), rank=2))
    ids = torch.randint(0, 61, (2, 19))
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    model(ids, labels=ids).loss.backward()
    assert {p.grad.dtype for _, p in adapter_parameters(model)} == {torch.float32}


@torch.no_grad()
def test_generate():
    """Step by step with a cache as in one pass; the fused decode step of dense models does not take adapters."""
    model = randomized(apply_lora(CausalLM(TINY), rank=2)).eval()
    ids = torch.randint(0, 61, (2, 5))
    tokens = model.generate(ids, max_new_tokens=8)
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, ids)
    assert torch.equal(merge_lora(model).generate(ids[:, :5], max_new_tokens=8), ids)


def test_compile():
    model = randomized(apply_lora(CausalLM(TINY), rank=2))
    ids = torch.randint(0, 61, (2, 19))
    expected = model(ids, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "apply_lora: rank must be in [1, 16384], got 0"),
        (dict(rank=True), "apply_lora: rank must be in [1, 16384], got True"),
        (dict(alpha=0), "apply_lora: alpha must be a positive number of float32, got 0"),
        (dict(alpha=float("nan")), "apply_lora: alpha must be a positive number of float32, got nan"),
        (dict(alpha=1e39), "apply_lora: alpha must be a positive number of float32, got 1e+39"),
        (dict(dropout=1.0), "apply_lora: dropout must be in [0, 1), got 1.0"),
        (dict(targets=()), "apply_lora: targets must be some of q_proj, k_proj"),
        (dict(targets=("query",)), "up_proj, down_proj, lm_head, got query"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ValueError) as caught:
        apply_lora(CausalLM(TINY), **options)
    assert message in str(caught.value)


def test_models_that_do_not_fit():
    def refused(model, message, **options):
        parameters = dict(model.named_parameters())
        with pytest.raises(ValueError) as caught:
            apply_lora(model, **options)
        assert message in str(caught.value)
        assert dict(model.named_parameters()).keys() == parameters.keys()

    tied = CausalLM(TINY.replace(tie_word_embeddings=True))
    refused(tied, "(a tied head is none), got 'lm_head'", targets=("q_proj", "lm_head"))
    experts = CausalLM(TINY_EXPERTS.replace(num_shared_experts=0))
    refused(experts, "hold gate_proj and up_proj together for stacked experts, got up_proj", targets=("up_proj",))
    refused(experts, "dropout must be 0 with adapters of stacked experts, got 0.1", dropout=0.1)
    refused(apply_lora(CausalLM(TINY)), "model must have no adapters yet, got one with")
    with pytest.raises(ValueError, match="merge_lora: model must have adapters, got one without"):
        merge_lora(CausalLM(TINY))


def test_targets_have_one_order():
    expected = LoraConfig(targets=("q_proj", "v_proj", "lm_head"))
    assert LoraConfig(targets=["lm_head", "v_proj", "q_proj", "v_proj"]) == expected


@pytest.mark.parametrize("name", ["nn.lora", "adapter", "export"])
def test_examples(name):
    names = dict(CausalLM=CausalLM, CausalLMConfig=CausalLMConfig, tempfile=tempfile, apply_lora=apply_lora)
    results = doctest.testmod(importlib.import_module(f"arfast.{name}"), extraglobs=names)
    assert results.attempted and not results.failed
