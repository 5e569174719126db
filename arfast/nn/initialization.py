"""Normal deviates as a pure function of (seed, parameter name, element index): the same values under every sharding.

Counter-based generator: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
over the counters 0, 1, 2, ... with a key hashed from seed and name; then Box and Muller (1958) in float64.
"""

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_CHUNK = (
    1 << 20
)  # elements per pass: bounds the temporaries to a few times 8 MiB (6 ns per element on 2 cores, 2026-11)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer: torch wraps int64 arithmetic, but has little uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(state: Tensor) -> Tensor:
    """53 uniform bits per 64-bit state: the output function of SplitMix64."""
    state = (state ^ _shift_right(state, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    state = (state ^ _shift_right(state, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shift_right(state ^ _shift_right(state, 31), 11)


def _normal_chunk(key: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the stream of `key`, float64: elements 2i and 2i + 1 use the counters 2i and 2i + 1."""
    first, last = start // 2, (stop + 1) // 2
    state = torch.arange(first, last, dtype=torch.int64).mul_(_signed(2 * _GAMMA)).add_(_signed(key + _GAMMA))
    radius = (_mix(state) + 1).double().mul_(2.0**-53).log_().mul_(-2.0).sqrt_()
    angle = _mix(state.add_(_signed(_GAMMA))).double().mul_(2.0**-52 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.view(-1)[start % 2 : start % 2 + stop - start]


@torch.no_grad()
def normal_(tensor: Tensor, seed: int, name: str, std: float, start: int = 0) -> Tensor:
    """Fill `tensor` with elements [start, start + tensor.numel()) of the normal stream of (seed, name).

    Drawn on the CPU in float64 and rounded once, so that a slice of a parameter, on whatever rank or device, has the
    bits that the whole has there (between instruction sets the last bit of log and cos, hence of a value, may differ).

    Args:
        tensor: a contiguous floating-point tensor, or a slice of one; filled in place.
        seed: any integer.
        name: the parameter's name.
        std: standard deviation.
        start: flat index in the parameter of the tensor's first element.

    Example:
        >>> whole = normal_(torch.empty(10), seed=0, name="w", std=1.0)
        >>> part = normal_(torch.empty(4), seed=0, name="w", std=1.0, start=3)
        >>> torch.equal(part, whole[3:7])
        True
    """
    if not tensor.is_contiguous():
        raise ValueError(f"normal_: tensor must be contiguous, got strides {tuple(tensor.stride())}")
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    flat = tensor.view(-1)
    for offset in range(0, flat.numel(), _CHUNK):
        count = min(_CHUNK, flat.numel() - offset)
        flat[offset : offset + count] = _normal_chunk(key, start + offset, start + offset + count).mul_(std)
    return tensor
