"""Sequences split over ranks: every rank has the queries of its own tokens, and gathers the keys and values of all.

As in the training of Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2): the sequence is cut into 2 C
pieces, of which rank r of C has the pieces r and 2 C - 1 - r, so that under a causal mask all ranks have the same work.
A piece of queries [a, b) sees keys of [0, b) only, and the last query the last key, which is the mask of
`arfast.ops.attention` as it stands: one call per piece, over a slice of the keys, gives the exact rows of the whole
attention, with documents, windows and grouped heads. No partial results are combined. Gathering costs the traffic of a
ring without its latencies; keys and values are the small part of the activations when heads are grouped. torch's own
context_parallel replaces scaled_dot_product_attention alone, which knows no packed documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arfast import ops
from arfast.models.decoder import Decoder
from arfast.nn import Attention, KVCache, TokenLayout
from arfast.nn.layout import packed_positions

from .collectives import Group, gather_rows, gather_rows_whole
from .tensor_parallel import TensorRegion


class ContextPlan:
    """Which tokens of a batch [B, T] belong to this rank, and what attention needs to know about all of them.

    Args:
        batch_size, seqlen: B and T; packed documents are one row of B * T.
        group: the ranks that share the tokens.
        cu_seqlens: int32 [documents + 1], boundaries of packed documents, or None.
        position_ids: int64 [B, T] or None: counted from the start of the row or document.
        device: of the tokens.

    Raises:
        ValueError: `CausalLM: input_ids must <rule>, got <actual>`.
    """

    def __init__(
        self,
        batch_size: int,
        seqlen: int,
        group: Group,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        if cu_seqlens is not None:
            batch_size, seqlen = 1, batch_size * seqlen
        pieces = 2 * group.size
        if seqlen % pieces:
            what = "input_ids must have a sequence length (packed: a number of tokens) that is a multiple of"
            raise ValueError(f"CausalLM: {what} 2 * context = {pieces}, got {seqlen}")
        self.group, self.batch_size, self.seqlen, self.cu_seqlens = group, batch_size, seqlen, cu_seqlens
        self.length = seqlen // pieces
        self.pieces = (group.rank, pieces - 1 - group.rank)
        if position_ids is not None:
            positions, self.max_position = position_ids.reshape(batch_size, seqlen), None
        else:
            self.max_position = seqlen
            if cu_seqlens is None:
                positions = torch.arange(seqlen, device=device).expand(batch_size, seqlen)
            else:
                positions = packed_positions(cu_seqlens, seqlen)[0][None]
        self.positions = self.own(positions)

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's part [B, 2 T / (2 C), ...] of a tensor about all tokens [B, T, ...], or of the same number."""
        whole = tokens.reshape(self.batch_size, 2 * self.group.size, self.length, *tokens.shape[2:])
        return torch.cat([whole[:, piece] for piece in self.pieces], dim=1)

    def gather(self, own: Tensor, gather=gather_rows) -> Tensor:
        """The parts [B, 2 T / (2 C), ...] of every rank, put together: [B, T, ...]."""
        ranks = gather(own[None], self.group)  # [C, B, 2 T / (2 C), ...]
        ranks = ranks.unflatten(2, (2, self.length))
        first, last = ranks[:, :, 0], ranks[:, :, 1].flip(0)
        return torch.cat([first, last]).transpose(0, 1).flatten(1, 2)

    def gather_whole(self, own: Tensor) -> Tensor:
        """As `gather`, for work that every rank does alike."""
        return self.gather(own, gather_rows_whole)


@dataclass(slots=True)
class ContextLayout(TokenLayout):
    """A TokenLayout of this rank's tokens. cu_seqlens is None: the documents are in the plan."""

    plan: ContextPlan | None = None


class ContextParallelDecoder(Decoder):
    """A Decoder of this rank's tokens: it takes a ContextPlan where Decoder takes cu_seqlens and positions."""

    def _layout(
        self, input_ids: Tensor, plan: ContextPlan, position_ids: Tensor | None, cache: KVCache | None
    ) -> ContextLayout:
        if plan.cu_seqlens is None:
            shape = (plan.batch_size, 2 * plan.length)
            cos, sin = self.rotary(
                plan.positions if plan.max_position is None else plan.positions[0], plan.max_position
            )
        else:
            shape = (2 * plan.length,)
            cos, sin = self.rotary(plan.positions, plan.max_position)
        return ContextLayout(shape, cos, sin, plan=plan)


class ParallelAttention(Attention):
    """Attention of this rank's heads (o_proj is a RowParallelLinear) and of this rank's tokens."""

    region: TensorRegion

    def forward(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        return super().forward(self.region.enter(hidden), layout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        if not isinstance(layout, ContextLayout):
            return super()._attend(q, k, v, layout)
        q, k = ops.rotary(q, layout.cos, layout.sin), ops.rotary(k, layout.cos, layout.sin)
        return context_attention(q, k, v, layout.plan, window=self.window)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of this rank's tokens to those of all ranks.

    Args:
        q, k, v: of this rank's tokens in the order of `ContextPlan.own`, [B, n, H, D] and [B, n, Hkv, D]; packed
            [n, H, D] and [n, Hkv, D].
        softmax_scale, window, softcap: see `arfast.ops.attention`.

    Returns:
        [B, n, H, D] or [n, H, D]: the rows of `arfast.ops.attention` over all tokens.

    The keys and values of all tokens are kept for the backward pass; activation checkpointing gathers them again.
    """
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
    keys, values = plan.gather(torch.stack([k, v], dim=2)).unbind(2)  # [B, T, Hkv, D] each
    pieces = q.unflatten(1, (2, plan.length)).unbind(1)
    outs = []
    for queries, piece in zip(pieces, plan.pieces, strict=True):
        begin, end = piece * plan.length, (piece + 1) * plan.length
        options = dict(softmax_scale=softmax_scale, window=window, softcap=softcap)
        if plan.cu_seqlens is None:
            outs.append(ops.attention(queries, keys[:, :end], values[:, :end], **options))
            continue
        # Documents that end before the piece have keys and no queries, later ones neither: the host knows all shapes.
        options |= dict(
            cu_seqlens_q=plan.cu_seqlens.clamp(begin, end) - begin,
            cu_seqlens_k=plan.cu_seqlens.clamp(max=end),
            max_seqlen_q=plan.length,
            max_seqlen_k=end,
        )
        outs.append(ops.attention(queries[0], keys[0, :end], values[0, :end], **options))
    return torch.cat(outs, dim=0 if packed else 1)
