"""Activations that the backward pass computes again instead of keeping.

Either single ones that cost little beside the products around them, as the output of a norm or of a gate, from what is
kept anyway; or whole layers, from their input alone (Chen et al., arXiv 1604.06174).
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint

from arfast.ops._library import in_autocast

_thread = threading.local()


def recomputed(output: Tensor, function: Callable[..., Tensor], *arguments: Any) -> contextlib.AbstractContextManager:
    """Layers called within this context keep `function(*arguments)` for the backward pass where they would keep
    `output`.

    Args:
        output: what the function returned for the arguments; it must live as long as the context.
        function: gives the same bits every time. It runs once for all that kept it, without autograd, and under the
            autocast that this context began under.
        arguments: those that are tensors stay in memory until the backward pass.

    A compiler decides for itself what to keep, and a `checkpoint` keeps neither: there the context does nothing.

    Example:
        >>> x, layer = torch.randn(3, 8, requires_grad=True), torch.nn.Linear(8, 8)
        >>> output = torch.tanh(x)
        >>> with recomputed(output, torch.tanh, x):
        ...     y = layer(output)
        >>> y.sum().backward()
    """
    idle = not torch.is_grad_enabled() or torch.compiler.is_compiling() or getattr(_thread, "in_checkpoint", False)
    if idle:
        return contextlib.nullcontext()
    call = _Call(output, function, arguments)
    return saved_tensors_hooks(call.pack, call.unpack)


def checkpoint(layer: Callable, *arguments: Any) -> Any:
    """layer(*arguments), of which autograd keeps the arguments alone."""
    return torch_checkpoint.checkpoint(_in_checkpoint, layer, *arguments, use_reentrant=False)


def _in_checkpoint(layer: Callable, *arguments: Any) -> Any:
    before, _thread.in_checkpoint = getattr(_thread, "in_checkpoint", False), True
    try:
        return layer(*arguments)
    finally:
        _thread.in_checkpoint = before


class _Call:
    """Stands for an output that is kept in several places."""

    def __init__(self, output: Tensor, function: Callable[..., Tensor], arguments: tuple):
        self._identity = _identity(output)
        device, on = output.device.type, in_autocast(output)
        self._autocast = dict(device_type=device, enabled=on, dtype=torch.get_autocast_dtype(device) if on else None)
        self._function = function
        self._arguments = [_Kept(value.detach()) if isinstance(value, Tensor) else value for value in arguments]
        self._places = self._read = 0
        self._value: Tensor | None = None

    def pack(self, tensor: Tensor) -> "_Kept | _Call":
        if _identity(tensor) != self._identity:
            return _Kept(tensor)
        self._places += 1
        return self

    def unpack(self, packed: "_Kept | _Call") -> Tensor:
        if isinstance(packed, _Kept):
            return packed.get()
        if self._value is None:
            arguments = [value.get() if isinstance(value, _Kept) else value for value in self._arguments]
            with torch.no_grad(), torch.autocast(**self._autocast):
                self._value = self._function(*arguments)
        value = self._value
        self._read = (self._read + 1) % self._places
        if self._read == 0:
            self._value = None
        return value


class _Kept:
    """A tensor and its version: autograd looks at none where there are hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor, tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            got = f"modified a tensor {tuple(self.tensor.shape)}, version {self.version}, now {self.tensor._version}"
            raise RuntimeError(f"recomputed: what the backward pass needs must not be modified in place, got {got}")
        return self.tensor


def _identity(tensor: Tensor) -> tuple:
    """The same for a tensor and what autograd makes of it to keep it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
