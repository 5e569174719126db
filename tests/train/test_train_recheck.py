"""A bit that flips in a gradient of one pass is found and does no harm; arithmetic that never repeats ends the run."""

import random

import pytest
import torch
from train_doubles import TinyConfig, TinyData, TinyLM

from arfast.train import TrainConfig, UnrepeatableError
from arfast.train.engine import Engine

SETTINGS = dict(output_dir="x", max_steps=20, batch_size=4, seqlen=16, learning_rate=1e-2)


def make(recheck_every=1, **options):
    return Engine(TinyLM(TinyConfig(dropout=0.2)), TrainConfig(**SETTINGS, recheck_every=recheck_every, **options))


def flip(engine, rng, passes):
    """One bit of one gradient, in the passes of these numbers; returns how many passes there were."""
    accumulate, count = engine._accumulate_gradients, [0]

    def faulty(*arguments):
        losses = accumulate(*arguments)
        if count[0] in passes:
            gradient = rng.choice(engine.parameters).grad.view(torch.int32).flatten()
            gradient[rng.randrange(gradient.numel())] ^= 1 << rng.randrange(31)
        count[0] += 1
        return losses

    engine._accumulate_gradients = faulty
    return count


def run(engine, steps=2):
    torch.manual_seed(5)
    results = [engine.step([TinyData().batch(4 * step, 4)]) for step in range(steps)]
    return results, [parameter.detach().clone() for parameter in engine.parameters], torch.get_rng_state()


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1]))
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeating_changes_nothing(dtype, capsys):
    """Not the random numbers either, which dropout draws."""
    assert_same(run(make(dtype=dtype)), run(make(0, dtype=dtype)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_flip_is_found(dtype, capsys):
    expected, rng = run(make(0, dtype=dtype)), random.Random(0)
    for trial in range(60):
        engine = make(dtype=dtype)
        count = flip(engine, rng, [trial % 2])
        assert_same(run(engine), expected)
        assert count == [5]  # three passes, and two of the next step
        assert "step 1 gave other bits in one of three passes" in capsys.readouterr().err


def test_a_flip_without_the_check_does_harm():
    """What the test above rests on."""
    expected, rng, harmed = run(make(0)), random.Random(0), 0
    for _ in range(20):
        engine = make(0)
        flip(engine, rng, [0])
        try:
            harmed += run(engine)[0] != expected[0]
        except Exception:
            harmed += 1
    assert harmed > 10


def test_what_never_repeats_ends_the_run():
    engine = make()
    flip(engine, random.Random(0), [0, 1, 2])
    before = [parameter.detach().clone() for parameter in engine.parameters]
    with pytest.raises(UnrepeatableError, match="Trainer: step 1 must give the same bits twice, got three results"):
        run(engine)
    assert engine.state.step == 0
    assert all(torch.equal(a, b) for a, b in zip(engine.parameters, before))


def test_only_every_so_many_steps():
    engine = make(3)
    count = flip(engine, random.Random(0), [])
    run(engine, 7)
    assert count == [9]
