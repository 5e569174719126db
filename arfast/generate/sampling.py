"""Drawing tokens for sequences that each have their own stream of random numbers.

The randomness is a pure function of (seed, sample, step), so a sequence is the same alone and in any batch.
"""

import torch
from torch import Tensor

from arfast import ops


class Sampler:
    """Draws the next tokens of sequences; every call is the next step of all.

    Args:
        streams: (seed, sample) of every row: another sample of the same prompt and seed is independent of the first.
            Integers of any size, taken modulo 2^64.
        device: of the logits.
        filters: temperature, top_k, top_p and min_p of `arfast.ops.sample`.

    Example:
        >>> sampler = Sampler([(7, 0), (8, 0)], temperature=0.8, top_k=50)
        >>> tokens, logprobs = sampler(torch.randn(2, 100))
        >>> tokens.shape
        torch.Size([2])
    """

    def __init__(self, streams: list[tuple[int, int]], device: torch.device | str = "cpu", **filters: float):
        self.generator_state = generator_state_of(streams, device)
        self.filters = filters

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] -> (tokens int64 [B], log-probabilities float32 [B])."""
        return ops.sample(logits, **self.filters, generator_state=self.generator_state)


def generator_state_of(streams: list[tuple[int, int]], device: torch.device | str = "cpu") -> Tensor:
    """int64 [R, 3], as `arfast.ops.sample` takes it, at step 0."""
    rows = [(_as_int64(seed), _as_int64(sample), 0) for seed, sample in streams]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _as_int64(number: int) -> int:
    """The same modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
