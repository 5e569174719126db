"""The same tensor elsewhere in memory."""

import torch


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy that begins one element after an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def with_gaps(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy whose rows, along the last dimension, lie `gap` elements apart."""
    *leading, size = tensor.shape
    room = torch.empty(*leading, size + gap, dtype=tensor.dtype, device=tensor.device)
    return room[..., :size].copy_(tensor)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of 3 entries along the first dimension, the last one more than 2^31 elements after the first.

    Only the entries are ever touched: on the CPU the rest takes no memory.
    """
    assert len(tensor) == 3
    stride = (1 << 30) + 8
    room = torch.empty(2 * stride + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    return room.as_strided(tensor.shape, (stride, *tensor.contiguous().stride()[1:])).copy_(tensor)


def overlapping(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """A view [N - size + 1, size, ...] of tokens [N, ...]: slot s begins at token s."""
    stride = tokens.stride()
    return tokens.as_strided((len(tokens) - size + 1, size, *tokens.shape[1:]), (stride[0], *stride))
