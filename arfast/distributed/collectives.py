"""Collectives that autograd sees, over the ranks of one mesh dimension; with one rank they are the identity.

Every rank runs backward, and what is differentiated is the sum of what the ranks call it on. A collective therefore has
two possible gradients, and the name says which: `copy_to`, `reduce_from` and the `whole` forms are for a value that all
ranks hold alike and that counts once (f and g of Shoeybi et al. 2019, arXiv 1909.08053, section 3); the others have the
adjoint of the sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Names of torch 2.13, before it those they replaced.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """The ranks along one dimension of a mesh that differ from this one in that coordinate alone.

    Args:
        mesh: a DeviceMesh with named dimensions, or None.
        name: of the dimension; one that the mesh lacks is a group of one rank.

    Attributes:
        size, rank: how many ranks, and which of them this one is.
        process_group: what torch.distributed takes; None for one rank.
    """

    def __init__(self, mesh: DeviceMesh | None = None, name: str = ""):
        self.name, self.size, self.rank, self.process_group = name, 1, 0, None
        if mesh is not None and name in (mesh.mesh_dim_names or ()) and mesh[name].size() > 1:
            self.size, self.rank, self.process_group = (
                mesh[name].size(),
                mesh.get_local_rank(name),
                mesh.get_group(name),
            )

    def __deepcopy__(self, memo: dict) -> Group:
        return self  # a copy of a model works with the same ranks

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, without a gradient."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[...] of every rank -> [ranks, ...], without a gradient."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        _all_gather(gathered.view(-1), tensor.contiguous().view(-1), group=self.process_group)
        return gathered

    def sum_slices(self, tensor: Tensor) -> Tensor:
        """[ranks, ...] of every rank -> [...], this rank's slice of their sum, without a gradient."""
        if self.size == 1:
            return tensor[0]
        out = tensor.new_empty(tensor.shape[1:])
        _reduce_scatter(out.view(-1), tensor.contiguous().view(-1), group=self.process_group)
        return out

    def exchange(self, tensor: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows [sum(send), ...], send[r] of them to rank r in order -> rows [sum(receive), ...], without a gradient."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        dist.all_to_all_single(out, tensor.contiguous(), receive, send, group=self.process_group)
        return out


def copy_to(x: Tensor, group: Group) -> Tensor:
    """x, held by all ranks alike, for work that is split over them: the gradient is the sum of theirs."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x, which all then hold alike: the gradient, the same on every rank, is passed on."""
    return x if group.size == 1 else _AllReduce.apply(x, group, True)


def share_gradient(x: Tensor, group: Group) -> Tensor:
    """x, a result that all ranks compute alike: each passes on its share, 1 / ranks, of the gradient."""
    return x if group.size == 1 else _ShareGradient.apply(x, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x, which every rank uses in its own way: the gradient is the sum of theirs."""
    return x if group.size == 1 else _AllReduce.apply(x, group, False)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """[n, ...] of every rank -> [ranks * n, ...] in their order: the gradient is the sum of theirs."""
    return x if group.size == 1 else _GatherRows.apply(x, group, False)


def gather_rows_whole(x: Tensor, group: Group) -> Tensor:
    """As `gather_rows`, for work that all ranks do alike: the gradient, the same on every rank, is cut."""
    return x if group.size == 1 else _GatherRows.apply(x, group, True)


def scatter_rows(x: Tensor, group: Group) -> Tensor:
    """[ranks * n, ...] of every rank -> [n, ...], this rank's rows of their sum."""
    return x if group.size == 1 else _ScatterRows.apply(x, group)


def exchange_rows(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows [sum(send), d], send[r] of them to rank r in order -> [sum(receive), d]; gradients go the way back."""
    return x if group.size == 1 else _ExchangeRows.apply(x, send, receive, group)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return ctx.group.sum_(dout.clone(memory_format=torch.contiguous_format)), None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout / ctx.group.size, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, whole):
        ctx.group, ctx.whole = group, whole
        return group.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, dout):
        return dout if ctx.whole else ctx.group.sum_(dout.clone(memory_format=torch.contiguous_format)), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, whole):
        ctx.group, ctx.whole = group, whole
        return group.gather(x).flatten(0, 1)

    @staticmethod
    def backward(ctx, dout):
        slices = dout.unflatten(0, (ctx.group.size, -1))
        return slices[ctx.group.rank] if ctx.whole else ctx.group.sum_slices(slices), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.sum_slices(x.unflatten(0, (group.size, -1)))

    @staticmethod
    def backward(ctx, dout):
        return ctx.group.gather(dout).flatten(0, 1), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.arguments = (receive, send)
        ctx.group = group
        return group.exchange(x, send, receive)

    @staticmethod
    def backward(ctx, dout):
        return ctx.group.exchange(dout, *ctx.arguments), None, None, None
