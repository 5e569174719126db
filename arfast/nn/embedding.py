"""Vectors of tokens, in the dtype that the layers compute in."""

import torch
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """Token ids of any shape [...] -> their rows of the weight, [..., d]; under autocast in its dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return in_compute_dtype(super().forward(ids))


def in_compute_dtype(hidden: Tensor) -> Tensor:
    """Under autocast in its dtype, so that the whole residual stream is: half the traffic of letting float32 embeddings
    promote it."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
