"""How the tokens of a forward pass are arranged: what every layer needs to know beside the hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_cache import KVCache


@dataclass(slots=True)
class TokenLayout:
    """Computed once per forward pass, read by every layer.

    shape: (batch, seqlen), or (num_tokens,) for packed documents.
    cos, sin: rotary tables, float32 [P, D / 2] with P = seqlen or the number of tokens.
    cu_seqlens: int32 [documents + 1], the documents' boundaries when packed.
    cache: where keys and values go, and come from.
    """

    shape: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor | None = None
    cache: KVCache | None = None


def packed_positions(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Position within its document, and the document's index, of every token of a packed batch: int64 [num_tokens]."""
    lengths = cu_seqlens.diff()
    documents = torch.arange(len(lengths), device=lengths.device)
    document = torch.repeat_interleave(documents, lengths, output_size=num_tokens)
    return torch.arange(num_tokens, device=lengths.device) - cu_seqlens[document], document
