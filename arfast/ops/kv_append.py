"""Appending new tokens to a key-value cache in one pass, with the rotation of queries and keys (Su et al. 2021, arXiv
2104.09864, equation 34). Pages: Kwon et al. 2023, arXiv 2309.06180, section 4.1.

Without it a decode step takes four launches per layer: two rotations and two copies.
"""

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake
from arfast.ops.rotary import rotary_reference

_ops = torch.ops.arfast


def kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    beam_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write keys, rotated, and values of the last T tokens of every sequence into the caches; returns q, rotated.

    Token t of sequence b goes to position seqlens[b] - T + t: `attention_decode` takes the result, the caches, seqlens,
    block_table and beam_slots as they are.

    Args:
        q: [B, T, H, D], D even, float32, bfloat16, float16, or float64 on the CPU.
        k, v: [B, T, Hkv, D]. Like q they may be parts of one projection: only the channels must be dense. Under
            autocast q, k and v are cast to the dtype of the caches.
        cos, sin: float32 [P, D / 2], rows for the B * T tokens in turn, as for `rotary`, whose bits these are.
        k_cache, v_cache: [B, S_max, Hkv, D], position p of sequence b at [b, p]; or paged, [pages, page, Hkv, D].
            Changed in place, nothing but the new tokens; the channels must be dense.
        seqlens: int32 [B], the tokens of every sequence, the new ones included.
        block_table: int32 [B, pages per sequence]: page block_table[b, p // page] holds position p of sequence b.
            Entries of pages without a new token may hold anything; two tokens must not have the same place.
        beam_slots: int32 [B, S_max], cache indirection for beam search: position p of sequence b is at
            [beam_slots[b, p], p] of caches with any number of slots. Entries of positions without a new token may hold
            anything; two tokens must not have the same place. Not with block_table. The caches may overlap themselves:
            a view of tokens [N, Hkv, D] with the strides (Hkv * D, Hkv * D, D, 1) has position p of slot s at token
            s + p.

    Returns:
        [B, T, H, D], contiguous.

    Raises:
        RuntimeError: `kv_append: <argument> must <rule>, got <actual>`. Where a GPU finds a token without a place in
            the caches, it writes nothing for it.

    Not differentiable.

    Example:
        >>> q, k, v = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 2, 64), torch.randn(1, 1, 2, 64)
        >>> k_cache, v_cache = torch.zeros(2, 1, 100, 2, 64)
        >>> angle = 36 * 10_000.0 ** -(torch.arange(32.0)[None] / 32)
        >>> seqlens = torch.tensor([37], dtype=torch.int32)
        >>> kv_append(q, k, v, angle.cos(), angle.sin(), k_cache, v_cache, seqlens).shape
        torch.Size([1, 1, 4, 64])
    """
    if needs_grad(q, k, v, k_cache, v_cache):
        raise RuntimeError("kv_append: inputs must not require a gradient (use torch.no_grad), got one that does")
    if in_autocast(q):
        q, k, v = (x.to(k_cache.dtype) for x in (q, k, v))
    return _ops.kv_append(q, k, v, cos, sin, k_cache, v_cache, seqlens, block_table, beam_slots)


def kv_append_reference(q, k, v, cos, sin, k_cache, v_cache, seqlens, *, block_table=None, beam_slots=None):
    """The specification of `kv_append` in plain torch."""
    batch, num_tokens = k.shape[:2]
    positions = seqlens[:, None] - num_tokens + torch.arange(num_tokens, device=k.device)
    rows, columns = torch.arange(batch, device=k.device)[:, None], positions
    if block_table is not None:
        page = k_cache.shape[1]
        rows, columns = block_table.gather(1, positions // page).long(), positions % page
    elif beam_slots is not None:
        rows = beam_slots.gather(1, positions).long()
    k_cache[rows, columns] = rotary_reference(k, cos, sin)
    v_cache[rows, columns] = v
    return rotary_reference(q, cos, sin)


@register_fake("kv_append")
def _(q, *arguments):
    return q.new_empty(q.shape)
