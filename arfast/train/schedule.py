"""Learning rate as a pure function of the tokens consumed, so that a resumed run needs no scheduler state.

Linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2), then one cosine half-period to a floor (Loshchilov
and Hutter 2017, arXiv:1608.03983, equation 5), or a straight line to it, or the peak; at the end, where it is asked
for, a straight line to zero (Llama 3, arXiv:2407.21783, section 3.4.3; after a constant rate: Hu et al.,
arXiv:2404.06395).
"""

from __future__ import annotations

import math

SHAPES = ("cosine", "linear", "constant")


def learning_rate(
    tokens: int,
    shape: str = "cosine",
    *,
    peak: float,
    floor: float,
    warmup_tokens: int,
    total_tokens: int,
    decay_tokens: int = 0,
) -> float:
    """Learning rate of the optimizer step that ends after ``tokens`` tokens.

    ``peak * tokens / warmup_tokens`` up to ``warmup_tokens``; then, where ``progress`` goes from 0 to 1 at
    ``total_tokens - decay_tokens``:

    * "cosine": ``floor + (peak - floor) * (1 + cos(pi * progress)) / 2``;
    * "linear": ``peak + (floor - peak) * progress``;
    * "constant": ``peak``;

    and over the last ``decay_tokens`` in a straight line to 0. After ``total_tokens`` what it was there.

    >>> schedule = dict(peak=1.0, floor=0.1, warmup_tokens=100, total_tokens=1100)
    >>> learning_rate(50, **schedule), round(learning_rate(600, **schedule), 12)
    (0.5, 0.55)
    >>> learning_rate(1000, "constant", **schedule, decay_tokens=200)
    0.5
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    end = total_tokens - decay_tokens
    progress = (min(tokens, end) - warmup_tokens) / (end - warmup_tokens) if end > warmup_tokens else 1.0
    if shape == "constant":
        rate = peak
    elif progress >= 1.0:
        rate = floor if end > warmup_tokens or not decay_tokens else peak
    elif shape == "linear":
        rate = peak + (floor - peak) * progress
    else:
        rate = floor + (peak - floor) * (1.0 + math.cos(math.pi * progress)) / 2.0
    if tokens > end and decay_tokens:
        rate *= max(0, total_tokens - tokens) / decay_tokens
    return rate
