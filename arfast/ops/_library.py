"""Loads the compiled library and holds the few lines that every op's Python side needs."""

import torch

try:
    from arfast import _C  # noqa: F401  (loading it registers torch.ops.arfast.*)
except ImportError as error:
    raise ImportError(
        f"arfast: the compiled library does not load with torch {torch.__version__}: {error}. "
        "Build it with `pip install .` in the environment whose torch (>= 2.10) you use."
    ) from error


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record the call: an autograd.Function costs several microseconds, so inference skips it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return torch.is_autocast_enabled(tensor.device.type)
