"""Parameters that are spread over ranks: FSDP2 around a CausalLM, and which part of a parameter a rank holds.

Zhao et al., "PyTorch FSDP" (VLDB 2023), in its second form: torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from arfast.models import CausalLM
from arfast.models.causal_lm import init_parameter

Index = int | slice


@dataclass(frozen=True)
class Box:
    """The part [offset, offset + shape) of a tensor, per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

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


def shard_model(model: CausalLM, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread the parameters of a model over the ranks of a mesh of one dimension, one layer at a time.

    The shards keep their dtype; layers are put together, and compute, in ``dtype``; gradients are summed in float32,
    and not divided by the number of ranks, since the loss is by the number of targets of all of them.

    Args:
        model: float32 parameters; on the meta device the shards stay without memory until `initialize_shards`.
    """
    # It warns of operations in place on what a layer returns, of which there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh, mp_policy=policy, shard_placement_fn=_placement(mesh.size()))
    for module in (*model.model.layers, model):
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A product with the factor 1 is an operation that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def _placement(num_ranks: int):
    """Rows; but of a stack of fewer experts than ranks the rows of each expert, so that no rank goes without."""

    def place(parameter: nn.Parameter) -> Shard | None:
        stacked = parameter.ndim == 3 and parameter.shape[0] < num_ranks
        return Shard(1) if stacked and parameter.shape[1] % num_ranks == 0 else None

    return place


def local_box(tensor: Tensor) -> Box:
    """The part of a tensor that this rank holds; all of it where it is not spread."""
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        # FSDP cuts what tensor parallelism has cut before, although its dimension of the mesh comes first.
        for i in sorted(range(mesh.ndim), key=lambda i: isinstance(tensor.placements[i], _StridedShard)):
            placement = tensor.placements[i]
            if isinstance(placement, Shard | _StridedShard):
                step = -(-shape[placement.dim] // mesh.size(i))
                first = min(mesh.get_local_rank(i) * step, shape[placement.dim])
                offset[placement.dim] += first
                shape[placement.dim] = min(step, shape[placement.dim] - first)
    return Box(tuple(offset), tuple(shape))


def local_part(tensor: Tensor) -> Tensor:
    """The memory of this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank calls this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def initialize_shards(model: CausalLM, device: torch.device, seed: int) -> None:
    """Give memory to the shards of a model from the meta device, and to each element the value that it has on one rank.

    See `arfast.models.causal_lm.init_parameter`: parameters are a pure function of (seed, name, index).
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        box, part = local_box(parameter), local_part(parameter)
        if part.numel() == 0:
            continue
        rows = parameter.shape[1:].numel()
        if box.shape[1:] == tuple(parameter.shape[1:]):
            init_parameter(model.config, name, part, seed, box.offset[0] * rows)
            continue
        inner = parameter.shape[2:].numel()  # split in the second dimension: the rest of it is contiguous
        for i, matrix in enumerate(part):
            init_parameter(model.config, name, matrix, seed, (box.offset[0] + i) * rows + box.offset[1] * inner)


def reshard(model: nn.Module) -> None:
    """Give back the whole parameters that a forward pass has left, so that the model's are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(model: CausalLM, dtype: torch.dtype, keep: bool) -> CausalLM | None:
    """A copy of a sharded model that is not, in ``dtype``, on the ranks that ``keep`` it; every rank calls this."""
    reshard(model)
    copied = None
    if keep:
        copied = CausalLM(copy.deepcopy(model.config), dtype=dtype, device="meta")
        copied.to_empty(device=next(model.parameters()).device)
    for name, parameter in model.named_parameters():
        tensor = whole(parameter)
        if keep:
            copied.get_parameter(name).data.copy_(tensor)
    return copied
