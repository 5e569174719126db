"""The rules of beam search that random configurations (test_transformers.py) do not reach, and its scores."""

import pytest
import scipy.stats
import torch

from arfast.generate import generate, score
from arfast.generate.beam import BeamSearch, beam_search
from arfast.generate.options import GenerationOptions

PAD = 1


def options_of(**changes):
    sampling = dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0)
    beams = dict(num_beams=2, num_return_sequences=2, length_penalty=1.0, early_stopping=False)
    return GenerationOptions(
        **(sampling | beams | dict(max_new_tokens=10, eos_token_id=(), pad_token_id=PAD) | changes)
    )


def search(tables, options):
    """Beam search over tables: tables[b][t][previous token] are the logits of item b in step t. No model."""
    found = BeamSearch(len(tables), options, torch.device("cpu"))
    logits = torch.stack([table[0][0] for table in tables])
    for step in range(1, options.max_new_tokens + 1):
        found.step(logits)
        if found.is_done():
            break
        tokens, rows = found.tokens, found.states[0].rows
        items = [item for item in range(len(tables)) for _ in range(options.num_beams)]
        assert [row // (len(logits) // len(tables)) for row in rows.tolist()] == items
        logits = torch.stack([tables[b][step][token] for b, token in zip(items, tokens.tolist(), strict=True)])
    tokens, _, scores = found.hypotheses()
    return tokens.tolist(), scores, step


def table(*steps, vocab_size=6):
    """Logits from {token: probability} per step, or from {previous token: {token: probability}}."""
    rows = []
    for step in steps:
        by_token = step if isinstance(next(iter(step.values())), dict) else dict.fromkeys(range(vocab_size), step)
        logits = torch.full((vocab_size, vocab_size), -torch.inf)
        for previous, probabilities in by_token.items():
            for token, probability in probabilities.items():
                logits[previous, token] = torch.tensor(probability).log()
        rows.append(logits)
    return rows


# ends at once in tokens 2 and 3, or goes on through 4 and 5 to an end in step 4 that is better at length_penalty=2
RISING = table(
    {2: 0.5, 3: 0.48, 4: 0.015, 5: 0.005}, {4: 0.9, 5: 0.1}, {4: 0.9, 5: 0.1}, {2: 0.9, 3: 0.1}, {4: 1.0}, {4: 1.0}
)
NEVER_ENDS = table(*[{4: 0.6, 5: 0.4}] * 6)


def test_an_item_that_gave_up_stays_so_while_the_batch_runs():
    """early_stopping=False: at length 1 nothing can win, at length 4 it could; the neighbour keeps the loop alive."""
    options = options_of(length_penalty=2.0, max_new_tokens=6, eos_token_id=(2, 3))
    alone, scores_alone, steps_alone = search([RISING], options)
    together, scores_together, steps = search([RISING, NEVER_ENDS], options)
    assert (steps_alone, steps) == (1, 6)
    assert alone == [[2], [3]]
    assert [row[0] for row in together[:2]] == [2, 3] and {t for row in together[:2] for t in row[1:]} == {PAD}
    assert torch.equal(scores_alone, scores_together[:2])
    patient, _, _ = search([RISING, NEVER_ENDS], options_of(**vars(options) | dict(early_stopping="never")))
    assert patient[0][:4] == [4, 4, 4, 2]


def test_a_draw_does_not_keep_an_item_alive():
    """The best beam scores exactly what the worst hypothesis does: transformers asks for more than that."""
    equal = table({2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}, {4: 1.0}, {2: 1.0})
    tokens, scores, steps = search([equal], options_of(eos_token_id=(2, 3), max_new_tokens=3))
    assert (tokens, steps) == ([[2], [3]], 1)
    better = table({2: 1.0, 3: 0.999, 4: 0.9995, 5: 1.0}, {4: 1.0}, {2: 1.0})
    tokens, _, steps = search([better], options_of(eos_token_id=(2, 3), max_new_tokens=3))
    assert steps == 3


def test_equal_scores_keep_the_older_hypothesis():
    steps = table({2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25}, {2: 1.0})
    tokens, scores, _ = search(
        [steps], options_of(length_penalty=0.0, early_stopping="never", eos_token_id=(2,), max_new_tokens=2)
    )
    assert tokens[0] == [2, PAD] and tokens[1] in ([3, 2], [4, 2])
    assert scores[0] == scores[1]


def test_early_stopping_takes_the_first_hypotheses():
    """Two hypotheses end the search although a better one is a step away."""
    steps = table({2: 0.35, 3: 0.34, 4: 0.31}, {4: 1.0}, {2: 1.0})
    options = dict(num_return_sequences=1, eos_token_id=(2, 3), max_new_tokens=3)
    tokens, _, length = search([steps], options_of(early_stopping=True, **options))
    assert (tokens, length) == ([[2]], 1)
    tokens, _, length = search([steps], options_of(early_stopping="never", **options))
    assert (tokens, length) == ([[4, 4, 2]], 3)
    steps = table({4: 0.6, 2: 0.3, 5: 0.1}, {4: 0.8, 2: 0.2}, {2: 1.0})  # here the best beam is still promising
    tokens, _, length = search([steps], options_of(early_stopping=True, **options))
    assert (tokens, length) == ([[4, 2]], 2)


def test_never_looks_ahead_only_with_a_positive_penalty():
    """With length_penalty=-1 long sequences score worse, so the present length is the one to hope with."""
    steps = table(
        {4: 0.6, 2: 0.37, 5: 0.03}, {4: {4: 0.8, 2: 0.2}, 5: {5: 1.0}}, {4: {2: 1.0}, 5: {5: 1.0}}, *[{5: 1.0}] * 5
    )
    options = options_of(length_penalty=-1.0, early_stopping="never", eos_token_id=(2,), max_new_tokens=8)
    # 2 scores -0.99, 4 2 scores -4.2, and 4 4 2 will score -2.2 while 4 4 at length 8 would be at -5.9
    assert search([steps], options)[0] == [[2, PAD, PAD], [4, 4, 2]]


def test_end_tokens_do_not_crowd_out_beams():
    """Three end tokens lead, and both beams behind them must still go on: 2 K candidates would leave one."""
    first = {1: 0.3, 2: 0.25, 3: 0.2, 4: 0.15, 5: 0.1}
    second = {4: {0: 0.5, 4: 0.5}, 5: {5: 1.0}}
    options = dict(num_return_sequences=1, early_stopping="never", length_penalty=2.0, max_new_tokens=2)
    assert search([table(first, second)], options_of(eos_token_id=(1, 2, 3), **options))[0] == [[5, 5]]


def test_an_end_token_beyond_the_best_beams_is_no_hypothesis():
    steps = table({4: 0.5, 5: 0.3, 2: 0.2}, {4: 0.5, 5: 0.5}, {2: 1.0})
    tokens, _, _ = search([steps], options_of(eos_token_id=(2,), max_new_tokens=3))
    assert all(len(row) == 3 and row[0] in (4, 5) for row in tokens)


def test_a_vocabulary_smaller_than_the_beams():
    steps = table({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, {0: 1.0}, vocab_size=2)
    tokens, scores, _ = search(
        [steps], options_of(num_beams=4, num_return_sequences=4, max_new_tokens=2, pad_token_id=0)
    )
    assert sorted(tokens) == [[0, 0], [0, 1], [1, 0], [1, 1]] and scores.isfinite().all()


@pytest.mark.parametrize("end", [0, 1])
def test_nothing_left_to_continue(end):
    """One token besides the end token, and after it only the end: the search stops, and the third result is padding."""
    steps = table({0: 0.5, 1: 0.5}, {0: {end: 1.0}, 1: {end: 1.0}}, *[{0: 0.5, 1: 0.5}] * 7, vocab_size=2)
    options = options_of(num_beams=3, num_return_sequences=3, max_new_tokens=9, eos_token_id=(end,))
    tokens, scores, length = search([steps], options)
    assert length == 2 and tokens == [[1 - end, end], [end, PAD], [PAD, PAD]]
    assert scores[:2].isfinite().all() and scores[2] == -1e9


def run(model, input_ids, mask, options):
    """(tokens, log-probabilities, scores) of beam search on a model."""
    with torch.no_grad():
        return beam_search(model, input_ids, mask.bool(), options)


def test_one_beam_is_greedy(tiny_pair, padded_prompts):
    """A beam of one, which `generate` does not offer, finds what greedy decoding finds."""
    _, ours = tiny_pair(60, 0)
    input_ids, mask = padded_prompts(2, 5, 60)
    expected = generate(ours, input_ids, 8, attention_mask=mask)[:, 5:]
    options = options_of(num_beams=1, num_return_sequences=1, max_new_tokens=8)
    assert torch.equal(run(ours, input_ids, mask, options)[0], expected)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7])
def test_scores_are_the_log_probabilities_of_the_sequences(length_penalty, tiny_pair, padded_prompts):
    _, ours = tiny_pair(60, 1)
    input_ids, mask = padded_prompts(2, 5, 60)
    options = options_of(num_beams=4, num_return_sequences=3, length_penalty=length_penalty, max_new_tokens=12)
    tokens, _, scores = run(ours, input_ids, mask, options)
    input_ids, mask = input_ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    whole, mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    sums = score(ours.model, whole, prompt_lengths=mask[:, :5].sum(-1), attention_mask=mask).sums
    torch.testing.assert_close(scores.double() * 12.0**length_penalty, sums, rtol=1e-5, atol=0)


def test_beams_that_are_drawn():
    """Two of the first tokens are drawn without replacement, and the likelier one comes back: chi-square over seeds."""
    from tiny_models import TINY

    from arfast.models import CausalLM

    model, prompt = CausalLM(TINY.replace(vocab_size=12), seed=3), torch.tensor([[7, 3, 9]])
    options = dict(do_sample=True, num_beams=2, max_new_tokens=1, top_k=0, temperature=0.7, eos_token_id=[])
    draws = generate(model, prompt.expand(4000, 3), seed=0, **options)[:, -1]
    assert torch.equal(generate(model, prompt.expand(5, 3), seed=100, **options)[:, -1], draws[100:105])
    p = (model(prompt).logits[0, -1].double() / 0.7).softmax(-1).detach()
    pairs = p[:, None] * p * (1 / (1 - p[:, None]) + 1 / (1 - p))
    expected = (pairs * (p[:, None] > p)).sum(-1)
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0, dtype=torch.float64))
    counts, likely = torch.bincount(draws, minlength=12), expected > 5 / 4000
    assert (
        scipy.stats.chisquare(
            [*counts[likely], counts[~likely].sum()], [*4000 * expected[likely], 4000 * expected[~likely].sum()]
        ).pvalue
        > 1e-4
    )


def test_filters_of_drawn_beams(tiny_pair, padded_prompts):
    """At a low temperature the best continuations are drawn; bans hold at a high one."""
    _, ours = tiny_pair(60, 1)
    input_ids, mask = padded_prompts(3, 5, 60)
    options = dict(attention_mask=mask, do_sample=True, num_beams=3, seed=1, pad_token_id=PAD)
    cold = generate(ours, input_ids, 8, temperature=1e-4, top_k=0, **options)
    assert torch.equal(cold, generate(ours, input_ids, 8, attention_mask=mask, num_beams=3))
    allowed = torch.arange(60) % 2 == 0
    warm = generate(ours, input_ids, 8, temperature=2.0, top_k=0, allowed_tokens=allowed, eos_token_id=[4, 8],
                    min_new_tokens=8, num_return_sequences=3, **options)[:, 5:]  # fmt: skip
    assert warm.shape == (9, 8) and (warm % 2 == 0).all() and not torch.isin(warm, torch.tensor([4, 8])).any()
    assert len({tuple(row) for row in warm.tolist()}) == 9
