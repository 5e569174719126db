"""Mixture of experts: top-k routed SwiGLU experts (Shazeer et al., arXiv 1701.06538; Jiang et al., arXiv 2401.04088),
and shared experts that see every token (Dai et al., arXiv 2401.06066, eq. 9); balanced by a loss, or by a bias.

Balance without a loss (Wang et al., arXiv 2408.15664, algorithm 1): expert e is chosen by s_e + b_e and weighed by s_e,
and after each step b_e += rate * sign(mean load - load of e).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arfast import ops

from .mlp import SwiGLU


class Experts(nn.Module):
    """Stacked weights of routed experts: gate_up_proj [E, 2 I, d] (gate rows, then up rows), down_proj [E, d, I]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, hidden: Tensor, routing: "ops.Routing") -> Tensor:
        return ops.moe_experts(hidden, routing, self.gate_up_proj, self.down_proj)


SCORE_BIAS = "e_score_correction_bias"  # the name that transformers' DeepSeek-V3 gave it


class MoE(nn.Module):
    """hidden [N, d] -> (out [N, d], auxiliary loss or None, choices [E] int32 that went to each expert).

    Args:
        hidden_size, intermediate_size: d and I of one expert.
        num_experts, top_k: E experts, of which every token takes K.
        num_shared_experts: experts that every token takes beside; their sum is one SwiGLU of I * num_shared_experts.
        score: "softmax" or "sigmoid" of the router's logits.
        renormalize: divide the K weights by their sum.
        scale: factor on the routed experts' weights.
        balance_coef: of the load-balancing loss (Fedus et al., arXiv 2101.03961, eq. 4, counted as Hugging Face counts:
            top_k when balanced). z_loss_coef: of the router z-loss (Zoph et al., arXiv 2202.08906, eq. 5).
        score_bias: a parameter ``gate.e_score_correction_bias`` [E], added to the scores for the choice alone; it has
            no gradient and is moved by `balance_experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared_experts: int = 0,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        balance_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        score_bias: bool = False,
    ):
        super().__init__()
        self.top_k, self.score, self.renormalize, self.scale = top_k, score, renormalize, scale
        self.balance_coef, self.z_loss_coef = balance_coef, z_loss_coef
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False) if score_bias else None
        self.gate.register_parameter(SCORE_BIAS, bias)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        shared_size = intermediate_size * num_shared_experts
        self.shared_experts = SwiGLU(hidden_size, shared_size) if num_shared_experts else None

    @property
    def score_bias(self) -> nn.Parameter | None:
        return getattr(self.gate, SCORE_BIAS)

    def forward(self, hidden: Tensor, with_aux_loss: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        router_logits = self.gate(hidden)  # [N, E]
        routing = ops.moe_route(
            router_logits,
            self.top_k,
            score=self.score,
            renormalize=self.renormalize,
            bias=self.score_bias,
            scale=self.scale,
        )
        out = self.experts(hidden, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)
        aux_loss = self._aux_loss(router_logits, routing) if with_aux_loss else None
        return out, aux_loss, routing.tokens_per_expert

    def _aux_loss(self, router_logits: Tensor, routing: "ops.Routing") -> Tensor:
        loss = router_logits.new_zeros((), dtype=torch.float32)
        if not (self.balance_coef or self.z_loss_coef):
            return loss
        balance, z = ops.router_losses(router_logits, routing)
        if self.balance_coef:
            loss = loss + self.balance_coef * balance
        if self.z_loss_coef:
            loss = loss + self.z_loss_coef * z
        return loss


@torch.no_grad()
def balance_experts(layers: Iterable[MoE], tokens_per_expert: Tensor, rate: float) -> None:
    """Move the biases of the layers that have one towards balance, each by ``rate`` (Wang et al., algorithm 1).

    Args:
        layers: in the order of the rows of tokens_per_expert [layers, E], the choices of one optimizer step.
    """
    for layer, load in zip(layers, tokens_per_expert, strict=True):
        if layer.score_bias is not None:
            # In integers: an expert with the mean load stays where it is.
            excess = load.long() * load.numel() - load.long().sum()
            layer.score_bias.sub_(excess.sign().to(layer.score_bias.dtype), alpha=rate)
