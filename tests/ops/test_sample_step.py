"""sample_step against its reference: every tensor of the state, after every step; and what decode_step leaves of its
logits in place of them."""

import copy
import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from filter_errors import FILTER_ERRORS
from test_sample import DTYPES, FILTERS
from threads import same_for_any_threads

from arfast.ops import SampleState, sample, sample_step, sample_step_reference
from arfast.ops.decode_step import tile_sums_reference
from arfast.ops.sample_step import GOES_ON, NOT_FINITE

INF, NAN = math.inf, math.nan
# rows, vocab_size, max_length
SIZES = [(0, 5, 2), (1, 1, 1), (1, 7, 3), (5, 33, 4), (3, 257, 6), (2, 8185, 3)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def tensors(state):
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def start(size, device="cpu", num_ends=0, **filters):
    rows, vocab_size, max_length = size
    generator = torch.randint(-(2**63), 2**63 - 1, (rows, 3)).to(device)
    ends = torch.randperm(vocab_size)[:num_ends].tolist()
    return SampleState.start(generator, max_length, ends=ends, pad_token=vocab_size + 3, **filters)


def compare(logits, state, **options):
    """A step of copies of the state: the one after the op."""
    ours, exact, plain = (copy.deepcopy(state) for _ in range(3))
    exact.log_probs = exact.log_probs.double()
    sample_step(logits, ours, **options)
    sample_step_reference(logits.double(), exact)
    sample_step_reference(logits.float(), plain)
    assert_accurate(ours.log_probs, exact.log_probs, plain.log_probs, name="log_probs")
    for name, value in tensors(exact).items():
        assert name == "log_probs" or torch.equal(getattr(ours, name), value), name
    return ours


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.emulated_sample(3)
@pytest.mark.parametrize("num_ends", [0, 1, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(device, size, dtype, num_ends):
    """Until nothing goes on, and one step more. Of few tokens many end a sequence."""
    for filters in FILTERS[2::4]:
        state = start(size, device, num_ends, **filters)
        for _ in range(size[2] + 1):
            state = compare((torch.randn(size[0], size[1]) * 2).to(dtype).to(device), state)
        assert not state.status.any()


def test_sequences_that_have_ended(device):
    """They are fed with padding, their logits are not read, their random numbers wait."""
    state = start((3, 40, 6), device)
    state.ends = torch.tensor([4, 11], device=device)
    logits = torch.zeros(3, 40, device=device)
    logits[torch.arange(3), torch.tensor([4, 5, 11])] = 1e4
    sample_step(logits, state)
    assert state.next_tokens.tolist() == [4, 5, 11] and state.status.tolist() == [0, GOES_ON, 0]
    generators, logits[0], logits[2] = state.generator_state.clone(), NAN, INF
    sample_step(logits, state)
    assert state.next_tokens.tolist() == [43, 5, 43] and state.lengths.tolist() == [1, 2, 1]
    assert state.tokens[:, :3].tolist() == [[4, 43, 43], [5, 5, 43], [11, 43, 43]]
    assert (state.generator_state - generators)[:, 2].tolist() == [0, 1, 0]
    assert state.log_probs.tolist() == [[0.0] * 6] * 3


def test_tokens_within_a_larger_tensor(device):
    history = torch.arange(40, device=device).view(4, 10)
    before, state = history.clone(), start((4, 9, 3), device)
    state.tokens = history[:, 5:8]
    for length in (1, 2, 3):
        sample_step(torch.randn(4, 9, device=device), state)
        assert torch.equal(state.next_tokens, history[:, 4 + length])
        rest = torch.ones(10, dtype=torch.bool)
        rest[5 : 5 + length] = False
        assert torch.equal(history[:, rest], before[:, rest])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_what_sample_draws(filters, device):
    state, logits = start((4, 3000, 1), device, **filters), torch.randn(4, 3000, device=device) * 2
    tokens, log_probs = sample(logits, **filters, generator_state=state.generator_state.clone())
    sample_step(logits, state)
    assert_bitwise_equal(state.tokens[:, 0], tokens)
    assert_bitwise_equal(state.log_probs[:, 0], log_probs)


def sums_of(logits):
    """What decode_step leaves of any logits: a NaN is in the sum alone."""
    wide = logits.float()
    sums = tile_sums_reference(wide)
    sums[0] = torch.stack([tile.nan_to_num(-INF, INF, -INF).amax(-1) for tile in wide.split(256, 1)])
    broken = torch.stack([tile.isnan().any(-1) for tile in wide.split(256, 1)])
    sums[1] = torch.where(broken, NAN, torch.where(sums[0].isinf(), 1.0, sums[1]))
    return sums


BROKEN = [[NAN], [INF], [-INF], [INF, NAN], "-inf everywhere", "NaN everywhere"]


def compare_broken(bad, device, options_of):
    """One row has ended with NOT_FINITE, on a token of the vocabulary; the others do not notice."""
    logits = torch.randn(3, 600, device=device)
    if isinstance(bad, str):
        logits[1] = -INF if bad.startswith("-") else NAN
    else:
        logits[1, 300 : 300 + len(bad)] = torch.tensor(bad, device=device)
    broken = 0 if bad == [-INF] else NOT_FINITE
    for filters in FILTERS:
        state = compare(logits, start((3, 600, 4), device, **filters), **options_of(logits))
        assert state.status.tolist() == [GOES_ON, broken or GOES_ON, GOES_ON]
        assert bool(state.log_probs[1, 0].isnan()) == bool(broken)


@pytest.mark.parametrize("bad", BROKEN, ids=str)
def test_broken_rows(bad, device):
    compare_broken(bad, device, lambda logits: {})


@pytest.mark.parametrize("bad", BROKEN, ids=str)
def test_broken_rows_in_tiles(bad):
    compare_broken(bad, "cpu", lambda logits: dict(tile_sums=sums_of(logits)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(3, 1, 1), (2, 257, 2), (3, 1000, 3), (2, 20000, 2)], ids=str)
def test_from_tile_sums(size, dtype):
    for filters in FILTERS:
        state = start(size, num_ends=1, **filters)
        for _ in range(size[2]):
            logits = (3 * torch.randn(size[:2])).to(dtype)
            state = compare(logits, state, tile_sums=sums_of(logits))


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ties_from_tile_sums(steps):
    """On a grid, where as many tokens as there are tie with the last of top_k."""
    logits = torch.randint(0, steps, (2, 9000)) / 8
    for filters in FILTERS:
        compare(logits, start((2, 9000, 2), **filters), tile_sums=sums_of(logits))


def test_ties_that_division_makes_from_tile_sums():
    """Tokens next to each other, and each in a tile of its own, where the best of another tile may be a tie."""
    beside = 1.9 + torch.arange(9000).flip(0).expand(2, -1) * 2.0**-23
    apart = torch.full((2, 9000), -9.0)
    apart[:, 100::256] = beside[:, :35]
    for logits in (beside, apart):
        for filters in FILTERS:
            for temperature in (1.8, 1.8 * 2**10):  # neighbours among the quotients are twice as far from each other
                state = start((2, 9000, 2), **filters | dict(temperature=temperature))
                compare(logits, state, tile_sums=sums_of(logits))


def test_tiles_that_cannot_hold_a_token_are_not_read():
    """Others are said to be worse than they are."""
    logits = torch.randn(2, 32000)
    logits[:, 5000:5100] += 20
    sums = sums_of(logits)
    best = (sums[0] >= sums[0].topk(72, dim=0).values[-1:]).repeat_interleave(256, 0).mT
    unread = torch.where(best, logits, logits.amax(-1, keepdim=True))
    for filters in (dict(temperature=0.0), dict(top_k=1), dict(top_k=20), dict(top_k=20, temperature=1.7)):
        state, expected = (start((2, 32000, 3), **filters) for _ in range(2))
        expected.generator_state = state.generator_state.clone()
        sample_step(logits, expected)
        sample_step(unread, state, tile_sums=sums)
        assert torch.equal(state.tokens, expected.tokens)


@pytest.mark.parametrize("filters", FILTERS[::3], ids=str)
@pytest.mark.parametrize("tiled", [False, True])
def test_same_bits_alone_and_for_any_threads(filters, tiled):
    logits, first = torch.randn(5, 20011), start((5, 20011, 2), **filters)
    sums = sums_of(logits)

    def run(rows=slice(0, 5)):
        state = copy.deepcopy(first)
        for name in ("generator_state", "lengths", "tokens", "log_probs", "status", "next_tokens"):
            setattr(state, name, getattr(state, name)[rows])
        sample_step(logits[rows], state, tile_sums=sums[..., rows].contiguous() if tiled else None)
        return list(tensors(state).values())

    whole = same_for_any_threads(run)
    for part, all_rows in zip(run(slice(3, 4)), whole, strict=True):
        assert_bitwise_equal(part, all_rows[3:4])


def test_no_gradient_is_needed():
    state = start((2, 50, 3))
    sample_step(torch.randn(2, 50, requires_grad=True), state)
    assert state.lengths.tolist() == [1, 1] and not state.log_probs.requires_grad


def test_opcheck():
    state, logits = start((2, 40, 3), num_ends=2, top_k=5, temperature=0.8), torch.randn(2, 40)
    torch.library.opcheck(torch.ops.arfast.sample_step, (logits, *state.arguments()))
    torch.library.opcheck(torch.ops.arfast.sample_step, (logits, *state.arguments(), sums_of(logits)))


LONG = torch.zeros(2, 3, dtype=torch.int64)
ERRORS = [
    (dict(logits=torch.zeros(2, 9).int()), "logits must be float32, bfloat16, float16 or float64, got int32"),
    (dict(logits=torch.zeros(9)), r"logits must have shape \[R, V\]"),
    (dict(logits=torch.zeros(2, 0)), r"logits must have 1 <= V < 2\^24, got \[2, 0\]"),
    (dict(ends=LONG), r"ends must have shape \[number of end tokens\]"),
    (dict(ends=torch.zeros(1)), "ends must be int64, got float32"),
    (dict(lengths=torch.zeros(2)), "lengths must be int32, got float32"),
    (dict(lengths=torch.zeros(3).int()), r"lengths must have shape \[R\] = \[2\], got \[3\]"),
    (dict(tokens=LONG[:1]), r"tokens must have shape \[R, L\] = \[2, \*\], got \[1, 3\]"),
    (dict(tokens=LONG.int()), "tokens must be int64, got int32"),
    (dict(tokens=LONG[:, :0]), r"tokens must have room for a step, got \[2, 0\]"),
    (dict(tokens=LONG[:1].expand(2, 3)), "tokens must have dense rows in memory of their own"),
    (dict(tokens=torch.zeros(3, 2).long().mT), "tokens must have dense rows in memory of their own"),
    (dict(log_probs=torch.zeros(2, 4)), r"log_probs must have shape \[R, L\] = \[2, 3\], got \[2, 4\]"),
    (dict(log_probs=torch.zeros(3, 2).mT), "log_probs must be contiguous"),
    (dict(status=LONG[:, 0]), "status must be int32, got int64"),
    (dict(next_tokens=LONG[:, 0]), "next_tokens must be contiguous"),
    (dict(tile_sums=torch.zeros(2, 2, 2)), r"tile_sums must have shape \[2, tiles, R\] = \[2, 1, 2\], got \[2, 2, 2\]"),
    *FILTER_ERRORS,
]


@pytest.mark.parametrize("change,message", ERRORS)
def test_errors(change, message):
    """And nothing has changed."""
    state, change = start((2, 9, 3)), dict(change)
    logits, tile_sums = change.pop("logits", torch.zeros(2, 9)), change.pop("tile_sums", None)
    for name, value in change.items():
        setattr(state, name, value)
    before = copy.deepcopy(tensors(state))
    with pytest.raises(RuntimeError, match="sample_step: " + message):
        sample_step(logits, state, tile_sums=tile_sums)
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    run_on_target(target, [__file__], chosen="tile")
