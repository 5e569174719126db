"""Greedy speculative decoding against decoding without drafts, and against its own forward passes alone.

The draft model is the first layers of the model; the others add little, so that most drafts are accepted. "forward
passes" are those that the algorithm asks for: per round G steps of the draft model and one pass of G + 1 tokens. With c
the cost of the one and v that of the other, in steps, a round takes G c + v steps and gives (1 - a^(G + 1)) /
(1 - a) tokens: the speed-up of Leviathan et al. (arXiv 2211.17192, theorem 3.8) for v = 1. The ratio to them is the
share of it that is reached.
"""

import functools

import pytest
import torch
from harness import Case
from llama import LLAMA_11M

from arfast.generate import DecodeStep, DraftStatistics, generate
from arfast.models import CausalLM
from arfast.nn import StaticKVCache

CONFIG = LLAMA_11M.replace(vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=12)
DRAFT_LAYERS = 2
PROMPT, NEW = 32, 96


@functools.cache
def models(device, strength):
    """The model, whose later layers have outputs of `strength`, and the draft model."""
    model = CausalLM(CONFIG.replace(initializer_range=0.05), seed=0, device=device).eval()
    for layer in model.model.layers[DRAFT_LAYERS:]:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data *= strength
    draft = CausalLM(model.config.replace(num_hidden_layers=DRAFT_LAYERS), device=device).eval()
    weights = model.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return model, draft


def options_of(prompts, num_drafts, strength, statistics=None):
    model, draft = models(prompts.device.type, strength)
    options = dict(draft_model=draft, num_draft_tokens=num_drafts, draft_statistics=statistics)
    return model, dict(input_ids=prompts, max_new_tokens=NEW, eos_token_id=[]), options


def speculative(prompts, num_drafts, strength):
    model, arguments, options = options_of(prompts, num_drafts, strength)
    return generate(model, **arguments, **options)


def without_drafts(prompts, num_drafts, strength):
    model, arguments, _ = options_of(prompts, num_drafts, strength)
    return generate(model, **arguments)


@functools.cache
def num_rounds(device, batch, num_drafts, strength):
    statistics = DraftStatistics()
    model, arguments, options = options_of(prompts_of(batch, device), num_drafts, strength, statistics)
    generate(model, **arguments, **options)
    print(f"\nbatch {batch}: acceptance {statistics.acceptance:.2f}, {statistics.rounds} rounds for {NEW} tokens")
    return statistics.rounds


@torch.no_grad()
def forward_passes(prompts, num_drafts, strength):
    device = prompts.device.type
    model, draft = models(device, strength)
    batch, room = len(prompts), PROMPT + NEW + num_drafts + 1
    caches = [StaticKVCache(model_.config, batch, room, device=device) for model_ in (model, draft)]
    model(prompts, cache=caches[0], logits_to_keep=1)
    draft(prompts, cache=caches[1], logits_to_keep=1)
    rounds = num_rounds(device, batch, num_drafts, strength)
    tokens = prompts[:, : num_drafts + 1]
    verify, draft_step = (DecodeStep(*pair) for pair in zip((model, draft), caches, strict=True))
    for i in range(rounds):
        length = PROMPT + i * (NEW - 1) // rounds
        for cache in caches:
            cache.set_lengths(torch.full((batch,), length, dtype=torch.int32, device=device), longest=length)
        for _ in range(num_drafts):
            draft_step(tokens[:, 0])
        verify.extend(tokens)
    return torch.cat([prompts, prompts.new_zeros(batch, NEW)], 1)


def prompts_of(batch, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG.vocab_size, (batch, PROMPT), generator=generator).to(device)


def check(outputs, prompts, num_drafts, strength):
    expected = without_drafts(prompts, num_drafts, strength)
    assert (outputs[0] == expected).float().mean() > 0.9  # rounding may choose another of two equal tokens


def case(batch, num_drafts, strength):
    return Case(
        name=f"B{batch}-G{num_drafts}-strength{strength}-float32",
        make_inputs=lambda device: (prompts_of(batch, device), num_drafts, strength),
        ours=speculative,
        peers={"without drafts": without_drafts, "forward passes": forward_passes},
        check=check,
        tokens=batch * NEW,
        graph=False,
        gates={"forward passes": 0.85},
    )


CASES = [case(1, 4, 0.05), case(1, 4, 0.2), case(4, 4, 0.05)]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_speculative(compare, case):
    compare(case)
