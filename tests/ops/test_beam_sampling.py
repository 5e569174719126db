"""beam_step with a generator: the same draws as its reference, to the last bit, and draws without replacement."""

import copy
import itertools
import math

import pytest
import torch
from accuracy import assert_bitwise_equal
from test_beam_step import SIZES, assert_same_state, start, step_logits
from threads import same_for_any_threads

from arfast.ops import BeamState, beam_step, beam_step_reference
from arfast.ops._gumbel import gumbel_noise


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def generators(items, device="cpu"):
    return (
        torch.stack([torch.tensor([7, item, 3]) for item in range(items)] or [torch.zeros(3)]).long()[:items].to(device)
    )


def test_noise_is_gumbel():
    """Against -log(-log(u)) of the same random bits, and its first moments."""
    noise = gumbel_noise(torch.tensor([[1, 2, 3], [-1, 2**62, 0]]), 200_000).double()
    assert (noise[0] != noise[1]).all()
    count = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    uniform = noise.neg().exp().neg().exp().flatten().sort().values
    distance = (uniform - torch.linspace(0, 1, count, dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, 0.001


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("mode", [False, True, "never"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(device, size, mode):
    """Every tensor of the state after every step. Log-probabilities are given, so the scores have the same bits."""
    ours = start(size, device, mode, cache=size[3] + 9, min_length=1)
    ours_generator = generators(size[0], device)
    expected, generator = copy.deepcopy((ours, ours_generator))
    for step in range(size[3] + 1):
        logits = step_logits(size, ours, step == 0)
        beam_step(logits, ours, log_probs=True, generator_state=ours_generator)
        if size[0] > 0:
            beam_step_reference(logits, expected, log_probs=True, generator_state=generator)
        assert_same_state(ours, expected)
        assert_bitwise_equal(ours_generator, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 33, 16385, 40001])
def test_every_dtype_and_misaligned_rows(vocab_size, dtype, device):
    logits = (torch.randn(6, vocab_size + 3) * 3).to(dtype)[:, 1 : vocab_size + 1]
    logits[:, ::7] = -math.inf
    banned = torch.rand(6, vocab_size) < 0.3
    ours = start((2, 3, vocab_size, 5, 1), device)
    ours.lengths.fill_(2)
    ours.running.copy_(torch.randn(2, 3).sort(descending=True).values)
    generator = generators(2, device)
    expected, reference_generator = copy.deepcopy((ours, generator))
    options = dict(banned=banned.to(device), log_probs=True)
    beam_step(logits.to(device), ours, generator_state=generator, **options)
    beam_step_reference(logits.to(device), expected, generator_state=reference_generator, **options)
    assert_same_state(ours, expected)


@pytest.mark.parametrize("scale, offset", [(0.0, 0.0), (1e-4, 0.0), (1e4, 0.0), (1.0, -1e6), (1.0, 1e9)])
def test_extreme_values(scale, offset, device):
    """Also where rounding makes scores with noise equal: the smaller token goes first."""
    logits = torch.randn(6, 20000) * scale + offset
    ours = start((2, 3, 20000, 5, 1), device)
    ours.lengths.fill_(1)
    ours.running.copy_(torch.tensor([0.0, -0.5, -3.0]))
    generator = generators(2, device)
    expected, reference_generator = copy.deepcopy((ours, generator))
    beam_step(logits.to(device), ours, log_probs=True, generator_state=generator)
    beam_step_reference(logits.to(device), expected, log_probs=True, generator_state=reference_generator)
    assert_same_state(ours, expected)


def test_logits_are_normalised(device):
    """The same draws as from log_softmax, but for the rounding of scores."""
    logits = (torch.randn(6, 3000) * 3).to(device)
    first = start((2, 3, 3000, 5, 1), device)
    first.lengths.fill_(1)
    results = []
    for x, log_probs in ((logits, False), (logits.log_softmax(-1), True)):
        state = copy.deepcopy(first)
        beam_step(x, state, log_probs=log_probs, generator_state=generators(2, device))
        results.append(state)
    assert torch.equal(results[0].tokens, results[1].tokens) and torch.equal(results[0].rows, results[1].rows)
    torch.testing.assert_close(results[0].running, results[1].running)


def test_scores_have_no_noise(device):
    logits = torch.randn(8, 500).log_softmax(-1).to(device)
    state = start((2, 4, 500, 5, 0), device)
    state.lengths.fill_(1)
    state.running.copy_(torch.tensor([0.0, -1.0, -2.0, -3.0]))
    before = state.running.clone()
    beam_step(logits, state, generator_state=generators(2, device))
    expected = before.flatten()[state.rows] + logits[state.rows, state.next_tokens]
    torch.testing.assert_close(state.running.flatten(), expected)
    assert (state.running.diff(dim=1) <= 0).all()  # the beams are in the order of their scores, not of the draw
    best = BeamState.start(2, 4, 5, device=device)
    beam_step(logits[:2], best)
    assert not torch.equal(best.next_tokens, state.next_tokens)


def test_draws_without_replacement():
    """Two beams over three tokens: Plackett and Luce, by chi-square over 40,000 items."""
    items, beams, vocab_size = 40_000, 2, 3
    running = torch.tensor([0.0, -0.7])
    logits = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.3, -0.5]])
    scores = (logits.log_softmax(-1) + running[:, None]).flatten().double()
    state = BeamState.start(items, beams, 3)
    state.lengths.fill_(1)
    state.running.copy_(running)
    generator = torch.stack([torch.full((items,), 5), torch.arange(items), torch.ones(items).long()], dim=1)
    beam_step(logits.repeat(items, 1), state, generator_state=generator)
    drawn = (state.rows.view(items, beams) % beams * vocab_size + state.next_tokens.view(items, beams)).sort(-1).values
    p = scores.softmax(0)
    statistic, pairs = 0.0, list(itertools.combinations(range(beams * vocab_size), 2))
    # The beams are the 2 best by score of the 4 drawn.
    expected = dict.fromkeys(pairs, 0.0)
    for order in itertools.permutations(range(beams * vocab_size), 4):
        left, probability = 1.0, 1.0
        for index in order:
            probability *= (p[index] / left).item()
            left -= p[index].item()
        best = sorted(order, key=lambda index: -scores[index].item())[:2]
        expected[tuple(sorted(best))] += probability
    counts = torch.bincount(drawn[:, 0] * 10 + drawn[:, 1], minlength=100)
    for (a, b), probability in expected.items():
        count, mean = counts[10 * a + b].item(), probability * items
        if mean == 0:
            assert count == 0
        else:
            statistic += (count - mean) ** 2 / mean
    degrees = sum(probability > 0 for probability in expected.values()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 6


def test_hypotheses_are_those_among_the_first_drawn(device):
    """At the largest length all end: the K drawn first become hypotheses, whatever their scores."""
    items, beams, vocab_size = 300, 2, 5
    logits = torch.randn(items * beams, vocab_size).log_softmax(-1).to(device)
    state = BeamState.start(items, beams, 2, length_penalty=0.0, device=device)
    state.lengths.fill_(1)
    generator = generators(items, device)
    noise = gumbel_noise(generator, beams * vocab_size).view(items, -1)
    beam_step(logits, state, log_probs=True, generator_state=generator)
    first = (logits.view(items, -1) + noise).topk(beams).indices
    ended = state.endings[:, :, 1] * vocab_size + state.endings[:, :, 2]
    assert torch.equal(ended.sort(-1).values.long(), first.sort(-1).values)
    torch.testing.assert_close(state.scores, logits.view(items, -1).gather(1, ended.long()))
    assert torch.equal(generator[:, 2], torch.full((items,), 4, device=device))


def test_an_item_draws_the_same_in_any_batch():
    logits = torch.randn(6, 20000)
    together = BeamState.start(6, 3, 4)
    beam_step(logits, together, generator_state=generators(6))
    for item in range(6):
        alone = BeamState.start(1, 3, 4)
        beam_step(logits[item : item + 1], alone, generator_state=generators(6)[item : item + 1].clone())
        assert torch.equal(alone.running[0], together.running[item])
        assert torch.equal(alone.next_tokens, together.next_tokens[3 * item : 3 * item + 3])


def test_same_for_any_threads():
    logits = torch.randn(4, 50000)

    def run():
        state = BeamState.start(1, 4, 3, ends=(3,))
        state.lengths.fill_(1)
        beam_step(logits, state, generator_state=generators(1))
        return state.running, state.next_tokens, state.scores

    same_for_any_threads(run)


@pytest.mark.parametrize(
    "generator, message",
    [
        (torch.zeros(2, 2, dtype=torch.int64), r"generator_state must have shape \[B, 3\] = \[2, 3\], got \[2, 2\]"),
        (torch.zeros(2, 3), "generator_state must be int64, got float32"),
        (torch.zeros(3, 2, dtype=torch.int64).T, "generator_state must be contiguous"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), "."),
    ],
)
def test_errors(generator, message):
    with pytest.raises(RuntimeError, match="beam_step: " + message):
        beam_step(torch.randn(2, 9), start((2, 3, 9, 4, 1), "cpu"), generator_state=generator)
