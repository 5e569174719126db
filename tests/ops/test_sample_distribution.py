"""What sample draws: the kept sets against transformers' warpers, frequencies against exact distributions, the random
numbers."""

import pytest
import scipy.stats
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arfast.ops import sample
from arfast.ops.sample import kept_weights, random_bits


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def kept_by_transformers(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """bool [R, V]: what survives transformers' warpers in their order."""
    ids, scores = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device), logits.clone()
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.isfinite()


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
def test_kept_sets_equal_transformers(top_k, grid):
    """4,000 rows in all. Among exact ties transformers' unstable sort may keep another token of the same logit."""
    generator = torch.Generator().manual_seed(top_k + 1000 * grid)
    pick = lambda values: values[int(torch.randint(len(values), (), generator=generator))]
    for _ in range(100):
        logits = torch.randn(5, pick([30, 1000, 20000]), generator=generator) * pick([0.5, 2.0, 6.0])
        logits = logits.bfloat16().float() if grid else logits
        temperature, top_p, min_p = (
            pick([1.0, 0.7, 1.5]),
            pick([1.0, 0.9, 0.5, 0.05, 1e-9, 0.0, 0.999]),
            pick([0, 0.05, 1]),
        )
        filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        kept = kept_weights(logits, **filters) > 0
        # what is less likely than 2^-40 of the best token has no weight
        expected = kept_by_transformers(logits, **filters) & (kept_weights(logits, temperature=temperature) > 0)
        assert torch.equal(kept.sum(-1), expected.sum(-1)), filters
        for row in range(5):
            values, theirs = logits[row][kept[row]], logits[row][expected[row]]
            assert torch.equal(values.sort().values, theirs.sort().values), filters
            if not grid:
                assert torch.equal(kept[row], expected[row]), filters


def test_ties_keep_the_smaller_token():
    logits = torch.zeros(1, 10)
    logits[0, 6] = 1.0
    # masses: e / (e + 9) = 0.232 for token 6, then 0.0853 each: four more tokens pass 0.5
    assert kept_weights(logits, top_p=0.5)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 6]
    assert kept_weights(logits, top_k=3)[0].count_nonzero() == 10


def test_weights_are_exponentials():
    distance = torch.cat([torch.linspace(0, 30, 200001), torch.logspace(-9, 1, 1001)]).double().float()
    weights = kept_weights(-distance[None])[0].double()
    exact = (2.0**40 * torch.exp(-distance.double())).floor()
    assert bool(((weights - exact).abs() <= 2e-8 * exact + 1).all())
    assert bool((weights[1:200001] <= weights[:200000]).all())


FILTERS = [
    {},
    dict(temperature=0.6),
    dict(top_k=12, temperature=1.4),
    dict(top_k=200),
    dict(top_p=0.8),
    dict(min_p=0.05),
    dict(top_k=30, top_p=0.7),
    dict(top_k=150, top_p=0.9, min_p=0.01),
]


@pytest.mark.not_emulated  # 40,000 rows; that the kernel draws what the CPU does is for test_sample.py
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_distribution(filters, device):
    draws, logits = 40_000, torch.randn(1, 300) * 2
    kept = kept_by_transformers(logits, **filters)[0]
    exact = (logits[0].double() / filters.get("temperature", 1.0)).masked_fill(~kept, -torch.inf).softmax(-1)
    state = torch.tensor([[11, 0, 0]]).repeat(draws, 1)
    state[:, 1] = torch.arange(draws)
    tokens, _ = sample(logits.expand(draws, -1), **filters, generator_state=state)
    counts = torch.bincount(tokens, minlength=300)
    assert counts[~kept].sum() == 0
    likely = exact * draws > 5  # the others are one class
    expected = torch.cat([exact[likely], exact[~likely].sum()[None]]).cpu() * draws
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]]).cpu()
    used = expected > 0
    assert scipy.stats.chisquare(observed[used], expected[used] * draws / expected[used].sum()).pvalue > 1e-4


def test_the_random_number_picks_the_token(device):
    """Of equally likely tokens, the one that the number times their count, rounded down, names."""
    state = torch.randint(-(2**63), 2**63 - 1, (60, 3))
    for vocab_size in (1, 2, 1000):
        numbers = [random_bits(*row) * vocab_size >> 48 for row in state.tolist()]
        tokens, logprobs = sample(torch.zeros(60, vocab_size), generator_state=state)
        assert tokens.tolist() == numbers
        torch.testing.assert_close(logprobs, torch.full((60,), 1 / vocab_size).log())


def state_with(bits):
    """A state with seed 0 and sample 0 whose 48 random bits are these: SplitMix64 backwards."""
    unmix = lambda x, shift: x ^ x >> shift ^ x >> 2 * shift
    state = unmix(bits << 16, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) % (1 << 64)
    state = unmix(state, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) % (1 << 64)
    step = unmix(state, 30) - splitmix(splitmix(0)) - 0x9E3779B97F4A7C15
    return [0, 0, (step + (1 << 63)) % (1 << 64) - (1 << 63)]


def splitmix(state):
    state = (state + 0x9E3779B97F4A7C15) % (1 << 64)
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    state = (state ^ state >> 27) * 0x94D049BB133111EB % (1 << 64)
    return state ^ state >> 31


@pytest.mark.parametrize("top_k", [0, 2, 64, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_ends_of_every_interval(top_p, top_k, device):
    """Of 64 equally likely tokens, top_p = 1/2 leaves exactly 32: the numbers that first and last give each of them."""
    kept = 64 if top_p == 1.0 else 32
    tokens = [token for token in range(kept) for _ in range(2)]
    bits = [b for token in range(kept) for b in (token * 2**48 // kept, (token + 1) * 2**48 // kept - 1)]
    state = torch.tensor([state_with(b) for b in bits])
    assert [random_bits(*row) for row in state.tolist()] == bits
    logits = torch.zeros(len(bits), 100)
    logits[:, 1:65] = 30.0  # the others have no weight
    drawn, _ = sample(logits, top_k=top_k, top_p=top_p, generator_state=state)
    assert (drawn - 1).tolist() == tokens


@pytest.mark.parametrize("top_k", [0, 2])
def test_weights_are_exact(top_k, device):
    """The last number that gives a token of small weight, and the next one that gives the other token."""
    logits = torch.zeros(80, 2)
    logits[:, 0] = -(torch.rand(40) * 27).repeat_interleave(2)
    weights = kept_weights(logits)
    numbers = (weights[:, 0] - torch.tensor([1, 0]).repeat(40)).tolist()
    bits = [-((-number << 48) // mass) for number, mass in zip(numbers, weights.sum(-1).tolist())]
    state = torch.tensor([state_with(b) for b in bits])
    assert sample(logits, top_k=top_k, generator_state=state)[0].tolist() == [0, 1] * 40


def test_random_numbers():
    """Uniform, and without relation between neighbouring seeds, samples and steps."""
    uniform = lambda *counters: random_bits(*counters) * 2.0**-48
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
    assert uniform(-3, 0, 0) != uniform(3, 0, 0)
