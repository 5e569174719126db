"""What this machine reaches: the bandwidth of a copy and the rate of torch's matrix product, measured when asked; and
what its maker says."""

import functools
import time
from collections.abc import Callable

import torch

BLOCK_SECONDS = 0.03
BLOCKS = 5
# FLOP/s of dense products of 16-bit matrices: NVIDIA's data sheets. The first name found in the device's counts.
NOMINAL = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12}


def share_of_peak(bytes: int, flops: int, seconds: float, device: str, dtype: torch.dtype) -> tuple[float, str] | None:
    """The larger of achieved / measured bandwidth (for as many bytes) and achieved / measured matrix-product rate, and
    which it is: "copy" or "product"."""
    shares = []
    if bytes:
        # A power of two near the traffic of the op, so that both are in the same cache; DRAM beyond 256 MiB.
        bandwidth = copy_bandwidth(device, 1 << max(20, min(28, (bytes // 2).bit_length() - 1)))
        shares.append((bytes / seconds / bandwidth, "copy"))
    if flops:
        shares.append((flops / seconds / matmul_rate(device, dtype), "product"))
    return max(shares, default=None)


@functools.cache
def copy_bandwidth(device: str, size: int) -> float:
    """Bytes read plus bytes written per second by a copy of `size` bytes."""
    source, target = (torch.randint(0, 100, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def nominal_matmul_rate(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products on paper; None where that is not known."""
    if device != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in NOMINAL.items() if known in name), None)


def _best_seconds(function: Callable, device: str) -> float:
    best = float("inf")
    for _ in range(BLOCKS):
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < BLOCK_SECONDS:
            function()
            calls += 1
            if device == "cuda":
                torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return best
