"""Greedy decoding and sampling through the model: equality with transformers, batches, ends, streaming, errors."""

import re
import warnings
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from streams import Recorder

from arfast.generate import generate, score
from arfast.models import CausalLM, CausalLMConfig

PAD = 1


def theirs_generate(model, input_ids, mask, **options):
    """transformers' result; no end tokens unless given."""
    model.generation_config.eos_token_id = options.get("eos_token_id")
    model.generation_config.pad_token_id = PAD
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids, attention_mask=mask, pad_token_id=PAD, **options)


@pytest.fixture(scope="module")
def model():
    return CausalLM(CausalLMConfig.preset("tiny", vocab_size=101, num_hidden_layers=2, initializer_range=0.15), seed=3)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("eos", [None, 5, [5, 9, 17]])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers(seed, eos, batch, tiny_pair, padded_prompts):
    bias = torch.zeros(60)
    bias[eos or []] = 1.0
    theirs, ours = tiny_pair(60, seed, bias=bias)
    input_ids, mask = padded_prompts(batch, 6, 60)
    expected = theirs_generate(theirs, input_ids, mask, max_new_tokens=15, do_sample=False, eos_token_id=eos)
    actual = generate(ours, input_ids, 15, attention_mask=mask, eos_token_id=eos, pad_token_id=PAD)
    assert torch.equal(actual, expected)
    assert ours.calls == expected.shape[1] - 6  # nothing runs after the last sequence has ended


def test_the_cases_above_end_early_and_at_different_lengths(tiny_pair, padded_prompts):
    bias = torch.zeros(60)
    bias[[5, 9, 17]] = 1.0
    _, ours = tiny_pair(60, 0, bias=bias)
    input_ids, mask = padded_prompts(4, 6, 60)
    new = generate(ours, input_ids, 15, attention_mask=mask, eos_token_id=[5, 9, 17], pad_token_id=PAD)[:, 6:]
    ended = torch.isin(new, torch.tensor([5, 9, 17])).any(-1)
    lengths = (new != PAD).sum(-1)
    assert ended.any() and len(set(lengths.tolist())) > 1


def test_padding_is_found_from_its_token(model, padded_prompts):
    input_ids, mask = padded_prompts(4, 6, 101)
    input_ids[0, 2] = PAD  # in the middle it is a token
    expected = generate(model, input_ids, 5, attention_mask=mask)
    assert torch.equal(generate(model, input_ids, 5, pad_token_id=PAD), expected)
    everything = generate(model, input_ids, 5, attention_mask=torch.ones_like(mask))
    assert torch.equal(generate(model, input_ids, 5), everything)
    assert not torch.equal(everything, expected)
    as_end = generate(model, input_ids, 1, pad_token_id=PAD, eos_token_id=PAD)
    assert torch.equal(as_end, everything[:, :7]) and not torch.equal(as_end, expected[:, :7])
    hole = torch.ones_like(mask)
    hole[0, 2] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        generate(model, input_ids, 5, attention_mask=hole)


def test_special_tokens_come_from_the_configuration(model, padded_prompts):
    input_ids, mask = padded_prompts(4, 6, 101)
    free = generate(model, input_ids, 8, attention_mask=mask)
    end = int(free[0, 8])
    named = CausalLM(model.config.replace(eos_token_id=(end, 100), pad_token_id=PAD), seed=3)
    expected = generate(model, input_ids, 8, attention_mask=mask, eos_token_id=[end, 100], pad_token_id=PAD)
    assert not torch.equal(expected, free[:, : expected.shape[1]])
    assert torch.equal(generate(named, input_ids, 8), expected)
    assert torch.equal(generate(named, input_ids, 8, eos_token_id=[]), free)
    first = generate(model, input_ids, 8, attention_mask=mask, eos_token_id=end)[0, 6:]
    after = (first == end).cumsum(0) - (first == end).long() > 0
    assert after.any() and (first[after] == end).all()  # without a padding token the end token fills


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(do_sample=True, seed=[5, 6, 7, 8], top_p=0.9)])
def test_a_prompt_gets_the_same_tokens_alone_and_in_a_batch(options, model, padded_prompts):
    input_ids, mask = padded_prompts(4, 9, 101)
    options = options | dict(eos_token_id=[], pad_token_id=PAD)
    together = generate(model, input_ids, 12, attention_mask=mask, **options)[:, 9:]
    for row in range(4):
        alone = options | ({"seed": options["seed"][row : row + 1]} if "seed" in options else {})
        prompt = input_ids[row : row + 1, mask[row].bool()]
        assert torch.equal(generate(model, prompt, 12, **alone)[0, prompt.shape[1] :], together[row])


def test_seeds(model, padded_prompts):
    input_ids, mask = padded_prompts(3, 5, 101)
    options = dict(max_new_tokens=10, attention_mask=mask, do_sample=True, top_k=0)
    first = generate(model, input_ids, seed=11, **options)
    assert torch.equal(generate(model, input_ids, seed=11, **options), first)
    assert torch.equal(generate(model, input_ids, seed=[11, 12, 13], **options), first)
    assert not torch.equal(generate(model, input_ids, seed=12, **options), first)
    torch.manual_seed(5)
    unseeded = [generate(model, input_ids, **options) for _ in range(2)]
    assert not torch.equal(*unseeded)
    torch.manual_seed(5)
    assert torch.equal(generate(model, input_ids, **options), unseeded[0])


def test_return_sequences_are_different_samples(model, padded_prompts):
    input_ids, mask = padded_prompts(2, 5, 101)
    options = dict(max_new_tokens=10, attention_mask=mask, do_sample=True, top_k=0, seed=4)
    several = generate(model, input_ids, num_return_sequences=3, **options)
    assert torch.equal(several[:, :5], input_ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in several.tolist()}) == 6
    assert torch.equal(several[::3], generate(model, input_ids, **options))


@pytest.mark.parametrize(
    "filters", [dict(top_k=0), dict(top_k=12, temperature=1.4), dict(top_k=0, top_p=0.7, min_p=0.02)]
)
def test_samples_follow_the_distribution(filters, model):
    """Chi-square of 4,000 draws through `generate` against the distribution that the definition gives."""
    prompt = torch.tensor([[7, 3, 19]])
    draws = generate(model, prompt, 1, do_sample=True, num_return_sequences=4000, seed=0, **filters)[:, -1]
    with torch.no_grad():
        logits = model(prompt).logits[0, -1].double() / filters.get("temperature", 1.0)
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    if filters["top_k"]:
        probabilities[filters["top_k"] :] = 0
    if "top_p" in filters:
        probabilities[probabilities.cumsum(0) - probabilities >= filters["top_p"]] = 0
        probabilities[probabilities < filters["min_p"] * probabilities[0]] = 0
    probabilities /= probabilities.sum()
    counts = torch.bincount(draws, minlength=101)[order]
    kept = probabilities > 0
    assert 0 < kept.sum() < 101 or filters == dict(top_k=0)
    assert counts[~kept].sum() == 0
    assert scipy.stats.chisquare(counts[kept], 4000 * probabilities[kept]).pvalue > 1e-4


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, seed=1), dict(do_sample=True, num_return_sequences=2)])
def test_streaming(options, model, padded_prompts):
    input_ids, mask = padded_prompts(3, 5, 101)
    streamer = Recorder()
    out = generate(model, input_ids, 6, attention_mask=mask, streamer=streamer, **options)
    assert torch.equal(torch.cat([streamer.values[0], torch.stack(streamer.values[1:], 1)], 1), out)
    assert streamer.ended == 1


def test_streamer_of_transformers(model):
    from transformers import TextIteratorStreamer

    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(f"<{i}>" for i in ids))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = generate(model, torch.tensor([[1, 2, 3]]), 6, streamer=streamer)
    assert [int(x) for x in re.findall(r"\d+", "".join(streamer))] == out[0, 3:].tolist()


def test_a_failure_ends_the_stream(model):
    streamer = Recorder()
    with pytest.raises(IndexError, match="CausalLM: input_ids must be in"):
        generate(model, torch.tensor([[1, 101]]), 3, streamer=streamer)
    assert streamer.ended == 1


@pytest.mark.parametrize("options", [{}, dict(do_sample=True), dict(num_beams=2)])
def test_logits_that_are_not_finite(options):
    model = CausalLM(CausalLMConfig.preset("tiny", vocab_size=50, num_hidden_layers=1))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="generate: logits must be finite, got"):
        generate(model, torch.tensor([[1, 2]]), 3, **options)


def test_bfloat16_and_autocast(model, padded_prompts):
    """The cache has the dtype of the activations."""
    input_ids, mask = padded_prompts(2, 5, 101)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, input_ids, 4, attention_mask=mask).shape == (2, 9)
    half = CausalLM(model.config, seed=3, dtype=torch.bfloat16)
    assert generate(half, input_ids, 4, attention_mask=mask, num_beams=2).shape == (2, 9)


def test_method_of_the_model(model):
    prompt = torch.tensor([[4, 8, 15]])
    assert torch.equal(model.generate(prompt, max_new_tokens=4), generate(model, prompt, 4))


def test_sampling_options_without_sampling_warn(model):
    with pytest.warns(UserWarning, match="generate: temperature, top_p have no effect without do_sample=True"):
        generate(model, torch.tensor([[1]]), 1, temperature=0.5, top_p=0.5)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(input_ids=[[1, 2]]), r"input_ids must be an int64 tensor \[B, P\], got list"),
        (dict(input_ids=IDS.int()), r"input_ids must be an int64 tensor \[B, P\], got torch.int32 \[2, 3\]"),
        (dict(input_ids=IDS[0]), r"input_ids must be an int64 tensor \[B, P\], got torch.int64 \[3\]"),
        (dict(input_ids=IDS[:, :0]), r"input_ids must hold at least one token per prompt, got \[2, 0\]"),
        (dict(input_ids=IDS[:0]), r"input_ids must hold at least one token per prompt, got \[0, 3\]"),
        (
            dict(input_ids=torch.full((1, 3), PAD), pad_token_id=PAD),
            "input_ids must hold at least one token per prompt, got only padding",
        ),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer, got 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be a positive integer, got 2.0"),
        (dict(num_beams=129), "num_beams must be at most 128, got 129"),
        (
            dict(num_beams=2, eos_token_id=list(range(9))),
            "eos_token_id must be at most 8 tokens with num_beams > 1, got 9",
        ),
        (dict(do_sample=True, temperature=1e39), "temperature must be a positive float32, got 1e\\+39"),
        (dict(num_beams=0), "num_beams must be a positive integer, got 0"),
        (dict(num_return_sequences=0), "num_return_sequences must be a positive integer, got 0"),
        (dict(num_return_sequences=2), "num_return_sequences must be 1 in greedy decoding, got 2"),
        (dict(num_return_sequences=3, num_beams=2), "num_return_sequences must be at most num_beams=2, got 3"),
        (dict(do_sample=1), "do_sample must be a bool, got 1"),
        (dict(do_sample=True, temperature=0.0), "temperature must be a positive float32, got 0.0"),
        (dict(do_sample=True, temperature=float("nan")), "temperature must be a positive float32, got nan"),
        (dict(do_sample=True, top_k=-1), "top_k must be an integer >= 0, got -1"),
        (dict(do_sample=True, top_k=None), "top_k must be an integer >= 0, got None"),
        (dict(do_sample=True, top_p=1.5), r"top_p must be in \[0, 1\], got 1.5"),
        (dict(do_sample=True, min_p=-0.1), r"min_p must be in \[0, 1\], got -0.1"),
        (dict(num_beams=2, length_penalty=float("inf")), "length_penalty must be a finite number, got inf"),
        (dict(num_beams=2, early_stopping="always"), "early_stopping must be True, False or \"never\", got 'always'"),
        (dict(eos_token_id=101), r"eos_token_id must be in \[0, vocab_size=101\), got \[101\]"),
        (dict(eos_token_id=[3, -1]), r"eos_token_id must be in \[0, vocab_size=101\), got \[3, -1\]"),
        (dict(pad_token_id=-1), r"pad_token_id must be in \[0, vocab_size=101\), got \[-1\]"),
        (
            dict(attention_mask=torch.ones(2, 4)),
            r"attention_mask must have the shape of input_ids, \[2, 3\], got torch.float32 \[2, 4\]",
        ),
        (
            dict(attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
            r"attention_mask must end with a token in every row, got \[1, 0\]",
        ),
        (
            dict(attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
            r"attention_mask must have its zeros on the left, got a zero after a one in rows \[1\]",
        ),
        (dict(seed=[1]), r"seed must be an integer or one per prompt \(2\), got \[1\]"),
        (dict(seed=1.5), r"seed must be an integer or one per prompt \(2\), got 1.5"),
        (dict(num_beams=2, streamer=Recorder()), "streamer must be None with num_beams > 1, got Recorder"),
    ],
)
def test_errors(change, message, model):
    with pytest.raises(ValueError, match="generate: " + message):
        generate(model, **(dict(input_ids=IDS, max_new_tokens=2) | change))


def test_the_context(model):
    short = CausalLM(model.config.replace(max_position_embeddings=4), seed=3)
    with pytest.raises(ValueError, match="generate: input_ids must fit the context, max_position_embeddings=4, got a"):
        generate(short, torch.arange(5)[None], 1)
    with pytest.warns(UserWarning, match="past the context are a guess: max_position_embeddings=4, got prompts of 3"):
        assert generate(short, torch.arange(3)[None], 2).shape == (1, 5)


OUTPUTS = [{}, dict(do_sample=True, top_k=5, temperature=0.7, seed=3, num_return_sequences=2), dict(num_beams=3)]
OUTPUTS.append(dict(num_beams=4, num_beam_groups=2, num_return_sequences=3, length_penalty=0.5))
OUTPUTS.append(dict(prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("options", OUTPUTS, ids=str)
def test_log_probabilities_of_new_tokens(options, model, padded_prompts):
    """They are those that `score` gives the sequences, 0 after their end, and sum up to the scores."""
    input_ids, mask = padded_prompts(3, 5, 101)
    options = options | dict(max_new_tokens=9, attention_mask=mask, pad_token_id=PAD)
    ends = generate(model, input_ids, **options)[:2, 9].tolist()
    options["eos_token_id"] = ends
    out = generate(model, input_ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, generate(model, input_ids, **options))
    new = out.sequences[:, 5:]
    ended = torch.isin(new, torch.tensor(ends)).cumsum(1) - torch.isin(new, torch.tensor(ends)).long() > 0
    real = torch.cat([mask.repeat_interleave(len(new) // 3, 0), (~ended).long()], 1)
    lengths = mask.sum(-1).repeat_interleave(len(new) // 3)
    scores = score(model, out.sequences, prompt_lengths=lengths, attention_mask=real)
    torch.testing.assert_close(out.token_logprobs, scores.token_logprobs[:, 5:], rtol=1e-4, atol=1e-5)
    assert ended.any() and not out.token_logprobs[ended].any()
    power = scores.num_tokens ** options.get("length_penalty", 1.0) if "num_beams" in options else 1
    torch.testing.assert_close(out.sequences_scores.double() * power, scores.sums, rtol=1e-4, atol=1e-5)
