"""Activation checkpointing keeps every bit and less memory; torch.compile keeps the numbers, or says that it failed."""

import functools
from types import SimpleNamespace

import pytest
import torch
from storages import Storages
from tiny_models import TINY, TINY_EXPERTS
from train_doubles import TinyConfig, TinyData, TinyLM, make_trainer

from arfast.models import CausalLM
from arfast.train import TrainConfig
from arfast.train.engine import Engine

CONFIGS = {"dense": TINY, "experts": TINY_EXPERTS.replace(router_aux_loss_coef=0.5, router_z_loss_coef=0.1)}
SETTINGS = dict(output_dir="x", max_steps=20, batch_size=8, seqlen=16, learning_rate=1e-2, warmup_tokens=0)


def make(name="dense", **options):
    return Engine(CausalLM(CONFIGS[name], seed=3), TrainConfig(**SETTINGS | options))


def batch(step, packed=False, rows=8):
    ids = torch.randint(61, (rows, 16), generator=torch.Generator().manual_seed(step))
    if not packed:
        return SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=None, num_tokens=15 * rows)
    ends = torch.tensor([0, 7 + step, 60, 16 * rows], dtype=torch.int32)
    ids = ids.view(1, -1)
    return SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=ends, num_tokens=16 * rows - 3)


def gradients(engine):
    return [parameter.grad for parameter in engine.parameters]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointed_activations_give_the_same_bits(name, packed, dtype):
    plain, checkpointed = make(name, dtype=dtype), make(name, dtype=dtype, activation_checkpointing=True)
    for step in range(3):
        given = [batch(step, packed), batch(step + 3, packed, 5)]
        assert plain.step(given) == checkpointed.step(given)
        for a, b in zip(gradients(plain), gradients(checkpointed)):
            assert torch.equal(a, b)
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters()):
        assert torch.equal(a, b)


def test_checkpointed_activations_need_less_memory():
    """Bytes kept for the backward pass: of a layer its input, and what one layer needs, which comes later."""
    kept = {}
    for on in (False, True):
        engine = Engine(
            CausalLM(TINY.replace(num_hidden_layers=8)), TrainConfig(**SETTINGS, activation_checkpointing=on)
        )
        given = batch(0)
        with Storages() as storages:
            loss = engine.compute_model(given.input_ids, labels=given.labels).loss
        kept[on] = storages.alive()
        loss.backward()
    assert kept[True] < 0.35 * kept[False]


def test_evaluation_checkpoints_nothing():
    engine = make(activation_checkpointing=True)
    with torch.no_grad():
        assert engine.compute_model(batch(0).input_ids).logits.isfinite().all()


def test_checkpointing_is_of_one_run():
    model = CausalLM(TINY)
    for on in (True, False):
        Engine(model, TrainConfig(**SETTINGS, activation_checkpointing=on))
        assert model.model.activation_checkpointing is on


def test_checkpointing_needs_a_model_that_can():
    with pytest.raises(ValueError, match="activation_checkpointing must be False for TinyLM, which has none, got True"):
        Engine(TinyLM(TinyConfig()), TrainConfig(**SETTINGS, activation_checkpointing=True))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without the code generator, which takes half a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


COMPILED = [
    ("dense", False, {}),
    ("experts", True, {"dtype": "bfloat16"}),
    pytest.param("experts", True, {"activation_checkpointing": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "packed", "options"), COMPILED)
def test_compiled_steps_are_the_steps(traced, name, packed, options, capsys):
    plain, compiled = make(name, **options), make(name, compile=True, **options)
    compiled.warm_up([batch(9, packed)])
    assert compiled.state.step == 0 and all(gradient is None for gradient in gradients(compiled))
    for step in range(3):
        actual, expected = compiled.step([batch(step, packed)]), plain.step([batch(step, packed)])
        tolerance = 1e-4 if options.get("dtype") is None else 3e-2
        assert actual.loss == pytest.approx(expected.loss, rel=tolerance)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)
        assert actual.expert_load is None or sum(actual.expert_load) > 0
    assert compiled._forward.compiles and "failed" not in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_step_by_inductor(capsys):
    torch._dynamo.reset()
    plain, compiled = make("experts"), make("experts", compile=True)
    for step in range(2):
        assert compiled.step([batch(step)]).loss == pytest.approx(plain.step([batch(step)]).loss, rel=1e-4)
    assert compiled._forward.compiles and capsys.readouterr().err == ""


def test_failing_compiler_is_told_and_left(monkeypatch, capsys):
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    plain, compiled = make(), make(compile=True)
    compiled.warm_up([batch(0)])
    text = capsys.readouterr().err
    assert "Trainer: training goes on without torch.compile, which failed: " in text and "no such compiler" in text
    assert compiled.step([batch(0)]).loss == pytest.approx(plain.step([batch(0)]).loss, rel=1e-5)
    assert capsys.readouterr().err == ""


def test_model_that_is_no_graph_is_told(traced, capsys):
    """fullgraph: a graph break is a failure, not a silent slow path."""

    class Breaking(TinyLM):
        def forward(self, *args, **options):
            torch._dynamo.graph_break()
            return super().forward(*args, **options)

    engine = Engine(Breaking(TinyConfig()), TrainConfig(**SETTINGS, compile=True))
    assert engine.step([TinyData().batch(0, 8)]).applied
    assert "training goes on without torch.compile, which failed: " in capsys.readouterr().err
    assert not engine._forward.compiles


def test_all_stages_are_warm_before_the_first_step(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path,
        compile=True,
        micro_batch_size=3,
        max_steps=6,
        seqlen_ramp=[[0, 4], [64, 8], [128, 16]],
    )
    shapes = []
    monkeypatch.setattr(trainer.engine, "warm_up", lambda batches: shapes.append([b.input_ids.shape for b in batches]))
    monkeypatch.setattr(trainer.engine, "_forward", trainer.engine.compute_model)
    trainer.fit()
    assert shapes == [[(12, 4), (4, 4)], [(6, 8), (2, 8)], [(3, 16), (1, 16)]]
    assert trainer.datasets["train"].served[-8:] == [16, 17, 18, 19, 20, 21, 22, 23]
