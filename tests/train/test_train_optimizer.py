"""Who gets which optimizer and decay; Muon on stacks against its paper in float64; clipping within AdamW's pass."""

import math

import pytest
import torch
from tiny_models import TINY, TINY_EXPERTS
from torch import nn
from train_doubles import TinyConfig, TinyData, TinyLM, assert_same_outcome, make_trainer, outcome

from arfast.models import CausalLM
from arfast.train import TrainConfig
from arfast.train.engine import Engine
from arfast.train.optimizer import build_optimizer, clipped_step, scale_gradients

SETTINGS = {"max_steps": 10, "learning_rate": 1e-2, "weight_decay": 0.3}
UNTIED = TINY_EXPERTS.replace(tie_word_embeddings=False, qkv_bias=True, router_bias=True)


def decays(model, **options):
    optimizer = build_optimizer(model, TrainConfig(**SETTINGS | options))
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}, optimizer


def test_embeddings_can_be_left_out_of_the_decay():
    for tied in (False, True):
        model = CausalLM(TINY.replace(tie_word_embeddings=tied))
        found, _ = decays(model, decay_embeddings=False)
        for name, parameter in model.named_parameters():
            expected = 0.0 if parameter.ndim < 2 or name == "model.embed_tokens.weight" else 0.3
            assert found[id(parameter)] == expected, name


def test_muon_gets_the_matrices_between_embedding_and_head():
    model = CausalLM(UNTIED)
    found, optimizer = decays(model, optimizer="muon")
    muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            assert id(parameter) not in found
            continue
        assert found[id(parameter)] == (0.3 if parameter.ndim >= 2 else 0.0), name
        lookup = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert (id(parameter) in muon) == (parameter.ndim >= 2 and not lookup), name
    assert len(found) == len(muon) + sum(len(group["params"]) for group in optimizer.param_groups[1:])


def orthogonalized(matrix):
    """Newton-Schulz with the coefficients of Jordan et al., in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_is_its_definition_on_every_matrix_of_a_stack():
    torch.manual_seed(0)
    model = nn.Module()
    model.gate_up_proj = nn.Parameter(torch.randn(3, 2 * 12, 8))
    model.down_proj = nn.Parameter(torch.randn(3, 8, 12))
    model.plain = nn.Parameter(torch.randn(16, 8))
    model.vector = nn.Parameter(torch.randn(5))
    optimizer = build_optimizer(model, TrainConfig(**SETTINGS, optimizer="muon", momentum=0.9))
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = {name: value.clone() for name, value in start.items()}
    momenta = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = lr = 1e-2 * (step + 1)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape)
            if name == "vector":
                continue
            momenta[name].lerp_(parameter.grad.double(), 0.1)
            update = parameter.grad.double().lerp(momenta[name], 0.9)
            cut = 2 if name == "gate_up_proj" else 1
            matrices = update.reshape(-1, update.shape[-2] // cut, update.shape[-1])
            rate = lr * 0.2 * math.sqrt(max(matrices.shape[1:]))
            moved = torch.stack([orthogonalized(matrix) for matrix in matrices]).reshape(update.shape)
            expected[name] = expected[name] * (1 - lr * 0.3) - rate * moved
        optimizer.step()
    for name in ("gate_up_proj", "down_proj", "plain"):
        actual, distance = dict(model.named_parameters())[name].double(), (expected[name] - start[name]).norm()
        # torch's iteration is in bfloat16.
        assert (actual - expected[name]).norm() < 0.05 * distance, name
        assert optimizer.state[getattr(model, name)].keys() == {"momentum_buffer"}
    assert optimizer.state[model.vector].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_one_matrix_of_a_stack_does_not_move_another():
    model = nn.Module()
    model.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))
    optimizer = build_optimizer(model, TrainConfig(**SETTINGS | {"weight_decay": 0.0}, optimizer="muon"))
    before = model.gate_up_proj.detach().clone()
    model.gate_up_proj.grad = torch.zeros_like(before)
    model.gate_up_proj.grad[1, 4:] = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(model.gate_up_proj[0], before[0]) and torch.equal(model.gate_up_proj[1, :4], before[1, :4])
    assert not torch.equal(model.gate_up_proj[1, 4:], before[1, 4:])


def test_parameter_without_gradient_stays():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer(model, TrainConfig(**SETTINGS, optimizer="muon"))
    for _ in range(2):
        model.a.grad, model.b.grad = torch.eye(4), None
        optimizer.step()
    assert (model.b == 1).all() and not (model.a == 1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("factor", [1.0, 0.1234])
def test_clipped_step_is_a_step_with_clipped_gradients(optimizer, factor):
    models = [TinyLM(TinyConfig()) for _ in range(2)]
    fused, plain = (build_optimizer(model, TrainConfig(**SETTINGS, optimizer=optimizer)) for model in models)
    for step in range(3):
        batch = TinyData().batch(4 * step, 4)
        for model, own in zip(models, (fused, plain)):
            own.zero_grad()
            model(batch.input_ids, batch.labels).loss.backward()
        clipped_step(fused, models[0].parameters(), factor)
        scale_gradients(models[1].parameters(), factor)
        plain.step()
        for a, b in zip(models[0].parameters(), models[1].parameters()):
            assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    assert not hasattr(fused, "grad_scale")


def test_parameters_of_another_type_are_scaled_by_themselves(monkeypatch):
    class Sharded(nn.Parameter):
        pass

    parameter = Sharded(torch.ones(3))
    parameter.grad = torch.full((3,), 4.0)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    clipped_step(optimizer, [parameter], 0.25)
    assert parameter.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_resumes(tmp_path, dtype):
    """In halves and in one go: the same bits."""
    options = {"optimizer": "muon", "dtype": dtype, "max_steps": 6, "save_every": 3, "keep_last": 0}
    options |= {"learning_rate": 2e-2, "warmup_tokens": 0}
    trainer = make_trainer(tmp_path / "whole", **options)
    trainer.fit()
    other = make_trainer(tmp_path / "halves", **options)
    step = other.step

    def interrupted(batches):
        if other.state.step == 4:
            raise KeyboardInterrupt
        return step(batches)

    other.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        other.fit()
    make_trainer(tmp_path / "halves", **options).fit()
    assert_same_outcome(outcome(tmp_path / "halves"), outcome(tmp_path / "whole"))


def test_muon_learns():
    config = TrainConfig(max_steps=30, batch_size=8, seqlen=16, learning_rate=2e-2, optimizer="muon", warmup_tokens=0)
    engine, batch = Engine(TinyLM(TinyConfig()), config), TinyData().batch(0, 8)
    losses = [engine.step([batch]).loss for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
