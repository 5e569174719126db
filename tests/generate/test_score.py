"""score against transformers' log-probabilities in float64."""

import pytest
import torch
from accuracy import assert_accurate

from arfast.generate import generate, score
from arfast.models import CausalLM, CausalLMConfig


@pytest.fixture(scope="module")
def model():
    return CausalLM(CausalLMConfig.preset("tiny", vocab_size=101, num_hidden_layers=2, initializer_range=0.2), seed=3)


def logprobs_of(logits, input_ids):
    """[B, T]: the log-probability of every token but the first, which has 0."""
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logprobs, (1, 0))


def test_equals_transformers(tiny_pair):
    theirs, ours = tiny_pair(120, 0)
    input_ids = torch.randint(0, 120, (4, 33))
    result = score(ours.model, input_ids)
    with torch.no_grad():
        baseline = logprobs_of(theirs(input_ids).logits, input_ids)
        theirs.double()
        exact = logprobs_of(theirs(input_ids).logits, input_ids)
    assert_accurate(result.token_logprobs, exact, baseline, name="token_logprobs")
    assert (result.token_logprobs.dtype, result.sums.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(result.sums, result.token_logprobs.double().sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.sums, exact.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.perplexity, torch.exp(-exact.sum(-1) / 32), rtol=1e-5, atol=0)
    assert result.num_tokens.tolist() == [32] * 4 and not result.mask[:, 0].any() and result.mask[:, 1:].all()
    assert result.corpus_perplexity == pytest.approx(float(torch.exp(-exact.sum() / 128)), rel=1e-5)


def test_prompts_are_not_scored(model):
    input_ids = torch.randint(0, 101, (5, 10))
    whole = score(model, input_ids)
    result = score(model, input_ids, prompt_lengths=torch.tensor([0, 1, 4, 9, 10]))
    for row, first in enumerate([1, 1, 4, 9, 10]):
        assert result.mask[row].tolist() == [t >= first for t in range(10)]
        assert torch.equal(result.token_logprobs[row, first:], whole.token_logprobs[row, first:])
        assert (result.token_logprobs[row, :first] == 0).all()
    assert result.num_tokens.tolist() == [9, 9, 6, 1, 0]
    assert result.sums[4] == 0 and result.perplexity.isnan().tolist() == [False] * 4 + [True]
    expected = torch.exp(-result.sums.sum() / 25)
    assert result.corpus_perplexity == pytest.approx(float(expected))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, model):
    lengths = [9, 4, 1, 7]
    rows = [torch.randint(0, 101, (n,)) for n in lengths]
    pad = lambda values, fill: torch.stack(
        [torch.nn.functional.pad(v, (9 - len(v), 0) if side == "left" else (0, 9 - len(v)), value=fill) for v in values]
    )
    mask = pad([torch.ones_like(row) for row in rows], 0)
    result = score(model, pad(rows, 55), prompt_lengths=[0, 2, 1, 3], attention_mask=mask)
    for row, (tokens, prompt) in enumerate(zip(rows, [0, 2, 1, 3], strict=True)):
        alone = score(model, tokens[None], prompt_lengths=[prompt])
        real = mask[row].bool()
        torch.testing.assert_close(result.token_logprobs[row][real], alone.token_logprobs[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(result.mask[row][real], alone.mask[0])
        assert (result.token_logprobs[row][~real] == 0).all() and not result.mask[row][~real].any()
        assert result.num_tokens[row] == alone.num_tokens[0]
        torch.testing.assert_close(result.sums[row], alone.sums[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_n_best_of_several_lengths(length_penalty, tiny_pair):
    """The scores of beam search, where hypotheses end at different steps."""
    _, ours = tiny_pair(23, 4, 0.15)
    prompts, beams, ends = torch.randint(8, 23, (3, 5)), 6, torch.tensor([5, 6, 7])
    counts = dict(num_beams=beams, num_return_sequences=beams, max_new_tokens=9)
    special = dict(eos_token_id=ends.tolist(), pad_token_id=1, length_penalty=length_penalty)
    out = generate(ours, prompts, **counts, **special, return_dict_in_generate=True)
    tokens, scores = out.sequences[:, 5:], out.sequences_scores
    ended = torch.isin(tokens, ends).cumsum(-1)
    mask = (ended == 0) | ((ended == 1) & torch.isin(tokens, ends))
    lengths = mask.sum(-1)
    assert len(lengths.unique()) > 2
    mask = torch.cat([torch.ones(3 * beams, 5), mask], 1)
    sums = score(ours.model, out.sequences, [5] * 3 * beams, attention_mask=mask).sums
    torch.testing.assert_close(scores.double() * lengths**length_penalty, sums, rtol=1e-5, atol=0)


def test_logits_are_never_held_whole(model, monkeypatch):
    input_ids = torch.randint(0, 101, (2, 60))
    expected = score(model, input_ids).sums
    monkeypatch.setattr(type(model), "_logits", None)
    assert torch.equal(score(model, input_ids).sums, expected)


def test_a_single_token_has_no_score(model):
    result = score(model, torch.tensor([[3], [4]]))
    assert result.num_tokens.tolist() == [0, 0] and result.sums.tolist() == [0, 0]


def test_method_of_the_model(model):
    input_ids = torch.randint(0, 101, (2, 6))
    expected = score(model, input_ids, torch.tensor([2, 3]))
    assert torch.equal(model.score(input_ids, torch.tensor([2, 3])).token_logprobs, expected.token_logprobs)


def test_bfloat16(model):
    half = CausalLM(model.config, seed=3, dtype=torch.bfloat16)
    result = score(half, torch.randint(0, 101, (2, 6)))
    assert result.token_logprobs.dtype == torch.float32 and (result.sums < 0).all()


def test_logits_that_are_nan_are_an_error(model):
    """One row of the head is enough, also if nobody asks for that token."""
    broken = CausalLM(model.config, seed=3)
    broken.head_weight.data[100, 0] = torch.nan
    with pytest.raises(ValueError, match=r"score: logits must not be NaN, got NaN in sequences \[0, 1\]"):
        score(broken, torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_padding_does_not_count_for_the_context(model):
    short = CausalLM(model.config.replace(max_position_embeddings=4), seed=3)
    input_ids, mask = torch.randint(0, 101, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert score(short, input_ids, attention_mask=mask).num_tokens.tolist() == [3, 2]
    message = "input_ids must have at most max_position_embeddings=4 tokens, got 5"
    with pytest.raises(ValueError, match="score: " + message):
        score(short, input_ids[:, :5])


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(input_ids=[[1]]), r"input_ids must be an int64 tensor \[B, T\], got list"),
        (dict(input_ids=IDS.float()), r"input_ids must be an int64 tensor \[B, T\], got torch.float32 \[2, 3\]"),
        (dict(input_ids=IDS + 97), r"input_ids must be in \[0, vocab_size=101\), got 101"),
        (dict(input_ids=IDS - 2), r"input_ids must be in \[0, vocab_size=101\), got -1"),
        (dict(prompt_lengths=[1]), r"prompt_lengths must be one integer per sequence, \[2\], got torch.int64 \[1\]"),
        (
            dict(prompt_lengths=[1.0, 2.0]),
            r"prompt_lengths must be one integer per sequence, \[2\], got torch.float32 \[2\]",
        ),
        (dict(prompt_lengths=[1, 4]), r"prompt_lengths must be in \[0, number of tokens\], \[3, 3\], got \[1, 4\]"),
        (dict(prompt_lengths=[-1, 2]), r"prompt_lengths must be in \[0, number of tokens\], \[3, 3\], got \[-1, 2\]"),
        (
            dict(attention_mask=torch.ones(2, 2)),
            r"attention_mask must have the shape of input_ids, \[2, 3\], got \[2, 2\]",
        ),
    ],
)
def test_errors(change, message, model):
    with pytest.raises(ValueError, match="score: " + message):
        score(model, **(dict(input_ids=IDS) | change))
