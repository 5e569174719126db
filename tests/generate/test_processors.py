"""Penalties, constraints and filters against transformers' processors, alone and within `generate`."""

import warnings

import pytest
import torch
from transformers import generation

from arfast.generate import generate
from arfast.generate.processors import (
    MinNewTokens,
    RepetitionPenalty,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)

PAD = 1


def random_scores(rows, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab_size, generator=generator) * 3
    return torch.where(torch.rand(rows, vocab_size, generator=generator) < 0.1, -torch.inf, scores)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_repetition_penalty(penalty):
    ids, scores = torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(0)), random_scores(6, 50, 1)
    expected = generation.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    assert torch.equal(RepetitionPenalty(penalty, torch.zeros(3, dtype=torch.int64))(ids, scores.clone()), expected)


def test_padding_is_not_penalised():
    """Two rows of each of two prompts, which have 3 tokens of padding and none."""
    ids, scores = torch.randint(2, 50, (4, 8), generator=torch.Generator().manual_seed(0)), random_scores(4, 50, 1)
    ids[:2, :3] = PAD
    actual = RepetitionPenalty(1.5, torch.tensor([3, 0]))(ids, scores.clone())
    alone = RepetitionPenalty(1.5, torch.tensor([0]))(ids[:2, 3:], scores[:2].clone())
    assert torch.equal(actual[:2], alone) and torch.equal(actual[:2, PAD], scores[:2, PAD])


def test_min_new_tokens():
    ids, processor = torch.zeros(2, 7, dtype=torch.int64), MinNewTokens(3, (4, 9), prompt_length=5)
    theirs = generation.MinNewTokensLengthLogitsProcessor(5, 3, [4, 9])
    for length in (5, 6, 7, 8):
        ids, scores = torch.zeros(2, length, dtype=torch.int64), random_scores(2, 12, length)
        assert torch.equal(processor(ids, scores.clone()), theirs(ids, scores))


@pytest.mark.parametrize("fewest", [1, 3])
def test_filters_keep_what_transformers_keeps(fewest):
    """4,000 rows; where probabilities tie at a cut, transformers' choice hangs on its sort."""
    scores = random_scores(4000, 37, 2)
    for ours, theirs in (
        (keep_top_k(scores.clone(), max(5, fewest)), generation.TopKLogitsWarper(5, min_tokens_to_keep=fewest)),
        (keep_top_p(scores.clone(), 0.8, fewest), generation.TopPLogitsWarper(0.8, min_tokens_to_keep=fewest)),
        (keep_min_p(scores.clone(), 0.1, fewest), generation.MinPLogitsWarper(0.1, min_tokens_to_keep=fewest)),
    ):
        assert torch.equal(ours, theirs(None, scores)), theirs


@pytest.fixture
def pair(tiny_pair):
    bias = torch.zeros(60)
    bias[PAD] = -100
    return tiny_pair(60, 5, 0.8, bias)


def odd_or_even(prompt, tokens):
    """For the first prompt odd tokens after even ones and the other way round, for others no multiples of 3."""
    if prompt == 0:
        return [token for token in range(2, 60) if (token + int(tokens[-1])) % 2]
    return [token for token in range(2, 60) if token % 3]


OPTIONS = [dict(num_beams=1), dict(num_beams=4), dict(num_beams=4, num_return_sequences=3, early_stopping=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["function", "mask", "processor"])
def test_constraints_equal_transformers(way, options, pair, padded_prompts):
    theirs, ours = pair
    input_ids, mask = padded_prompts(3, 6, 60)
    allowed = torch.arange(60) % 3 != 0
    own = {"function": dict(prefix_allowed_tokens_fn=odd_or_even), "mask": dict(allowed_tokens=allowed)}
    same = {
        "function": own["function"],
        "mask": dict(prefix_allowed_tokens_fn=lambda prompt, tokens: allowed.nonzero().flatten().tolist()),
    }
    processor = dict(logits_processor=[generation.NoRepeatNGramLogitsProcessor(2)])
    options = options | dict(max_new_tokens=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(
            input_ids, attention_mask=mask, do_sample=False, pad_token_id=PAD, eos_token_id=7,
            **options, **same.get(way, processor),
        )  # fmt: skip
    actual = generate(
        ours, input_ids, attention_mask=mask, pad_token_id=PAD, eos_token_id=7, **options, **own.get(way, processor)
    )
    assert torch.equal(actual, expected)


def test_constraints_of_samples(pair, padded_prompts):
    """Every sample of a prompt obeys the rule of that prompt."""
    _, ours = pair
    input_ids, mask = padded_prompts(2, 6, 60)
    out = generate(
        ours, input_ids, 8, attention_mask=mask, do_sample=True, seed=1, num_return_sequences=5, top_k=0,
        prefix_allowed_tokens_fn=odd_or_even, min_new_tokens=8, eos_token_id=4, pad_token_id=PAD,
    )  # fmt: skip
    assert out.shape == (10, 14) and not (out[:, 6:] == 4).any()
    assert ((out[:5, 6:] + out[:5, 5:-1]) % 2 == 1).all()
    assert (out[5:, 6:] % 3 != 0).all() and len({tuple(row) for row in out.tolist()}) == 10


def test_penalty_of_samples_is_that_of_transformers(pair):
    """The one token that is left after top_k=1 is the best after the penalty."""
    theirs, ours = pair
    prompt = torch.tensor([[5, 9, 33, 12]])
    expected = theirs.generate(prompt, max_new_tokens=15, do_sample=False, repetition_penalty=1.4, pad_token_id=PAD)
    options = dict(do_sample=True, top_k=1, repetition_penalty=1.4, seed=0)
    assert torch.equal(generate(ours, prompt, 15, **options), expected)
    assert not torch.equal(generate(ours, prompt, 15), expected)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(repetition_penalty=0), "repetition_penalty must be a positive number, got 0"),
        (dict(min_new_tokens=-1), r"min_new_tokens must be an integer in \[0, max_new_tokens=4\], got -1"),
        (dict(min_new_tokens=5), r"min_new_tokens must be an integer in \[0, max_new_tokens=4\], got 5"),
        (dict(allowed_tokens=[1, 2]), r"allowed_tokens must be a bool tensor \[vocab_size=60\], got list"),
        (
            dict(allowed_tokens=torch.ones(59, dtype=torch.bool)),
            r"allowed_tokens must be a bool tensor \[vocab_size=60\], got torch.bool \[59\]",
        ),
        (
            dict(allowed_tokens=torch.zeros(60, dtype=torch.bool)),
            "allowed_tokens must allow at least one token, got none",
        ),
        (dict(prefix_allowed_tokens_fn=3), "prefix_allowed_tokens_fn must be a function, got 3"),
        (dict(logits_processor=[3]), r"logits_processor must be a list of functions, got \[3\]"),
        (dict(logits_processor=len), "logits_processor must be a list of functions, got <built-in function len>"),
        (
            dict(prefix_allowed_tokens_fn=lambda prompt, tokens: []),
            "prefix_allowed_tokens_fn must allow at least one token, got none for prompt 0",
        ),
        (
            dict(prefix_allowed_tokens_fn=lambda prompt, tokens: [60]),
            r"prefix_allowed_tokens_fn must give tokens in \[0, vocab_size=60\), got \[60\]",
        ),
        (dict(num_beams=4, num_beam_groups=3), "num_beam_groups must divide num_beams=4, got 3"),
        (
            dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1.0),
            "diversity_penalty must be a number >= 0, got -1.0",
        ),
        (
            dict(num_beams=4, num_beam_groups=2, do_sample=True),
            "do_sample must be False with num_beam_groups > 1, got True",
        ),
    ],
)
def test_errors(change, message, pair):
    with pytest.raises(ValueError, match="generate: " + message):
        generate(pair[1], torch.tensor([[2, 3]]), **dict(max_new_tokens=4) | change)


def test_a_penalty_for_groups_needs_groups(pair):
    with pytest.warns(UserWarning, match="generate: diversity_penalty has no effect without num_beam_groups > 1"):
        generate(pair[1], torch.tensor([[2, 3]]), 2, num_beams=2, diversity_penalty=1.0)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_counts_as_said_in_no_row(num_beams, tiny_pair, padded_prompts):
    """The model likes the padding token best, and must get to say it once."""
    _, ours = tiny_pair(60, 5, 0.8, torch.eye(60)[PAD] * 5)
    input_ids, mask = padded_prompts(2, 6, 60)
    options = dict(max_new_tokens=6, num_beams=num_beams, repetition_penalty=3.0, pad_token_id=PAD, eos_token_id=[])
    together = generate(ours, input_ids, attention_mask=mask, **options)[:, 6:]
    for row in range(2):
        prompt = input_ids[row : row + 1, mask[row].bool()]
        assert torch.equal(generate(ours, prompt, **options)[0, prompt.shape[1] :], together[row])
    assert (together == PAD).any()


NOTHING_LEFT = [(1, "logits must be finite, got others for sequences"), (3, "constraints must leave a token to every")]


@pytest.mark.parametrize(("num_beams", "message"), NOTHING_LEFT)
def test_constraints_that_leave_nothing(num_beams, message, pair):
    only_ends = torch.arange(60) == 7
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(pair[1], torch.tensor([[2, 3]]), 3, num_beams=num_beams, allowed_tokens=only_ends, min_new_tokens=2,
                 eos_token_id=7)  # fmt: skip


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(do_sample=True, seed=2)], ids=str)
def test_a_function_is_not_asked_about_what_has_ended(options, pair, padded_prompts):
    """A tree of answers of different lengths: nothing follows their ends."""
    _, ours = pair
    input_ids, mask = padded_prompts(4, 6, 60)
    answers = [[10, 7], [20, 21, 7], [30, 31, 32, 33, 7]]

    def allowed(prompt, tokens):
        said = tokens[6:].tolist()
        return sorted({answer[len(said)] for answer in answers if answer[: len(said)] == said and answer != said})

    out = generate(ours, input_ids, 8, attention_mask=mask, prefix_allowed_tokens_fn=allowed, eos_token_id=7,
                   pad_token_id=PAD, **options)  # fmt: skip
    for row in out[:, 6:].tolist():
        assert [token for token in row if token != PAD] in answers


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_processor_sees_what_is_banned(num_beams, pair):
    allowed = torch.arange(60) % 2 == 0
    seen = []

    def look(input_ids, scores):
        seen.append(scores.clone())
        return scores

    options = dict(allowed_tokens=allowed, min_new_tokens=2, eos_token_id=4, logits_processor=[look])
    generate(pair[1], torch.tensor([[2, 3]]), 4, num_beams=num_beams, **options)
    assert all((scores[:, ~allowed] == -torch.inf).all() for scores in seen)
    assert (seen[1][:, 4] == -torch.inf).all() and (seen[2][:, 4] > -torch.inf).any()
    generate(pair[1], torch.tensor([[2, 3]]), 4, logits_processor=None)


def test_a_beam_that_may_not_go_on(pair):
    """The others do; nothing follows the banned one."""

    def ban(input_ids, scores):
        scores[(input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > 2)] = -torch.inf
        return scores

    out = generate(pair[1], torch.tensor([[2, 3]]), 5, num_beams=4, num_return_sequences=4, logits_processor=[ban])
    new, free = out[:, 2:], generate(pair[1], torch.tensor([[2, 3]]), 5, num_beams=4, num_return_sequences=4)[:, 2:-1]
    assert new.shape == (4, 5) and (new[:, :-1] % 3 > 0).all() and (free % 3 == 0).any()
