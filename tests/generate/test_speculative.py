"""Speculative decoding: greedy results equal those without drafts, samples have the same distribution, whatever the
drafts are; the bookkeeping of caches, ends and statistics."""

import itertools
from unittest import mock

import pytest
import scipy.stats
import torch
from host_waits import pretended_gpu
from recorded_graphs import recorded_graphs
from streams import Recorder

from arfast.generate import DraftStatistics, generate
from arfast.generate.draft_length import Clock, DraftLength, expected_speedup
from arfast.generate.drafts import LookupDrafts
from arfast.models import CausalLM, CausalLMConfig
from arfast.nn import BranchedKVCache

PAD = 1


def make(seed, layers=2, vocab_size=101, **options):
    config = CausalLMConfig.preset(
        "tiny", vocab_size=vocab_size, num_hidden_layers=layers, initializer_range=0.15, **options
    )
    return CausalLM(config, seed=seed)


@pytest.fixture(scope="module")
def model():
    return make(3)


def noisy(model, noise):
    """A draft whose tokens are accepted now and then."""
    draft = CausalLM(model.config)
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


@pytest.fixture(scope="module")
def drafts(model):
    """Options of generate by name."""
    return {
        "stranger": dict(draft_model=make(5, layers=1), num_draft_tokens=3),
        "noisy": dict(draft_model=noisy(model, 0.03), num_draft_tokens=4),
        "itself": dict(draft_model=model, num_draft_tokens=5),
        "one token": dict(draft_model=noisy(model, 0.02), num_draft_tokens=1),
        "automatic": dict(draft_model=noisy(model, 0.03)),
        "lookup": dict(prompt_lookup_num_tokens=4),
        "long lookup": dict(prompt_lookup_num_tokens=7, max_matching_ngram_size=3),
    }


NAMES = ["stranger", "noisy", "itself", "one token", "automatic", "lookup", "long lookup"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("eos", [[], [5], [5, 9, 17, 30, 41, 77]])
def test_greedy_is_as_without_drafts(eos, batch, name, model, drafts, padded_prompts):
    for length, max_new_tokens in itertools.product((6, 9), (1, 2, 24)):
        input_ids, mask = padded_prompts(batch, length, 101)
        input_ids[0, -4:-2] = input_ids[0, -2:]  # something to look up
        options = dict(attention_mask=mask, eos_token_id=eos, pad_token_id=PAD)
        expected = generate(model, input_ids, max_new_tokens, **options)
        assert torch.equal(generate(model, input_ids, max_new_tokens, **options, **drafts[name]), expected)


def test_the_cases_above_accept_all_some_and_none(model, drafts, padded_prompts):
    input_ids, mask = padded_prompts(4, 6, 101)
    acceptance = {}
    for name in ("stranger", "noisy", "itself"):
        statistics = DraftStatistics()
        generate(model, input_ids, 24, attention_mask=mask, draft_statistics=statistics, **drafts[name])
        acceptance[name] = statistics.acceptance
    assert acceptance["stranger"] < 0.2 < acceptance["noisy"] < 0.9 < acceptance["itself"] == 1


def test_statistics(model, drafts):
    statistics = DraftStatistics()
    for _ in range(2):
        generate(model, torch.tensor([[7, 3]]), 19, draft_statistics=statistics, **drafts["itself"])
    # The prompt gives one token, then three rounds give six each.
    assert statistics == DraftStatistics(rounds=6, drafted=30, accepted=30, new_tokens=38)
    assert statistics.acceptance == 1 and DraftStatistics().acceptance == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "automatic"])
def test_a_prompt_gets_the_same_tokens_alone_and_in_a_batch(name, model, drafts, padded_prompts):
    """Also with more drafts than its last tokens need, and beside rows that end earlier."""
    input_ids, mask = padded_prompts(4, 9, 101)
    options = dict(eos_token_id=[5, 9, 17], pad_token_id=PAD, do_sample=True, top_p=0.9) | drafts[name]
    together = generate(model, input_ids, 13, attention_mask=mask, seed=[5, 6, 7, 8], **options)[:, 9:]
    for row in range(4):
        prompt = input_ids[row : row + 1, mask[row].bool()]
        alone = generate(model, prompt, 13, seed=[5 + row], **options)[0, prompt.shape[1] :]
        assert torch.equal(alone, together[row, : len(alone)])
        assert (together[row, len(alone) :] == PAD).all()


@pytest.mark.parametrize("name", ["noisy", "automatic", "lookup"])
@pytest.mark.parametrize(
    "filters", [dict(top_k=0), dict(top_k=9, temperature=1.4), dict(top_k=0, top_p=0.7, min_p=0.05)], ids=str
)
def test_samples_follow_the_distribution(filters, name, model, drafts):
    """Chi-square of the first two, of the fourth and of the sixth token against as many draws without drafts."""
    prompt, draws = torch.tensor([[7, 3, 19, 7, 3]]), 2500
    options = dict(do_sample=True, num_return_sequences=draws, **filters)
    expected = generate(model, prompt, 6, seed=0, **options)[:, 5:]
    statistics = DraftStatistics()
    actual = generate(model, prompt, 6, seed=1, draft_statistics=statistics, **options, **drafts[name])[:, 5:]
    assert 0 <= statistics.accepted < statistics.drafted and (statistics.accepted > 0 or name == "lookup")
    for classes in (lambda t: t[:, 0] % 11 * 11 + t[:, 1] % 11, lambda t: t[:, 3], lambda t: t[:, 5]):
        counts = torch.stack([torch.bincount(classes(tokens), minlength=121) for tokens in (expected, actual)])
        likely = counts.sum(0) >= 20
        table = torch.cat([counts[:, likely], counts[:, ~likely].sum(1, keepdim=True)], 1)
        assert scipy.stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-4


def test_seeds(model, drafts, padded_prompts):
    input_ids, mask = padded_prompts(3, 5, 101)
    options = dict(max_new_tokens=10, attention_mask=mask, do_sample=True, top_k=0, **drafts["noisy"])
    first = generate(model, input_ids, seed=11, **options)
    assert torch.equal(generate(model, input_ids, seed=[11, 12, 13], **options), first)
    assert not torch.equal(generate(model, input_ids, seed=12, **options), first)
    several = generate(model, input_ids, seed=11, num_return_sequences=3, **options)
    assert torch.equal(several[::3], first) and len({tuple(row) for row in several.tolist()}) == 9


def test_drafts_and_verification_have_numbers_of_their_own(model):
    """With the same numbers, a draft that is its model's equal would be followed by the token that a round without
    drafts draws."""
    prompt = torch.tensor([[7, 3, 19]] * 50)
    options = dict(max_new_tokens=4, do_sample=True, top_k=0, seed=0)
    plain = generate(model, prompt, **options)
    drafted = generate(model, prompt, **options, draft_model=model, num_draft_tokens=3)
    assert torch.equal(plain[:, 3], drafted[:, 3]) and (plain[:, 4] == drafted[:, 4]).float().mean() < 0.5


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, num_return_sequences=2, seed=1)], ids=str)
@pytest.mark.parametrize("name", ["noisy", "lookup"])
@pytest.mark.parametrize("batch", [1, 3])
def test_streaming(batch, name, options, model, drafts, padded_prompts):
    input_ids, mask = padded_prompts(batch, 5, 101)
    options = dict(attention_mask=mask, eos_token_id=[5, 9, 17], pad_token_id=PAD, **options, **drafts[name])
    streamer = Recorder()
    out = generate(model, input_ids, 14, streamer=streamer, **options)
    assert torch.equal(torch.cat([streamer.values[0], torch.stack(streamer.values[1:], 1)], 1), out)
    assert streamer.ended == 1


def test_automatic_lengths_grow_with_acceptance_and_vanish_without():
    """On a clock of our own: a draft takes a tenth of a step."""

    class FakeClock(Clock):
        def between(self, first, last):
            return {"begun": 0.1 * self.drafts, "drafted": 1.0}[first]

    for acceptance, expected in ((0.9, set(range(7, 13))), (0.6, {3}), (0.05, {0})):
        length, clock = DraftLength(), FakeClock(torch.device("cpu"))
        generator, chosen = torch.Generator().manual_seed(0), []
        for _ in range(300):
            clock.drafts = num = length.choose()
            accepted = int((torch.rand(num, generator=generator) < acceptance).long().cumprod(0).sum())
            length.learn([num], [accepted], num, clock)
            chosen.append(num)
        settled = chosen[100:]
        assert sum(num in expected for num in settled) > 0.6 * len(settled), (acceptance, settled)
        assert 3 < sum((num == 0) != (expected == {0}) for num in settled) < 20  # probes


def test_best_lengths_of_the_formula():
    assert expected_speedup(3, 0.8, 0.1) == pytest.approx(2.27, abs=0.005)
    assert expected_speedup(5, 0.8, 0.1) == pytest.approx(2.46, abs=0.005)
    assert expected_speedup(8, 0.8, 0.1) == pytest.approx(2.40, abs=0.006)


def test_lookup():
    sequences = [[4, 5, 6, 7, 5, 6, 8, 5, 6], [1, 2, 3], [9, 9]]
    drafts = LookupDrafts(sequences, 2, torch.device("cpu"))
    assert drafts.draft(sequences, 3, None)[0].tolist() == [[8, 5, 6], [-1] * 3, [9] * 3]
    sequences[0].append(7)  # after [6, 7] came [5]; only [7] alone occurred otherwise
    sequences[1] += [4, 2]
    drafts.follow(sequences)
    assert drafts.draft(sequences, 5, None)[0].tolist() == [[5, 6, 8, 5, 6], [3, 4, 2, 3, 4], [9] * 5]
    assert LookupDrafts([[1, 2]], 2, torch.device("cpu")).draft([[1, 2]], 4, None)[0].shape == (1, 0)


def test_bfloat16_and_autocast(model, drafts, padded_prompts):
    input_ids, mask = padded_prompts(2, 5, 101)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, input_ids, 6, attention_mask=mask, **drafts["noisy"]).shape == (2, 11)
    half = CausalLM(model.config, seed=3, dtype=torch.bfloat16)
    options = dict(attention_mask=mask, do_sample=True, seed=2) | drafts["noisy"]
    assert generate(half, input_ids, 6, **options).shape == (2, 11)
    assert generate(model, input_ids, 6, **options | dict(draft_model=half)).shape == (2, 11)


@pytest.mark.parametrize("options", [{}, dict(do_sample=True)])
def test_logits_that_are_not_finite(options):
    broken, prompt = make(0, layers=1), torch.tensor([[1, 2]])
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"generate: logits must be finite, got others for sequences \[0\] by step 0"):
        generate(broken, prompt, 3, draft_model=make(1), num_draft_tokens=2, **options)
    sound = make(2)
    expected = generate(sound, prompt, 9)
    assert torch.equal(generate(sound, prompt, 9, draft_model=broken, num_draft_tokens=2), expected)


LOOKUP = dict(prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(draft_model=make(0, layers=1, vocab_size=102)),
            "draft_model must have the model's vocabulary, vocab_size=101, got vocab_size=102",
        ),
        (dict(draft_model=make(0), num_draft_tokens=0), "num_draft_tokens must be a positive integer, got 0"),
        (dict(num_draft_tokens=3), "num_draft_tokens must be None without a draft_model, got 3"),
        (
            dict(draft_model=make(0), prompt_lookup_num_tokens=3),
            "prompt_lookup_num_tokens must be None with a draft_model, got 3",
        ),
        (dict(prompt_lookup_num_tokens=2.5), "prompt_lookup_num_tokens must be a positive integer, got 2.5"),
        (
            dict(prompt_lookup_num_tokens=2, max_matching_ngram_size=0),
            "max_matching_ngram_size must be a positive integer, got 0",
        ),
        (
            dict(prompt_lookup_num_tokens=2, max_matching_ngram_size=None),
            "max_matching_ngram_size must be a positive integer, got None",
        ),
        (dict(prompt_lookup_num_tokens=2, num_beams=2), "num_beams must be 1 with drafts, got 2"),
        (LOOKUP | dict(repetition_penalty=1.2), "repetition_penalty must be left out with drafts, got float"),
        (LOOKUP | dict(min_new_tokens=1), "min_new_tokens must be left out with drafts, got int"),
        (
            LOOKUP | dict(allowed_tokens=torch.ones(101).bool()),
            "allowed_tokens must be left out with drafts, got Tensor",
        ),
        (LOOKUP | dict(logits_processor=[print]), "logits_processor must be left out with drafts, got list"),
    ],
)
def test_errors(change, message, model):
    with pytest.raises(ValueError, match="generate: " + message):
        generate(model, torch.tensor([[1, 2, 3]]), 2, **change)


class FakeEvent:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, later):
        return 1.0


@pytest.mark.parametrize("name", ["noisy", "itself", "automatic", "lookup"])
def test_steps_that_are_replayed_as_graphs(name, drafts, padded_prompts):
    """The way of a GPU: single steps of both models are graphs, which see where the caches were rewound to."""
    model = drafts["itself"]["draft_model"]
    input_ids, mask = padded_prompts(3, 6, 101)
    options = dict(attention_mask=mask, eos_token_id=[5, 9], pad_token_id=PAD)
    expected = generate(model, input_ids, 24, **options)
    with recorded_graphs(), pretended_gpu(), mock.patch("torch.cuda.Event", FakeEvent):
        assert torch.equal(generate(model, input_ids, 24, **options, **drafts[name]), expected)


def test_a_draft_model_with_a_shorter_context(model):
    short = CausalLM(model.config.replace(max_position_embeddings=4), seed=1)
    with pytest.raises(ValueError, match="generate: input_ids must fit the context, max_position_embeddings=4"):
        generate(model, torch.arange(6)[None], 2, draft_model=short)


def test_drafts_behind_an_end_do_not_count(model):
    prompt = torch.tensor([[5, 6, 7]])
    greedy = generate(model, prompt, 8)[0, 3:].tolist()
    end = greedy[2]
    statistics = DraftStatistics()
    out = generate(
        model, prompt, 8, eos_token_id=end, draft_model=model, num_draft_tokens=6, draft_statistics=statistics
    )
    assert out[0, 3:].tolist() == greedy[: greedy.index(end) + 1]
    assert statistics.accepted < statistics.new_tokens == out.shape[1] - 3


def test_copies_of_a_prompt_leave_it_alone(model):
    """Rows that end early store again what they have, and their prompt is that of others, too."""
    prompts, written = torch.randint(2, 101, (2, 9), generator=torch.Generator().manual_seed(3)), []

    class Watched(BranchedKVCache):
        def advance(self, seqlen=1):
            positions = self.lengths[:, None] + torch.arange(seqlen)
            places = self.slots.gather(1, positions.clamp(max=self.max_length - 1).long()) + positions
            written.append(places.flatten().tolist())
            super().advance(seqlen)

    noisy = make(3, layers=1)
    options = dict(do_sample=True, top_k=0, temperature=1.5, num_return_sequences=4, eos_token_id=list(range(2, 8)))
    with mock.patch("arfast.generate.prompts.BranchedKVCache", Watched):
        generate(model, prompts, 40, draft_model=noisy, seed=5, pad_token_id=1, **options)
    assert len(written) > 20
    for places in written:
        assert len(set(places)) == len(places) and min(places) >= 2 * 9
