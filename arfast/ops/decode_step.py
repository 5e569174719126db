"""One decode step of a dense model of the Llama family in a single call on the CPU (Touvron et al. 2023, arXiv
2302.13971, section 2.2).

A step of a small model is dozens of ops of a few microseconds, and calling them takes longer than reading the weights.
On a GPU a CUDA graph of the model's own kernels does this: see `arfast.generate.DecodeStep`.
"""

from collections.abc import Sequence

import torch

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.attention_decode import attention_decode_reference
from arfast.ops.rms_norm import rms_norm_reference
from arfast.ops.rotary import rotary_reference
from arfast.ops.swiglu import swiglu_reference

_ops = torch.ops.arfast


def decode_step(
    tokens: torch.Tensor,
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens: torch.Tensor,
    *,
    num_heads: int,
    eps: float,
    windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    beam_slots: torch.Tensor | None = None,
    advance: bool = False,
    with_tile_sums: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Store new tokens in the caches, one per sequence or a few; the logits that follow each.

    Args:
        tokens: int64 [B], or [B, T], T in turn for every sequence; in [0, V).
        weights: contiguous, of one dtype, float32, bfloat16 or float16, on the CPU, in this order: the embedding
            [V, d], the final norm [d], the output head [V, d] (a tied one is the embedding again); then for each layer
            the input norm [d], the projections of queries [H D, d], keys [Hkv D, d], values [Hkv D, d] and output
            [d, H D], the post-attention norm [d], gate [I, d], up [I, d] and down [d, I]; the biases of queries, keys
            and values with qkv_bias, that of the output with o_bias, the norms [D] of each query and key with qk_norm.
        cos, sin: float32 [positions, D / 2], as for `rotary`; contiguous.
        k_cache, v_cache: [L, rows, S, Hkv, D] in the dtype of the weights: position p of sequence b at [:, b, p].
            Changed in place, nothing but the new tokens; only the channels must be dense.
        seqlens: int32 [B], the tokens of every sequence, the new ones included; at least T, at most S and positions.
        num_heads: H.
        eps: of every RMSNorm.
        windows: per layer, how many tokens before itself a token sees; None: all.
        qkv_bias, o_bias, qk_norm: what the weights hold beside those of all models.
        beam_slots: int32 [B, S]: position p of sequence b is at [:, beam_slots[b, p], p], those of the new tokens
            too, which no other sequence of the batch may read or write. Entries past seqlens may hold anything.
        advance: seqlens, contiguous, come without the new tokens, and the call adds them when it has stored them.
        with_tile_sums: also return what `beam_step` can choose from with few looks at the logits.

    Returns:
        logits [B, V] or [B, T, V] in the dtype of the weights. With with_tile_sums a tuple of them and float32
        [2, tiles, B] or [2, tiles, B, T]: in every tile of 256 columns, the last one shorter, the maximum and the sum
        of exp(logit - maximum).

    Raises:
        IndexError: `decode_step: tokens must be in [0, vocab_size=V), got <actual>`.
        RuntimeError: `decode_step: <argument> must <rule>, got <actual>`; also on a GPU.

    Activations are float32 between the layers, whatever the dtype of the weights; products round them to bfloat16 where
    the machine multiplies that itself (AVX512_BF16), subnormal numbers counting as zero. Not differentiable. The result
    of a sequence depends neither on the batch around it nor on the number of threads, and that of a token not on how
    many are stored at a time. A thread keeps working memory of about 4 B T (3 d + 2 (H + Hkv) D + 3 I) bytes for its
    next call.

    Example:
        >>> head, norm, square, wide = torch.randn(11, 8), torch.ones(8), torch.randn(8, 8), torch.randn(16, 8)
        >>> layer = [norm, square, square, square, square, norm, wide, wide, torch.randn(8, 16)]
        >>> angles = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.1])
        >>> k_cache, v_cache = torch.zeros(2, 1, 1, 32, 2, 4)
        >>> tables, seqlens = (angles.cos(), angles.sin()), torch.tensor([1], dtype=torch.int32)
        >>> weights = [head, norm, head, *layer]
        >>> decode_step(torch.tensor([3]), weights, *tables, k_cache, v_cache, seqlens, num_heads=2, eps=1e-5).shape
        torch.Size([1, 11])
    """
    if needs_grad(*weights, k_cache, v_cache):
        raise RuntimeError("decode_step: inputs must not require a gradient (use torch.no_grad), got one that does")
    limits = [-1 if window is None else window for window in windows or [None] * len(k_cache)]
    caches = (cos, sin, k_cache, v_cache, seqlens, beam_slots)
    try:
        logits, tile_sums = _ops.decode_step(
            tokens, weights, *caches, limits, num_heads, eps, qkv_bias, o_bias, qk_norm, advance, with_tile_sums
        )
        return (logits, tile_sums) if with_tile_sums else logits
    except RuntimeError as error:
        if "tokens must be in [" in str(error):
            raise IndexError(str(error)) from None
        raise


def decode_step_reference(
    tokens, weights, cos, sin, k_cache, v_cache, seqlens, *, num_heads, eps, windows=None, qkv_bias=False, o_bias=False,
    qk_norm=False, beam_slots=None, advance=False, with_tile_sums=False,
):  # fmt: skip
    """The specification of `decode_step` in plain torch."""
    embedding, norm, head, *rest = weights
    batch, head_dim, num_tokens = len(tokens), k_cache.shape[-1], tokens[:1].numel()
    seqlens = seqlens.add_(num_tokens) if advance else seqlens
    places = seqlens.long()[:, None] - num_tokens + torch.arange(num_tokens)  # [B, T]
    cos, sin, sequences = cos[places.flatten()], sin[places.flatten()], torch.arange(batch)[:, None]
    rows = sequences if beam_slots is None else beam_slots[sequences, places].long()
    hidden, per_layer = embedding[tokens.flatten()], len(rest) // len(k_cache)
    for layer, window in enumerate(windows or [None] * len(k_cache)):
        norm_1, *qkv, o, norm_2, gate, up, down = rest[layer * per_layer :][:9]
        extra = rest[layer * per_layer + 9 : (layer + 1) * per_layer]
        normed = rms_norm_reference(hidden, norm_1, eps)
        biases = extra[:3] if qkv_bias else [None] * 3
        q, k, v = (torch.nn.functional.linear(normed, w, b) for w, b in zip(qkv, biases, strict=True))
        q, k, v = (x.view(batch, num_tokens, -1, head_dim) for x in (q, k, v))
        if qk_norm:
            q, k = (rms_norm_reference(x, weight, eps) for x, weight in zip((q, k), extra[-2:], strict=True))
        k_cache[layer, rows, places] = rotary_reference(k, cos, sin)
        v_cache[layer, rows, places] = v
        options = dict(window=window, beam_slots=beam_slots)
        out = attention_decode_reference(
            rotary_reference(q, cos, sin), k_cache[layer], v_cache[layer], seqlens, **options
        )
        hidden = hidden + torch.nn.functional.linear(
            out.flatten(2).flatten(0, 1), o, extra[3 * qkv_bias] if o_bias else None
        )
        normed = rms_norm_reference(hidden, norm_2, eps)
        hidden = hidden + swiglu_reference(normed @ gate.mT, normed @ up.mT) @ down.mT
    logits = (rms_norm_reference(hidden, norm, eps) @ head.mT).view(*tokens.shape, len(head))
    return (logits, tile_sums_reference(logits)) if with_tile_sums else logits


def tile_sums_reference(logits):
    """The maximum and the sum of exp(logit - maximum) in every tile of 256 columns."""
    tiles = logits.to(torch.promote_types(logits.dtype, torch.float32)).split(256, dim=-1)
    maxima = torch.stack([tile.amax(-1) for tile in tiles])
    sums = torch.stack([(tile - tile.amax(-1, keepdim=True)).exp().sum(-1) for tile in tiles])
    return torch.stack([maxima, sums])


@register_fake("decode_step")
def _(
    tokens, weights, cos, sin, k_cache, v_cache, seqlens, beam_slots, windows, num_heads, eps, qkv_bias, o_bias,
    qk_norm, advance=False, with_tile_sums=False,
):  # fmt: skip
    vocab_size = weights[0].shape[0]
    shape = (2, (vocab_size + 255) // 256, *tokens.shape) if with_tile_sums else (0,)
    return weights[0].new_empty(*tokens.shape, vocab_size), weights[0].new_empty(shape, dtype=torch.float32)
