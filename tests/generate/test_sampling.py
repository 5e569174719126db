"""Streams of random numbers per sequence; what is drawn from them is tested with the op, arfast.ops.sample."""

import pytest
import torch

from arfast.generate.sampling import Sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_do_not_depend_on_each_other(dtype):
    logits = (torch.randn(5, 300) * 2).to(dtype)
    logits[1] = 0.0
    streams = [(seed, seed % 2) for seed in range(5)]
    for filters in (dict(top_k=10), dict(top_k=10, top_p=0.6), dict(top_p=0.6), dict(min_p=0.2)):
        together, alone = Sampler(streams, **filters), [Sampler([stream], **filters) for stream in streams]
        for _ in range(3):
            expected = [draw(logits[i : i + 1])[0] for i, draw in enumerate(alone)]
            assert torch.equal(together(logits)[0], torch.cat(expected))


def test_every_stream_and_every_step_is_another():
    logits = torch.zeros(1, 2**20)
    streams = [(seed, sample) for seed in (0, -1, 2**63, 2**70 + 5) for sample in (0, 1)]
    draws = [[int(sampler(logits)[0]) for _ in range(3)] for sampler in (Sampler([stream]) for stream in streams)]
    assert len({token for tokens in draws for token in tokens}) == 24


def test_seeds_count_modulo_2_to_the_64():
    logits = torch.zeros(1, 2**20)
    for seed in (0, -1, 2**63 + 5):
        assert torch.equal(Sampler([(seed, 0)])(logits)[0], Sampler([(seed + 2**64, 0)])(logits)[0])


def test_top_p_of_zero_keeps_the_best_token():
    logits = torch.randn(6, 50)
    assert torch.equal(Sampler([(i, 0) for i in range(6)], top_p=0.0)(logits)[0], logits.argmax(-1))
