"""Learning rate as a pure function of the tokens consumed, so that a resumed run needs no scheduler state.

Linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2), then one cosine half-period (Loshchilov and Hutter
2017, arXiv:1608.03983, equation 5) to a floor that is held from then on.
"""

from __future__ import annotations

import math


def warmup_cosine(tokens: int, *, peak: float, floor: float, warmup_tokens: int, total_tokens: int) -> float:
    """Learning rate of the optimizer step that ends after ``tokens`` tokens.

    ``peak * tokens / warmup_tokens`` up to ``warmup_tokens``; then
    ``floor + (peak - floor) * (1 + cos(pi * progress)) / 2`` where ``progress`` goes from 0 to 1 at ``total_tokens``.

    >>> warmup_cosine(50, peak=1.0, floor=0.1, warmup_tokens=100, total_tokens=1100)
    0.5
    >>> round(warmup_cosine(600, peak=1.0, floor=0.1, warmup_tokens=100, total_tokens=1100), 12)
    0.55
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    if tokens >= total_tokens:
        return floor
    progress = (tokens - warmup_tokens) / (total_tokens - warmup_tokens)
    return floor + (peak - floor) * (1.0 + math.cos(math.pi * progress)) / 2.0
