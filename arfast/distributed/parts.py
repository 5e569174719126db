"""What a rank holds of a tensor that is spread over ranks: where it lies in the whole, and the whole of all parts.

A parameter is cut twice: by tensor and expert parallelism into plain tensors (`Split`), and FSDP2 spreads what that
leaves a rank over the ranks that have the same (a DTensor). Either may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from arfast.models import CausalLM
from arfast.models.causal_lm import init_parameter

from .splits import Split

Index = int | slice


@dataclass(frozen=True)
class Box:
    """The part [offset, offset + shape) of a tensor, per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(first, first + length) for first, length in zip(self.offset, self.shape))

    def intersect(self, place: Sequence[Index], whole: Sequence[int]) -> tuple[tuple, tuple] | None:
        """Where this box meets ``whole[place]``: as an index into what stands there, and as one into the box.

        None where they do not meet.
        """
        there, here = [], []
        places = [*place, *(slice(None) for _ in range(len(whole) - len(place)))]
        for index, size, offset, length in zip(places, whole, self.offset, self.shape, strict=True):
            first, last, _ = (index, index + 1, 1) if isinstance(index, int) else index.indices(size)
            low, high = max(first, offset), min(last, offset + length)
            if low >= high:
                return None
            if isinstance(index, int):
                here.append(index - offset)
            else:
                there.append(slice(low - first, high - first))
                here.append(slice(low - offset, high - offset))
        return tuple(there), tuple(here)

    def runs(self, whole: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
        """(index into the box, place in the flat whole of what stands there first) of each stretch without gaps."""
        partial = [dim for dim, size in enumerate(whole) if self.shape[dim] != size]
        outer = self.shape[: max(partial, default=0)]
        strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
        first = sum(offset * stride for offset, stride in zip(self.offset, strides))
        for index in product(*map(range, outer)):
            yield index, first + sum(i * stride for i, stride in zip(index, strides))


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor as this rank holds it.

    tensor: a DTensor where FSDP has spread it. splits: how it was cut before that.
    """

    tensor: Tensor
    splits: tuple[Split, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.tensor.shape)
        for split in self.splits:
            shape[split.dim] *= split.group.size
        return tuple(shape)

    @property
    def local(self) -> Tensor:
        """The memory that this rank has."""
        tensor = self.tensor.detach()
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """Boxes of the whole that make up the part, each with its memory; two where gate rows stand on up rows."""
        ranges = [[range(size)] for size in self.tensor.shape]
        for split in self.splits:
            ranges[split.dim] = split.ranges(self.shape[split.dim])
        local, dims = self.local, []
        for dim, first in enumerate(self._offset()):
            dims.append(list(_meet(ranges[dim], first, first + local.shape[dim])))
        for sides in product(*dims):
            box = Box(tuple(start for start, _ in sides), tuple(place.stop - place.start for _, place in sides))
            yield box, local[tuple(place for _, place in sides)]

    def _offset(self) -> list[int]:
        """Of this rank's shard, in what the splits have left."""
        offset, shape = [0] * self.tensor.ndim, list(self.tensor.shape)
        if isinstance(self.tensor, DTensor):
            mesh = self.tensor.device_mesh
            for i, placement in enumerate(self.tensor.placements):
                if isinstance(placement, Shard):
                    dim, step = placement.dim, -(-shape[placement.dim] // mesh.size(i))
                    first = min(mesh.get_local_rank(i) * step, shape[dim])
                    offset[dim], shape[dim] = offset[dim] + first, min(step, shape[dim] - first)
        return offset

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All of the tensor; every rank calls this."""
        tensor = self.tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        for split in reversed(self.splits):
            tensor = split.gather(tensor)
        return tensor


def _meet(ranges: list[range], first: int, last: int) -> Iterator[tuple[int, slice]]:
    """(start in the whole, place among [first, last)) of what lies there, of ranges of the whole one after another."""
    done = 0
    for indices in ranges:
        low, high = max(first, done), min(last, done + len(indices))
        if low < high:
            yield indices.start + low - done, slice(low - first, high - first)
        done += len(indices)


def parts(model: nn.Module) -> dict[str, Part]:
    """This rank's part of every parameter, by name."""
    splits = getattr(model, "splits", {})
    return {name: Part(parameter, splits.get(name, ())) for name, parameter in model.named_parameters()}


@torch.no_grad()
def initialize(model: CausalLM, seed: int) -> None:
    """Give each element of this rank's parts the value that it has in a whole model.

    See `arfast.models.causal_lm.init_parameter`: parameters are a pure function of (seed, name, index).
    """
    for name, part in parts(model).items():
        for box, memory in part.boxes():
            for index, start in box.runs(part.shape):
                init_parameter(model.config, name, memory[index], seed, start)
