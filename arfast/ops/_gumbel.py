"""The Gumbel noise of csrc/core/gumbel.h in plain torch, bit by bit: int64 in which the numbers of 64 bits wrap."""

import torch
from torch import Tensor

_P = (774540888, 193649402, 64260319, 26358548, 1840705, 19010456, -13088702, 7170050)  # -log2(1 - h / 2) / h
_LOG2 = (1549081704, -774500808, 515464434, -379454599, 274887753, -166806946, 68297834, -13227757)  # log2(1 + f) / f


def gumbel_noise(generator_state: Tensor, count: int) -> Tensor:
    """float32 [R, count]: the noise of candidates [0, count) of rows [R, 3] of (seed, sample, step)."""
    seed, sample, step = generator_state[:, :, None].unbind(1)
    stream = _mix(_mix(_mix(seed) + sample) + step)
    bits = _mix(stream + torch.arange(count, device=stream.device)) | 1
    rest, zeros = _normalised(bits)
    rest = -rest
    h = _shifted(rest - 1, 31)
    rest, small = _normalised(rest)
    value = _shifted(rest, 32) * _polynomial(_P, h)
    whole = (zeros << 56) + (value >> (small + 5).clamp(max=63))
    unit = torch.where(zeros > 0, -56, -61 - small)
    value, top = _normalised(torch.where(zeros > 0, whole, value))
    f = _shifted(value << 1, 32)
    log2 = (63 - top + unit) * 2**24 + ((f * _polynomial(_LOG2, f) >> 32) >> 6)
    return ((8871228 - log2) * 744261118 >> 30).float() / 2**24


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count without the sign."""
    return x >> count & (1 << 64 - count) - 1


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x without its leading zeros, and how many they were."""
    zeros = torch.zeros_like(x)
    for count in (32, 16, 8, 4, 2, 1):
        empty = _shifted(x, 64 - count) == 0
        x, zeros = torch.where(empty, x << count, x), zeros + count * empty
    return x, zeros


def _polynomial(coefficients: tuple[int, ...], x: Tensor) -> Tensor:
    """In units of 2^-30 of x in units of 2^-32; products are rounded towards zero."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = coefficient + torch.where(value < 0, -(x * -value >> 32), x * value >> 32)
    return value


def _mix(state: Tensor) -> Tensor:
    """One step of SplitMix64."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _signed(x: int) -> int:
    return x - (1 << 64)
