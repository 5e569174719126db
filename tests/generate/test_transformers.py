"""Greedy decoding and beam search equal transformers.generate, token for token in float32, on random configurations."""

import random
import warnings
from unittest import mock

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from arfast.generate import generate

PAD = 1


def random_configuration(rng):
    """A model, prompts, and arguments of both `generate`."""
    beams = rng.choice([1, 2, 3, 4, 5, 6, 8])
    model = dict(
        vocab_size=rng.choice([23, 60, 200]),
        batch=rng.choice([1, 2, 3, 4]),
        scale=rng.choice([0.15, 0.4, 0.8]),
        num_ends=rng.choice([0, 1, 1, 2, 3, 8]),
        push=rng.choice([0.0, 2.0, 4.0, 6.0]),  # of end tokens
    )
    options = dict(
        num_beams=beams,
        max_new_tokens=rng.choice([1, 4, 9, 14, 22]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
    )
    if rng.random() < 0.3:
        options |= dict(min_new_tokens=rng.randint(1, options["max_new_tokens"]))
    if beams > 1:
        options |= dict(
            length_penalty=rng.choice([0.0, 1.0, 2.0, -1.0, 0.6]),
            early_stopping=rng.choice([True, False, "never"]),
            num_return_sequences=rng.choice([1, beams]),
        )
    return model, options


def make_pair(rng, seed, model, tiny_pair, padded_prompts):
    """(transformers' model, ours, prompts, their mask, end tokens). Padding never comes up."""
    vocab_size = model["vocab_size"]
    ends = rng.sample(range(2, vocab_size), model["num_ends"])
    bias = torch.zeros(vocab_size)
    bias[ends] = model["push"] * 2 * model["scale"]
    bias[PAD] = -100
    theirs, ours = tiny_pair(vocab_size, seed, model["scale"], bias)
    theirs.generation_config.eos_token_id = ends or None
    theirs.generation_config.pad_token_id = PAD
    return theirs, ours, *padded_prompts(model["batch"], 5, vocab_size), ends


@torch.no_grad()
def transformers_generate(model, input_ids, mask, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids, attention_mask=mask, do_sample=False, pad_token_id=PAD, **options)


@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(seed, tiny_pair, padded_prompts):
    rng = random.Random(seed)
    for i in range(26):
        model, options = random_configuration(rng)
        theirs, ours, input_ids, mask, ends = make_pair(rng, 100 * seed + i, model, tiny_pair, padded_prompts)
        expected = transformers_generate(theirs, input_ids, mask, **options)
        actual = generate(ours, input_ids, attention_mask=mask, eos_token_id=ends, pad_token_id=PAD, **options)
        assert torch.equal(actual, expected), (i, model, options, ends)


@pytest.mark.parametrize("seed", range(10))
def test_random_configurations_of_fused_steps(seed, tiny_pair, padded_prompts):
    """A CausalLM itself, of which a step is one op, with vocabularies of several tiles; end tokens by their weights."""
    rng = random.Random(2000 + seed)
    for i in range(6):
        model, options = random_configuration(rng)
        vocab_size = rng.choice([60, 256, 700, 1300])
        ends = rng.sample(range(2, vocab_size), model["num_ends"])
        if rng.random() < 0.7:  # beams are then chosen from the sums that a step leaves
            options |= dict(repetition_penalty=1.0, min_new_tokens=0)
        theirs, ours = tiny_pair(vocab_size, 100 * seed + i, model["scale"])
        for head in (theirs.lm_head, ours.model.lm_head):
            head.weight.data[ends] *= 1 + model["push"]
        input_ids, mask = padded_prompts(model["batch"], 5, vocab_size)
        theirs.generation_config.eos_token_id = ends or None
        expected = transformers_generate(theirs, input_ids, mask, **options)
        with mock.patch("arfast.generate.decode.decode_one_token", side_effect=AssertionError("a forward pass")):
            options |= dict(attention_mask=mask, eos_token_id=ends, pad_token_id=PAD)
            actual = generate(ours.model, input_ids, **options)
        assert torch.equal(actual, expected), (i, model, options)


class Diversity:
    """Hamming diversity for a search of transformers: `chosen[step]` are the tokens that groups before have chosen in
    that step, and `own` becomes what this one chooses."""

    def __init__(self, penalty, prompt_length, chosen):
        self.penalty, self.prompt_length, self.chosen, self.own = penalty, prompt_length, chosen, {}

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        if step > 0:
            self.own[step - 1] = input_ids[:, -1].tolist()
        for token in self.chosen.get(step, []):
            scores = scores.clone()
            scores[:, token] -= self.penalty
        return scores


def groups_by_transformers(model, input_ids, mask, *, num_beam_groups, diversity_penalty, num_beams, **options):
    """Diverse beam search of one prompt: a search of transformers per group, which knows what those before chose."""
    count, repetition = options.pop("num_return_sequences"), options.pop("repetition_penalty")
    chosen, found = {}, []
    for _ in range(num_beam_groups):
        diversity = Diversity(diversity_penalty, input_ids.shape[1], chosen)
        processors = [diversity] + ([RepetitionPenaltyLogitsProcessor(repetition)] if repetition != 1 else [])
        size = num_beams // num_beam_groups
        kept = dict(num_beams=size, num_return_sequences=size, logits_processor=processors)
        out = transformers_generate(
            model, input_ids, mask, **options, **kept, return_dict_in_generate=True, output_scores=True
        )
        found += zip(out.sequences_scores.tolist(), out.sequences[:, input_ids.shape[1] :].tolist(), strict=True)
        for step, tokens in diversity.own.items():
            chosen[step] = chosen.get(step, []) + tokens
    best = sorted(found, key=lambda hypothesis: -hypothesis[0])[:count]  # a stable order
    return [tokens for _, tokens in best]


def strip(tokens):
    while tokens and tokens[-1] == PAD:
        tokens = tokens[:-1]
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_random_groups(seed, tiny_pair, padded_prompts):
    rng = random.Random(1000 + seed)
    for i in range(6):
        model, options = random_configuration(rng)
        groups = rng.choice([2, 3, 4])
        options |= dict(num_beams=groups * rng.choice([2, 3]), num_beam_groups=groups)
        options |= dict(diversity_penalty=rng.choice([0.0, 0.3, 1.0, 5.0]), length_penalty=rng.choice([0.0, 1.0, -1.0]))
        options |= dict(early_stopping=rng.choice([True, False, "never"]))
        options |= dict(num_return_sequences=rng.choice([1, options["num_beams"]]), repetition_penalty=1.0)
        options.pop("min_new_tokens", None)
        theirs, ours, input_ids, mask, ends = make_pair(rng, 100 * seed + i, model, tiny_pair, padded_prompts)
        actual = generate(ours, input_ids, attention_mask=mask, eos_token_id=ends, pad_token_id=PAD, **options)
        actual = [strip(tokens) for tokens in actual[:, input_ids.shape[1] :].tolist()]
        for prompt in range(len(input_ids)):
            row = slice(prompt, prompt + 1)
            expected = groups_by_transformers(theirs, input_ids[row], mask[row], **options)
            count = options["num_return_sequences"]
            mine = actual[prompt * count : (prompt + 1) * count]
            assert mine == [strip(tokens) for tokens in expected], (i, prompt, model, options, ends)
