"""The Trainer on ranks that share a model by tensors, context or experts: runs and checkpoints of one process."""

import shutil

import pytest
import torch
from fsdp_runs import (
    DENSE,
    EXPERTS,
    assert_continued,
    consumed_by_all,
    largest_difference,
    make_trainer,
    metrics,
    train,
)
from ranks import RanksFailed, run_ranks

from arfast.distributed import Parallel, ParallelConfig
from arfast.distributed.parts import parts
from arfast.models import CausalLM, CausalLMConfig

FOUR_EXPERTS = EXPERTS | {"num_experts": 4, "router_z_loss_coef": 0.01, "num_shared_experts": 1}
BIASED = FOUR_EXPERTS | {"router_bias": True, "router_score": "sigmoid", "num_key_value_heads": 4}
MIXTRAL = EXPERTS | {"num_experts": 4}
QWEN = DENSE | {"qkv_bias": True, "tie_word_embeddings": False}
# Adam turns the rounding of a gradient that is no larger than epsilon into a step of another size.
STEADY = {"epsilon": 1e-5}
DOCUMENTS = {"packing": "documents", "label_smoothing": 0.05, "z_loss": 1e-4}
CLIPPED = {"max_grad_norm": 0.05}

RUNS = {
    "tensor 2": (2, {"tensor": 2}, QWEN, DOCUMENTS | CLIPPED),
    "tensor 2, sequences": (2, {"tensor": 2, "sequence_parallel": True}, FOUR_EXPERTS, {}),
    "tensor 4": (4, {"tensor": 4}, BIASED, DOCUMENTS),
    "context 2": (2, {"context": 2}, DENSE, DOCUMENTS),
    "context 4": (4, {"context": 4}, FOUR_EXPERTS, CLIPPED),
    "expert 2": (2, {"expert": 2}, BIASED, DOCUMENTS | CLIPPED),
    "expert 4": (4, {"expert": 4}, FOUR_EXPERTS, {}),
    "expert 2 of data 4": (4, {"expert": 2}, FOUR_EXPERTS, {"micro_batch_size": 1}),
    "data 2, tensor 2": (4, {"tensor": 2}, DENSE, CLIPPED),
    "data 2, tensor 2, expert 2": (4, {"tensor": 2, "expert": 2}, FOUR_EXPERTS, DOCUMENTS | CLIPPED),
    "context 2, tensor 2": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}, QWEN, DOCUMENTS),
    "data 2, context 2, expert 4": (4, {"context": 2, "expert": 4}, FOUR_EXPERTS, {}),
    "context 2, tensor 2, expert 2": (4, {"context": 2, "tensor": 2, "expert": 2}, BIASED, {}),
    "activations again": (4, {"context": 2, "expert": 2}, FOUR_EXPERTS, {"activation_checkpointing": True}),
}
QUICK = {"tensor 2", "expert 2"}  # the other tests of this folder that run every time have "context 2"
RAMPS = STEADY | {"max_steps": 12, "batch_ramp": [[0, 4], [512, 8]], "seqlen_ramp": [[0, 16], [1024, 32, 20_000.0]]}


def run(data, output_dir, model, parallel, config):
    return train(data, output_dir, model, parallel=parallel, **config)


def consumed_by_data_ranks(ranks, parallel):
    """Samples of each step; the ranks of one batch must have read the same."""
    shared = parallel.get("context", 1) * parallel.get("tensor", 1)
    for rank, result in enumerate(ranks):
        assert result["consumed"] == ranks[rank - rank % shared]["consumed"]
    return consumed_by_all(ranks[::shared])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_the_first_fifty_steps(data, tmp_path, name):
    num_ranks, parallel, model, config = RUNS[name]
    config = STEADY | config
    expected = train(data, str(tmp_path / "one"), model, **config)
    ranks = run_ranks(run, num_ranks, data, str(tmp_path / "several"), model, parallel, config, timeout=200.0)
    assert consumed_by_data_ranks(ranks, parallel) == expected["consumed"]
    assert len(expected["losses"]) == 50
    difference = largest_difference(ranks[0]["losses"], expected["losses"])
    print(f"{name}: largest relative difference {difference:.1e}")
    assert difference < 1e-5
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    one, several = ([row.get("expert_load") for row in metrics(tmp_path / path)] for path in ("one", "several"))
    assert one == several


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"context": 2}, {"expert": 2}], ids=str)
def test_ramps(data, tmp_path, parallel):
    """Sequences, batches and rotary frequencies that change."""
    expected = train(data, str(tmp_path / "one"), FOUR_EXPERTS, **RAMPS)
    ranks = run_ranks(run, 2, data, str(tmp_path / "several"), FOUR_EXPERTS, parallel, RAMPS)
    assert consumed_by_data_ranks(ranks, parallel) == expected["consumed"]
    assert largest_difference(ranks[0]["losses"], expected["losses"]) < 1e-5


def _everything(data, output_dir, model, parallel, config):
    """Samples, losses on the validation split, and the bits of the model."""
    trainer = make_trainer(data, model, parallel, output_dir=output_dir, eval_batch_size=3, **config)
    result = trainer.fit()
    scores = [trainer.evaluate(max_tokens=limit) for limit in (None, 200)]
    return result.samples, [(score.loss, score.num_tokens) for score in scores]


@pytest.mark.parametrize(
    "num_ranks, parallel",
    [
        (2, {"tensor": 2}),
        pytest.param(2, {"context": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), pytest.param("bfloat16", 3e-3, marks=pytest.mark.slow)])
def test_evaluation_samples_and_log(data, tmp_path, num_ranks, parallel, dtype, bound):
    config = {"max_steps": 4, "sample_prompts": ["the "], "sample_tokens": 6, "eval_every": 2, "dtype": dtype}
    samples, scores = _everything(data, str(tmp_path / "one"), FOUR_EXPERTS, {}, config)
    arguments = (data, str(tmp_path / "several"), FOUR_EXPERTS, parallel, config)
    for got in run_ranks(_everything, num_ranks, *arguments):
        if dtype == "float32":
            assert got[0] == samples
        for (loss, count), (expected, expected_count) in zip(got[1], scores):
            assert count == expected_count and loss == pytest.approx(expected, rel=bound)
    one, several = (metrics(tmp_path / name) for name in ("one", "several"))
    for a, b in zip(one, several, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["tokens"] == b["tokens"]
        assert b.get("val_loss", 0) == pytest.approx(a.get("val_loss", 0), rel=bound)


def _initial(model, parallel):
    strategy = Parallel(ParallelConfig(**parallel))
    built = strategy.build_model(CausalLMConfig(**model), seed=3)
    wholes = {name: part.whole() for name, part in parts(built).items()}
    return sum(part.local.numel() for part in parts(built).values()), wholes, strategy.count_parameters(built)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "data": 2, "expert": 2},
        pytest.param({"context": 2, "data": 2, "expert": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_rank_makes_its_part_of_the_same_model(parallel):
    """And no more: what is not spread evenly are the few rows that vocabulary and experts leave over."""
    model = CausalLM(CausalLMConfig(**BIASED), seed=3)
    total = model.num_parameters()
    biases = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    for held, wholes, counted in run_ranks(_initial, 4, BIASED, parallel):
        assert counted == (total - biases, total) and total / 4 <= held < 1.1 * total / 4
        assert all(torch.equal(wholes[name], value) for name, value in model.state_dict().items())


STEPS, STOP = 10, 4


def run_on(mesh, data, output_dir, model, **options):
    """Outcomes by rank; mesh: (ranks, sizes), 0 ranks: in this process, without a process group."""
    num_ranks, parallel = mesh
    config = STEADY | {"max_steps": STEPS} | options
    if num_ranks == 0:
        return [run(data, str(output_dir), model, {}, config)]
    return run_ranks(run, num_ranks, data, str(output_dir), model, parallel, config)


ONE, TENSOR, CONTEXT, EXPERT = (0, {}), (4, {"tensor": 2}), (2, {"context": 2}), (4, {"expert": 2})
ALL = (4, {"tensor": 2, "expert": 2})


@pytest.mark.parametrize(
    "model, writer, readers",
    [
        pytest.param(FOUR_EXPERTS, ALL, (ONE, CONTEXT), id="all"),
        pytest.param(DENSE, TENSOR, (TENSOR, ONE, (2, {}), CONTEXT), id="tensor", marks=pytest.mark.slow),
        pytest.param(FOUR_EXPERTS, ALL, (ALL, EXPERT, TENSOR), id="all to four", marks=pytest.mark.slow),
        pytest.param(BIASED, ONE, (ALL, (4, {"tensor": 4}), CONTEXT), id="one", marks=pytest.mark.slow),
        pytest.param(BIASED, EXPERT, (EXPERT, ONE, TENSOR), id="expert", marks=pytest.mark.slow),
        pytest.param(EXPERTS, (4, {"context": 4}), ((3, {}), TENSOR, ONE), id="context", marks=pytest.mark.slow),
    ],
)
def test_continues_on_any_arrangement(data, tmp_path, model, writer, readers):
    """The same samples, the same losses up to the order of additions; on the same arrangement the same bits."""
    options = {"batch_size": 12, "micro_batch_size": 1}
    undisturbed = run_on(writer, data, tmp_path / "undisturbed", model, **options)
    run_on(writer, data, tmp_path / "stopped", model, stop_after=(STOP, max(0, writer[0] - 1)), **options)
    expected = consumed_by_data_ranks(undisturbed, writer[1])
    for reader in readers:
        path = tmp_path / str(reader)
        shutil.copytree(tmp_path / "stopped", path)
        ranks = run_on(reader, data, path, model, **options)
        samples = consumed_by_data_ranks(ranks, reader[1]), undisturbed, expected
        assert_continued(ranks, *samples, range(STOP + 1, STEPS + 1), reader == writer)


@pytest.mark.slow
@pytest.mark.parametrize("model", [QWEN, MIXTRAL], ids=["qwen2", "mixtral"])
def test_transformers_reads_it(data, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    mesh = ALL if "num_experts" in model else TENSOR
    run_on(mesh, data, tmp_path, model, max_steps=2)
    ours = CausalLM.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def _refusals(data, output_dir):
    """What each says: settings and sizes that do not go together."""
    cases = [
        ({"tensor": 2}, DENSE | {"num_key_value_heads": 1}, {}),
        ({"expert": 2}, DENSE, {}),
        ({"expert": 2}, EXPERTS, {}),
        ({"context": 2}, DENSE, {"seqlen": 30}),
        ({"context": 2}, DENSE, {"seqlen": 32, "seqlen_ramp": [[0, 2], [512, 32]]}),
        ({"tensor": 2, "sequence_parallel": True}, DENSE, {"seqlen": 27}),
        ({"tensor": 3}, DENSE, {}),
        ({"context": 0}, DENSE, {}),
        ({"tensor": 2}, DENSE, {"optimizer": "muon"}),
    ]
    said = []
    for parallel, model, config in cases:
        try:
            make_trainer(data, model, parallel, output_dir=output_dir, **config)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_does_not_go_together_is_refused(data, tmp_path):
    for said in run_ranks(_refusals, 2, data, str(tmp_path / "run")):
        assert said == [
            "ParallelConfig: tensor must divide num_key_value_heads=1, got 2",
            "ParallelConfig: expert must be 1 for a model without experts, got 2",
            "ParallelConfig: expert must divide num_experts=3, got 2",
            "Trainer: seqlen must be a multiple of 2 * context = 4 in every stage, got 30",
            "Trainer: seqlen must be a multiple of 2 * context = 4 in every stage, got 2",
            "Trainer: seqlen must be a multiple of context * tensor = 2 in every stage, got 27",
            "ParallelConfig: world size must be a multiple of context * tensor = 1 * 3 = 3, got 2",
            "ParallelConfig: context must be a positive integer, got 0",
            "Trainer: optimizer must be 'adamw' on several ranks, got 'muon'",
        ]
    assert not list(tmp_path.iterdir())


def test_an_arrangement_of_another_type():
    with pytest.raises(TypeError, match="Parallel: parallel must be a ParallelConfig or None, got a dict"):
        Parallel({"tensor": 2})


def _other_arrangements():
    rank = torch.distributed.get_rank()
    Parallel(ParallelConfig(tensor=2) if rank else ParallelConfig(data=2))


def test_ranks_must_be_arranged_alike():
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_other_arrangements, 2)
    text = "Parallel: data must be the same on every rank, got 2 on rank 0 and 1 on rank 1"
    assert all(text in raised.value.errors[rank] for rank in range(2))
