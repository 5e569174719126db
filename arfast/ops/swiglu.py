"""The gate of a SwiGLU feed-forward layer: silu(gate) * up in one pass (Shazeer 2020, arXiv 2002.05202, equation 6)."""

import math

import torch

from arfast.ops._library import has_kernel, needs_grad, register_fake

_ops = torch.ops.arfast


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise, rounded once.

    Args:
        gate, up: [..., I] of one shape, float32, bfloat16, float16, or float64; arithmetic in float32 (float64).

    Returns:
        [..., I], the dtype of `gate`. Differentiable once in both.

    Raises:
        RuntimeError: `swiglu: <argument> must <rule>, got <actual>`.

    Where there is no kernel (float64 on a GPU), it is the same formula in torch's own operations.

    Example:
        >>> swiglu(torch.randn(3, 8), torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """
    if not has_kernel(gate):
        return swiglu_reference(gate, up)
    if gate.dim() != 2:
        if up.shape != gate.shape:
            raise RuntimeError(f"swiglu: up must have the shape of gate {list(gate.shape)}, got {list(up.shape)}")
        if gate.dim() == 0:
            raise RuntimeError("swiglu: gate must have at least one dimension, got []")
        rows = (math.prod(gate.shape[:-1]), gate.shape[-1])
        return swiglu(gate.reshape(rows), up.reshape(rows)).view(gate.shape)
    return _Swiglu.apply(gate, up) if needs_grad(gate, up) else _ops.swiglu_forward(gate, up)


def swiglu_reference(gate, up):
    """The specification of `swiglu` in plain torch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _ops.swiglu_forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _ops.swiglu_backward(dout, *ctx.saved_tensors)


@register_fake("swiglu_forward")
def _(gate, up):
    return gate.new_empty(gate.shape)


@register_fake("swiglu_backward")
def _(dout, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
