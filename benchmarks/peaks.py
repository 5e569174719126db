"""How much of its device a timing has used: of what a copy or torch's matrix product reaches there, and of what the
device's maker says."""

import torch

from arfast.peaks import copy_bandwidth, matmul_rate

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


def nominal_matmul_rate(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products on paper; None where that is not known."""
    if device != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in NOMINAL.items() if known in name), None)
