"""T1, T4, T5, T6: batches that are NaN, signals, memory and data that give out, and runs that stand still."""

import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from train_doubles import TinyData, assert_same_outcome, content, make_trainer, outcome

from arfast.data import Document, PackedDataset, prepare_dataset
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import NonFiniteError, TrainConfig, Trainer
from arfast.train.checkpoint import latest_checkpoint, list_checkpoints

CONFIG = {"max_steps": 20, "save_every": 2, "eval_every": 5, "micro_batch_size": 2}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def undisturbed(worker, memory_path):
    status, seconds, log = worker(memory_path / "undisturbed", config=CONFIG)
    assert status == 0, log
    return seconds, outcome(memory_path / "undisturbed")


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "a gradient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_that_is_not_finite_changes_nothing(tmp_path, record, bad, where, dtype):
    """Whichever micro-batch and parameter it comes from; weights, moments and counters keep their bits."""
    trainer, count = make_trainer(tmp_path, dtype=dtype), 0
    batches = [trainer.datasets["train"].batch(p, 2) for p in (0, 2)]
    trainer.step(batches)
    computing = dict(trainer.engine.compute_model.named_parameters())

    def state():
        moments = [v.clone() for each in trainer.engine.optimizer.state.values() for v in each.values()]
        weights = [
            p.detach().clone() for model in (trainer.model, trainer.engine.compute_model) for p in model.parameters()
        ]
        return [*weights, *moments], vars(trainer.state).copy()

    for micro_batch in (0, 1):
        for name in computing if where == "a gradient" else ["loss"]:
            before = state()
            calls = 0

            def spoil(value, micro_batch=micro_batch):
                nonlocal calls
                calls += 1
                if calls == micro_batch + 1:
                    value = value.clone()
                    value.view(-1)[0] = bad
                return value

            if where == "a gradient":
                hook = computing[name].register_hook(spoil)
            else:
                hook = trainer.engine.compute_model.register_forward_hook(
                    lambda module, inputs, output, spoil=spoil: setattr(output, "loss", spoil(output.loss))
                )
            with pytest.raises(NonFiniteError, match=r"must be finite, got .* samples 4 to 7"):
                trainer.step(batches)
            hook.remove()
            after = state()
            assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1]
            count += 1
    assert trainer.step(batches).applied
    record("T1", f"{bad} in {where} of one micro-batch ({dtype})", count, "found before the optimizer; nothing changed")


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_signals_at_random_times(undisturbed, worker, memory_path, amount, record, background):
    seconds, expected = undisturbed
    generator, path, sent, stopped = random.Random(3), memory_path / "run-0", 0, 0
    config = CONFIG | {"async_save": background, "save_every": 0}
    while sent < amount(9, 100):
        number = SIGNALS[sent % 3]
        status, _, log = worker(path, config=config, signals=[(generator.uniform(0, seconds), int(number))])
        sent += 1
        if status == 128 + number:
            stopped += 1
            step = int(re.search(rf"stopped by {number.name} after step (\d+)", log)[1])
            assert step == max([int(each.name[5:]) for each in list_checkpoints(path)], default=0)
        elif status == 0:
            assert_same_outcome(outcome(path), expected)
            path = memory_path / f"run-{sent}"
        else:
            assert status == -number, log  # before the trainer listens, or after it has ended
    status, _, log = worker(path, config=config)
    assert status == 0, log
    assert_same_outcome(outcome(path), expected)
    kind = "background" if background else "inline"
    happened = (
        f"{stopped} left with 128 + number after a checkpoint of that very step, the rest before or after the run"
    )
    record("T4", f"SIGTERM, SIGINT, SIGUSR1 at random times ({kind} saves)", sent, f"0 steps lost; {happened}")


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize("place", ["_next_batches", "engine._backward", "engine._update", "_save", "_evaluate"])
def test_signal_in_a_place(undisturbed, worker, memory_path, amount, record, place, background):
    """While data is loaded, in backward, in the optimizer, in a save, in an evaluation."""
    config = CONFIG | {"async_save": background}
    count = 0
    for call, number in list(zip((1, 2, 3), SIGNALS))[-amount(1, 3) :]:
        path = memory_path / f"run-{call}"
        status, _, log = worker(path, config=config, signal_in={place: [call, int(number)]})
        assert status == 128 + number, log
        (step,) = re.findall(rf"stopped by {number.name} after step (\d+)", log)
        assert latest_checkpoint(path, pytest.fail).name == f"step-{int(step):08d}"
        assert worker(path, config=config)[0] == 0
        assert_same_outcome(outcome(path), undisturbed[1])
        count += 1
    kind = "background" if background else "inline"
    record("T4", f"a signal in {place} ({kind} saves)", count, "a checkpoint of that step; continued bit-identically")


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_second_signal(undisturbed, worker, memory_path, amount, record, background):
    """At once, at any moment after the first: what is on the disk is whole, and the run continues."""
    seconds, expected = undisturbed
    config, generator, count, at_once = CONFIG | {"async_save": background}, random.Random(4), amount(3, 30), 0
    for i in range(count):
        path = memory_path / f"run-{i}"
        first = generator.uniform(0.1, seconds)
        signals = [(first, int(signal.SIGTERM)), (first + generator.uniform(0, 0.01), int(signal.SIGTERM))]
        status, _, log = worker(path, config=config, signals=signals)
        assert status in (0, 128 + signal.SIGTERM, -signal.SIGTERM), log
        at_once += status == -signal.SIGTERM
        if list_checkpoints(path):
            latest_checkpoint(path, pytest.fail)
        assert worker(path, config=config)[0] == 0
        assert_same_outcome(outcome(path), expected)
    kind = "background" if background else "inline"
    record(
        "T4",
        f"a second signal within 10 ms ({kind} saves)",
        count,
        f"{at_once} ended at once; continued bit-identically",
    )


@pytest.mark.parametrize("place", ["batch", "_accumulate_gradients", "_update"])
def test_memory_gives_out(tmp_path, record, place):
    """Python's MemoryError and torch's: the run ends with it, the checkpoint is whole, and a new run continues."""
    for kind in (MemoryError("no memory"), torch.OutOfMemoryError("no memory on the device")):
        path = tmp_path / f"{place}-{type(kind).__name__}"
        trainer = make_trainer(path, max_steps=6, save_every=2)
        owner = trainer.datasets["train"] if place == "batch" else trainer.engine
        original = getattr(owner, place)

        def fail(*args, trainer=trainer, original=original, kind=kind, **options):
            if trainer.state.step == 3:
                raise kind
            return original(*args, **options)

        setattr(owner, place, fail)
        with pytest.raises(type(kind), match="no memory"):
            trainer.fit()
        assert [each.name for each in list_checkpoints(path)] == ["step-00000002"]
        assert make_trainer(path, max_steps=6, save_every=2).fit().step == 6
    record(
        "T5", f"MemoryError and OutOfMemoryError in {place}", 2, "the run ends with it; continued from the checkpoint"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "data"
    prepare_dataset([Document(f"text number {i} " * 9, source=str(i)) for i in range(40)], path, vocab_size=280)
    return path


MODEL = CausalLMConfig(vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def spoil(file, how):
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "short":
        file.write_bytes(data[:-3])
    elif how == "changed":
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif how == "a directory":
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("how", ["missing", "empty", "short", "changed", "a directory"])
def test_data_files(data, tmp_path, record, how):
    """A shard, the manifest, the tokenizer: named when the run begins, and the checkpoints stay as they are."""
    copy, config = tmp_path / "data", TrainConfig(output_dir=tmp_path / "run", seqlen=32, batch_size=2, max_steps=2)
    shutil.copytree(data, copy)
    Trainer(CausalLM(MODEL), config, copy).fit()
    before = content(latest_checkpoint(tmp_path / "run"))
    files = [file.name for file in data.iterdir() if not file.name.startswith("test-")]
    for name in files:
        shutil.rmtree(copy)
        shutil.copytree(data, copy)
        spoil(copy / name, how)
        with pytest.raises((ValueError, OSError)) as caught:
            Trainer(CausalLM(MODEL), config, copy)
        assert name in str(caught.value) or str(copy) in str(caught.value), (name, caught.value)
        assert "\n" not in str(caught.value)
    assert content(latest_checkpoint(tmp_path / "run")) == before
    record("T5", f"each file of a data set is {how}", len(files), "named in a sentence before the first step")


def test_another_data_set_in_its_place(data, tmp_path, record):
    other = tmp_path / "other"
    prepare_dataset([Document(f"text number {i} " * 9, source=str(i)) for i in range(1, 41)], other, vocab_size=280)
    config = TrainConfig(output_dir=tmp_path / "run", seqlen=32, batch_size=2, max_steps=2)
    Trainer(CausalLM(MODEL), config, data).fit()
    longer = TrainConfig(output_dir=tmp_path / "run", seqlen=32, batch_size=2, max_steps=3)
    with pytest.raises(RuntimeError, match=r"fingerprint must be '\w+' to continue"):
        Trainer(CausalLM(MODEL), longer, other).fit()
    assert Trainer(CausalLM(MODEL), longer, data).fit().step == 3
    assert PackedDataset(data, "train", 32).fingerprint != PackedDataset(other, "train", 32).fingerprint
    record("T5", "another data set between two runs", 1, "refused, naming the fingerprint")


def test_watchdog_tells_where_a_run_stands(worker, memory_path, record):
    config = {"max_steps": 2, "watchdog_seconds": 0.3}
    status, _, log = worker(memory_path / "run", config=config, hang_in_step=0.8)
    assert status == 0, log
    dumps = log.count("Timeout (0:00:00.3")
    assert dumps >= 2 and 'train_worker.py", line' in log and "in fit" in log
    status, _, log = worker(memory_path / "quiet", config=config | {"watchdog_seconds": 30.0})
    assert status == 0 and "Timeout" not in log
    status, _, log = worker(memory_path / "without", config={"max_steps": 2}, hang_in_step=0.8)
    assert status == 0 and "Timeout" not in log
    record("T6", "steps that hang", 2, f"stacks of all threads on stderr {dumps} times; silent when steps come")


def test_watchdog_is_off_after_a_run(tmp_path, monkeypatch):
    import faulthandler

    calls = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **options: calls.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("off"))
    make_trainer(tmp_path, watchdog_seconds=60.0).fit()
    assert calls == [60.0] * 5 + ["off"]


def test_consecutive_bad_batches_stop(tmp_path, record):
    train = TinyData()
    trainer = make_trainer(tmp_path, train=train, max_steps=9, on_nonfinite="skip", save_every=1)
    bad = [train.batch(4 * step, 4).input_ids for step in (2, 3, 4)]
    trainer.model.poison = lambda ids: any(torch.equal(ids, each) for each in bad)
    before = []
    with pytest.raises(NonFiniteError, match="third|3|consecutive|in a row"):
        trainer.fit()
    last = list_checkpoints(tmp_path)
    before = [int(path.name[5:]) for path in last]
    assert before == [3, 4]
    for path in last:
        weights = [np.frombuffer((each / "model.safetensors").read_bytes(), np.uint8) for each in (path, last[0])]
        assert np.array_equal(*weights)
    record("T1", "three NaN batches in a row with policy skip", 3, "stopped; weights as before the first of them")
