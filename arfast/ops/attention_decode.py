"""Attention of the newest tokens of a batch of sequences to their key-value caches, for generation.

The softmax of `arfast.ops.attention`, computed in ranges of keys that are merged at the end (Milakov and Gimelshein
2018, arXiv 1805.02867, section 3.1), so that one long sequence still occupies several cores. Pages: Kwon et al. 2023,
arXiv 2309.06180, section 4.1.
"""

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake
from arfast.ops.attention import attention_reference, statistics_dtype

_ops = torch.ops.arfast
PLAIN, TENSOR_CORES = 1, 2  # for tests and benchmarks, which compare the kernels of the GPU; 0 chooses one


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    beam_slots: torch.Tensor | None = None,
    num_splits: int = 0,
    _kernel: int = 0,
) -> torch.Tensor:
    """Causal attention of the last Tq tokens of every sequence to all its tokens, read from a cache.

    Query t of sequence b stands at position seqlens[b] - Tq + t and sees the positions up to its own.

    Args:
        q: [B, Tq, H, D], float32, bfloat16, float16, or float64 on the CPU; Tq is small; D up to 256. Under autocast it
            is cast to the dtype of the caches.
        k_cache, v_cache: [B, S_max, Hkv, D], position p of sequence b at [b, p]; or paged, [pages, page, Hkv, D]. They
            hold the new tokens already. H % Hkv == 0.
        seqlens: int32 [B], the tokens of every sequence, the new ones included; 0 gives an output of 0. Memory past
            them is never read.
        block_table: int32 [B, pages per sequence]: page block_table[b, p // page] holds position p of sequence b.
            Entries that no query needs may hold anything.
        softmax_scale: positive; 1 / sqrt(D) if None.
        window: a query sees at most this many tokens before its own.
        softcap: replaces the scores by softcap * tanh(scores / softcap).
        sink: [H], the logit of one more key per head whose value is 0.
        beam_slots: int32 [B, S_max], cache indirection for beam search: position p of sequence b is at
            [beam_slots[b, p], p], so that a beam that continues another one shares its past without a copy. The caches
            may then have any number of rows. Entries that no query needs may hold anything.
        num_splits: ranges of keys per sequence; 0: one per 512 keys.

    Returns:
        out [B, Tq, H, D], like q and dense.

    Raises:
        RuntimeError: `attention_decode: <argument> must <rule>, got <actual>`.

    Not differentiable. The result of a sequence depends neither on the batch around it nor on the number of threads.

    Example:
        >>> q, k_cache, v_cache = torch.randn(1, 1, 4, 64), torch.randn(1, 100, 2, 64), torch.randn(1, 100, 2, 64)
        >>> attention_decode(q, k_cache, v_cache, torch.tensor([37], dtype=torch.int32)).shape
        torch.Size([1, 1, 4, 64])
    """
    if needs_grad(q, k_cache, v_cache, sink):
        raise RuntimeError("attention_decode: inputs must not require a gradient (use attention), got one that does")
    if in_autocast(q):
        q = q.to(k_cache.dtype)
    if sink is not None and sink.is_floating_point():
        sink = sink.to(statistics_dtype(q))
    options = (softmax_scale, window, softcap, sink, beam_slots, num_splits, _kernel)
    return _ops.attention_decode(q, k_cache, v_cache, seqlens, block_table, *options)


def attention_decode_reference(
    q, k_cache, v_cache, seqlens, *, block_table=None, softmax_scale=None, window=None, softcap=None, sink=None,
    beam_slots=None, num_splits=0,
):  # fmt: skip
    """The specification of `attention_decode` in plain torch."""
    out = []
    for b, length in enumerate(seqlens.tolist()):
        positions = torch.arange(length, device=q.device)
        rows, columns = torch.full_like(positions, b), positions
        if block_table is not None:
            page = k_cache.shape[1]
            rows, columns = block_table[b, positions // page].long(), positions % page
        elif beam_slots is not None:
            rows = beam_slots[b, :length].long()
        k, v = k_cache[rows, columns][None], v_cache[rows, columns][None]
        options = dict(softmax_scale=softmax_scale, window=window, softcap=softcap, sink=sink)
        out.append(attention_reference(q[b : b + 1], k, v, **options))
    return torch.cat(out) if out else torch.empty_like(q)


@register_fake("attention_decode")
def _(q, *arguments):
    return q.new_empty(q.shape)
