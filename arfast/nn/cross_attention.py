"""Attention of a decoder to what an encoder has made of a source (Vaswani et al., arXiv 1706.03762, section 3.2.3).

The keys and values of a source do not change while its target grows, so they are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from arfast import ops

from .layout import packed_positions


class Source(Protocol):
    """Keys and values of sources in every decoder layer."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """What queries [..., H, D] of a layer read, in the same shape."""


@dataclass(frozen=True)
class PackedSource:
    """Sources of M tokens in all, one behind the other, with targets of N tokens that are packed alike.

    k, v: per layer [M, Hkv, D].
    cu_seqlens, cu_targets: int32 [documents + 1], where each source and each target begins, and the end.
    """

    k: Sequence[Tensor]
    v: Sequence[Tensor]
    cu_seqlens: Tensor
    cu_targets: Tensor

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Queries [N, H, D]: each sees the whole source of its own document, and nothing else."""
        offsets = dict(cu_seqlens_q=self.cu_targets, cu_seqlens_k=self.cu_seqlens)
        return ops.attention(q, self.k[layer], self.v[layer], causal=False, **offsets)

    def padded(self) -> PaddedSource:
        """The same for a decoder that goes on token by token; waits for the device."""
        seqlens = self.cu_seqlens.diff()
        batch, width = len(seqlens), max(1, int(seqlens.max()))
        position, document = packed_positions(self.cu_seqlens, len(self.k[0]))
        places = document * width + position
        k, v = (_padded(tensors, batch, width, places) for tensors in (self.k, self.v))
        rows = torch.arange(batch, dtype=torch.int32, device=seqlens.device)
        return PaddedSource(k, v, seqlens, rows[:, None].expand(batch, width).contiguous())


def _padded(tensors: Sequence[Tensor], batch: int, width: int, places: Tensor) -> Tensor:
    """Per layer [M, Hkv, D] -> [layers, batch, width, Hkv, D]."""
    heads = tensors[0].shape[1:]
    out = tensors[0].new_zeros(len(tensors), batch * width, *heads)
    for layer, tensor in enumerate(tensors):
        out[layer].index_copy_(0, places, tensor)
    return out.view(len(tensors), batch, width, *heads)


@dataclass(frozen=True)
class PaddedSource:
    """Sources of at most S tokens that R sequences read from, several from one where they are beams of an item.

    k, v: [layers, B, S, Hkv, D]; seqlens: int32 [R]; slots: int32 [R, S], the number of the source, in every column:
    `beam_slots` of `ops.attention_decode`.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    slots: Tensor

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Queries [R, T, H, D] of the next T tokens of every sequence."""
        rows, num_tokens = q.shape[:2]
        # One query per row: several would be taken for tokens that stand at the source's end, and see less of it.
        q = q.reshape(rows * num_tokens, 1, *q.shape[2:])
        seqlens, slots = (x.repeat_interleave(num_tokens, dim=0) for x in (self.seqlens, self.slots))
        out = ops.attention_decode(q, self.k[layer], self.v[layer], seqlens, beam_slots=slots)
        return out.view(rows, num_tokens, *out.shape[2:])

    def select(self, rows: Tensor) -> PaddedSource:
        """For sequences that read what sequences rows [R'] read; keys and values stay where they are."""
        return replace(self, seqlens=self.seqlens[rows], slots=self.slots[rows])


class CrossAttention(nn.Module):
    """hidden [N, d] and a source -> [N, d]; without positions and without biases.

    Args:
        hidden_size: d.
        num_heads, num_kv_heads, head_dim: H query heads share Hkv key-value heads (H % Hkv == 0) of D channels.
        layer: index of this layer in the source.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, layer: int = 0):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer = num_heads, num_kv_heads, head_dim, layer
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def keys_and_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Of encoded sources [M, d]: [M, Hkv, D] each."""
        heads = (self.num_kv_heads, self.head_dim)
        return self.k_proj(encoded).unflatten(-1, heads), self.v_proj(encoded).unflatten(-1, heads)

    def forward(self, hidden: Tensor, shape: tuple[int, ...], source: Source) -> Tensor:
        """shape: (N,) for packed documents, (batch, new tokens) for sequences in a cache."""
        q = self.q_proj(hidden).view(*shape, self.num_heads, self.head_dim)
        out = source.attend(self.layer, q)
        return self.o_proj(out.reshape(hidden.shape[0], self.num_heads * self.head_dim))
