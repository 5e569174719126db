"""Checkpoints of several ranks: read by any number of ranks, by one process, by transformers; damaged ones by none."""

import functools
import shutil

import pytest
import torch
from fsdp_runs import CONFIG, DENSE, EXPERTS, assert_continued, consumed_by_all, train
from ranks import RanksFailed, run_ranks

from arfast.distributed import Parallel
from arfast.distributed.parts import parts
from arfast.distributed.sharded_checkpoint import assign_files
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import CheckpointError, verify
from arfast.train.checkpoint import list_checkpoints

STEPS, STOP = 10, 4


def run(data, output_dir, model, options):
    return train(data, output_dir, model, **options)


def run_on(num_ranks, data, output_dir, model=DENSE, **options):
    """Outcomes by rank; 0 ranks: in this process, without a process group."""
    options = {"max_steps": STEPS} | options
    if num_ranks == 0:
        return [run(data, str(output_dir), model, options)]
    return run_ranks(run, num_ranks, data, str(output_dir), model, options)


@pytest.mark.parametrize(
    "model, writers, readers",
    [
        pytest.param(DENSE, 2, (0, 2, 4), id="dense from two"),
        pytest.param(EXPERTS, 0, (2,), id="experts from one process"),
        pytest.param(EXPERTS, 2, (0, 2, 4), id="experts from two", marks=pytest.mark.slow),
        pytest.param(DENSE, 0, (1, 2, 4), id="dense from one process", marks=pytest.mark.slow),
        pytest.param(EXPERTS, 4, (0, 1, 4), id="experts from four", marks=pytest.mark.slow),
    ],
)
def test_continues_on_any_number_of_ranks(data, tmp_path, model, writers, readers):
    """The same samples, the same losses up to the order of additions; on as many ranks the same bits."""
    undisturbed = run_on(writers, data, tmp_path / "undisturbed", model)
    stopped = run_on(writers, data, tmp_path / "stopped", model, stop_after=(STOP, max(0, writers - 1)))
    assert {(rank["status"], rank["step"]) for rank in stopped} == {(128 + 15, STOP)}
    for num_ranks in readers:
        path = tmp_path / f"on-{num_ranks}"
        shutil.copytree(tmp_path / "stopped", path)
        ranks = run_on(num_ranks, data, path, model)
        # One process writes no number of ranks, and one rank computes what it computes.
        same = max(1, num_ranks) == max(1, writers)
        samples = consumed_by_all(ranks), undisturbed, consumed_by_all(undisturbed)
        assert_continued(ranks, *samples, range(STOP + 1, STEPS + 1), same)


@pytest.mark.parametrize("model", [pytest.param(DENSE, marks=pytest.mark.slow), EXPERTS], ids=["dense", "mixtral"])
def test_transformers_reads_it(data, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    run_on(4, data, tmp_path, model, max_steps=2)
    for directory in (tmp_path, tmp_path / "step-00000002"):
        assert sorted(path.name for path in directory.glob("model*.safetensors"))[-1].endswith("-of-00004.safetensors")
        ours = CausalLM.from_pretrained(directory)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = torch.arange(24).view(1, 24)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_saved_in_the_background(data, tmp_path):
    """By a thread of each rank, which communicate beside the run: the same files."""
    for name, background in (("at-once", False), ("background", True)):
        ranks = run_on(2, data, tmp_path / name, max_steps=6, save_every=2, async_save=background, keep_last=0)
        assert {rank["step"] for rank in ranks} == {6}
    for checkpoint in list_checkpoints(tmp_path / "at-once"):
        verify(tmp_path / "background" / checkpoint.name)
        for file in checkpoint.glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "background" / checkpoint.name / file.name).read_bytes()


def _flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _flip_bits(path):
    """Flip a bit of each file in turn, and back; what verify says of each on this rank."""
    strategy, said = Parallel(), {}
    strategy.verify(path)
    for file in sorted(path.iterdir()):
        flip = functools.partial(_flip_bit, file)
        strategy.from_main(flip)
        try:
            strategy.verify(path)
        except CheckpointError as error:
            said[file.name] = str(error)
        strategy.from_main(flip)
    strategy.verify(path)
    return said


def test_a_flipped_bit_in_any_file_is_seen_by_all_ranks(data, tmp_path):
    """Each rank reads some of the files. A damaged checkpoint is passed over for the one before it."""
    first = run_on(2, data, tmp_path, max_steps=4, save_every=2)
    path = tmp_path / "step-00000004"
    names = {file.name for file in path.iterdir()}
    assert sum(name.endswith(".safetensors") for name in names) == 6
    for said in run_ranks(_flip_bits, 2, path):
        assert said.keys() == names
    file = path / "optimizer-00002-of-00002.safetensors"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    again = run_on(2, data, tmp_path, max_steps=4)
    assert list(again[0]["losses"]) == [3, 4]
    assert [rank["local"] for rank in again] == [rank["local"] for rank in first]


def test_all_damaged_is_one_error_on_all_ranks(data, tmp_path):
    run_on(2, data, tmp_path, max_steps=2)
    file = tmp_path / "step-00000002" / "optimizer-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RanksFailed) as raised:
        run_on(2, data, tmp_path, max_steps=3)
    for rank in range(2):
        assert "must hold an undamaged checkpoint, got 1 damaged" in raised.value.errors[rank]


def test_another_model_is_refused(data, tmp_path):
    run_on(2, data, tmp_path, max_steps=2)
    with pytest.raises(RanksFailed) as raised:
        run_on(2, data, tmp_path, DENSE | {"hidden_size": 64}, max_steps=3)
    for rank in range(2):
        assert "Trainer: model.hidden_size must be 32 to continue" in raised.value.errors[rank]


def test_nothing_else_is_left(data, tmp_path):
    run_on(2, data, tmp_path, max_steps=6, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]
    assert not list(tmp_path.glob("*.tmp-*"))
    assert verify(tmp_path / "step-00000006")["step"] == 6
    assert CONFIG["save_every"] == 0


def test_files_are_about_equal_and_none_is_empty():
    sizes = [4000, 1, 1, 300, 300, 300, 1, 4000]
    for num_ranks in (1, 2, 3, 4, 8, 20):
        files = assign_files(sizes, num_ranks)
        assert files == sorted(files) and set(files) == set(range(max(files) + 1)) and max(files) < num_ranks
    assert assign_files([10] * 10, 1, max_bytes=20) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def _load_model(path):
    model = Parallel().load_model(path)
    return {name: [(box, memory.clone()) for box, memory in part.boxes()] for name, part in parts(model).items()}


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "mixtral"])
def test_each_rank_reads_its_part_of_a_hugging_face_directory(tmp_path, model):
    written = CausalLM(CausalLMConfig(**model), seed=5).bfloat16()
    written.save_pretrained(tmp_path, max_shard_bytes=20_000)
    parameters = dict(written.named_parameters())
    for own in run_ranks(_load_model, 4, tmp_path):
        assert own.keys() == parameters.keys()
        for name, boxes in own.items():
            for box, part in boxes:
                assert part.dtype == torch.float32 and torch.equal(part, parameters[name][box.slices].float()), name
