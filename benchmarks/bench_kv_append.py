"""kv_append in a decode step against the launches it replaces: two rotations and two copies."""

import pytest
import torch
from harness import Case, accurate

from arfast.ops import kv_append, kv_append_reference, rotary


def separate(q, k, v, cos, sin, k_cache, v_cache, seqlens):
    slots = torch.arange(len(seqlens), device=seqlens.device) * k_cache.shape[1] + seqlens - 1
    for cache, new in ((k_cache, rotary(k, cos, sin)), (v_cache, v)):
        cache.flatten(0, 1).index_copy_(0, slots, new.flatten(0, 1))
    return rotary(q, cos, sin)


def with_caches(append):
    """append -> q and the caches, which are empty before."""

    def run(*inputs):
        *new, k_cache, v_cache, seqlens = inputs
        k_cache, v_cache = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
        return append(*new, k_cache, v_cache, seqlens), k_cache, v_cache

    return run


def check(outputs, *inputs):
    accurate(with_caches(kv_append_reference))(with_caches(kv_append)(*inputs), *inputs)


def case(batch, seqlen, heads, head_dim, dtype):
    num_heads, num_kv_heads = heads

    def make_inputs(device):
        projection = torch.randn(batch, 1, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
        angles = torch.randn(batch, head_dim // 2, device=device)
        caches = torch.randn(2, batch, seqlen, num_kv_heads, head_dim, device=device).to(dtype)
        seqlens = torch.randint(1, seqlen + 1, (batch,), dtype=torch.int32, device=device)
        qkv = projection.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        inputs = *qkv, angles.cos(), angles.sin(), *caches, seqlens
        kv_append(*inputs)  # so that the calls that are timed change nothing, and many can be timed together
        return inputs

    return Case(
        name=f"B{batch}-H{num_heads}/{num_kv_heads}-D{head_dim}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=kv_append,
        peers={"rotary and index_copy_": separate},
        check=check,
        bytes=batch * head_dim * (2 * (num_heads + 2 * num_kv_heads) * dtype.itemsize + 4),
    )


SIZES = [(1, 128, (8, 2), 64), (8, 128, (32, 8), 128), (64, 128, (32, 8), 128)]
CASES = [case(*size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_kv_append(compare, case):
    compare(case)
