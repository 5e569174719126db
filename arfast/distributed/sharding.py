"""Parameters that are spread over ranks: FSDP2 around a CausalLM, whole or split.

Zhao et al., "PyTorch FSDP" (VLDB 2023), in its second form: torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from arfast.models import CausalLM
from arfast.nn.moe import SCORE_BIAS

from .parts import parts


def shard_model(model: CausalLM, mesh: DeviceMesh, dtype: torch.dtype, expert_mesh: DeviceMesh | None = None) -> None:
    """Spread the parameters of a model over the ranks of a mesh of one dimension, one layer at a time.

    The shards keep their dtype; layers are put together, and compute, in ``dtype``; gradients are summed in float32,
    and not divided by the number of ranks, since the loss is by the number of targets of all of them. A bias of the
    experts' choice, which has no gradient and moves by a thousandth at a time, stays whole and in its dtype.

    Args:
        model: float32 parameters; on the meta device the shards stay without memory until `to_empty`.
        expert_mesh: the ranks that have the same experts, where those are split over ranks.
    """
    # It warns of operations in place on what a layer returns, of which there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ignored = {parameter for name, parameter in model.named_parameters() if name.endswith(SCORE_BIAS)}
    wrapped = [(module, mesh) for module in (*model.model.layers, model)]
    if expert_mesh is not None:
        inner = [(layer.mlp.experts, expert_mesh) for layer in model.model.layers if layer.has_experts]
        wrapped = [*inner, *wrapped]  # what is wrapped already is left out of what is around it
    for module, ranks in wrapped:
        placement = _placement(ranks.size())
        fully_shard(module, mesh=ranks, mp_policy=policy, shard_placement_fn=placement, ignored_params=ignored)
        module.set_gradient_divide_factor(1.0)
        # A product with the factor 1 is an operation that gloo does not have.
        module.set_force_sum_reduction_for_comms(True)


def _placement(num_ranks: int):
    """Rows; but of a stack of fewer experts than ranks the rows of each expert, so that no rank goes without."""

    def place(parameter: nn.Parameter) -> Shard | None:
        stacked = parameter.ndim == 3 and parameter.shape[0] < num_ranks
        return Shard(1) if stacked and parameter.shape[1] % num_ranks == 0 else None

    return place


def reshard(model: nn.Module) -> None:
    """Give back the whole parameters that a forward pass has left, so that the model's are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(model: CausalLM, dtype: torch.dtype, keep: bool) -> CausalLM | None:
    """A copy of a model that is not spread, in ``dtype``, on the ranks that ``keep`` it; every rank calls this."""
    reshard(model)
    copied = None
    if keep:
        copied = CausalLM(copy.deepcopy(model.config), dtype=dtype, device="meta")
        copied.to_empty(device=next(model.parameters()).device)
    for name, part in parts(model).items():
        tensor = part.whole()
        if keep:
            copied.get_parameter(name).data.copy_(tensor)
    return copied
