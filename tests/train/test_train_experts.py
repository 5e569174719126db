"""Balance by bias: the rule against its paper, through training, saving and loading; the load in the log."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY, TINY_EXPERTS

from arfast.models import CausalLM
from arfast.models.families import choose_family
from arfast.nn import MoE
from arfast.nn.moe import balance_experts
from arfast.train import TrainConfig
from arfast.train.engine import Engine

BIASED = TINY_EXPERTS.replace(router_bias=True, router_aux_loss_coef=0.0)
SETTINGS = dict(output_dir="x", max_steps=60, batch_size=8, seqlen=16, learning_rate=1e-3, warmup_tokens=0)


def biases(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("e_score_correction_bias")]


def randomize(model):
    for bias in biases(model):
        bias.data.normal_()


def batch(step, rows=8):
    ids = torch.randint(61, (rows, 16), generator=torch.Generator().manual_seed(step))
    return SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=None, num_tokens=15 * rows)


def test_rule():
    layers = [MoE(8, 4, 4, 1, score_bias=on) for on in (True, False, True)]
    counts = torch.tensor([[10, 0, 5, 5], [1, 2, 3, 4], [7, 7, 7, 7]], dtype=torch.int32)
    balance_experts(layers, counts, 0.25)
    assert layers[0].score_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert layers[1].score_bias is None
    assert layers[2].score_bias.tolist() == [0.0] * 4
    with pytest.raises(ValueError):
        balance_experts(layers[:2], counts, 0.25)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_chooses_and_does_not_weigh(score):
    """Against the definition, expert by expert, in float64."""
    layer = MoE(8, 4, 5, 2, score=score, score_bias=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(40, 8, dtype=torch.float64)
    logits = hidden @ layer.gate.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    chosen = (scores + layer.score_bias).topk(2).indices
    assert (chosen.sort().values != scores.topk(2).indices.sort().values).any()
    expected = torch.zeros_like(hidden)
    for token in range(40):
        weights = scores[token, chosen[token]]
        for weight, expert in zip(weights / weights.sum(), chosen[token]):
            gate, up = (layer.experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            expected[token] += weight * (layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    out, _, counts = layer(hidden)
    torch.testing.assert_close(out, expected)
    assert counts.tolist() == chosen.flatten().bincount(minlength=5).tolist()


def test_model_saves_and_loads_the_bias(tmp_path):
    model = CausalLM(BIASED, seed=1)
    assert all((bias == 0).all() and not bias.requires_grad for bias in biases(model))
    assert model.num_parameters() == BIASED.num_parameters() == TINY_EXPERTS.num_parameters() + 8
    randomize(model)
    assert choose_family(BIASED) == "arfast"
    model.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path)
    assert loaded.config == BIASED
    assert all(not bias.requires_grad for bias in biases(loaded))
    for (name, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
    ids = batch(0).input_ids
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"activation_checkpointing": True}])
def test_counts_are_of_the_whole_step(options):
    """Whatever the micro-batches, and also when the backward pass computes the layers again."""
    engine = Engine(CausalLM(BIASED, seed=1), TrainConfig(**SETTINGS | options))
    batches = [batch(0, 3), batch(1, 5)]
    expected = sum(engine.model(b.input_ids, labels=b.labels).tokens_per_expert for b in batches)
    result = engine.step(batches)
    assert torch.equal(engine._expert_counts, expected)
    assert expected.sum(1).tolist() == [8 * 16 * 2] * 2
    load = expected.double().amax(1) / expected.double().mean(1)
    assert result.expert_load == pytest.approx(load.tolist())
    for bias, counts in zip(biases(engine.model), expected.tolist()):
        mean = sum(counts) / 4
        rate = engine.config.router_bias_rate
        assert bias.tolist() == pytest.approx([rate * ((mean > c) - (mean < c)) for c in counts])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_balances(dtype):
    """A router that starts with favourites: without a bias they stay, with it the load evens out."""
    loads = {}
    for rate in (0.0, 0.01):
        model = CausalLM(BIASED, seed=1)
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.mul_(0.3)
            layer.mlp.score_bias.data.copy_(torch.tensor([0.3, 0.2, 0.0, 0.0]))
        engine = Engine(model, TrainConfig(**SETTINGS, dtype=dtype, router_bias_rate=rate))
        loads[rate] = [max(engine.step([batch(step)]).expert_load) for step in range(60)]
        working = biases(engine.compute_model)
        for master, copy in zip(biases(engine.model), working):
            assert copy.dtype == torch.float32 and torch.equal(master, copy)
    assert min(loads[0.0]) > 1.6
    assert sum(loads[0.01][-20:]) / 20 < 1.4


def test_skipped_step_moves_no_bias():
    engine = Engine(CausalLM(BIASED, seed=1), TrainConfig(**SETTINGS, on_nonfinite="skip"))
    engine.step([batch(0)])
    before = [bias.clone() for bias in biases(engine.model)]
    engine.model.model.norm.weight.data[0] = float("nan")
    assert not engine.step([batch(1)]).applied
    assert all(torch.equal(a, b) for a, b in zip(before, biases(engine.model)))


def test_dense_model_has_no_load():
    engine = Engine(CausalLM(TINY, seed=1), TrainConfig(**SETTINGS))
    assert engine.step([batch(0)]).expert_load is None
    with pytest.raises(ValueError, match="CausalLMConfig: router_bias must be true or false, got 1"):
        TINY_EXPERTS.replace(router_bias=1)
    assert json.dumps(TrainConfig(**SETTINGS).to_dict())
