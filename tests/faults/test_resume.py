"""C7, T7: a run that stops anywhere and continues is, to the last bit and sample, the run that did not stop."""

import itertools
import json
import signal

import pytest
import torch
from train_doubles import assert_same_outcome, outcome

from arfast.data import Document, PackedDataset, prepare_dataset

STEPS = 20  # two epochs of 40 samples
CONFIG = {"max_steps": STEPS, "save_every": 1, "keep_last": 2, "eval_every": 7}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def stopped_and_continued(worker, memory_path):
    """Whether runs that are stopped in the ways given, one after another, end as the undisturbed one does."""

    numbers = itertools.count()

    def compare(stops, **job):
        expected_path = memory_path / "undisturbed"
        if not expected_path.exists():
            status, _, log = worker(expected_path, **job)
            assert status == 0, log
        path = memory_path / f"run-{next(numbers)}"
        for stop in stops:
            status, _, log = worker(path, **job, **stop)
            assert status == -signal.SIGKILL, log
        status, _, log = worker(path, **job)
        assert status == 0, log
        assert_same_outcome(outcome(path), outcome(expected_path))

    return compare


@DTYPES
@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_after_every_step(stopped_and_continued, amount, record, dtype, background):
    config = CONFIG | {"dtype": dtype, "async_save": background}
    points = range(2, STEPS + 1, amount(9, 1))
    for step in points:
        stopped_and_continued([{"kill_in": {"step": step}}], config=config)
    kind = "background" if background else "inline"
    outcome_text = "losses, weights, optimizer, random state, logs bit-identical"
    record("C7", f"stopped after every step, epoch edges too ({dtype}, {kind} saves)", len(points), outcome_text)


@DTYPES
def test_in_the_middle_of_an_accumulation(stopped_and_continued, amount, record, dtype):
    config = CONFIG | {"dtype": dtype, "micro_batch_size": 1, "max_steps": 6, "save_every": 2}
    points = range(2, 24, amount(11, 1))
    for call in points:
        stopped_and_continued([{"kill_in": {"engine._backward": call}}], config=config)
    record("C7", f"stopped between micro-batches ({dtype})", len(points), "bit-identical")


@DTYPES
def test_after_a_skipped_batch(stopped_and_continued, amount, record, dtype):
    """The bad sample comes again in each epoch: steps 4 and 14."""
    config = CONFIG | {"dtype": dtype, "on_nonfinite": "skip"}
    points = (4, 5, 6, 14, 15, 16)[:: amount(3, 1)]
    for step in points:
        stopped_and_continued([{"kill_in": {"step": step}}], config=config, poison_position=13)
    record("C7", f"stopped before and after a skipped batch ({dtype})", len(points), "bit-identical")


@DTYPES
def test_resume_of_a_resume(stopped_and_continued, record, dtype):
    stops = [{"kill_in": {"step": 4}}] * 5
    stopped_and_continued(stops, config=CONFIG | {"dtype": dtype, "save_every": 2})
    record("C7", f"stopped and continued five times in one run ({dtype})", len(stops), "bit-identical")


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_samples_of_three_epochs(worker, memory_path, record, packing):
    """Ten kills at several places of a step; by the tokens that were served, no row is missed or comes twice."""
    documents = [Document(f"text number {i} " * (3 + i % 5), source=str(i)) for i in range(60)]
    prepare_dataset(documents, memory_path / "data", vocab_size=280)
    options = {"seqlen": 32, "packing": packing}
    dataset = PackedDataset(memory_path / "data", "train", **options)
    steps = -(-3 * dataset.num_samples // 4)
    model = dict(vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    job = {"model": model, "data": str(memory_path / "data"), "served_log": str(memory_path / "served")}
    job["config"] = options | {"batch_size": 4, "micro_batch_size": 3, "max_steps": steps, "save_every": 2}
    stride = max(2, steps // 11)
    places = ["step", "_next_batches", "engine._backward", "_save", "engine._update"]
    for kill in range(10):
        status, _, log = worker(
            memory_path / "run", **job, kill_in={places[kill % 5]: max(1, stride // (1 + kill % 2))}
        )
        assert status == -signal.SIGKILL, log
    status, _, log = worker(memory_path / "run", **job)
    assert status == 0, log
    by_place = {}  # what was served last for each place: steps after the last checkpoint are served again
    for line in (memory_path / "served").read_text().splitlines():
        step, position, rows = json.loads(line)
        by_place[position] = (step, torch.tensor(rows).reshape(-1, 32).tolist())
    order = sorted(by_place)
    served = [row for position in order for row in by_place[position][1]]
    assert [by_place[position][0] for position in order] == [i for step in range(steps) for i in (step, step)]
    assert len(served) == 4 * steps
    for epoch in range(3):
        rows = served[epoch * dataset.num_samples : (epoch + 1) * dataset.num_samples]
        expected = dataset.batch(epoch * dataset.num_samples, dataset.num_samples).input_ids.reshape(-1, 32).tolist()
        assert rows == expected
        every_row = [row for batch in dataset.evaluation_batches(1) for row in batch.input_ids.reshape(-1, 32).tolist()]
        assert sorted(rows) == sorted(every_row)
    fault = f"10 kills over 3 epochs ({packing})"
    record("T7", fault, 10, "position exact; each row served once per epoch")
