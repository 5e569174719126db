"""A decode step, one token per sequence against a cache of earlier ones, against transformers' LlamaForCausalLM: eager
with the cache that grows, as its generate() does by default, and on a GPU compiled with the cache of fixed size.

Every call continues the same cache, so that all see the same context. The fewest bytes are the weights and the cache,
read once; the share of the peak is one of bandwidth.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from harness import Case
from llama import LLAMA_1B, LLAMA_11M, transformers_twin

from arfast.generate import DecodeStep
from arfast.models import CausalLM, CausalLMConfig
from arfast.nn import StaticKVCache

transformers = pytest.importorskip("transformers")


class Context(NamedTuple):
    """`batch` sequences of `length` random tokens."""

    config: CausalLMConfig
    batch: int
    length: int


@functools.cache
def models(config, device):
    model = CausalLM(config, seed=0, device=device).to(torch.bfloat16).eval()
    return model, transformers_twin(model).eval()


@functools.cache
def prompt(context, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(context.config.vocab_size, context[1:], generator=generator).to(device)


@functools.cache
def our_cache(context, device):
    cache = StaticKVCache(context.config, context.batch, context.length + 1, torch.bfloat16, device)
    models(context.config, device)[0](prompt(context, device), cache=cache, logits_to_keep=1)
    return cache


@functools.cache
def transformers_cache(context, device, kind):
    twin = models(context.config, device)[1]
    sizes = {"max_cache_len": context.length + 1} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=twin.config, **sizes)
    twin(prompt(context, device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@functools.cache
def our_decode_step(context):
    return DecodeStep(models(context.config, "cpu")[0], our_cache(context, "cpu"))


@torch.no_grad()
def our_step(context, tokens):
    device = tokens.device.type
    if device == "cpu":
        step = our_decode_step(context)
        logits = step(tokens)
        step.cache.set_lengths(step.cache.lengths - 1)  # the next call stores its token in the same place
        return logits
    stored = our_cache(context, device)
    cache = copy.copy(stored)  # shares the keys and values, not the lengths
    cache.lengths, cache.seqlens = stored.lengths.clone(), stored.seqlens.clone()
    return models(context.config, device)[0](tokens[:, None], cache=cache).logits[:, -1]


@torch.no_grad()
def growing_step(context, tokens):
    device = tokens.device.type
    stored = transformers_cache(context, device, "DynamicCache")
    cache = copy.copy(stored)
    cache.layers = [copy.copy(layer) for layer in stored.layers]
    twin = models(context.config, device)[1]
    return twin(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


@torch.compile(dynamic=False)
def static_cache_logits(twin, cache, tokens):
    logits = twin(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    for layer in cache.layers:  # the next call stores its token in the same place
        layer.cumulative_length.sub_(1)
    return logits


@torch.no_grad()
def static_step(context, tokens):
    device = tokens.device.type
    cache = transformers_cache(context, device, "StaticCache")
    return static_cache_logits(models(context.config, device)[1], cache, tokens)


def case(size, config, batch, length, **options):
    context, weights = Context(config, batch, length), 2 * config.num_parameters()

    def make_inputs(device):
        return (torch.randint(config.vocab_size, (batch,), device=device),)

    @torch.no_grad()
    def check(outputs, tokens):
        """The same logits as without a cache."""
        model, _ = models(config, tokens.device.type)
        everything = torch.cat([prompt(context, tokens.device.type), tokens[:, None]], 1)
        expected = model(everything, logits_to_keep=1).logits[:, -1].double()
        error = ((outputs[0].double() - expected).norm() / expected.norm()).item()
        assert error < 0.02, f"decoding differs from the whole forward pass by {error:.1%}"

    cache_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * length
    return Case(
        name=f"{size}-step-B{batch}-S{length}-bfloat16",
        make_inputs=make_inputs,
        ours=functools.partial(our_step, context),
        peers={"transformers": functools.partial(growing_step, context)},
        gpu_peers={"transformers, compiled": functools.partial(static_step, context)},
        check=check,
        bytes=weights + cache_bytes,
        tokens=batch,
        **options,
    )


CASES = [case("11M", LLAMA_11M, batch, 512, devices=("cpu",)) for batch in (1, 8)]
CASES += [case("1B", LLAMA_1B, batch, 4096, devices=("cuda",)) for batch in (1, 32)]


@pytest.fixture(scope="module", autouse=True)
def _memory_is_given_back():
    yield
    for cached in (models, prompt, our_cache, our_decode_step, transformers_cache):
        cached.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_decode(compare, case):
    compare(case)
