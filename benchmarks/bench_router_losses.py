"""The auxiliary losses of a router, forward and backward, against the same in torch, eager and compiled."""

import pytest
import torch
from harness import Case, accurate, compiled, with_gradients

from arfast.ops import (
    Routing,
    load_balancing_loss,
    load_balancing_loss_reference,
    moe_route,
    router_z_loss,
    router_z_loss_reference,
)


def losses(router_logits, *routing):
    routing = Routing(*routing)
    return load_balancing_loss(router_logits, routing) + router_z_loss(router_logits)


def losses_reference(router_logits, *routing):
    routing = Routing(*routing)
    return load_balancing_loss_reference(router_logits, routing) + router_z_loss_reference(router_logits)


def case(tokens, experts, top_k):
    def make_inputs(device):
        logits = torch.randn(tokens, experts, device=device)
        return logits.requires_grad_(), *moe_route(logits.detach(), top_k), torch.randn((), device=device)

    return Case(
        name=f"{tokens}x{experts}-K{top_k}-forward-backward",
        make_inputs=make_inputs,
        ours=with_gradients(losses),
        peers={"torch": with_gradients(losses_reference), "torch.compile": with_gradients(compiled(losses_reference))},
        check=accurate(with_gradients(losses_reference)),
        bytes=4 * 2 * 2 * tokens * experts,
    )


CASES = [case(4096, 64, 8), case(8192, 128, 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_router_losses(compare, case):
    compare(case)
