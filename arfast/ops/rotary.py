"""Rotary position embedding in one pass (Su et al. 2021, arXiv 2104.09864, equation 34).

Channels are paired as Hugging Face (and GPT-NeoX) pairs them: i with i + D / 2.
"""

import torch

from arfast.ops._library import has_kernel, needs_grad, register_fake

_ops = torch.ops.arfast


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head's channel pairs: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: [..., H, D], D even, float32, bfloat16, float16, or float64; arithmetic in float32 (float64).
        cos, sin: float32 [P, D / 2]; the rows of `x`, its leading dimensions flattened, take the table's rows in turn,
            so P is the sequence length, or the number of rows.

    Returns:
        [..., H, D], contiguous. Differentiable in `x`.

    Raises:
        RuntimeError: `rotary: <argument> must <rule>, got <actual>`.

    Where there is no kernel (float64 on a GPU), it is the same formula in torch's own operations.

    Example:
        >>> angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])
        >>> rotary(torch.randn(2, 5, 3, 4), angles.cos(), angles.sin()).shape
        torch.Size([2, 5, 3, 4])
    """
    if not has_kernel(x):
        return rotary_reference(x, cos, sin)
    if x.dim() < 3:
        raise RuntimeError(f"rotary: x must have shape [..., H, D] with at least 3 dimensions, got {list(x.shape)}")
    rows = x.reshape(-1, *x.shape[-2:]) if x.dim() != 3 else x
    out = _Rotary.apply(rows, cos, sin) if needs_grad(x) else _ops.rotary(rows, cos, sin, False)
    return out.view(x.shape)


def rotary_reference(x, cos, sin):
    """The specification of `rotary` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, *x.shape[-2:]).to(wide)
    cos, sin = (t.to(wide).repeat(rows.shape[0] // max(1, t.shape[0]), 1).unsqueeze(1) for t in (cos, sin))
    a, b = rows.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype).view(x.shape)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _ops.rotary(x, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _ops.rotary(dout, *ctx.saved_tensors, True), None, None


@register_fake("rotary")
def _(x, cos, sin, inverse):
    return x.new_empty(x.shape)
