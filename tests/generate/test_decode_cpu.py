"""Decode steps on the CPU: one op for a dense model, a forward pass for any other."""

import copy
from unittest import mock

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from test_decode import eager, make, tokens_for, with_prompt
from tiny_models import TINY

from arfast.generate import DecodeStep, generate
from arfast.generate.decode import decode_one_token
from arfast.generate.dense_step import DenseStep
from arfast.nn import StaticKVCache


def forward_passes():
    """Counts the steps that are forward passes of the model."""
    return mock.patch("arfast.generate.decode.decode_one_token", side_effect=decode_one_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense", "window, norms", "tied"])
def test_one_op_on_the_cpu(name, dtype):
    """As accurate as forward passes; the cache too, and the caller may go on with either."""
    model = make(name="dense", tie_word_embeddings=True) if name == "tied" else make(name=name)
    model, tokens = model.to(dtype), tokens_for(12, 3, "cpu")
    wide = copy.deepcopy(model).double()
    caches = [with_prompt(m, 3, 6, 32) for m in (model, wide, model)]
    step = DecodeStep(model, caches[0])
    with forward_passes() as calls:
        actual = torch.stack([step(token) for token in tokens[:8]])
        assert calls.call_count == 0 and step.graph is None
    actual = torch.cat([actual, eager(model, caches[0], tokens[8:])])
    exact, baseline = eager(wide, caches[1], tokens), eager(model, caches[2], tokens)
    assert_accurate(actual, exact, baseline)
    for cache in ("k", "v"):
        assert_accurate(*(getattr(c, cache) for c in caches), name=cache)
    assert [c.lengths.tolist() for c in caches] == [[18] * 3] * 3


def test_the_same_tokens_as_by_forward_passes():
    model, prompts = make(), torch.randint(61, (4, 5))
    options = dict(max_new_tokens=50, eos_token_id=[], pad_token_id=0)
    actual = generate(model, prompts, **options)
    with mock.patch("arfast.generate.decode.DenseStep.serves", return_value=False), forward_passes() as calls:
        assert torch.equal(actual, generate(model, prompts, **options))
    assert calls.call_count == 49


def test_what_one_op_does_not_serve():
    """Experts, hooks, autocast, parametrizations, float64, mixed dtypes, models of others: forward passes."""

    def passes(model, cache_of=None):
        step = DecodeStep(model, with_prompt(cache_of or model, 2, 4, 16))
        with forward_passes() as calls:
            step(torch.tensor([1, 2]))
        return calls.call_count

    assert passes(make()) == 0
    assert passes(make(name="experts")) == 1
    assert passes(make().double()) == 1
    hooked = make()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert passes(hooked) == 1
    model = make()
    assert passes(lambda *args, **options: model(*args, **options), cache_of=model) == 1
    mixed = make()
    mixed.model.norm.double()
    assert not DenseStep.serves(mixed, with_prompt(make(), 2, 4, 16))
    parametrized = make()
    torch.nn.utils.parametrizations.weight_norm(parametrized.model.layers[0].mlp.up_proj)
    assert passes(parametrized) == 1
    strided = make()
    strided.lm_head.weight = torch.nn.Parameter(strided.lm_head.weight.T.contiguous().T)
    assert passes(strided) == 1
    with torch.autocast("cpu", torch.bfloat16):
        cache = StaticKVCache(TINY, 2, 16, torch.bfloat16)
        with torch.no_grad():
            model(torch.ones(2, 4, dtype=torch.int64), cache=cache)
        with forward_passes() as calls:
            DecodeStep(model, cache)(torch.tensor([1, 2]))
    assert calls.call_count == 1


def test_parameters_may_change_between_steps():
    """In place, for other parameters, for other memory; and the rotary tables may grow."""
    model = make()
    step, tokens = DecodeStep(model, with_prompt(model, 2, 6, 32)), torch.tensor([5, 9])

    def check():
        step.cache.set_lengths(torch.tensor([6, 6]))
        actual = step(tokens)
        expected = DecodeStep(copy.deepcopy(model), with_prompt(model, 2, 6, 32))(tokens)
        assert_bitwise_equal(actual, expected)
        return actual

    results = [check()]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    results.append(check())
    model.lm_head.weight = torch.nn.Parameter(torch.randn(61, 32))
    results.append(check())
    model.lm_head.weight.data = torch.randn(61, 32)
    results.append(check())
    assert len({float(logits.detach()[0, 0]) for logits in results}) == len(results)
    model.model.rotary(None, 5000)
    check()


def test_a_step_that_fails_stores_nothing():
    model = make()
    step = DecodeStep(model, with_prompt(model, 2, 6, 7))
    for token in (61, -1):
        with pytest.raises(IndexError, match=rf"decode_step: tokens must be in \[0, vocab_size=61\), got {token}"):
            step(torch.tensor([1, token]))
        assert step.cache.lengths.tolist() == [6, 6]
    step(torch.tensor([1, 2]))  # there is still room for it


@pytest.mark.parametrize("name", ["dense", "window, norms", "experts"])
def test_several_tokens_at_a_time(name):
    """As what drafts need: by one op or by a forward pass, then one token at a time again."""
    model, tokens = make(name=name), tokens_for(8, 3, "cpu")
    cache, other = with_prompt(model, 3, 6, 32), with_prompt(model, 3, 6, 32)
    expected, step = eager(model, other, tokens), DecodeStep(model, cache)
    actual = [step(tokens[0])[None], step.extend(tokens[1:6].T).transpose(0, 1), step(tokens[6])[None]]
    torch.testing.assert_close(torch.cat(actual), expected[:7])
    cache.set_lengths(torch.tensor([8, 9, 7], dtype=torch.int32))
    assert step.extend(tokens[:3].T).shape == (3, 3, 61) and cache.lengths.tolist() == [11, 12, 10]
    with pytest.raises(ValueError, match="StaticKVCache: max_length must be at least 33 for this, got 32"):
        step.extend(torch.ones(3, 21, dtype=torch.int64))
    assert cache.lengths.tolist() == [11, 12, 10]
