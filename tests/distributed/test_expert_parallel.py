"""Experts split over ranks against experts on one rank: outputs, gradients, auxiliary losses, empty ranks."""

import pytest
import torch
import torch.distributed as dist
from parallel_models import DENSE, MOE, config, same_curve, same_step
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from arfast import ops
from arfast.distributed import ParallelConfig, init_mesh
from arfast.distributed.collectives import Group
from arfast.distributed.expert_parallel import expert_parallel, global_router_losses
from arfast.distributed.mesh import Groups

FIVE = dict(num_attention_heads=5, num_key_value_heads=5, head_dim=8, vocab_size=250)
EXPERTS, TOP_K, SIZE, INNER = 8, 2, 16, 12


def _inputs(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return draw(num_tokens, SIZE), draw(num_tokens, EXPERTS), draw(EXPERTS, 2 * INNER, SIZE), draw(EXPERTS, SIZE, INNER)


def _run(hidden, router_logits, weights, group):
    """Output and gradients of this rank's tokens and experts; the upstream gradient is a function of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, router_logits, *weights)]
    routing = ops.moe_route(leaves[1], TOP_K)
    out = expert_parallel(leaves[0], routing, *leaves[2:], group)
    out.sin().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _check(group, counts, change_logits=lambda logits: logits):
    """Rank r has counts[r] of the tokens; everything is what one rank computes of all."""
    hidden, router_logits, *weights = _inputs(sum(counts))
    router_logits = change_logits(router_logits)
    expected = _run(hidden, router_logits, weights, Group())
    mine = slice(sum(counts[: group.rank]), sum(counts[: group.rank + 1]))
    parts = [w.chunk(group.size)[group.rank] for w in weights]
    got = _run(hidden[mine], router_logits[mine], parts, group)
    again = _run(hidden[mine], router_logits[mine], parts, group)
    assert all(map(torch.equal, got, again)), "not the same bits in two runs"
    wanted = [t[mine] for t in expected[:3]] + [t.chunk(group.size)[group.rank] for t in expected[3:]]
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-12)


def _all_checks():
    ranks = dist.get_world_size()
    group = Group(init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",)), "expert")
    _check(group, [20] * ranks)
    _check(group, [3 * r + 1 for r in range(ranks)])
    _check(group, [0] + [11] * (ranks - 1))  # a rank without tokens still computes for the others
    _check(group, [9] * ranks, lambda logits: logits.index_fill(1, torch.tensor([0, 1]), 50.0))  # all to one rank
    _check(group, [0] * (ranks - 1) + [5], lambda logits: logits.index_fill(1, torch.tensor([2, 3]), 50.0))


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_travel_and_return(ranks):
    run_ranks(_all_checks, ranks)


def _losses_of_uneven_batches(parallel):
    groups = Groups(init_mesh(ParallelConfig(**parallel), "cpu"))
    rank, counts, shares = dist.get_rank(), (7, 0, 30, 3), (0.1, 0.2, 0.3, 0.4)
    ranks = dist.get_world_size()
    _, router_logits, *_ = _inputs(sum(counts[:ranks]))
    own = router_logits.split(counts[:ranks])[rank].clone().requires_grad_()
    router_logits.requires_grad_()
    expected = ops.router_losses(router_logits, ops.moe_route(router_logits, TOP_K))
    losses = global_router_losses(own, ops.moe_route(own, TOP_K), groups.context, groups.data)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert all((groups.data.gather(loss) == loss).all() for loss in losses), "not the same value on every data rank"
    # The ranks of one batch count once; what the data ranks weigh it by adds up.
    share = shares[groups.data.rank] / sum(shares[: groups.data.size])
    (share * (losses[0] + 3 * losses[1])).backward()
    (expected[0] + 3 * expected[1]).backward()
    wanted = router_logits.grad.split(counts[:ranks])[rank]
    torch.testing.assert_close(own.grad, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("parallel", [dict(data=4), dict(context=2), dict(data=2, context=2)])
def test_auxiliary_losses_are_those_of_all_tokens(parallel):
    run_ranks(_losses_of_uneven_batches, ParallelConfig(**parallel).num_ranks, parallel)


def _steps(cases):
    for parallel, changes in cases:
        same_step(parallel, MOE, **changes)


def test_one_step_on_two_ranks():
    sigmoid = dict(router_score="sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5, qk_norm=False)
    cases = [
        (dict(data=2, expert=2), dict(num_shared_experts=1)),
        (dict(data=2), {}),
        (dict(context=2, expert=2), sigmoid),
        (dict(data=2, expert=2), dict(decoder_sparse_step=2)),
        (dict(data=2, expert=2), dict(mlp_only_layers=(1,), tie_word_embeddings=True)),
    ]
    run_ranks(_steps, 2, cases)


def test_one_step_with_fewer_expert_ranks_than_ranks():
    run_ranks(_steps, 4, [(dict(data=4, expert=2), {}), (dict(data=2, context=2, expert=2), {})])


def _curve(parallel, changes):
    same_curve(parallel, MOE, **changes)


def test_fifty_steps_on_two_ranks():
    run_ranks(_curve, 2, dict(data=2, expert=2), dict(num_shared_experts=1))


@pytest.mark.slow
def test_fifty_steps_on_four_ranks():
    run_ranks(_curve, 4, dict(data=4, expert=4), {}, timeout=200)
    run_ranks(_curve, 4, dict(data=2, context=2, expert=4), {}, timeout=200)


@pytest.mark.parametrize(
    "parallel, changes, message",
    [
        (dict(data=4, expert=3), {}, "expert must divide data \\* context = 4, got 3"),
        (dict(data=3, expert=3), {}, "expert must divide num_experts=8, got 3"),
        (dict(data=2, expert=2), dict(num_experts=0), "expert must be 1 for a model without experts, got 2"),
        (dict(tensor=5), FIVE, "tensor must divide moe_intermediate_size=24, got 5"),
    ],
)
def test_errors(parallel, changes, message):
    with pytest.raises(ValueError, match=f"ParallelConfig: {message}"):
        ParallelConfig(**parallel).check_model(config(MOE if changes != dict(num_experts=0) else DENSE, **changes))
