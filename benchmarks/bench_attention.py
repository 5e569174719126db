"""attention and attention_decode against torch's scaled_dot_product_attention: plain, packed, windowed, cached;
on a GPU against its back ends by name, and FlexAttention. Decode cases read the cache and little else: their share of
the peak is one of bandwidth."""

import dataclasses
import functools

import pytest
import torch
from harness import Case, accurate, compiled, leaves, with_gradients
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from arfast.doctor import environment
from arfast.ops import attention, attention_decode, attention_decode_reference, attention_reference
from arfast.ops.attention_decode import PLAIN, TENSOR_CORES


def sdpa(q, k, v, **options):
    """torch's function on our layout [B, T, H, D]."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return scaled_dot_product_attention(*heads, enable_gqa=q.shape[2] != k.shape[2], **options).transpose(1, 2)


def masked(mask):
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask.to(q.device))


def training_cases(name, seqlen, heads, head_dim, dtype, *, ours, reference, peer, visible, gates):
    """Forward alone and with the backward pass, with a gate each. `visible`: the fraction of all scores that the mask
    leaves."""
    num_heads, num_kv_heads = heads
    suffix = f"{name}-T{seqlen}-H{num_heads}/{num_kv_heads}-D{head_dim}-{str(dtype).removeprefix('torch.')}"
    flops = int(4 * num_heads * seqlen**2 * head_dim * visible)

    def make_inputs(device, gradients=False):
        shapes = [(1, seqlen, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads)]
        tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_(gradients) for shape in shapes]
        return (*tensors, torch.randn(shapes[0], device=device).to(dtype)) if gradients else tuple(tensors)

    def make(name, inputs, wrap, flops, gate):
        return Case(
            name=f"{name}-{suffix}",
            make_inputs=inputs,
            ours=wrap(ours),
            peers={"torch": wrap(peer)},
            check=accurate(wrap(reference)),
            flops=flops,
            gates={"torch": gate} if gate else {},
            devices=("cpu",),
        )

    return [
        make("forward", make_inputs, lambda function: function, flops, gates[0]),
        make("forward-backward", lambda device: make_inputs(device, True), with_gradients, flops * 7 // 2, gates[1]),
    ]


def plain_cases():
    # Where matrix units do torch's products too, its forward pass is as far from their peak as ours.
    bfloat16 = (0.95 if environment()["cpu instructions"] == "amx" else 1.3, 1.3)
    for dtype in (torch.float32, torch.bfloat16):
        for seqlen, heads, head_dim in ((512, (8, 8), 64), (512, (8, 2), 128), (2048, (2, 2), 64), (2048, (2, 2), 128)):
            yield from training_cases(
                "causal", seqlen, heads, head_dim, dtype,
                ours=attention, reference=attention_reference, visible=0.5,
                gates=bfloat16 if dtype == torch.bfloat16 else (0.95, 0.95),
                peer=lambda q, k, v: sdpa(q, k, v, is_causal=True),
            )  # fmt: skip


def masked_cases(seqlen=2048, window=128, document=256):
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    ends = torch.arange(0, seqlen + 1, document, dtype=torch.int32)
    index = torch.arange(seqlen) // document

    def packed(function):
        def run(q, k, v):
            return function(q[0], k[0], v[0], cu_seqlens_q=ends, cu_seqlens_k=ends)[None]

        return run

    masks = {
        "window": (distance >= 0) & (distance <= window),
        "documents": (distance >= 0) & (index[:, None] == index),
    }
    ours = {
        "window": lambda function: lambda q, k, v: function(q, k, v, window=window),
        "documents": packed,
    }
    for name, mask in masks.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield from training_cases(
                name, seqlen, (2, 2), 64, dtype,
                ours=ours[name](attention), reference=ours[name](attention_reference), peer=masked(mask),
                visible=mask.float().mean().item(), gates=(None, None),
            )  # fmt: skip


def by_head(function):
    """The reference, or it with its gradients, one head at a time: the scores of all would not fit."""

    def run(*tensors):
        with torch.device(tensors[0].device):  # where the reference makes its mask
            heads = [[x[:, :, head : head + 1] for x in tensors] for head in range(tensors[0].shape[2])]
            return tuple(torch.cat(parts, 2) for parts in zip(*(leaves(function(*head)) for head in heads)))

    return run


def backend(name):
    def run(q, k, v):
        with sdpa_kernel(name):
            return sdpa(q, k, v, is_causal=True)

    return run


@functools.cache
def causal_blocks(seqlen, device):
    return create_block_mask(lambda batch, head, query, key: query >= key, None, None, seqlen, seqlen, device=device)


def flex(function):
    """FlexAttention, compiled, with the tiles above the diagonal left out."""

    def run(q, k, v):
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        return function(*heads, block_mask=causal_blocks(q.shape[1], q.device)).transpose(1, 2)

    return run


def gpu_cases(seqlen, head_dim, tokens=16384, hidden_size=2048):
    """16 Ki tokens as sequences of one length, FlashAttention-3's setting (arXiv 2407.08608, section 4.1), forward
    alone and with the backward pass.

    All add up dq in whatever order their blocks end. Gates are against torch's flash kernel, at 8192 tokens, and of our
    fixed order against any.
    """
    heads = hidden_size // head_dim

    def make_inputs(device, gradients):
        shape = (tokens // seqlen, seqlen, heads, head_dim)
        *arguments, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
        return (*(x.requires_grad_() for x in arguments), dout) if gradients else tuple(arguments)

    def case(name, gradients):
        wrap = with_gradients if gradients else lambda function: function
        return Case(
            name=f"{name}-causal-B{tokens // seqlen}-T{seqlen}-H{heads}-D{head_dim}-bfloat16",
            make_inputs=lambda device: make_inputs(device, gradients),
            ours=wrap(attention),
            peers={"torch flash": wrap(backend(SDPBackend.FLASH_ATTENTION))},
            gpu_peers={
                "torch cuDNN": wrap(backend(SDPBackend.CUDNN_ATTENTION)),
                "torch efficient": wrap(backend(SDPBackend.EFFICIENT_ATTENTION)),
                "torch flex": wrap(flex(compiled(flex_attention))) if seqlen == 8192 else None,
            },
            check=accurate(by_head(wrap(attention_reference))),
            flops=2 * tokens * seqlen * hidden_size * (7 if gradients else 2) // 2,
            gates={"torch flash": 0.95 if head_dim == 128 else 0.9} if seqlen == 8192 else {},
            devices=("cuda",),
        )

    if (seqlen, head_dim) == (8192, 128):
        fixed_order = with_gradients(functools.partial(attention, deterministic=True))
        any_order = case("forward-backward", True)
        yield dataclasses.replace(
            any_order,
            name=any_order.name.replace("causal", "deterministic"),
            ours=fixed_order,
            peers={"any order": any_order.ours},
            gpu_peers={"torch flash": any_order.peers["torch flash"]},
            gates={"any order": 0.8},
        )
    yield case("forward", False)
    if seqlen <= 8192:  # the scores of the reference, in float64 and with their gradients, fill the memory beyond
        yield case("forward-backward", True)


GPU_SIZES = ((512, 128), (2048, 128), (8192, 128), (16384, 128), (8192, 64), (8192, 256))


def decode_case(batch, seqlen, heads, head_dim, dtype, devices=("cpu",)):
    num_heads, num_kv_heads = heads

    def make_inputs(device):
        q = torch.randn(batch, 1, num_heads, head_dim, device=device)
        caches = torch.randn(2, batch, seqlen, num_kv_heads, head_dim, device=device).to(dtype)
        return q.to(dtype), caches[0], caches[1], torch.full((batch,), seqlen, dtype=torch.int32, device=device)

    return Case(
        name=f"decode-B{batch}-S{seqlen}-H{num_heads}/{num_kv_heads}-D{head_dim}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=attention_decode,
        peers={"torch": lambda q, k, v, seqlens: sdpa(q, k, v)},
        gpu_peers={
            "plain": functools.partial(attention_decode, _kernel=PLAIN),
            "tensor cores": functools.partial(attention_decode, _kernel=TENSOR_CORES),
        },
        check=accurate(attention_decode_reference),
        bytes=2 * batch * seqlen * num_kv_heads * head_dim * dtype.itemsize,
        devices=devices,
    )


def decode_cases():
    for dtype in (torch.float32, torch.bfloat16):
        for batch, seqlen, heads, head_dim in ((1, 1024, (8, 2), 64), (1, 4096, (8, 2), 64), (8, 1024, (32, 8), 128)):
            yield decode_case(batch, seqlen, heads, head_dim, dtype)
    shapes = [(1, seqlen, (32, 4)) for seqlen in (4096, 32768, 131072)]
    shapes += [(batch, seqlen, (32, 8)) for batch, seqlen in ((8, 4096), (32, 4096), (64, 2048))]
    shapes += [(batch, 4096, heads) for batch in (1, 8) for heads in ((8, 8), (16, 8), (24, 8))]  # a few rows per key
    for batch, seqlen, heads in shapes:
        yield decode_case(batch, seqlen, heads, 128, torch.bfloat16, devices=("cuda",))


CASES = [*plain_cases(), *masked_cases(), *decode_cases(), *(case for size in GPU_SIZES for case in gpu_cases(*size))]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention(compare, case):
    compare(case)
