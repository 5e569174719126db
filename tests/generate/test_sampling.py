"""The filters against transformers' warpers, the draw against exact distributions, the random numbers."""

import pytest
import scipy.stats
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arfast.generate.sampling import Sampler, draw, kept_candidates, uniform


def kept_by_transformers(logits, temperature, top_k, top_p, min_p):
    """bool [B, V]: what survives transformers' warpers in their order."""
    ids, scores = torch.zeros(len(logits), 1, dtype=torch.long), logits.clone()
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.isfinite()


def probabilities_of(weights, tokens, vocab_size):
    dense = torch.zeros(len(weights), vocab_size, dtype=torch.float64)
    return dense.scatter_(1, tokens, weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
def test_kept_sets_equal_transformers(top_k, grid):
    """1,000 rows in all. Among exact ties transformers' unstable sort may keep another token of the same logit."""
    generator = torch.Generator().manual_seed(top_k + 1000 * grid)
    pick = lambda values: values[int(torch.randint(len(values), (), generator=generator))]
    for _ in range(25):
        logits = torch.randn(5, pick([30, 1000, 20000]), generator=generator) * pick([0.5, 2.0, 6.0])
        logits = logits.bfloat16().float() if grid else logits
        top_p, min_p = pick([1.0, 0.9, 0.5, 0.05, 0.0, 0.999]), pick([0.0, 0.05, 0.3, 1.0])
        filters = dict(temperature=pick([1.0, 0.7, 1.5]), top_k=top_k, top_p=top_p, min_p=min_p)
        weights, tokens = kept_candidates(logits, **filters)
        kept = probabilities_of(weights, tokens, logits.shape[1]) > 0
        expected = kept_by_transformers(logits, **filters)
        assert torch.equal(kept.sum(-1), expected.sum(-1)), filters
        for row in range(5):
            values, theirs = logits[row][kept[row]], logits[row][expected[row]]
            assert torch.equal(values.sort().values, theirs.sort().values), filters
            if not grid:
                assert torch.equal(kept[row], expected[row]), filters


@pytest.mark.parametrize(
    "filters", [{}, dict(top_k=7), dict(top_p=0.8), dict(temperature=0.5, top_k=20, top_p=0.9, min_p=0.1)]
)
def test_weights_are_the_renormalised_distribution(filters):
    logits = torch.randn(6, 400) * 3
    kept = kept_by_transformers(logits, **(dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | filters))
    exact = torch.softmax((logits.double() / filters.get("temperature", 1.0)).masked_fill(~kept, -torch.inf), -1)
    torch.testing.assert_close(probabilities_of(*kept_candidates(logits, **filters), 400), exact, rtol=2e-6, atol=0)


def test_ties_keep_the_smaller_token():
    logits = torch.zeros(1, 10)
    logits[0, 6] = 1.0
    weights, tokens = kept_candidates(logits, top_p=0.5)
    # masses: e / (e + 9) = 0.232 for token 6, then 0.0853 each: four more tokens pass 0.5
    assert tokens[weights > 0].tolist() == [6, 0, 1, 2, 3]
    weights, tokens = kept_candidates(logits, top_k=3)
    assert tokens[weights > 0].sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_do_not_depend_on_each_other(dtype):
    logits = (torch.randn(5, 300) * 2).to(dtype)
    logits[1] = 0.0  # a row in which everything ties makes the others' candidates wider
    streams = [(seed, 0) for seed in range(5)]
    for filters in (dict(top_k=10), dict(top_k=10, top_p=0.6), dict(top_p=0.6), dict(min_p=0.2)):
        together = Sampler(streams, **filters)(logits, 3)
        alone = [Sampler(streams[i : i + 1], **filters)(logits[i : i + 1], 3) for i in range(5)]
        assert torch.equal(together, torch.cat(alone))


def test_draw_is_the_inverse_of_the_distribution_function():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    tokens = torch.tensor([[9, 8, 7, 6, 5]])
    for number, token in [(0.0, 8), (0.2499, 8), (0.25, 6), (0.6, 6), (1 - 2.0**-48, 6)]:
        assert draw(weights, tokens, torch.tensor([number], dtype=torch.float64)).item() == token


def test_draw_never_runs_off_the_end():
    weights = torch.rand(2000, 50, dtype=torch.float64)
    weights[:, 40:] = 0
    tokens = torch.arange(50).expand(2000, -1)
    assert draw(weights, tokens, torch.full((2000,), 1 - 2.0**-48, dtype=torch.float64)).max() < 40


def test_uniform_numbers():
    """Uniform, and without relation between neighbouring seeds, samples and steps."""
    at = lambda axis, i: [i if a == axis else 0 for a in range(3)]
    for axis in range(3):
        x = torch.tensor([uniform(*at(axis, i)) for i in range(4000)], dtype=torch.float64)
        assert 0 <= x.min() and x.max() < 1
        assert scipy.stats.kstest(x, "uniform").pvalue > 1e-4
        for other in {0, 1, 2} - {axis}:
            neighbours = [[a + b for a, b in zip(at(axis, i), at(other, 1))] for i in range(4000)]
            y = torch.tensor([uniform(*counters) for counters in neighbours], dtype=torch.float64)
            for u, v in ((x, y), (x[1:], y[:-1]), (x[1:], x[:-1])):
                cells = torch.bincount((u * 8).long() * 8 + (v * 8).long(), minlength=64)
                assert scipy.stats.chisquare(cells).pvalue > 1e-4
    assert uniform(-3, 0, 0) != uniform(3, 0, 0) and 0 <= uniform(2**70, 0, 0) < 1
