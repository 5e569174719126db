"""Matrix products of consecutive groups of rows with one matrix per group, as in a mixture of experts."""

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake

_ops = torch.ops.arfast


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """out[offsets[e] : offsets[e + 1]] = a[offsets[e] : offsets[e + 1]] @ b[e] for every group e.

    Args:
        a: [M, K], on the CPU float32, bfloat16, float16 or float64; on a GPU bfloat16 or float16.
        b: [E, K, N], the dtype of `a`; a transposed view of [E, N, K] costs nothing. Under autocast both are cast to
            its dtype.
        offsets: [E + 1] int32, from 0 to M without decreasing; checked on the CPU. On a GPU wrong ones give wrong
            results, and touch no other memory.

    Returns:
        [M, N], the dtype of `a`.

    Raises:
        RuntimeError: `grouped_mm: <argument> must <rule>, got <actual>`.

    Gradients of a and b; a group without rows gets zeros. Deterministic: the same bits for every number of threads.

    Example:
        >>> a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[10.0]], [[100.0]]])
        >>> grouped_mm(a, b, torch.tensor([0, 2, 3], dtype=torch.int32)).tolist()
        [[10.0], [20.0], [300.0]]
    """
    if in_autocast(a):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b = a.to(dtype), b.to(dtype)
    if needs_grad(a, b):
        return _GroupedMm.apply(a, b, offsets)
    return _ops.grouped_mm(a, b, offsets)


def grouped_mm_reference(a, b, offsets):
    """The specification of `grouped_mm` in plain torch."""
    bounds = offsets.tolist()
    return torch.cat([a[begin:end] @ b[e] for e, (begin, end) in enumerate(zip(bounds, bounds[1:]))])


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets):
        ctx.save_for_backward(a, b, offsets)
        return _ops.grouped_mm(a, b, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        a, b, offsets = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _ops.grouped_mm(dout, b.transpose(1, 2), offsets)
        if ctx.needs_input_grad[1]:
            # In the memory order of b: the gradient of a transposed view then reaches its parameter without a copy.
            if b.stride(1) == 1:
                db = _ops.grouped_mm_transposed(dout, a, offsets).transpose(1, 2)
            else:
                db = _ops.grouped_mm_transposed(a, dout, offsets)
        return da, db, None


@register_fake("grouped_mm")
def _(a, b, offsets):
    return a.new_empty((a.shape[0], b.shape[2]))


@register_fake("grouped_mm_transposed")
def _(a, b, offsets):
    return a.new_empty((offsets.shape[0] - 1, a.shape[1], b.shape[1]))
