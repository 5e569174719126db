"""Loads the compiled library and holds the few lines that every op's Python side needs."""

import functools
from pathlib import Path

import torch

try:
    from arfast import _C  # noqa: F401  (loading it registers torch.ops.arfast.*)
except ImportError as error:
    folder = Path(__file__).resolve().parents[1]
    if not any(folder.glob("_C.*")):
        raise ImportError(
            f"arfast: {folder} has no compiled library. Build it with `pip install .`; if that was done, Python found "
            "this folder first: start elsewhere, and with `pytest` instead of `python -m pytest`, which looks here."
        ) from error
    raise ImportError(
        f"arfast: the compiled library does not load with torch {torch.__version__}: {error}. "
        "Build it with `pip install .` in the environment whose torch (>= 2.10) you use."
    ) from error


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record the call: an autograd.Function costs several microseconds, so inference skips it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def has_kernel(tensor: torch.Tensor) -> bool:
    """Whether the kernels of an elementwise op serve the tensor's device and dtype (meta: its fake implementation)."""
    return tensor.device.type in ("cpu", "meta") or (tensor.is_cuda and tensor.dtype != torch.float64)


def register_fake(name: str):
    """torch.library.register_fake for `arfast::<name>`, with the check of devices that the binding makes elsewhere.

    A call with a meta tensor among others comes here, not to the binding.
    """
    op = name.removesuffix("_").removesuffix("_forward").removesuffix("_backward")

    def register(function):
        @functools.wraps(function)
        def checked(*arguments, **options):
            values = [*arguments, *options.values()]
            values += [item for value in values if isinstance(value, (list, tuple)) for item in value]
            devices = {str(t.device) for t in values if isinstance(t, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{op}: tensors must be on one device, got {', '.join(sorted(devices))}")
            return function(*arguments, **options)

        return torch.library.register_fake(f"arfast::{name}")(checked)

    return register
