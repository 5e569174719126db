"""Sums over what stands at and before each place, for all places at once: s[t] = sum of x[t - w + 1 .. t].

Parallel prefix sums by doubling (Hillis and Steele, "Data parallel algorithms", CACM 1986): the sum of 2^k values that
ends at t is the one of 2^(k-1) that ends there plus the one that ends 2^(k-1) before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ENDLESS = 1 << 40


def shift(x: Tensor, steps: int, positions: Tensor | None = None) -> Tensor:
    """x[:, t - steps] at every place t, 0 where that lies before the start of the row or document.

    Args:
        x: [B, T, d].
        steps: at least 0.
        positions: int64 [B * T], places counted from the start of the document; None: each row is one.
    """
    if steps == 0:
        return x
    x = F.pad(x[:, :-steps], (0, 0, min(steps, x.shape[1]), 0))
    return x if positions is None else x.masked_fill((positions < steps).view(*x.shape[:2], 1), 0)


def trailing_sums(x: Tensor, window: int | None = None, positions: Tensor | None = None) -> Tensor:
    """Sums of the last `window` values at every place, of all since the start of the row or document without one.

    Nothing is ever subtracted, and every sum is a tree of depth log2(window): the relative error of a sum of positive
    values is at most that many roundings, where a difference of two running totals would lose what the totals have
    grown to. A sum is the same, to the last bit, whatever stands outside its window or its document. Time is
    O(B T d log(window)).

    Args:
        x: [B, T, d]; 16-bit values are summed in float32.
        window: at least 1; None: no limit.
        positions: as for `shift`.

    Returns:
        [B, T, d], float32, or float64 for float64.

    Example:
        >>> trailing_sums(torch.ones(1, 5, 1), window=3).flatten().tolist()
        [1.0, 2.0, 3.0, 3.0, 3.0]
    """
    block, size = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    total, taken, seqlen, window = block, 0, x.shape[1], window or _ENDLESS
    while taken < window:  # block: sums of `size` values; total: of the last `taken`, the binary digits of window
        if window & size:
            if taken == 0:
                total = block
            elif taken < seqlen:
                total = total + shift(block, taken, positions)
            taken += size
        if size < seqlen:
            block = block + shift(block, size, positions)
        size *= 2
    return total
