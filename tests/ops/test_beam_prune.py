"""beam_prune against its reference: lse and scores in float64, the order of the candidates exactly."""

import math

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from threads import same_for_any_threads

from arfast.ops import beam_prune, beam_prune_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = math.inf, math.nan
# groups, beams, vocab_size, num_candidates
SIZES = [
    (0, 4, 10, 8),
    (1, 1, 1, 1),
    (2, 3, 1, 6),
    (1, 2, 31, 4),
    (2, 2, 32, 5),
    (3, 4, 33, 8),
    (2, 5, 257, 16),
    (1, 1, 4099, 2),
    (2, 8, 1021, 24),
    (1, 64, 511, 192),
    (2, 3, 16384, 6),
    (1, 3, 50257, 9),
    (1, 2, 100, 200),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def inputs(groups, beams, vocab_size, dtype=torch.float32, scale=2.0):
    logits = (torch.randn(groups * beams, vocab_size) * scale).to(dtype)
    return logits, torch.randn(groups, beams) * 3


def expected_order(logits, scores, lse, num_candidates, *, banned=None, log_probs=False):
    """The contract once more, from the op's own lse: so the float32 scores and their ties are equal to the last bit."""
    total = (logits.float() - lse.view(-1, 1)) + scores.view(-1, 1)
    if banned is not None:
        total = total.masked_fill(banned, -INF)
    vocab_size = logits.shape[1]
    result = []
    for group in total.view(scores.shape[0], scores.shape[1] * vocab_size).cpu().numpy():
        (candidates,) = (group > -INF).nonzero()
        order = candidates[np.lexsort((candidates, -group[candidates]))][:num_candidates]
        rows = [(group[i].item(), i // vocab_size, i % vocab_size) for i in order.tolist()]
        result.append(rows + [(-INF, 0, 0)] * (num_candidates - len(rows)))
    return result


def candidates_of(best, parents, tokens):
    """The same as lists of (score, parent, token)."""
    return [
        list(zip(*rows, strict=True)) for rows in zip(best.tolist(), parents.tolist(), tokens.tolist(), strict=True)
    ]


def check(logits, scores, num_candidates, **options):
    out = beam_prune(logits, scores, num_candidates=num_candidates, **options)
    best, parents, tokens, lse = out
    assert candidates_of(best, parents, tokens) == expected_order(logits, scores, lse, num_candidates, **options)
    exact = beam_prune_reference(logits, scores.double(), num_candidates=num_candidates, **options)
    baseline = beam_prune_reference(logits, scores, num_candidates=num_candidates, **options)
    assert_accurate(lse, exact[3], baseline[3], name="lse")
    assert_accurate(best, exact[0], baseline[0], name="scores")
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups,beams,vocab_size,num_candidates", SIZES)
def test_forward(groups, beams, vocab_size, num_candidates, dtype, poisoned, device):
    check(*inputs(groups, beams, vocab_size, dtype), num_candidates)


@pytest.mark.parametrize("groups,beams,vocab_size,num_candidates", SIZES)
def test_reference_is_the_contract(groups, beams, vocab_size, num_candidates):
    logits, scores = inputs(groups, beams, vocab_size)
    banned = torch.rand(logits.shape) < 0.3
    best, parents, tokens, lse = beam_prune_reference(logits, scores, num_candidates=num_candidates, banned=banned)
    assert candidates_of(best, parents, tokens) == expected_order(logits, scores, lse, num_candidates, banned=banned)


def test_equals_log_softmax_and_topk():
    logits, scores = inputs(3, 4, 5000)
    total = (torch.log_softmax(logits, -1) + scores.view(-1, 1)).view(3, -1)
    values, index = total.topk(8)
    best, parents, tokens, lse = beam_prune(logits, scores, num_candidates=8)
    assert torch.equal(parents * 5000 + tokens, index.int())
    torch.testing.assert_close(best, values)
    torch.testing.assert_close(lse.flatten(), torch.logsumexp(logits, -1))
    assert (best.dtype, parents.dtype, tokens.dtype, lse.dtype) == (
        torch.float32,
        torch.int32,
        torch.int32,
        torch.float32,
    )


@pytest.mark.parametrize("vocab_size", [1, 7, 300, 40000])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(scale, vocab_size, device):
    check(*inputs(2, 3, vocab_size, scale=scale), 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 64])
def test_ties_of_logits(steps, dtype, device):
    logits = torch.randint(0, steps, (6, 20000)).to(dtype)
    check(logits, torch.zeros(2, 3), 12)
    check(logits, torch.tensor([[0.0, -1.0, 1.0], [2.0, 2.0, -2.0]]), 12)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_with_many_ties(seed, device):
    random = np.random.default_rng(seed)
    for _ in range(60):
        groups, beams, vocab_size, num_candidates = (int(random.integers(1, high)) for high in (4, 6, 70, 14))
        logits = torch.randint(0, int(random.integers(1, 9)), (groups * beams, vocab_size)).float()
        logits[torch.rand(logits.shape) < random.choice([0.0, 0.5])] = -INF
        scores = torch.randint(-2, 1, (groups, beams)) * random.choice([1.0, 3e7])
        banned = torch.rand(logits.shape) < random.choice([0.0, 0.3, 0.9])
        options = dict(banned=banned if random.integers(2) else None, log_probs=bool(random.integers(2)))
        check(logits, scores.float(), num_candidates, **options)


@pytest.mark.parametrize("running", [-1e9, -3e5, 1e7])
def test_ties_that_rounding_makes(running, device):
    """A large running score swallows the differences of the logits: the smaller token wins over the larger logit."""
    logits, _ = inputs(2, 3, 20000)
    _, _, tokens, _ = check(logits, torch.full((2, 3), running), 9)
    if running == -1e9:
        assert tokens[0].tolist() == list(range(9))
    check(logits, torch.tensor([[0.0, running, running], [running, 0.0, running]]), 9)


def test_first_step_of_beam_search(device):
    """transformers starts with one live beam and the others at -1e9; -inf must do as well."""
    logits, _ = inputs(1, 4, 1000)
    one_live = torch.tensor([[0.0, -1e9, -1e9, -1e9]])
    _, parents, _, _ = check(logits, one_live, 8)
    assert (parents == 0).all()
    _, parents, _, _ = check(logits, one_live.masked_fill(one_live < 0, -INF), 8)
    assert (parents == 0).all()


@pytest.mark.parametrize("order", ["ascending", "descending", "one-hot", "one-hot at the end"])
def test_ordered_rows(order, device):
    logits = torch.arange(40000.0).expand(4, -1) / 1000
    if order == "descending":
        logits = logits.flip(-1)
    elif order.startswith("one-hot"):
        logits = torch.zeros(4, 40000)
        logits[:, -1 if order.endswith("end") else 17] = 50.0
    check(logits, torch.tensor([[0.0, -0.5], [1.0, -2.0]]), 16)


@pytest.mark.random_schedules
@pytest.mark.parametrize("vocab_size", [2000, 60000])
def test_more_candidates_than_a_block_has_threads(vocab_size, device):
    """On a GPU: 2000 tokens are ranked at once, of 60000 the maximum is taken 300 times."""
    check(*inputs(1, 1, vocab_size), 300)


@pytest.mark.parametrize("beams", [1, 2, 3, 7, 16, 64])
def test_every_beam_width(beams, device):
    check(*inputs(2, beams, 1500), 2 * beams)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 5, 300, 17000, 19999])
def test_rows_that_have_no_candidates(position, dtype, poisoned, device):
    """NaN, +inf and all -inf: lse says which it was, no other beam is touched and no score is NaN."""
    logits, scores = inputs(2, 4, 20000, dtype)
    logits[0, position] = NAN
    logits[2, position] = INF
    logits[3] = -INF
    logits[4, [position, (position + 400) % 20000]] = torch.tensor([NAN, INF], dtype=dtype)
    best, parents, _, lse = check(logits, scores, 8)
    assert lse.isnan().tolist() == [[True, False, False, False], [True, False, False, False]]
    assert lse[0, 2] == INF and lse[0, 3] == -INF
    assert (parents[0] == 1).all() and not (parents[1] == 0).any() and best.isfinite().all()


def test_no_candidates_at_all(poisoned, device):
    logits, scores = inputs(3, 2, 600)
    logits[0:2] = -INF
    logits[2:4] = NAN
    scores[2] = torch.tensor([-INF, NAN])
    best, parents, tokens, _ = check(logits, scores, 4)
    assert (best == -INF).all() and (parents == 0).all() and (tokens == 0).all()


def test_masked_logits(device):
    logits, scores = inputs(2, 2, 20000)
    logits[:, 3:] = -INF
    best, _, tokens, _ = check(logits, scores, 8)
    assert (tokens < 3).all() and (best[:, 6:] == -INF).all()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens_stay_in_lse(share, dtype, device):
    logits, scores = inputs(2, 3, 17001, dtype)
    banned = torch.rand(logits.shape) < share
    banned[0, logits[0].argmax()] = True
    _, _, _, lse = check(logits, scores, 9, banned=banned)
    assert_bitwise_equal(lse, beam_prune(logits, scores, num_candidates=9)[3])


@pytest.mark.parametrize("vocab_size", [1, 33, 20001])
def test_one_row_of_banned_tokens_for_all_beams(vocab_size, device):
    logits, scores = inputs(2, 3, vocab_size)
    banned = torch.rand(vocab_size) < 0.5
    expected = check(logits, scores, 9, banned=banned.repeat(6, 1))
    for row in (banned, banned[None], banned.expand(6, -1), torch.stack([banned, ~banned], 1)[:, 0]):
        for a, b in zip(check(logits, scores, 9, banned=row), expected, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_not_normalised_again(dtype, poisoned, device):
    """Rows that sum to anything; and which of them are broken is still told."""
    logits, scores = inputs(2, 4, 20000, dtype)
    for position in (0, 19000):
        logits[1, position], logits[2, position], logits[3] = NAN, INF, -INF
        logits[4:, position] = -INF
        best, parents, tokens, lse = check(logits, scores, 8, log_probs=True)
        assert lse[0].isfinite().tolist() == [True, False, False, False]
        assert lse[0, 0] == 0 and (lse[1] == 0).all() and lse[0, 1].isnan()
        assert (parents[0] == 0).all()
        rows = torch.arange(2)[:, None] * 4 + parents
        assert torch.equal(best, logits[rows.long(), tokens.long()].float() + scores.flatten()[rows.long()])


def test_normalised_twice_is_normalised_once(device):
    logits, scores = inputs(2, 3, 500)
    given = beam_prune(torch.log_softmax(logits, -1), scores, num_candidates=6, log_probs=True)
    for a, b in zip(given[1:3], beam_prune(logits, scores, num_candidates=6)[1:3], strict=True):
        assert torch.equal(a, b)


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    logits, scores = inputs(2, 3, 517, torch.bfloat16)
    banned = torch.rand(logits.shape) < 0.2
    expected = beam_prune(logits, scores, num_candidates=6, banned=banned)
    wide, wide_banned = torch.empty(6, 700, dtype=logits.dtype), torch.empty(6, 555, dtype=torch.bool)
    for offset in (1, 3, 8):
        view = wide[:, offset : offset + 517].copy_(logits)
        mask = wide_banned[:, offset : offset + 517].copy_(banned)
        for a, b in zip(beam_prune(view, scores, num_candidates=6, banned=mask), expected, strict=True):
            assert_bitwise_equal(a, b)
    transposed = logits.t().contiguous().t(), scores.t().contiguous().t(), banned.t().contiguous().t()
    for a, b in zip(beam_prune(*transposed[:2], num_candidates=6, banned=transposed[2]), expected, strict=True):
        assert_bitwise_equal(a, b)


def test_expanded_row(device):
    logits, scores = inputs(1, 1, 300)
    check(logits.expand(4, -1), scores.expand(2, 2), 5)


def test_same_bits_alone_in_a_batch_and_in_any_order(device):
    logits, scores = inputs(5, 4, 20011)
    whole = beam_prune(logits, scores, num_candidates=8)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = beam_prune(logits.view(5, 4, -1)[order].reshape(20, -1), scores[order], num_candidates=8)
    for a, b in zip(whole, shuffled, strict=True):
        assert_bitwise_equal(a[order], b)
    for group in range(5):
        alone = beam_prune(logits[4 * group : 4 * group + 4], scores[group : group + 1], num_candidates=8)
        for a, b in zip(whole, alone, strict=True):
            assert_bitwise_equal(a[group : group + 1], b)


@pytest.mark.parametrize("groups,beams,vocab_size", [(1, 1, 200001), (1, 3, 70000), (9, 4, 3000)])
def test_same_bits_for_every_number_of_threads(groups, beams, vocab_size):
    logits, scores = inputs(groups, beams, vocab_size)
    logits = (logits * 8).round() / 8  # with ties
    same_for_any_threads(lambda: beam_prune(logits, scores, num_candidates=2 * beams), (1, 2, 3, 8))


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    """The portable code, as machines without AVX-512 run it."""
    tests = ("test_rows_that_have_no_candidates", "test_random_cases_with_many_ties")
    files = [f"{__file__}::{test}" for test in tests]
    run_on_target(target, files)


def test_no_gradient():
    logits, scores = inputs(1, 2, 50)
    assert not any(t.requires_grad for t in beam_prune(logits.requires_grad_(), scores, num_candidates=4))


def test_opcheck():
    logits, scores = inputs(2, 3, 40)
    torch.library.opcheck(torch.ops.arfast.beam_prune, (logits, scores, 6, None, False))
    banned = torch.rand(logits.shape) < 0.5
    torch.library.opcheck(torch.ops.arfast.beam_prune, (logits.bfloat16(), scores, 6, banned, True))


def test_compile():
    logits, scores = inputs(2, 3, 40)
    compiled = torch.compile(beam_prune, fullgraph=True, backend="aot_eager")
    expected = beam_prune(logits, scores, num_candidates=6)
    for a, b in zip(compiled(logits, scores, num_candidates=6), expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(logits=torch.zeros(6, 9, dtype=torch.int64)),
            "logits must be float32, bfloat16, float16 or float64, got int64",
        ),
        (dict(logits=torch.zeros(5, 9)), r"logits must have shape \[B\*K, V\] = \[6, \*\], got \[5, 9\]"),
        (dict(logits=torch.zeros(6)), r"logits must have shape \[B\*K, V\] = \[6, \*\], got \[6\]"),
        (dict(logits=torch.zeros(6, 0)), r"logits must have 1 <= V and K \* V < 2\^31, got \[6, 0\]"),
        (
            dict(logits=torch.zeros(6, 1).expand(6, 2**30)),
            r"logits must have 1 <= V and K \* V < 2\^31, got \[6, 1073741824\]",
        ),
        (dict(scores=torch.zeros(6)), r"scores must have shape \[B, K\] = \[\*, \*\], got \[6\]"),
        (dict(scores=torch.zeros(2, 3, dtype=torch.float64)), "scores must be float32, got float64"),
        (dict(scores=torch.zeros(2, 0)), r"scores must have K >= 1 beams per group, got \[2, 0\]"),
        (dict(num_candidates=0), "num_candidates must be at least 1, got 0"),
        (dict(num_candidates=-3), "num_candidates must be at least 1, got -3"),
        (
            dict(banned=torch.zeros(6, 8, dtype=torch.bool)),
            r"banned must have shape \[B\*K, V\] = \[6, 9\], got \[6, 8\]",
        ),
        (dict(banned=torch.zeros(8, dtype=torch.bool)), r"banned must have shape \[V\] = \[9\], got \[8\]"),
        (
            dict(banned=torch.zeros(1, 8, dtype=torch.bool)),
            r"banned must have shape \[B\*K, V\] = \[1, 9\], got \[1, 8\]",
        ),
        (
            dict(banned=torch.zeros(2, 9, dtype=torch.bool)),
            r"banned must have shape \[B\*K, V\] = \[6, 9\], got \[2, 9\]",
        ),
        (dict(banned=torch.zeros(6, 9)), "banned must be bool, got float32"),
    ],
)
def test_errors(change, message):
    arguments = dict(logits=torch.zeros(6, 9), scores=torch.zeros(2, 3), num_candidates=4) | change
    with pytest.raises(RuntimeError, match="beam_prune: " + message):
        beam_prune(**arguments)
