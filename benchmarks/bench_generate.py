"""A whole `generate` of 64 tokens against transformers', on the CPU also CTranslate2's and llama.cpp's where they are
installed: greedy with one prompt, and beam search.

The fewest bytes are the weights, read once per step, so the share of the peak is one of bandwidth. No end token: all
generate the same number of tokens. A table of one run on a quiet machine counts; single numbers of these decoders
scatter by a tenth.

On the CPU beam search also is compared with "its forward passes": those of the prompts and of every step, on the same
rows and cache, without anything that only a search needs. A ratio of 0.95 says that 5 % of the time goes elsewhere, and
that is all of it: sums and maxima that a step leaves of its logits, the choice of beams, the state, the loop, checks of
the arguments and the hypotheses at the end. The forward passes are called one by one from Python, as a loop without
beams calls them, and that is part of their time (about 1 % of it for the smallest model here).
"""

import functools

import pytest
import torch
from decoders import ctranslate2_decoder, installed, llama_cpp_decoder, transformers_decoder
from harness import Case
from llama import LLAMA_1B, LLAMA_11M, LLAMA_50M, transformers_twin

from arfast.generate import DecodeStep, generate
from arfast.generate.prompts import stored_prompts
from arfast.models import CausalLM

NEW = 64
FORWARD = "its forward passes"
LLAMA_12M = LLAMA_11M.replace(intermediate_size=1024, num_key_value_heads=4)


@functools.cache
def models(config, dtype, device):
    model = CausalLM(config, seed=0, device=device).to(dtype).eval()
    return model, transformers_twin(model).eval()


@functools.cache
def decoder(name, config, dtype, num_beams, device):
    _, twin = models(config, dtype, device)
    if name == "CTranslate2":
        return ctranslate2_decoder(twin, NEW, num_beams)
    return llama_cpp_decoder(twin, NEW) if name == "llama.cpp" else transformers_decoder(twin, NEW, num_beams)


def peer(*key):
    return lambda prompts: torch.no_grad()(decoder(*key, prompts.device.type))(prompts)


@torch.no_grad()
def forward_passes(model, prompts, num_beams):
    """Those of a beam search, each with the tokens that followed the prompts."""
    beam_of = torch.arange(len(prompts)).repeat_interleave(num_beams)
    logits, cache = stored_prompts(model, prompts, torch.ones_like(prompts, dtype=torch.bool), NEW, beam_of)
    tokens, step = logits.argmax(-1)[beam_of], DecodeStep(model, cache)
    for _ in range(NEW - 1):
        step(tokens)
    return ()  # no tokens to compare


def case(size, config, dtype, batch, num_beams, prompt, gates, devices=("cpu",)):
    def make_inputs(device):
        return (torch.randint(3, config.vocab_size, (batch, prompt), device=device),)

    def ours(prompts):
        options = dict(eos_token_id=[], pad_token_id=0, num_beams=num_beams)
        return generate(models(config, dtype, prompts.device.type)[0], prompts, NEW, **options)

    def check(outputs, prompts):
        """The tokens of transformers, at least the first: of random weights, rounding soon decides."""
        expected = peer("transformers", config, dtype, num_beams)(prompts)
        assert outputs[0].shape == expected.shape == (batch, prompt + NEW)
        same = (outputs[0] == expected)[:, prompt : prompt + (4 if dtype == torch.float32 else 1)].double().mean()
        assert same > 0.8, f"only {same:.0%} of the first tokens are those of transformers"

    peers = {}
    for name in gates:
        if name == FORWARD:
            peers[name] = lambda prompts: forward_passes(models(config, dtype, "cpu")[0], prompts, num_beams)
        elif installed(name):
            peers[name] = peer(name, config, dtype, num_beams)
    kind = "greedy" if num_beams == 1 else f"beam{num_beams}"
    return Case(
        name=f"{size}-{kind}-B{batch}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=ours,
        peers=peers,
        check=check,
        bytes=NEW * config.num_parameters() * dtype.itemsize,
        tokens=NEW * batch,
        gates={name: gate for name, gate in gates.items() if name in peers},
        devices=devices,
        dtype=dtype,
        graph=False,
    )


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CASES = [
    case("11M", LLAMA_11M, FLOAT32, 1, 1, 32, {"transformers": 2.5, "llama.cpp": 0.9}),
    case("50M", LLAMA_50M, FLOAT32, 1, 1, 32, {"transformers": 1.8, "llama.cpp": 0.9}),
    case("11M", LLAMA_11M, BFLOAT16, 1, 1, 32, {"transformers": 3.0, "llama.cpp": 0.9}),
    case("50M", LLAMA_50M, BFLOAT16, 1, 1, 32, {"transformers": 3.0, "llama.cpp": 0.9}),
    case("12M", LLAMA_12M, FLOAT32, 8, 8, 16, {"transformers": 1.7, "CTranslate2": 1.0, FORWARD: 0.95}),
    case("50M", LLAMA_50M, FLOAT32, 8, 8, 16, {FORWARD: 0.95}),
    case("12M", LLAMA_12M, BFLOAT16, 8, 8, 16, {FORWARD: 0.95}),
    case("50M", LLAMA_50M, BFLOAT16, 8, 8, 16, {FORWARD: 0.95}),
]
GPU_GATES = {"transformers": 10.0}
CASES += [case("1B", LLAMA_1B, BFLOAT16, 1, beams, 128, GPU_GATES, devices=("cuda",)) for beams in (1, 4, 8)]


@pytest.fixture(scope="module", autouse=True)
def _memory_is_given_back():
    yield
    for cached in (models, decoder):
        cached.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_generate(compare, case):
    compare(case)
