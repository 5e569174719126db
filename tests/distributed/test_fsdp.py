"""A run on several ranks is the run in one process: the same samples, losses, gradient norms, evaluation."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import DENSE, EXPERTS, checksum, consumed_by_all, largest_difference, make_trainer, metrics, train
from ranks import run_ranks

from arfast.distributed import Parallel
from arfast.distributed.parts import parts
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import NonFiniteError

RUNS = {
    "dense": (DENSE, {}),
    "dense-documents": (DENSE, {"packing": "documents", "label_smoothing": 0.05, "z_loss": 1e-4}),
    "experts": (EXPERTS, {}),
    "experts-documents": (EXPERTS, {"packing": "documents", "micro_batch_size": 1}),
}
BIASED = EXPERTS | {"router_bias": True, "router_score": "sigmoid"}  # the bias is not spread, nor cast
QUICK = {("dense", 2), ("experts-documents", 4)}  # of all, half a minute
CASES = [
    pytest.param(name, ranks, marks=[] if (name, ranks) in QUICK else pytest.mark.slow)
    for name in RUNS
    for ranks in (1, 2, 4)
]


@pytest.mark.parametrize("name, num_ranks", CASES)
def test_the_first_fifty_steps(data, tmp_path, name, num_ranks):
    model, config = RUNS[name]
    expected = train(data, str(tmp_path / "one"), model, **config)
    ranks = run_ranks(run, num_ranks, data, str(tmp_path / "several"), model, config)
    assert consumed_by_all(ranks) == expected["consumed"]
    assert len(expected["losses"]) == 50
    difference = largest_difference(ranks[0]["losses"], expected["losses"])
    print(f"{name} on {num_ranks} ranks: largest relative difference {difference:.1e}")
    assert difference < 1e-5
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)


def test_ramps(data, tmp_path):
    """Sequences and batches that grow: the same pieces of rows in every step, and the same choices of experts."""
    config = {"max_steps": 12, "batch_ramp": [[0, 4], [512, 8]], "seqlen_ramp": [[0, 16], [1024, 32]]}
    expected = train(data, str(tmp_path / "one"), EXPERTS, **config)
    ranks = run_ranks(run, 2, data, str(tmp_path / "several"), EXPERTS, config)
    assert consumed_by_all(ranks) == expected["consumed"] and ranks[0]["position"] == expected["position"]
    assert largest_difference(ranks[0]["losses"], expected["losses"]) < 1e-5
    loads = [[row.get("expert_load") for row in metrics(tmp_path / name)] for name in ("one", "several")]
    assert loads[0] == loads[1] and loads[0][0]


@pytest.mark.parametrize("num_ranks, bound", [(1, 0.0), (2, 3e-3)])
@pytest.mark.parametrize("model", [DENSE, BIASED], ids=["dense", "experts"])
def test_bfloat16_is_the_working_copy_of_one_process(data, tmp_path, model, num_ranks, bound):
    """The same casts at the same places: on one rank the same bits."""
    config = {"dtype": "bfloat16", "max_steps": 10}
    expected = train(data, str(tmp_path / "one"), model, **config)
    ranks = run_ranks(run, num_ranks, data, str(tmp_path / "several"), model, config)
    difference = largest_difference(ranks[0]["losses"], expected["losses"])
    print(f"bfloat16 on {num_ranks} ranks: largest relative difference {difference:.1e}")
    assert difference <= bound
    assert (ranks[0]["local"] == expected["local"]) == (num_ranks == 1)


def _share_beyond_bfloat16(data, output_dir):
    """Of this rank's gradients after one micro-batch per rank: those that bfloat16 could not hold."""
    trainer = make_trainer(data, output_dir=output_dir, dtype="bfloat16", batch_size=4)
    trainer.engine._update = lambda grad_norm, lr: None
    trainer.step(list(trainer._next_batches()))
    gradient = torch.cat([parameter.grad.to_local().flatten() for parameter in trainer.model.parameters()])
    return gradient.dtype, (gradient != gradient.bfloat16()).float().mean().item()


def test_bfloat16_gradients_are_added_in_float32(data, tmp_path):
    for dtype, share in run_ranks(_share_beyond_bfloat16, 2, data, str(tmp_path)):
        assert dtype == torch.float32 and share > 0.1


def run(data, output_dir, model, config):
    return train(data, output_dir, model, **config)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_each_rank_makes_its_part_of_the_same_model(model, num_ranks):
    whole = dict(CausalLM(CausalLMConfig(**model), seed=3).named_parameters())
    for own in run_ranks(_initial_parts, num_ranks, model):
        assert own.keys() == whole.keys()
        for name, boxes in own.items():
            assert all(torch.equal(part, whole[name][box.slices]) for box, part in boxes), name


def _initial_parts(model):
    built = Parallel().build_model(CausalLMConfig(**model), seed=3)
    return {name: [(box, memory.clone()) for box, memory in part.boxes()] for name, part in parts(built).items()}


def test_a_rank_holds_its_share_of_weights_and_optimizer(data, tmp_path):
    """Also of three experts on four ranks, of which one would have none."""
    total = 3 * 4 * CausalLM(CausalLMConfig(**EXPERTS), device="meta").num_parameters()
    for held in run_ranks(_bytes_held, 4, data, str(tmp_path), EXPERTS):
        assert held < 1.05 * total / 4


def _bytes_held(data, output_dir, model):
    trainer = make_trainer(data, model, output_dir=output_dir, max_steps=1)
    trainer.fit()
    moments = [v for state in trainer.engine.optimizer.state.values() for v in state.values() if v.ndim > 0]
    return sum(tensor.to_local().nbytes for tensor in (*trainer.model.parameters(), *moments))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_evaluation_is_exact(data, tmp_path, num_ranks):
    """The whole split and a part of it, with a batch size that leaves some ranks without a batch in the end."""
    trainer = make_trainer(data, output_dir=str(tmp_path / "one"), eval_batch_size=3)
    expected = [trainer.evaluate(max_tokens=limit) for limit in (None, 200)]
    assert expected[0].num_tokens > expected[1].num_tokens
    for scores in run_ranks(_evaluate, num_ranks, data, str(tmp_path / "several")):
        for got, wanted in zip(scores, expected):
            assert got[1] == wanted.num_tokens
            assert got[0] == pytest.approx(wanted.loss, rel=1e-6)


def _evaluate(data, output_dir):
    trainer = make_trainer(data, output_dir=output_dir, eval_batch_size=3)
    scores = [trainer.evaluate(max_tokens=limit) for limit in (None, 200)]
    return [(score.loss, score.num_tokens) for score in scores]


def test_samples_and_logs_are_those_of_one_process(data, tmp_path):
    config = {"max_steps": 4, "sample_prompts": ["the ", "dog"], "sample_tokens": 6, "eval_every": 2, "sample_every": 2}
    train(data, str(tmp_path / "one"), **config)
    ranks = run_ranks(_results, 2, data, str(tmp_path / "two"), config)
    assert ranks[0] == ranks[1] and len(ranks[0]["samples"]) == 2
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-5)
    assert (tmp_path / "one" / "samples.jsonl").read_bytes() == (tmp_path / "two" / "samples.jsonl").read_bytes()


def _results(data, output_dir, config):
    return dataclasses.asdict(make_trainer(data, output_dir=output_dir, **config).fit())


def test_nan_is_refused_by_all_ranks_alike(data, tmp_path):
    for skipped, text, same in run_ranks(_poisoned, 2, data, str(tmp_path)):
        assert skipped == [1, 2] and same
        assert "must be finite in one of 3 steps in a row" in text


def _poisoned(data, output_dir):
    """Rank 1 alone gets a NaN."""
    trainer = make_trainer(data, output_dir=output_dir, on_nonfinite="skip")
    before = checksum(trainer.model)
    forward = trainer.model.forward
    factor = float("nan") if dist.get_rank() == 1 else 1.0

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.loss = output.loss * factor
        return output

    trainer.model.forward = poisoned
    skipped = []
    try:
        while True:
            skipped += [trainer.state.step + 1] * (not trainer.step(list(trainer._next_batches())).applied)
    except NonFiniteError as error:
        return skipped, str(error), checksum(trainer.model) == before
