"""A training step (forward, backward, clipping, AdamW) of an 11M-parameter model, against transformers'
LlamaForCausalLM.

All start from the same weights, float32, and compute in bfloat16: ours with a working copy of the weights, as the
trainer does it, transformers under autocast with SDPA attention, as its own trainer does it. 4 sequences of 512 tokens
a step.
"""

import functools
import tempfile
from types import SimpleNamespace

import pytest
import torch
from harness import Case

from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig
from arfast.train.engine import Engine

BATCH, SEQLEN = 4, 512
CONFIG = CausalLMConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)


@functools.cache
def our_engine(dtype):
    # A learning rate of 1e-6: the models stay so close to their start that the losses of all can be compared.
    config = TrainConfig(max_steps=1_000_000, dtype=dtype, seqlen=SEQLEN, learning_rate=1e-6, warmup_tokens=0)
    return Engine(CausalLM(CONFIG, seed=0), config)


def our_step(dtype, ids):
    batch = SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=None, num_tokens=ids.numel() - len(ids))
    return torch.tensor(our_engine(dtype).step([batch]).loss)


@functools.cache
def transformers_model(dtype, compiled):
    transformers = pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as directory:
        CausalLM(CONFIG, seed=0).save_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return torch.compile(model, dynamic=False) if compiled else model, optimizer


def transformers_step(dtype, compiled, ids):
    model, optimizer = transformers_model(dtype, compiled)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def case(dtype):
    def make_inputs(device):
        return (torch.randint(0, CONFIG.vocab_size, (BATCH, SEQLEN), device=device),)

    def check(outputs, ids):
        torch.testing.assert_close(outputs[0], transformers_step(dtype, False, ids).float(), rtol=2e-3, atol=0)

    return Case(
        name=f"step-{BATCH}x{SEQLEN}-{dtype}",
        make_inputs=make_inputs,
        ours=functools.partial(our_step, dtype),
        peers={
            "transformers": functools.partial(transformers_step, dtype, False),
            "transformers, compiled": functools.partial(transformers_step, dtype, True),
        },
        check=check,
        flops=int(CONFIG.flops_per_token(SEQLEN) * BATCH * SEQLEN),
        gates={"transformers": 1.5, "transformers, compiled": 1.0} if dtype == "bfloat16" else {},
        devices=("cpu", "cuda") if dtype == torch.bfloat16 else ("cpu",),
    )


@pytest.mark.parametrize("case", [case("bfloat16"), case("float32")], ids=str)
def bench_train(compare, case):
    compare(case)
