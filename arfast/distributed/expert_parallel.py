"""Experts split over ranks: tokens travel to the ranks that own their experts, and back.

Lepikhin et al. 2020, arXiv 2006.16668, section 3.2, without a capacity: every choice of every token arrives. A rank
sorts the choices of its own tokens by expert, which is by rank; the counts and then the rows are exchanged all-to-all,
computed there, sent back, and weighed and summed where they came from.

The auxiliary losses are those of the global batch (or of each data rank's own): with S_e the sum over the tokens of all
data and context ranks of the router's probability of expert e, C_e the number of their choices of e, Z the sum of their
squared log-sum-exp, and N their number, all summed over the ranks before anything is multiplied or divided,

    balance = E sum_e (C_e / N) (S_e / N),    z = Z / N,

which a mean of the ranks' own losses is not. The value is the same on every rank. Its gradient is that of the sum over
the data ranks of what each differentiates: ranks that weigh aux_loss by shares that sum to 1 get its gradient once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arfast import ops
from arfast.nn import MoE
from arfast.nn.moe import Experts

from .collectives import Group, all_reduce, copy_to, exchange_rows, reduce_from
from .tensor_parallel import TensorRegion


class ParallelExperts(Experts):
    """This rank's experts [E / R, ...], for the tokens that all ranks send to them."""

    group: Group

    def forward(self, hidden: Tensor, routing: ops.Routing) -> Tensor:
        return expert_parallel(hidden, routing, self.gate_up_proj, self.down_proj, self.group)


class ParallelMoE(MoE):
    """MoE of this rank's tokens with ParallelExperts, and of those this rank's channels.

    context, data: the ranks whose tokens the auxiliary losses are of.
    """

    region: TensorRegion
    context: Group
    data: Group

    def forward(self, hidden: Tensor, with_aux_loss: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        tensor = self.region.group
        tokens = self.region.enter_whole(hidden)
        router_logits = self.gate(tokens)
        options = dict(score=self.score, renormalize=self.renormalize, bias=self.score_bias, scale=self.scale)
        routing = ops.moe_route(router_logits, self.top_k, **options)
        # Each rank has a part of the channels, hence of the gradients of what it is given.
        shared = routing._replace(expert_weights=copy_to(routing.expert_weights, tensor))
        out = self.region.leave(self.experts(copy_to(tokens, tensor), shared))
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)
        aux_loss = self._aux_loss(router_logits, routing) if with_aux_loss else None
        return out, aux_loss, routing.tokens_per_expert

    def _aux_loss(self, router_logits: Tensor, routing: ops.Routing) -> Tensor:
        loss = routing.lse.new_zeros((), dtype=torch.float32)
        if not (self.balance_coef or self.z_loss_coef):
            return loss
        balance, z = global_router_losses(router_logits, routing, self.context, self.data)
        return loss + self.balance_coef * balance + self.z_loss_coef * z


def expert_parallel(hidden: Tensor, routing: ops.Routing, w_gate_up: Tensor, w_down: Tensor, group: Group) -> Tensor:
    """`arfast.ops.moe_experts` with the experts split over the ranks of a group; every rank calls it.

    Args:
        hidden: [T, d], this rank's tokens; T may be 0.
        routing: of these tokens to all E experts, from `arfast.ops.moe_route`.
        w_gate_up, w_down: [E / R, 2 I, d] and [E / R, d, I]: experts r E / R to (r + 1) E / R of rank r.
        group: R ranks.

    Returns:
        [T, d], the dtype of `hidden`. Deterministic. Under NCCL the host waits once for the counts.

    Gradients of hidden and routing.expert_weights for this rank's tokens, of the weights for the tokens of all ranks.
    """
    if group.size == 1:
        return ops.moe_experts(hidden, routing, w_gate_up, w_down)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    ones = [w_gate_up.shape[0]] * group.size
    counts = routing.tokens_per_expert  # [E], by rank and expert: what this rank sends
    incoming = group.exchange(counts, ones, ones)  # [R * E / R], by rank and own expert: what it receives
    send, receive = torch.stack([counts, incoming]).view(2, group.size, -1).sum(-1).tolist()
    rows = exchange_rows(ops.moe_permute(hidden, routing), send, receive, group)
    out = ops.moe_experts(rows, _arrived(incoming, group.size, sum(receive), routing), w_gate_up, w_down)
    return ops.moe_combine(exchange_rows(out, receive, send, group), routing)


def _arrived(incoming: Tensor, num_ranks: int, num_rows: int, routing: ops.Routing) -> ops.Routing:
    """The routing of rows that came sorted by (rank, expert): each has one expert and the weight 1."""
    counts = incoming.view(num_ranks, -1)
    num_experts = counts.shape[1]
    experts = torch.arange(num_experts, device=counts.device, dtype=torch.int32).repeat(num_ranks)
    expert_ids = torch.repeat_interleave(experts, incoming, output_size=num_rows)
    order = expert_ids.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    per_expert = counts.sum(0, dtype=torch.int32)
    offsets = torch.cat([per_expert.new_zeros(1), per_expert.cumsum(0, dtype=torch.int32)])
    ones = routing.expert_weights.new_ones(num_rows, 1)
    order, position = order.int(), position.int()[:, None]
    return ops.Routing(expert_ids[:, None], ones, per_expert, offsets, order, position, ones[:, 0])


def global_router_losses(
    router_logits: Tensor, routing: ops.Routing, context: Group, data: Group
) -> tuple[Tensor, Tensor]:
    """`load_balancing_loss` with normalize="hf" and `router_z_loss` of the tokens of all data and context ranks.

    Args:
        router_logits: [T, E], this rank's; T may be 0.
        routing: from `arfast.ops.moe_route`.
    """
    lse = routing.lse
    probabilities = router_logits.to(lse.dtype).softmax(-1).sum(0)  # [E]
    differentiable = torch.cat([probabilities, lse.square().sum()[None]])
    sums = all_reduce(reduce_from(differentiable, context), data)
    counts = torch.cat([routing.tokens_per_expert, routing.tokens_per_expert.new_tensor([len(lse)])]).to(torch.int64)
    counts = data.sum_(context.sum_(counts)).to(sums.dtype)
    num_experts, num_tokens = router_logits.shape[1], counts[-1]
    balance = num_experts * (counts[:-1] / num_tokens * sums[:-1]).sum() / num_tokens
    return balance, sums[-1] / num_tokens
