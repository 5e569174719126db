"""Ranks that die, are stopped, or do not belong together: the run ends, nothing half written is taken for whole."""

import os
import shutil
import signal
import time

import pytest
import torch.distributed as dist
from fsdp_runs import DENSE, make_trainer, train
from ranks import RanksFailed, run_ranks

from arfast.distributed import Launch, Parallel, process_group
from arfast.distributed.exchange import Exchange
from arfast.distributed.sharded_checkpoint import ShardedSnapshot
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import CheckpointError, TrainConfig, Trainer, checkpoint, verify
from arfast.train.checkpoint import list_checkpoints

STEPS = 4


def run(data, output_dir, options):
    return train(data, output_dir, DENSE, **{"max_steps": STEPS, "save_every": 2} | options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_save(data, output_dir, rank, place):
    """SIGKILL on one rank at a place of the save of step 4."""
    write, write_manifest, replace = ShardedSnapshot.write, checkpoint.write_manifest, checkpoint._replace_directory
    on = lambda directory: "step-00000004" in str(directory) and dist.get_rank() == rank

    def dying_write(self, directory):
        if place == "before writing" and on(directory):
            die()
        write(self, directory)
        if place == "after writing" and on(directory):
            die()

    def dying_manifest(directory, step):
        if place == "before the manifest" and on(directory):
            die()
        write_manifest(directory, step)

    def dying_replace(source, target):
        if place == "before the rename" and on(target):
            die()
        replace(source, target)
        if place == "after the rename" and on(target):
            die()

    ShardedSnapshot.write = dying_write
    checkpoint.write_manifest, checkpoint._replace_directory = dying_manifest, dying_replace
    return run(data, output_dir, {})


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return run_ranks(run, 2, data, str(tmp_path_factory.mktemp("undisturbed")), {})


@pytest.mark.parametrize(
    "rank, place, kept",
    [
        (1, "after writing", 2),
        (0, "before the rename", 2),
        pytest.param(1, "before writing", 2, marks=pytest.mark.slow),
        pytest.param(0, "after writing", 2, marks=pytest.mark.slow),
        pytest.param(0, "before the manifest", 2, marks=pytest.mark.slow),
        pytest.param(0, "after the rename", 4, marks=pytest.mark.slow),
    ],
)
def test_a_kill_in_a_save(data, tmp_path, undisturbed, rank, place, kept):
    start = time.monotonic()
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_die_in_save, 2, data, str(tmp_path), rank, place)
    assert time.monotonic() - start < 60
    assert "exit code -9" in raised.value.errors[rank]
    assert raised.value.errors.keys() == {0, 1}, "the other rank ends too"
    for path in list_checkpoints(tmp_path):
        verify(path)
    assert list_checkpoints(tmp_path)[-1].name == f"step-{kept:08d}"
    again = run_ranks(run, 2, data, str(tmp_path), {})
    assert [rank["local"] for rank in again] == [rank["local"] for rank in undisturbed]
    assert not list(tmp_path.glob("*.tmp-*"))


def _die_in_step(data, output_dir, rank):
    trainer = make_trainer(data, output_dir=output_dir, max_steps=STEPS, save_every=2)
    backward = trainer.engine._backward

    def dying_backward(**arguments):
        if trainer.state.step == 3 and dist.get_rank() == rank:
            die()
        return backward(**arguments)

    trainer.engine._backward = dying_backward
    trainer.fit()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_kill_in_a_step(data, tmp_path, undisturbed, rank):
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_die_in_step, 2, data, str(tmp_path), rank)
    assert raised.value.errors.keys() == {0, 1}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    again = run_ranks(run, 2, data, str(tmp_path), {})
    assert list(again[0]["losses"]) == [3, 4]
    assert [rank["local"] for rank in again] == [rank["local"] for rank in undisturbed]


def _full_disk(data, output_dir, rank):
    write = ShardedSnapshot.write

    def failing_write(self, directory):
        write(self, directory)
        if "step-00000004" in str(directory) and dist.get_rank() == rank:
            raise OSError(28, "No space left on device")

    ShardedSnapshot.write = failing_write
    try:
        run(data, output_dir, {})
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_at_one_rank(data, tmp_path, rank):
    errors = run_ranks(_full_disk, 2, data, str(tmp_path), rank)
    assert errors[0] == errors[1] and "No space left on device" in errors[0]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert not list(tmp_path.glob("*.tmp-*"))


def _hang_in_step(data, output_dir):
    strategy = Parallel(timeout=3.0)
    if dist.get_rank() == 1:
        time.sleep(600)
    strategy.sum_over_ranks([1])


def test_a_rank_that_stands_still_ends_the_others(data, tmp_path):
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_hang_in_step, 2, data, str(tmp_path), timeout=20.0)
    assert "imed out" in raised.value.errors[0]


def _different_settings(data, output_dir, name):
    if name == "config":
        other = {"learning_rate": 1e-3 * (1 + dist.get_rank())}
        make_trainer(data, output_dir=output_dir, **other)
    else:
        make_trainer(data, DENSE | {"rope_theta": 1e4 * (1 + dist.get_rank())}, output_dir=output_dir)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config", "config.learning_rate must be the same on every rank, got 0.001 on rank 0 and 0.002 on rank 1"),
        ("model", "model.rope_theta must be the same on every rank, got 10000.0 on rank 0 and 20000.0 on rank 1"),
    ],
)
def test_ranks_that_do_not_agree(data, tmp_path, name, text):
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_different_settings, 2, data, str(tmp_path), name)
    assert all(f"Trainer: {text}" in raised.value.errors[rank] for rank in range(2))


def _make(data, output_dir, config):
    make_trainer(data, output_dir=output_dir, **config)


@pytest.mark.parametrize(
    "config, text",
    [
        ({"batch_size": 7, "micro_batch_size": None}, "batch_size must be a multiple of the 2 data ranks, got 7"),
        (
            {"batch_size": 12, "micro_batch_size": 4},
            "micro_batch_size must divide the 6 sequences that each of 2 data ranks has of a batch of 12, got 4",
        ),
        ({"cuda_graph": True}, "cuda_graph must be False on several ranks, got True"),
        ({"optimizer": "muon"}, "optimizer must be 'adamw' on several ranks, got 'muon'"),
        ({"compile": True}, "compile must be False on several ranks, got True"),
        ({"scheduled_sampling": 0.1}, "scheduled_sampling must be 0.0 on several ranks, got 0.1"),
        (
            {"batch_size": 8, "batch_ramp": [[0, 3], [96, 8]]},
            "batch_size must be a multiple of the 2 data ranks, got 3",
        ),
    ],
)
def test_settings_that_do_not_divide(data, tmp_path, config, text):
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_make, 2, data, str(tmp_path), config)
    assert all(f"Trainer: {text}" in raised.value.errors[rank] for rank in range(2))
    assert not list(tmp_path.iterdir())


def _make_unfit(data, output_dir):
    config = TrainConfig(output_dir=output_dir, max_steps=1)
    strategy = Parallel(dtype="bfloat16")
    model = CausalLMConfig(**DENSE)
    for candidate in (CausalLM(model), strategy.build_model(model)):
        try:
            Trainer(candidate, config, data, strategy=strategy)
        except ValueError as error:
            yield str(error)


def _unfit(data, output_dir):
    return list(_make_unfit(data, output_dir))


def test_a_model_or_dtype_of_somebody_else(data, tmp_path):
    for plain, dtype in run_ranks(_unfit, 2, data, str(tmp_path)):
        assert plain == "Trainer: model must be made by the strategy's build_model or load_model, got a CausalLM"
        assert dtype == "Trainer: dtype must be that of the strategy, 'bfloat16', got 'float32'"


def test_a_directory_in_use_is_refused_on_all_ranks(data, tmp_path):
    with checkpoint.lock_directory(tmp_path), pytest.raises(RanksFailed) as raised:
        run_ranks(run, 2, data, str(tmp_path), {})
    assert all("must be used by one trainer at a time" in raised.value.errors[rank] for rank in range(2))


VARIABLES = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set for a run of several ranks"),
        ({"RANK": None}, "RANK must be set for a run of several ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"RANK": "2"}, r"RANK must be in \[0, WORLD_SIZE=2\), got 2"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK must be in \[0, LOCAL_WORLD_SIZE=2\)"),
    ],
)
def test_an_environment_that_is_not_torchruns(monkeypatch, changes, text):
    for name, value in (VARIABLES | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"launch: {text}"):
        Launch.from_environment()


def test_a_process_of_its_own_is_no_launch(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() is None


def _arrive_late():
    launch = Launch.from_environment()
    if launch.rank == 1:
        return
    with process_group(launch, launch.device, timeout=2.0):
        pass


def test_a_rank_that_never_arrives():
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_arrive_late, 2, init=False, timeout=30.0)
    assert "launch: all 2 ranks must meet at 127.0.0.1:" in raised.value.errors[0]


def _errors_of_one_rank(failing):
    exchange, heard = Exchange(), []
    for call in (exchange.together, exchange.from_main):

        def fail():
            if dist.get_rank() == failing:
                raise CheckpointError("it is broken")
            return dist.get_rank()

        try:
            heard.append(call(fail))
        except CheckpointError as error:
            heard.append(str(error))
    return heard, exchange.gather({"rank": dist.get_rank()}), exchange.sum([1, dist.get_rank()])


@pytest.mark.parametrize("failing", [0, 2])
def test_errors_reach_all_ranks(failing):
    for rank, (heard, gathered, total) in enumerate(run_ranks(_errors_of_one_rank, 3, failing)):
        together = "it is broken" if rank == failing else f"rank {failing}: it is broken"
        assert heard == [together, "it is broken" if failing == 0 else 0]
        assert gathered == [{"rank": 0}, {"rank": 1}, {"rank": 2}] and total == [3, 3]


def test_checkpoints_are_refused_when_a_run_must_be_new(data, tmp_path):
    run_ranks(run, 2, data, str(tmp_path / "run"), {"max_steps": 1})
    shutil.rmtree(tmp_path / "run" / "data", ignore_errors=True)
    with pytest.raises(RanksFailed) as raised:
        run_ranks(run, 2, data, str(tmp_path / "run"), {"resume": False})
    assert all(
        "output_dir must hold no checkpoint when resume is False" in text for text in raised.value.errors.values()
    )
