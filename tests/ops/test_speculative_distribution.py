"""What speculative_verify draws: frequencies against exact distributions, whatever the drafts are."""

import itertools

import pytest
import scipy.stats
import torch

from arfast.ops import sample, speculative_verify
from arfast.ops.sample import kept_weights, random_bits

FILTERS = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((1.0, 0.6), (0, 7), (1.0, 0.8), (0.0, 0.1))
]
DRAWS = 40_000


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def states(sign=1):
    """A stream of its own for every row; the drafts' have sign -1."""
    state = torch.tensor([[11, 0, 0]]).repeat(DRAWS, 1)
    state[:, 1] = torch.arange(DRAWS) if sign == 1 else -1 - torch.arange(DRAWS)
    return state


def check_frequencies(tokens, weights):
    exact = weights.double() / weights.sum()
    counts = torch.bincount(tokens, minlength=len(weights))
    assert counts[weights == 0].sum() == 0
    used = exact > 0
    pvalue = scipy.stats.chisquare(counts[used].cpu(), (exact[used] * len(tokens)).cpu()).pvalue
    assert used.sum() == 1 or pvalue > 1e-4


@pytest.mark.not_emulated  # 40,000 rows; that the kernel draws what the CPU does is for test_speculative_verify.py
@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_target(filters, with_logits, device):
    """At every position, given that the drafts before it were accepted: the logits here do not depend on them."""
    target = torch.randn(4, 20)
    draft = target[:3] + 0.8 * torch.randn(3, 20)
    drafting = states(-1)
    tokens = [sample(logits.expand(DRAWS, -1), **filters, generator_state=drafting)[0] for logits in draft]
    if not with_logits:  # looked up: the same for all
        tokens = [kept_weights(logits[None], **filters).argmax(-1).expand(DRAWS) for logits in target[:3]]
    drafts, state = torch.stack(tokens, 1), states()
    draft_logits = draft.expand(DRAWS, -1, -1) if with_logits else None
    new, num_accepted, _ = speculative_verify(
        target.expand(DRAWS, -1, -1), drafts, draft_logits, **filters, generator_state=state
    )
    weights = kept_weights(target, **filters).double()
    p = weights / weights.sum(-1, keepdim=True)
    for position in range(4):
        check_frequencies(new[new[:, position] >= 0, position], weights[position])
    # The acceptance is sum min(p, q), or p of the token that was looked up.
    q = kept_weights(draft, **filters).double()
    q = q / q.sum(-1, keepdim=True)
    chances = torch.minimum(p[:3], q).sum(-1) if with_logits else p[:3].amax(-1)
    reached = DRAWS
    for position, chance in enumerate(chances.tolist()):
        accepted = int((num_accepted > position).sum())
        assert reached == 0 or scipy.stats.binomtest(accepted, reached, min(chance, 1.0)).pvalue > 1e-4
        reached = accepted


def test_numbers_of_acceptance():
    """Uniform, and without relation to those that draw the same token or its neighbours."""
    accept = torch.tensor([random_bits(5, 0, i, 1) * 2.0**-48 for i in range(8000)], dtype=torch.float64)
    draw = torch.tensor([random_bits(5, 0, i) * 2.0**-48 for i in range(8000)], dtype=torch.float64)
    assert scipy.stats.kstest(accept, "uniform").pvalue > 1e-4
    for u, v in ((accept, draw), (accept[1:], draw[:-1]), (accept[:-1], draw[1:]), (accept[1:], accept[:-1])):
        cells = torch.bincount((u * 8).long() * 8 + (v * 8).long(), minlength=64)
        assert scipy.stats.chisquare(cells).pvalue > 1e-4
