"""A training step (forward, backward, clipping, AdamW) against transformers' LlamaForCausalLM, eager and compiled: with
11M and 50M parameters on the CPU, with the size of Llama 3.2 1B on a GPU.

All start from the same weights, float32, and compute in bfloat16: ours with a working copy of the weights, as the
trainer does it, transformers under autocast with SDPA attention, as its own trainer does it.

The table's GFLOP/s and shares are model FLOPs (MFU): `CausalLMConfig.flops_per_token`, 6 per weight that multiplies a
token, the tied head too, and 12 H D per visible key and layer, which is half of all keys; nothing is recomputed. "of
peak" divides by the rate of a large bfloat16 product that torch reaches on this machine, "of nominal" by the maker's.
"""

import copy
import dataclasses
import functools
import gc
from types import SimpleNamespace

import pytest
import torch
from harness import Case
from llama import LLAMA_1B, LLAMA_11M, LLAMA_50M, transformers_twin

from arfast.models import CausalLM
from arfast.train import TrainConfig
from arfast.train.engine import Engine


@functools.cache
def initial_model(config, device):
    return CausalLM(config, seed=0, device=device)


@functools.cache
def our_engine(config, device, **settings):
    # A learning rate of 1e-6: the models stay so close to their start that the losses of all can be compared.
    settings = TrainConfig(max_steps=1_000_000, learning_rate=1e-6, warmup_tokens=0, **settings)
    return Engine(copy.deepcopy(initial_model(config, device)), settings)


def our_step(config, dtype, ids, cuda_graph=False):
    batch = SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=None, num_tokens=ids.numel() - len(ids))
    engine = our_engine(config, ids.device.type, dtype=dtype, cuda_graph=cuda_graph)
    return torch.tensor(engine.step([batch]).loss)


@functools.cache
def transformers_model(config, device):
    model = transformers_twin(initial_model(config, device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return model, torch.compile(model, dynamic=False), optimizer


def transformers_step(config, dtype, compiled, ids):
    model, compiled_model, optimizer = transformers_model(config, ids.device.type)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = (compiled_model if compiled else model)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().cpu()


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    our_engine.cache_clear()
    transformers_model.cache_clear()
    gc.collect()


def case(size, config, batch, seqlen, dtype, **options):
    def make_inputs(device):
        return (torch.randint(0, config.vocab_size, (batch, seqlen), device=device),)

    def check(outputs, ids):
        expected = transformers_step(config, dtype, False, ids).float()
        torch.testing.assert_close(outputs[0], expected, rtol=2e-3, atol=0)

    return Case(
        name=f"{size}-step-{batch}x{seqlen}-{dtype}",
        make_inputs=make_inputs,
        ours=functools.partial(our_step, config, dtype),
        peers={
            "transformers": functools.partial(transformers_step, config, dtype, False),
            "transformers, compiled": functools.partial(transformers_step, config, dtype, True),
        },
        check=check,
        flops=int(config.flops_per_token(seqlen) * batch * seqlen),
        dtype=getattr(torch, dtype),
        tokens=batch * seqlen,
        graph=False,  # the loss is read on the host
        **options,
    )


def graph_case(size, config, batch, seqlen, dtype):
    """What CUDA graphs are worth to a step of ours."""
    plain = case(size, config, batch, seqlen, dtype)
    return dataclasses.replace(
        plain,
        name=plain.name.replace("step", "graph-step"),
        ours=functools.partial(our_step, config, dtype, cuda_graph=True),
        peers={"without graphs": plain.ours},
        check=lambda outputs, ids: torch.testing.assert_close(outputs[0], plain.ours(ids), rtol=2e-3, atol=0),
        devices=("cuda",),
    )


CPU_GATES = {"transformers": 1.7, "transformers, compiled": 1.1}
CASES = [
    case("11M", LLAMA_11M, 4, 512, "bfloat16", devices=("cpu",), gates=CPU_GATES),
    case("11M", LLAMA_11M, 4, 512, "float32", devices=("cpu",)),
    case("50M", LLAMA_50M, 4, 512, "bfloat16", devices=("cpu",), gates=CPU_GATES),
    case("1B", LLAMA_1B, 2, 4096, "bfloat16", devices=("cuda",), gates={"transformers, compiled": 1.1}),
    graph_case("1B", LLAMA_1B, 2, 4096, "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_train(compare, case):
    compare(case)
