"""Low-rank adapters beside frozen weights (Hu et al., arXiv 2106.09685, eq. 3): W x + (alpha / r) B A x.

A [r, in] starts normal, B [out, r] at zero, so an adapted model begins as the one it was made of. Every product with a
frozen weight stays what it was; stacked experts get (W + (alpha / r) B A) as their weights instead, as in peft.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arfast import ops

from .initialization import normal_
from .moe import Experts

LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
# Names of the stacked weights, and the targets that ask for them.
EXPERT_TARGETS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Sizes of the adapters.

    rank: r. alpha: the adapters' output is multiplied by alpha / r, or alpha / sqrt(r) with rank_stabilized
    (Kalajdzievski, arXiv 2312.03732). dropout: of the adapters' input. targets: last names of the adapted layers.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_TARGETS
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        known, alpha, dropout = (*LINEAR_TARGETS, HEAD), self.alpha, self.dropout
        _require(type(self.rank) is int and 1 <= self.rank <= 2**14, "rank", "be in [1, 16384]", self.rank)
        # Products take their factor in float32.
        valid = _is_number(alpha) and 0 < alpha <= torch.finfo(torch.float32).max
        _require(valid, "alpha", "be a positive number of float32", alpha)
        _require(_is_number(dropout) and 0 <= dropout < 1, "dropout", "be in [0, 1)", dropout)
        valid = len(self.targets) > 0 and all(target in known for target in self.targets)
        _require(valid, "targets", f"be some of {', '.join(known)}", ", ".join(map(str, self.targets)) or "none")
        object.__setattr__(self, "targets", tuple(target for target in known if target in self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoraLinear(nn.Linear):
    """A frozen linear layer and its adapter: hidden [N, in] -> [N, out]. The weight keeps its name and its memory."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.scale, config.dropout
        options = dict(bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, config.rank, **options)
        self.lora_B = nn.Linear(config.rank, self.out_features, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)
        # In place: nobody keeps the frozen layer's output, and a second [N, out] would double its memory.
        return out.addmm_(self._low(hidden).to(out.dtype), self.lora_B.weight.to(out.dtype).t(), alpha=self.scale)

    def _low(self, hidden: Tensor) -> Tensor:
        return F.linear(F.dropout(hidden, self.dropout, self.training), self.lora_A.weight.to(hidden.dtype))

    def as_one_product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs [..., in + r], weight [out, in + r]) whose product is the output: for a head that is fused with the
        loss."""
        weight = torch.cat((self.weight, self.lora_B.weight.to(self.weight.dtype)), dim=-1)
        return torch.cat((hidden, self._low(hidden) * self.scale), dim=-1), weight

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with weight W + scale B A, summed in float32 at least."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(_merge(self.weight, self.lora_B.weight, self.lora_A.weight, self.scale))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data)
        return layer


class LoraExperts(Experts):
    """Frozen stacked experts and their adapters <name>_lora_A [E, r, in] and <name>_lora_B [E, out, r].

    The product of the adapters is added to the weights in every pass: E r in out multiply-adds, and the gradient of the
    sum costs what that of the weights would. The fused op then runs as without adapters.
    """

    def __init__(self, base: Experts, config: LoraConfig, names: tuple[str, ...]):
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.scale, self.names = config.scale, names
        for name in names:
            experts, outputs, inputs = getattr(self, name).shape
            options = dict(device=base.down_proj.device, dtype=torch.float32)
            shapes = {"A": (experts, config.rank, inputs), "B": (experts, outputs, config.rank)}
            for part, shape in shapes.items():
                self.register_parameter(f"{name}_lora_{part}", nn.Parameter(torch.empty(shape, **options)))

    def forward(self, hidden: Tensor, routing: "ops.Routing") -> Tensor:
        return ops.moe_experts(hidden, routing, self._weight("gate_up_proj"), self._weight("down_proj"))

    def _weight(self, name: str) -> Tensor:
        weight = getattr(self, name)
        if name not in self.names:
            return weight
        A, B = (getattr(self, f"{name}_lora_{part}").to(weight.dtype) for part in "AB")
        return torch.baddbmm(weight, B, A, alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Experts:
        """Plain experts with the adapters added to the weights."""
        with torch.device("meta"):
            experts = Experts(1, 1, 1)
        for name in EXPERT_TARGETS:
            weight = getattr(self, name).data
            if name in self.names:
                A, B = (getattr(self, f"{name}_lora_{part}") for part in "AB")
                weight = _merge(weight, B, A, self.scale)
            setattr(experts, name, nn.Parameter(weight))
        return experts


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = LINEAR_TARGETS,
    *,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Freeze a model and put trainable adapters beside its projections, in place.

    Args:
        model: a `CausalLM`, in any dtype; the adapters are float32.
        rank, alpha, dropout, targets, rank_stabilized: see `LoraConfig`. "gate_proj" and "up_proj" (together) and
            "down_proj" also mean the stacked experts of a layer that has them, where dropout must be 0; "lm_head" is
            the output head.
        seed: A is a pure function of (seed, name of the layer, element index).

    Returns:
        The model, whose ``lora`` is the `LoraConfig`.

    Raises:
        ValueError: a setting is out of range, or a target is not in the model.

    Example:
        >>> model = apply_lora(CausalLM(CausalLMConfig.preset("tiny")), rank=4, targets=("q_proj", "v_proj"))
        >>> count_parameters(model)
        (21504, 5497088)
    """
    options = dict(dropout=dropout, targets=tuple(targets), rank_stabilized=rank_stabilized)
    config = LoraConfig(rank=rank, alpha=alpha, **options)
    _require(getattr(model, "lora", None) is None, "model", "have no adapters yet", "one with")
    names = list(_find_targets(model, config))
    missing = [t for t in config.targets if not any(_serves(name, t) for name in names)]
    if missing:
        raise ValueError(f"apply_lora: targets must be layers of the model (a tied head is none), got {missing[0]!r}")
    add_adapters(model, config, names)
    for name, parameter in adapter_parameters(model):
        if name.endswith(("lora_A", "lora_A.weight")):
            # The variance of peft's: uniform within 1 / sqrt(in).
            normal_(parameter.data, seed, name, 1 / math.sqrt(3 * parameter.shape[-1]))
        else:
            parameter.data.zero_()
    return model


def add_adapters(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Freeze the model and put uninitialised adapters beside the named layers.

    Args:
        names: of linear layers, or of stacked weights ("model.layers.0.mlp.experts.down_proj").
    """
    stacked: dict[str, list[str]] = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        if isinstance(model.get_submodule(prefix), Experts):
            stacked.setdefault(prefix, []).append(last)
    if stacked and config.dropout:
        raise ValueError(f"apply_lora: dropout must be 0 with adapters of stacked experts, got {config.dropout}")
    model.requires_grad_(False)
    for prefix, own in stacked.items():
        model.set_submodule(prefix, LoraExperts(model.get_submodule(prefix), config, tuple(own)))
    for name in names:
        if name.rpartition(".")[0] not in stacked:
            model.set_submodule(name, LoraLinear(model.get_submodule(name), config))
    model.lora = config


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights they stand beside and remove them, in place; all parameters are trainable again.

    Raises:
        ValueError: the model has no adapters.
    """
    if getattr(model, "lora", None) is None:
        raise ValueError("merge_lora: model must have adapters, got one without")
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoraLinear, LoraExperts)):
            model.set_submodule(name, module.merged())
    model.lora = None
    return model.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and values of the adapters alone."""
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A.weight", "lora_B.weight", "_lora_A", "_lora_B")):
            yield name, parameter


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def _find_targets(model: nn.Module, config: LoraConfig) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for stacked, wanted in EXPERT_TARGETS.items():
                given = [target for target in wanted if target in config.targets]
                if given and len(given) < len(wanted):
                    rule = "hold gate_proj and up_proj together for stacked experts"
                    raise ValueError(f"apply_lora: targets must {rule}, got {given[0]}")
                if given:
                    yield f"{name}.{stacked}"
        elif type(module) is nn.Linear and name.rpartition(".")[2] in config.targets:
            yield name


def _serves(name: str, target: str) -> bool:
    last = name.rpartition(".")[2]
    return last == target or target in EXPERT_TARGETS.get(last, ())


def _merge(weight: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = torch.baddbmm if weight.dim() == 3 else torch.addmm
    return product(weight.to(wide), B.to(wide), A.to(wide), alpha=scale).to(weight.dtype)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(condition: bool, name: str, rule: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"apply_lora: {name} must {rule}, got {actual!s:.100}")
