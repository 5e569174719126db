"""What the ranks of a run must decide together: to rewind, to repeat a step; and where a run starts from weights."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import DENSE, EXPERTS, checksum, consumed_by_all, largest_difference, make_trainer, record
from ranks import run_ranks

from arfast.distributed import Parallel, ParallelConfig
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer, UnrepeatableError
from arfast.train.checkpoint import list_checkpoints
from arfast.train.rewind import JOURNAL

REWINDS = {"max_steps": 12, "on_nonfinite": "rewind", "save_every": 4, "rewind_steps": 2, "keep_last": 0}


def last_rank():
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def _rewinding(data, output_dir, parallel):
    """NaN in step 7, on the last rank alone, until something is left out; the run stops in step 10 and continues."""
    trainer = make_trainer(data, DENSE, parallel, output_dir=output_dir, **REWINDS)
    consumed, losses = record(trainer)
    forward = trainer.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.state.step == 6 and not trainer.state.left_out and last_rank():
            output.loss = output.loss * float("nan")
        return output

    trainer.model.forward = poisoned
    trainer.fit()
    rewinds = [dataclasses.asdict(rewind) for rewind in trainer._journal.rewinds]
    return {"losses": losses, "consumed": consumed, "rewinds": rewinds, "left_out": trainer.state.left_out}


@pytest.mark.parametrize("num_ranks, parallel", [(2, {}), pytest.param(4, {"tensor": 2}, marks=pytest.mark.slow)])
def test_a_rewind_is_that_of_one_process(data, tmp_path, num_ranks, parallel):
    expected = _rewinding(data, str(tmp_path / "one"), {})
    ranks = run_ranks(_rewinding, num_ranks, data, str(tmp_path / "several"), parallel)
    assert len(expected["rewinds"]) == 1 and expected["rewinds"][0]["to_step"] == 4
    for rank in ranks:
        assert rank["rewinds"] == expected["rewinds"] and rank["left_out"] == expected["left_out"]
    assert len(expected["losses"]) == 12 and largest_difference(ranks[0]["losses"], expected["losses"]) < 1e-5
    if not parallel:
        assert consumed_by_all(ranks)[12] == expected["consumed"][12]
    one, several = (json.loads((tmp_path / name / JOURNAL).read_text()) for name in ("one", "several"))
    assert one == several
    names = [[path.name for path in list_checkpoints(tmp_path / name)] for name in ("one", "several")]
    assert names[0] == names[1]


def _rechecking(data, output_dir, parallel, wrong_passes, every=1):
    """Three steps; in these passes of the second one a bit of a gradient of the last rank is flipped."""
    trainer = make_trainer(data, EXPERTS, parallel, output_dir=output_dir, recheck_every=every, micro_batch_size=None)
    accumulate, passes = trainer.engine._accumulate_gradients, []

    def faulty(*arguments):
        losses = accumulate(*arguments)
        if trainer.state.step == 1 and last_rank():
            if len(passes) in wrong_passes:
                gradient = trainer.engine.parameters[-1].grad.to_local().view(torch.int32)
                gradient.flatten()[0] ^= 1 << (10 + len(passes))
            passes.append(1)
        return losses

    trainer.engine._accumulate_gradients = faulty
    losses, error = [], None
    try:
        for _ in range(3):
            losses.append(trainer.step(list(trainer._next_batches())).loss)
    except UnrepeatableError as raised:
        error = str(raised)
    return losses, checksum(trainer.model), error


@pytest.mark.parametrize("wrong", [pytest.param([0], marks=pytest.mark.slow), [1], [0, 1, 2]], ids=str)
def test_what_one_rank_cannot_repeat_all_repeat(data, tmp_path, wrong):
    expected = run_ranks(_rechecking, 2, data, str(tmp_path / "right"), {}, [], 0)
    for (losses, weights, error), right in zip(run_ranks(_rechecking, 2, data, str(tmp_path), {}, wrong), expected):
        if len(wrong) < 3:
            assert error is None and (losses, weights) == right[:2]
        else:
            assert "step 2 must give the same bits twice" in error and losses == right[0][:1]


def _fine_tuned(data, output_dir, start, parallel):
    config = TrainConfig(output_dir=output_dir, max_steps=6, seqlen=32, batch_size=8, micro_batch_size=2,
                         progress=False, keep_freed_memory=False)  # fmt: skip
    if not dist.is_initialized():
        trainer = Trainer(CausalLM.from_pretrained(start), config, data)
    else:
        strategy = Parallel(ParallelConfig.for_ranks(dist.get_world_size(), **parallel))
        trainer = Trainer(strategy.load_model(start), config, data, strategy=strategy)
    _, losses = record(trainer)
    trainer.fit()
    return losses


@pytest.mark.parametrize(
    "num_ranks, parallel", [(2, {"context": 2}), pytest.param(4, {"tensor": 2}, marks=pytest.mark.slow)]
)
def test_starts_from_a_model_of_another_family(data, tmp_path, num_ranks, parallel):
    """Whose weights a config alone would name otherwise: what it is saved as is what it was read as."""
    model = CausalLM(CausalLMConfig(**DENSE), seed=5)
    model.family = "mistral"
    model.save_pretrained(tmp_path / "start")
    expected = _fine_tuned(data, str(tmp_path / "one"), str(tmp_path / "start"), {})
    arguments = (data, str(tmp_path / "several"), str(tmp_path / "start"), parallel)
    for losses in run_ranks(_fine_tuned, num_ranks, *arguments):
        assert largest_difference(losses, expected) < 1e-5
    kinds = {json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("one", "several")}
    assert kinds == {"mistral"}
