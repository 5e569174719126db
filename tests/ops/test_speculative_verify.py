"""speculative_verify against its reference: tokens exactly, since all of their arithmetic is on integers, and
log-probabilities."""

import itertools
import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from filter_errors import FILTER_ERRORS
from threads import same_for_any_threads

from arfast.ops import sample, speculative_verify, speculative_verify_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = math.inf, math.nan
# batch, num_drafts, vocab_size
SIZES = [(0, 3, 5), (2, 0, 7), (1, 1, 1), (5, 3, 2), (4, 2, 31), (4, 5, 32), (3, 4, 33), (3, 2, 257), (1, 2, 8185)]
FILTERS = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((1.0, 0.7), (0, 20), (1.0, 0.8), (0.0, 0.05))
]
OTHER_FILTERS = [dict(temperature=0.0), dict(top_k=1), dict(top_k=1500), dict(top_p=0.0), dict(min_p=1.0)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def inputs(batch, num_drafts, vocab_size, dtype=torch.float32, scale=2.0, noise=1.0, **filters):
    """A draft that is the target with noise, and the tokens that it draws."""
    target = torch.randn(batch, num_drafts + 1, vocab_size) * scale
    draft = (target[:, :-1] + noise * torch.randn(batch, num_drafts, vocab_size)).to(dtype)
    state = torch.randint(-(2**63), 2**63 - 1, (batch, 3))
    return target.to(dtype), drawn(draft, state, **filters), draft, state


def drawn(draft_logits, state, **filters):
    """Tokens [B, G] from [B, G, V], by streams of their own."""
    streams = state.clone()
    streams[:, 1] = -1 - state[:, 1]
    columns = [sample(logits, **filters, generator_state=streams)[0] for logits in draft_logits.unbind(1)]
    return torch.stack(columns, 1) if columns else state.new_empty(len(state), 0)


def check(target, tokens, draft, state, **options):
    before = state.clone()
    new, num_accepted, logprobs = speculative_verify(target, tokens, draft, **options, generator_state=state)
    options["generator_state"] = before
    wide = None if draft is None else draft.double()
    expected, accepted, exact = speculative_verify_reference(target.double(), tokens, wide, **options)
    assert new.dtype == torch.int64 and torch.equal(new, expected), options
    assert num_accepted.dtype == torch.int32 and torch.equal(num_accepted, accepted), options
    narrow = None if draft is None else draft.float()
    _, _, baseline = speculative_verify_reference(target.float(), tokens, narrow, **options)
    assert_accurate(logprobs, exact, baseline, name="logprobs")
    assert torch.equal(state[:, :2], before[:, :2]) and torch.equal(state[:, 2], before[:, 2] + accepted + 1)
    return new, num_accepted


@pytest.mark.emulated_sample(2)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,num_drafts,vocab_size", SIZES)
def test_forward(batch, num_drafts, vocab_size, dtype, half, poisoned, device, implementation):
    some = FILTERS[::5] if implementation != "cpu" or vocab_size > 300 else FILTERS
    for filters in [*some, *OTHER_FILTERS][half::2]:
        target, tokens, draft, state = inputs(batch, num_drafts, vocab_size, dtype, **filters)
        check(target, tokens, draft, state, **filters)
        check(target, tokens, None, state, **filters)


@pytest.mark.random_schedules
@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[6]], ids=str)
def test_large_vocabularies(filters, device):
    target, tokens, draft, state = inputs(2, 1, 10007, torch.bfloat16, **filters)
    check(target, tokens, draft, state, **filters)
    check(target, tokens, None, state, **filters)


@pytest.mark.parametrize("filters", [*FILTERS[::5], *OTHER_FILTERS], ids=str)
def test_ties(filters, device):
    """On a grid."""
    target = torch.randint(0, 7, (4, 4, 300)) / 4
    draft = (target[:, :-1] + torch.randint(0, 2, (4, 3, 300)) / 4).contiguous()
    state = inputs(4, 0, 1)[-1]
    check(target, drawn(draft, state, **filters), draft, state, **filters)


@pytest.mark.parametrize("with_logits", [True, False])
def test_rows_with_fewer_drafts(with_logits, device):
    """A row's drafts end at the first token that is none; what stands behind is not looked at."""
    target, tokens, draft, state = inputs(8, 4, 50, top_k=20)
    target[:, :-1] = draft  # all are accepted
    tokens[0, 0], tokens[1, 2], tokens[2, 3], tokens[3, 1] = -1, 50, 2**40, -(2**63)
    tokens[4] = -1
    draft = draft if with_logits else None
    new, num_accepted = check(target, tokens, draft, state, top_k=20)
    if with_logits:
        assert num_accepted.tolist() == [0, 2, 3, 1, 0, 4, 4, 4]
    for row, count in enumerate(num_accepted.tolist()):
        assert (new[row, : count + 1] >= 0).all() and (new[row, count + 1 :] == -1).all()


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[6], FILTERS[15], OTHER_FILTERS[0]], ids=str)
def test_without_drafts_it_is_sample(filters, device):
    target, _, _, state = inputs(5, 3, 300)
    expected = sample(target[:, 0], **filters, generator_state=state.clone())
    for num_drafts in (0, 3):
        tokens = torch.full((5, num_drafts), -1)
        logits, own = target[:, : num_drafts + 1], state.clone()
        new, num_accepted, logprobs = speculative_verify(logits, tokens, **filters, generator_state=own)
        assert torch.equal(new[:, 0], expected[0]) and not num_accepted.any()
        assert_accurate(logprobs[:, 0], expected[1].double(), expected[1])
        assert torch.equal(own, state + torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("filters", [*FILTERS, *OTHER_FILTERS], ids=str)
def test_equal_distributions_are_always_accepted(filters, device):
    target, _, _, state = inputs(8, 3, 60)
    draft = target[:, :-1].contiguous()
    _, num_accepted = check(target, drawn(draft, state, **filters), draft, state, **filters)
    assert (num_accepted == 3).all()


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[6], OTHER_FILTERS[0]], ids=str)
def test_disjoint_distributions_are_never_accepted(filters, device):
    target, _, _, state = inputs(20, 2, 60)
    target[..., 30:] = -INF
    draft = target[:, :-1].flip(-1).contiguous()
    new, num_accepted = check(target, drawn(draft, state, **filters), draft, state.clone(), **filters)
    assert not num_accepted.any() and (new[:, 0] < 30).all()
    assert torch.equal(new[:, 0], sample(target[:, 0], **filters, generator_state=state)[0])


def test_one_hot_target(device):
    target, tokens, draft, state = inputs(20, 3, 60, scale=0.1)
    target[:] = -INF
    target[..., 17] = 3.0
    tokens[:7] = 17
    for logits in (draft, None):
        new, num_accepted = check(target, tokens, logits, state.clone())
        assert (new[new >= 0] == 17).all() and (num_accepted[:7] == 3).all() and num_accepted[7:].max() < 3


def test_greedy_takes_the_first_of_the_best(device):
    target = torch.randint(0, 4, (30, 4, 9)).float()
    best = (target == target.amax(-1, keepdim=True)).byte().argmax(-1)
    tokens = torch.where(torch.rand(30, 3) < 0.7, best[:, :-1], 8 - best[:, :-1])
    _, _, draft, state = inputs(30, 3, 9)
    right = (tokens == best[:, :-1]).long().cumprod(-1).sum(-1)
    assert set(right.tolist()) == {0, 1, 2, 3}
    for logits in (draft, None):
        new, num_accepted = check(target, tokens, logits, state.clone(), temperature=0.0)
        assert torch.equal(num_accepted.long(), right)
        assert torch.equal(new[torch.arange(30), right], best[torch.arange(30), right])


@pytest.mark.emulated_sample(2)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(dtype, half, poisoned, device):
    target, tokens, draft, state = inputs(9, 2, 41, dtype)
    target[0, 0, 7] = NAN
    target[1, 0, 7] = INF
    target[2, 0] = -INF
    target[3, 1] = NAN
    draft[4, 0] = NAN
    draft[5, 1] = -INF
    draft[6, 0, 5] = INF
    target[7, 0, ::2] = -INF
    draft[8, 0, 1::2] = -INF
    for filters in [*FILTERS[::6], *OTHER_FILTERS][half::2]:
        tokens = drawn(draft, state, **filters)
        for logits in (draft, None):
            before = state.clone()
            new, _ = check(target, tokens, logits, state, **filters)
            assert new.max() < 41 and new[:, 0].min() >= 0 and new[7, 0] % 2 == 1
            logprobs = speculative_verify(target, tokens, logits, **filters, generator_state=before)[2]
            assert logprobs[:3, 0].isnan().all() and not logprobs[4:].isnan().any()


@pytest.mark.parametrize("temperature", [1e-45, 1e-3, 3e38])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_values(scale, temperature, device):
    for filters in FILTERS[:8:3]:
        filters = filters | dict(temperature=temperature)
        target, tokens, draft, state = inputs(3, 2, 100, scale=scale, **filters)
        check(target, tokens, draft, state, **filters)


def test_the_largest_sums(device):
    """All weights at 2^40: no product or sum of them overflows."""
    target, state = torch.zeros(2, 2, 70_000), inputs(2, 0, 1)[-1]
    draft = torch.zeros(2, 1, 70_000)
    draft[:, :, 35_000:] = -INF
    tokens = torch.tensor([[1], [34_999]])
    check(target, tokens, draft, state)
    check(target, tokens, None, state)


def test_same_bits_alone_in_a_batch_and_in_any_order(device):
    for filters in FILTERS[::4]:
        target, tokens, draft, state = inputs(5, 3, 1021, noise=0.3, **filters)
        whole = speculative_verify(target, tokens, draft, **filters, generator_state=state.clone())
        order = torch.tensor([3, 0, 4, 1, 2])
        some = (target[order], tokens[order], draft[order])
        for a, b in zip(whole, speculative_verify(*some, **filters, generator_state=state[order]), strict=True):
            assert_bitwise_equal(a[order], b)
        for row in range(5):
            one = slice(row, row + 1)
            alone = speculative_verify(
                target[one], tokens[one], draft[one], **filters, generator_state=state[one].clone()
            )
            for a, b in zip(whole, alone, strict=True):
                assert_bitwise_equal(a[one], b)


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    target, tokens, draft, state = inputs(4, 2, 517, torch.bfloat16, noise=0.3)
    wide_tokens = torch.zeros(2, 9, dtype=torch.int64).t()[1:5]
    wide_tokens.copy_(tokens)
    wide_state = torch.zeros(3, 9, dtype=torch.int64).t()[1::2]
    for filters in (dict(top_k=5), dict(top_p=0.9), {}):
        expected = speculative_verify(target, tokens, draft, **filters, generator_state=state.clone())
        for offset in (1, 3, 8):
            views = []
            for logits in (target, draft):
                wide = torch.empty(logits.shape[1], 4, 700, dtype=logits.dtype)[..., offset : offset + 517]
                views.append(wide.transpose(0, 1).copy_(logits))
            wide_state.copy_(state)
            actual = speculative_verify(views[0], wide_tokens, views[1], **filters, generator_state=wide_state)
            for a, b in zip(actual, expected, strict=True):
                assert_bitwise_equal(a, b)
            assert torch.equal(wide_state[:, 2], state[:, 2] + expected[1] + 1)
        columns = (target.transpose(1, 2).contiguous().transpose(1, 2), tokens, draft)
        for a, b in zip(speculative_verify(*columns, **filters, generator_state=state.clone()), expected, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[6], FILTERS[2]], ids=str)
def test_same_bits_for_every_number_of_threads(filters):
    target, tokens, draft, state = inputs(7, 2, 20011, noise=0.3, **filters)
    arguments = (target, tokens, draft)
    same_for_any_threads(lambda: speculative_verify(*arguments, **filters, generator_state=state.clone()), (1, 2, 3, 8))


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    """The portable code, as machines without AVX-512 run it."""
    files = [f"{__file__}::{test}" for test in ("test_ties", "test_rows_that_are_not_finite", "test_extreme_values")]
    run_on_target(target, files)


def test_no_gradient():
    target, tokens, draft, state = inputs(2, 2, 50)
    outputs = speculative_verify(target.requires_grad_(), tokens, draft.requires_grad_(), generator_state=state)
    assert not any(t.requires_grad for t in outputs)


def test_opcheck():
    target, tokens, draft, state = inputs(3, 2, 40)
    op = torch.ops.arfast.speculative_verify
    torch.library.opcheck(op, (target, tokens, draft, 0.8, 5, 0.9, 0.1, state))
    torch.library.opcheck(op, (target.bfloat16(), tokens, None, 1.0, 0, 1.0, 0.0, state))


def test_compile():
    target, tokens, draft, state = inputs(3, 2, 40)
    compiled = torch.compile(speculative_verify, fullgraph=True, backend="aot_eager")
    other = state.clone()
    for _ in range(3):
        expected = speculative_verify(target, tokens, draft, top_k=9, generator_state=state)
        for a, b in zip(compiled(target, tokens, draft, top_k=9, generator_state=other), expected, strict=True):
            assert_bitwise_equal(a, b)
        assert torch.equal(state, other)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(target_logits=torch.zeros(2, 4, 9).int()),
            "target_logits must be float32, bfloat16, float16 or float64, got int32",
        ),
        (
            dict(target_logits=torch.zeros(2, 9)),
            r"target_logits must have shape \[B, G \+ 1, V\] = \[\*, \*, \*\], got \[2, 9\]",
        ),
        (dict(target_logits=torch.zeros(2, 0, 9)), r"target_logits must have at least one position, got \[2, 0, 9\]"),
        (dict(target_logits=torch.zeros(2, 4, 0)), r"target_logits must have 1 <= V < 2\^24, got \[2, 4, 0\]"),
        (
            dict(draft_tokens=torch.zeros(2, 4).long()),
            r"draft_tokens must have shape \[B, G\] = \[2, 3\], got \[2, 4\]",
        ),
        (dict(draft_tokens=torch.zeros(2, 3).int()), "draft_tokens must be int64, got int32"),
        (
            dict(draft_logits=torch.zeros(2, 3, 8)),
            r"draft_logits must have shape \[B, G, V\] = \[2, 3, 9\], got \[2, 3, 8\]",
        ),
        (
            dict(draft_logits=torch.zeros(2, 3, 9).bfloat16()),
            r"draft_logits must have the dtype of target_logits \(float32\), got bfloat16",
        ),
        *FILTER_ERRORS,
    ],
)
def test_errors(change, message):
    arguments = dict(
        target_logits=torch.zeros(2, 4, 9),
        draft_tokens=torch.zeros(2, 3).long(),
        draft_logits=torch.zeros(2, 3, 9),
        generator_state=torch.zeros(2, 3).long(),
    )
    with pytest.raises(RuntimeError, match="speculative_verify: " + message):
        speculative_verify(**(arguments | change))
