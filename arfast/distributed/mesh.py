"""How ranks are arranged: sizes of the parallel dimensions, the device mesh, and what a model must have to be split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from arfast.models import CausalLMConfig

from .collectives import Group

DIMENSIONS = ("data", "context", "tensor")


def _require(condition: bool, owner: str, name: str, rule: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"{owner}: {name} must {rule}, got {actual!r}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share what. data * context * tensor is the number of ranks.

    Args:
        data: batches that are worked on at once. The ranks of one batch are given the same tensors.
        context: ranks that share the tokens of a batch, each its pieces of every sequence.
        tensor: ranks that share heads, feed-forward channels and vocabulary.
        expert: ranks that share the experts of a layer, a divisor of data * context: that many ranks, consecutive in
            (data, context), hold each expert once, and send each other the tokens.

    Raises:
        ValueError: `ParallelConfig: <argument> must <rule>, got <actual>`.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in (*DIMENSIONS, "expert"):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _require(valid, "ParallelConfig", name, "be a positive integer", value)
        shared = self.data * self.context
        _require(
            shared % self.expert == 0, "ParallelConfig", "expert", f"divide data * context = {shared}", self.expert
        )

    @classmethod
    def for_ranks(cls, num_ranks: int, *, context: int = 1, tensor: int = 1, expert: int = 1) -> ParallelConfig:
        """The configuration of so many ranks: what context and tensor do not need is for "data".

        >>> ParallelConfig.for_ranks(8, tensor=2)
        ParallelConfig(data=4, context=1, tensor=2, expert=1)
        """
        cls(data=expert, context=context, tensor=tensor, expert=expert)  # each of them is positive
        rule = f"be a multiple of context * tensor = {context} * {tensor} = {context * tensor}"
        _require(num_ranks % (context * tensor) == 0, "ParallelConfig", "world size", rule, num_ranks)
        return cls(data=num_ranks // (context * tensor), context=context, tensor=tensor, expert=expert)

    @property
    def num_ranks(self) -> int:
        return self.data * self.context * self.tensor

    @property
    def splits_model(self) -> bool:
        """Whether a rank has less than the model, before FSDP."""
        return max(self.context, self.tensor, self.expert) > 1

    def describe(self) -> str:
        """The sizes that are not 1, for people.

        >>> ParallelConfig(data=2, tensor=2).describe()
        'data 2, tensor 2'
        """
        sizes = {name: getattr(self, name) for name in (*DIMENSIONS, "expert")}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)

    def check_model(self, config: CausalLMConfig) -> None:
        """Raise ValueError unless every size that is split is a multiple of the ranks that share it."""
        sizes = ["num_attention_heads", "num_key_value_heads", "vocab_size"]
        layers = range(config.num_hidden_layers)
        if not all(config.has_experts(layer) for layer in layers):
            sizes.append("intermediate_size")
        if any(config.has_experts(layer) for layer in layers):
            sizes.append("moe_intermediate_size")
        elif self.expert > 1:
            raise ValueError(f"ParallelConfig: expert must be 1 for a model without experts, got {self.expert}")
        for name in sizes:
            size = getattr(config, name)
            _require(size % self.tensor == 0, "ParallelConfig", "tensor", f"divide {name}={size}", self.tensor)
        experts = config.num_experts
        _require(experts % self.expert == 0, "ParallelConfig", "expert", f"divide num_experts={experts}", self.expert)


def init_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """A DeviceMesh with the dimensions "data", "context" and "tensor", the last one over neighbouring ranks.

    torch.distributed is initialised from torchrun's variables if nobody did: gloo on CPUs, NCCL on GPUs, of which the
    process must have chosen its own (torch.cuda.set_device(LOCAL_RANK)).

    The same ranks as (data * context / expert, expert, tensor) are the attribute `expert_mesh`, with the dimensions
    "expert_data", "expert" and "tensor".

    Raises:
        ValueError: `init_mesh: world size must be data * context * tensor = ..., got ...`.

    Example:
        See `arfast.distributed.parallelize`.
    """
    if not dist.is_initialized():
        dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}.get(device_type))
    rule = f"be data * context * tensor = {config.data} * {config.context} * {config.tensor} = {config.num_ranks}"
    _require(dist.get_world_size() == config.num_ranks, "init_mesh", "world size", rule, dist.get_world_size())
    shape = tuple(getattr(config, name) for name in DIMENSIONS)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
    shape = (config.data * config.context // config.expert, config.expert, config.tensor)
    mesh.expert_mesh = init_device_mesh(device_type, shape, mesh_dim_names=("expert_data", "expert", "tensor"))
    return mesh


class Groups:
    """This rank's groups along every dimension: data, context, tensor, expert_data, expert.

    Args:
        mesh: from `init_mesh`, or any DeviceMesh with some of its dimensions; experts are not split then.
    """

    def __init__(self, mesh: DeviceMesh):
        names = mesh.mesh_dim_names or ()
        _require(
            set(names) <= set(DIMENSIONS) and names, "parallelize", "mesh", f"have dimensions of {DIMENSIONS}", names
        )
        self.data, self.context, self.tensor = (Group(mesh, name) for name in DIMENSIONS)
        experts = getattr(mesh, "expert_mesh", None)
        self.expert, self.expert_data = Group(experts, "expert"), Group(experts, "expert_data")

    def __deepcopy__(self, memo: dict) -> Groups:
        return self

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(**{name: getattr(self, name).size for name in (*DIMENSIONS, "expert")})

    def replicas(self, is_expert: bool) -> tuple[Group, ...]:
        """The groups over which a parameter is repeated, and its gradient summed."""
        if is_expert and self.expert.size > 1:
            return (self.expert_data,)
        return (self.data, self.context)
