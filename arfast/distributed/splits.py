"""Which part of every parameter a tensor or expert rank has: cut from the whole, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arfast.models import CausalLMConfig

from .collectives import Group
from .mesh import Groups


@dataclass(frozen=True)
class Split:
    """A dimension of a parameter that is split over ranks.

    dim: which. group: the ranks. sections: how many equal sections of the dimension are split, each over all ranks (two
    where gate rows are stacked on up rows).
    """

    dim: int
    group: Group
    sections: int = 1

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part, a copy where it has to be."""
        parts = whole.unflatten(self.dim, (self.sections, self.group.size, -1))
        return parts.select(self.dim + 1, self.group.rank).flatten(self.dim, self.dim + 1)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of every rank's part."""
        ranks = self.group.gather(part).movedim(0, self.dim).unflatten(self.dim + 1, (self.sections, -1))
        return ranks.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)

    def ranges(self, size: int) -> list[range]:
        """The indices, in the whole dimension of this size, of this rank's part."""
        section, part = size // self.sections, size // self.sections // self.group.size
        first = self.group.rank * part
        return [range(s * section + first, s * section + first + part) for s in range(self.sections)]


Splits = Mapping[str, tuple[Split, ...]]


def parameter_splits(config: CausalLMConfig, groups: Groups, names: list[str]) -> dict[str, tuple[Split, ...]]:
    """How every parameter of a CausalLM is split; those that every rank has whole are left out."""
    tensor, expert = groups.tensor, groups.expert
    rules = {  # end of a name: its splits
        "embed_tokens.weight": [Split(0, tensor)],
        "lm_head.weight": [Split(0, tensor)],
        "experts.gate_up_proj": [Split(0, expert), Split(1, tensor, sections=2)],
        "experts.down_proj": [Split(0, expert), Split(2, tensor)],
        "o_proj.weight": [Split(1, tensor)],
        "down_proj.weight": [Split(1, tensor)],
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        rules |= {f"{name}.weight": [Split(0, tensor)], f"{name}.bias": [Split(0, tensor)]}
    rules |= {f"{name}.weight": [Split(0, tensor)] for name in ("gate_proj", "up_proj")}
    found = {name: rules.get(".".join(name.rsplit(".", 2)[-2:]), []) for name in names}
    splits = {name: tuple(s for s in rule if s.group.size > 1) for name, rule in found.items()}
    return {name: rule for name, rule in splits.items() if rule}


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts."""
    return ".experts." in name


@torch.no_grad()
def cut_parameters(model: nn.Module, splits: Splits) -> None:
    """Keep this rank's part of every parameter of a whole model."""
    modules = dict(model.named_modules())
    for name, rule in splits.items():
        owner, _, leaf = name.rpartition(".")
        whole = modules[owner]._parameters[leaf]
        part = whole
        for split in rule:
            part = split.cut(part)
        part = part.detach().clone(memory_format=torch.contiguous_format)
        modules[owner]._parameters[leaf] = nn.Parameter(part, requires_grad=whole.requires_grad)
