"""Plans: sizes and compute are what a real model has, the same arguments give the same file, bad ones are refused."""

import json
import math

import pytest

from arfast.models import CausalLM, CausalLMConfig
from arfast.scaling import SweepPlan, model_shape, plan_sweep
from arfast.train import TrainConfig

SMALL = dict(vocab_size=300, num_sizes=3, size_range=1.8, tokens_per_parameter=2.0, seqlen=32, batch_size=2)


def test_runs_are_what_they_say():
    plan = plan_sweep([4e10, 8e10], target=2e11, **SMALL)
    assert [run.held_out for run in plan.runs] == [False] * (len(plan.runs) - 1) + [True]
    assert len({run.name for run in plan.runs}) == len(plan.runs) >= 6
    for run in plan.runs:
        config = CausalLMConfig(**run.model)
        model = CausalLM(config)
        assert run.parameters == sum(p.numel() for p in model.parameters())
        assert run.non_embedding_parameters == run.parameters - 300 * config.hidden_size
        train = TrainConfig(**run.train)
        assert train.total_tokens == run.tokens
        assert run.flops == pytest.approx(config.flops_per_token(32) * run.tokens)
        assert run.flops == pytest.approx(run.budget, rel=0.02)
        assert 1.0 < run.flops / (6 * run.parameters * run.tokens) < 1.6  # attention is what 6 N D leaves out
        assert train.learning_rate == pytest.approx(
            plan.settings["learning_rate"] * math.sqrt(256 / config.hidden_size), 1e-3
        )


def test_sizes_are_around_the_middle_of_each_budget():
    plan = plan_sweep(
        [1e19, 1e20], vocab_size=32_000, num_sizes=5, size_range=4.0, tokens_per_parameter=20.0, seqlen=2048
    )
    for budget in (1e19, 1e20):
        middle = math.sqrt(budget / 120)
        sizes = sorted(run.parameters for run in plan.runs if run.budget == budget)
        expected = [middle * 4.0**x for x in (-1, -0.5, 0, 0.5, 1)]
        assert sizes == pytest.approx(expected, rel=0.15)


def test_ladder_rises_and_meets_known_shapes():
    shapes = [model_shape(1e5 * 1.5**i, vocab_size=1024) for i in range(30)]
    counts = [shape.num_parameters() for shape in shapes]
    assert counts == sorted(counts) and all(abs(math.log(n / (1e5 * 1.5**i))) < 0.7 for i, n in enumerate(counts))
    large = model_shape(7e9, vocab_size=32_000)  # 4096 wide, 32 deep, 128 per head is Llama's
    assert (large.hidden_size, large.num_hidden_layers, large.head_dim) == pytest.approx((4096, 32, 128), rel=0.1)
    with pytest.raises(
        ValueError, match="^model_shape: parameters must be near those of a model with vocab_size=50000"
    ):
        model_shape(1e5, vocab_size=50_000)


def test_plan_is_a_function_of_its_arguments(tmp_path):
    first, second = (plan_sweep([4e10, 8e10], target=2e11, data_tokens=10**6, **SMALL) for _ in range(2))
    path = first.save(tmp_path / "a")
    assert path.read_bytes() == second.save(tmp_path / "b").read_bytes()
    assert SweepPlan.load(tmp_path / "a") == first
    first.save(tmp_path / "a")  # the same once more
    before = path.read_bytes()
    with pytest.raises(ValueError, match="^SweepPlan: directory must be without another plan, got"):
        plan_sweep([4e10], **SMALL).save(tmp_path / "a")
    assert path.read_bytes() == before
    assert first.runs[0].epochs == pytest.approx(first.runs[0].tokens / 1e6, abs=1e-3)
    assert len(first.table().splitlines()) == 1 + len(first.runs)


def test_damaged_plans_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="^SweepPlan: directory must hold a plan.json, got"):
        SweepPlan.load(tmp_path)
    path = plan_sweep([4e10], **SMALL).save(tmp_path)
    record = json.loads(path.read_text())
    outside = json.loads(path.read_text())
    outside["runs"][0]["name"] = "../run-001"
    for content in (path.read_text()[:-9], "[]", "{}", json.dumps(record | dict(format="x")), json.dumps(outside)):
        path.write_text(content)
        with pytest.raises(ValueError, match="^SweepPlan: .* must be an intact plan, got"):
            SweepPlan.load(tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(budgets=[]), "budgets must hold at least one, got none"),
        (dict(budgets=[1e10, -1.0]), "budgets must be finite and above 0, got -1.0"),
        (dict(budgets=[4e10, 4e10]), "budgets must be different, got"),
        (dict(target=1e10), "target must be above the budgets, got "),
        (dict(target=float("inf")), "target must be finite and above 0, got inf"),
        (dict(budgets=[2e9], tokens_per_parameter=0.01), "budgets must last for 50 steps of 64 tokens, got "),
        (dict(num_sizes=0), "num_sizes must be an integer at least 1, got 0"),
        (dict(size_range=0.5), "size_range must be at least 1, got 0.5"),
        (dict(tokens_per_parameter=0), "tokens_per_parameter must be finite and above 0, got 0"),
        (dict(learning_rate=float("nan")), "learning_rate must be finite and above 0, got nan"),
        (dict(seqlen=1), "seqlen must be an integer at least 2, got 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    arguments = dict(budgets=[4e10]) | SMALL | changes
    with pytest.raises(ValueError, match=f"^plan_sweep: {message}"):
        plan_sweep(**arguments)
