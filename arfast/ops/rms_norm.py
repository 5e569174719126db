"""Root mean square layer normalisation, alone or together with the residual addition before it.

Zhang and Sennrich 2019, arXiv 1910.07467, equation 4: out_i = x_i / sqrt(mean(x^2) + eps) * weight_i.
"""

import math

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake

_ops = torch.ops.arfast


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension of `x` (or of `x + residual`) by its root mean square and scale it by `weight`.

    Args:
        x: [..., D], float32, bfloat16, float16, or float64 on the CPU. Statistics are taken in float32 (float64).
        weight: [D], the dtype of `x`; under autocast it is cast to it.
        eps: added to the mean square; in [0, 1).
        residual: [..., D] like `x`, or None.

    Returns:
        out [..., D], the dtype of `x`; with `residual` the pair (out, x + residual), whose sum is rounded once before
        it is normalised, as the unfused sequence does.

    Raises:
        RuntimeError: an argument has another shape, dtype or device: `rms_norm: <argument> must <rule>, got <actual>`.

    Gradients of x, residual and weight; deterministic: the same bits for every number of threads.

    Example:
        >>> x, weight = torch.randn(2, 5, 64), torch.ones(64)
        >>> rms_norm(x, weight).shape
        torch.Size([2, 5, 64])
    """
    if in_autocast(x):
        weight = weight.to(x.dtype)
    rows, residual_rows = x, residual
    if x.dim() != 2:
        if x.dim() == 0:
            raise RuntimeError("rms_norm: x must have at least one dimension, got []")
        if residual is not None and residual.shape != x.shape:
            raise RuntimeError(
                f"rms_norm: residual must have the shape of x {list(x.shape)}, got {list(residual.shape)}"
            )
        shape = (math.prod(x.shape[:-1]), x.shape[-1])
        rows, residual_rows = x.reshape(shape), None if residual is None else residual.reshape(shape)
    if needs_grad(x, weight, residual):
        out, total = _RmsNorm.apply(rows, residual_rows, weight, eps)
    else:
        out, total, _ = _ops.rms_norm_forward(rows, residual_rows, weight, eps)
    out = out.view(x.shape)
    return out if residual is None else (out, total.view(x.shape))


def rms_norm_reference(x, weight, eps=1e-6, *, residual=None):
    """The specification of `rms_norm` in plain torch."""
    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)
    return out if residual is None else (out, total)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, total, rstd = _ops.rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.has_residual = residual is not None
        if residual is None:
            ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dtotal):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _ops.rms_norm_backward(dout, dtotal if ctx.has_residual else None, x, weight, rstd)
        return dx, dx if ctx.has_residual else None, dweight, None


def _statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register_fake("rms_norm_forward")
def _(x, residual, weight, eps):
    total = x.new_empty((x.shape[0] if residual is not None else 0, x.shape[1]))
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=_statistics_dtype(x))


@register_fake("rms_norm_backward")
def _(dout, dsum, x, weight, rstd):
    return x.new_empty(x.shape), x.new_empty(x.shape[1])
