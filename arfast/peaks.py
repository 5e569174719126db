"""What a device reaches here: the bandwidth of a copy and the rate of torch's matrix product, on random data, measured
once per process."""

import functools
import time
from collections.abc import Callable

import torch

_BLOCK_SECONDS, _BLOCKS = 0.03, 5  # enough of them to find a quiet moment
_MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}


def copy_bandwidth(device: torch.device | str, size: int = 1 << 28) -> float:
    """Bytes read plus bytes written per second by a copy of ``size`` bytes.

    >>> copy_bandwidth("cpu", 1 << 16) > 0
    True
    """
    return _copy_bandwidth(torch.device(device), size, torch.get_num_threads())


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOPs per second of the product of two large square matrices.

    >>> matmul_rate("cpu", torch.float32) > 0
    True
    """
    return _matmul_rate(torch.device(device), dtype, torch.get_num_threads())


@functools.cache
def _copy_bandwidth(device: torch.device, size: int, num_threads: int) -> float:
    generator = _generator(device)
    source, target = (
        torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator) for _ in range(2)
    )
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    size = _MATRIX_SIZES.get(device.type, 2048)
    generator = _generator(device)
    a, b, out = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(3))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def _generator(device: torch.device) -> torch.Generator:
    """Its own: a run that measures what it is divided by draws the same numbers as one that knows it already."""
    return torch.Generator(device).manual_seed(0)


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call in the fastest of some blocks of calls."""
    best = float("inf")
    for _ in range(_BLOCKS):
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < _BLOCK_SECONDS:
            function()
            calls += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best
