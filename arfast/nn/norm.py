"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

import contextlib

import torch
from torch import Tensor, nn

from arfast import ops

from .recompute import recomputed


class RMSNorm(nn.Module):
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension; with a residual also returns x + residual.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.

    Example:
        >>> RMSNorm(8)(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual=residual)

    def recomputed(self, normed: Tensor, x: Tensor) -> contextlib.AbstractContextManager:
        """Layers called within this context do not keep `normed`, which is the norm of x [..., size]; see
        `arfast.nn.recompute.recomputed`."""
        return recomputed(normed, ops.rms_norm, x, self.weight, self.eps)
