"""sample against its reference: tokens exactly, since all of their arithmetic is on integers, and log-probabilities."""

import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from filter_errors import FILTER_ERRORS
from threads import same_for_any_threads

from arfast.ops import sample, sample_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = math.inf, math.nan
# rows, vocab_size
SIZES = [(0, 5), (1, 1), (7, 2), (4, 31), (4, 32), (4, 33), (3, 257), (2, 1021), (1, 8184), (1, 16369), (2, 8185)]
# All that top_k leaves is in the lists of a GPU's blocks up to top_k = 128, and of the CPU up to 1024, if not too much
# ties; without top_k, whole rows are read.
FILTERS = [
    {},
    dict(temperature=0.7),
    dict(temperature=0.0, top_p=0.5),
    dict(top_k=1),
    dict(temperature=1.3, top_k=20),
    dict(top_k=50, top_p=0.9, temperature=0.8),
    dict(top_k=128, min_p=0.05),
    dict(top_k=129, top_p=0.6),
    dict(top_k=1500, top_p=0.99),
    dict(top_p=0.9, temperature=0.6),
    dict(top_p=0.3, min_p=0.1),
    dict(top_p=0.0),
    dict(min_p=0.2),
    dict(top_k=2**40, min_p=1.0),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def inputs(rows, vocab_size, dtype=torch.float32, scale=2.0):
    logits = (torch.randn(rows, vocab_size) * scale).to(dtype)
    return logits, torch.randint(-(2**63), 2**63 - 1, (rows, 3))


def check(logits, state, **options):
    before = state.clone()
    tokens, logprobs = sample(logits, **options, generator_state=state)
    expected, exact = sample_reference(logits.double(), **options, generator_state=before)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, expected), options
    _, baseline = sample_reference(logits.float(), **options, generator_state=before)
    assert_accurate(logprobs, exact, baseline, name="logprobs")
    assert torch.equal(state, before + torch.tensor([0, 0, 1]))
    return tokens, logprobs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,vocab_size", SIZES)
def test_forward(rows, vocab_size, dtype, poisoned, device):
    logits, state = inputs(rows, vocab_size, dtype)
    for options in FILTERS:
        check(logits, state, **options)


@pytest.mark.random_schedules
@pytest.mark.parametrize("options", FILTERS[5:10], ids=str)
def test_many_parts(options, device):
    check(*inputs(2, 40000, torch.bfloat16), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ties(steps, dtype, device):
    """On a grid. All tokens that tie with the k-th stay; of those where top_p cuts, the smaller ones."""
    logits = torch.randint(0, steps, (2, 3000)).to(dtype) / 8
    _, state = inputs(2, 1)
    for options in FILTERS:
        check(logits, state, **options)


def test_more_ties_than_are_compared_with_each_other(device):
    """On a GPU: in no part more than its list holds, but 569 in all."""
    logits, state = inputs(2, 5 * 8184, scale=0.5)
    logits[:, ::72] = 5.0
    for options in (dict(top_k=128), dict(top_k=128, top_p=0.5)):
        tokens, _ = check(logits, state, **options)
        assert (tokens % 72 == 0).all()


@pytest.mark.parametrize("top_k", [20, 129, 1100])
def test_top_k_that_ends_where_the_ties_do(top_k, device):
    logits, state = inputs(8, 2000, scale=0.0)
    logits[:, 7 : 7 + top_k] = 1.0
    tokens, _ = check(logits, state, top_k=top_k)
    assert tokens.min() >= 7 and tokens.max() < 7 + top_k


def test_ties_that_division_makes(device):
    """Different logits with the same quotient: the smaller logit may be the smaller token."""
    logits = 1.9 + torch.arange(2000).flip(0).expand(2, -1) * 2.0**-23
    assert (logits[0] / 1.8).unique().numel() < 1200
    _, state = inputs(2, 1)
    for options in FILTERS:
        check(logits, state, **options | dict(temperature=1.8))


@pytest.mark.parametrize("order", ["ascending", "descending", "one-hot", "one-hot at the end"])
def test_ordered_rows(order, device):
    logits = torch.arange(9001.0).expand(2, -1) / 300
    if order == "descending":
        logits = logits.flip(-1)
    elif order.startswith("one-hot"):
        logits = torch.zeros(2, 9001)
        logits[:, -1 if order.endswith("end") else 17] = 9.0
    _, state = inputs(2, 1)
    for options in FILTERS:
        check(logits, state, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 299])
def test_rows_that_are_not_finite(position, dtype, poisoned, device):
    logits, state = inputs(7, 300, dtype)
    logits[0, position] = NAN
    logits[1, position] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, [position, 150, 151]] = torch.tensor([NAN, INF, INF], dtype=dtype)
    logits[5] = -INF
    logits[5, position] = -3.0
    logits[6, ::2] = -INF
    for options in FILTERS:
        tokens, logprobs = check(logits, state, **options)
        assert tokens[1] == position and tokens[2] == tokens[3] == 0 and tokens[4] in (150, 151)
        assert tokens[5] == position and logprobs[5] == 0 and tokens[6] % 2 == 1
        assert logprobs[:5].isnan().all()


@pytest.mark.parametrize("temperature", [1e-45, 1e-3, 3e38])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_values(scale, temperature, device):
    logits, state = inputs(2, 300, scale=scale)
    for options in FILTERS:
        check(logits, state, **options | dict(temperature=temperature))
    check(-logits.abs(), state, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero_is_the_first_of_the_best(dtype, device):
    logits = torch.randint(0, 6, (10, 50)).to(dtype)
    _, state = inputs(10, 1)
    for options in (dict(), dict(top_k=9, top_p=0.9, min_p=0.1)):
        tokens, _ = sample(logits, temperature=0.0, **options, generator_state=state)
        first = (logits == logits.amax(-1, keepdim=True)).byte().argmax(-1)
        assert torch.equal(tokens, first)


def test_a_call_continues_the_stream(device):
    """As a captured graph would: the numbers come from the state alone."""
    logits, state = inputs(4, 500)
    again = state.clone()
    calls = torch.stack([sample(logits, generator_state=state)[0] for _ in range(6)])
    assert torch.equal(state, again + torch.tensor([0, 0, 6]))
    assert len({tuple(call) for call in calls.tolist()}) == 6
    for step, expected in enumerate(calls):
        later = again + torch.tensor([0, 0, step])
        assert torch.equal(sample(logits, generator_state=later)[0], expected)


def test_strided_states(device):
    logits, state = inputs(4, 50)
    expected, advanced = sample(logits, generator_state=state)[0], state.clone()
    state[:, 2] -= 1
    wide = torch.zeros(3, 11, dtype=torch.int64)
    view = wide.t()[1:9:2]
    view.copy_(state)
    assert torch.equal(sample(logits, generator_state=view)[0], expected)
    assert torch.equal(view, advanced) and wide.count_nonzero() == 12


def test_same_bits_alone_in_a_batch_and_in_any_order(device):
    logits, state = inputs(5, 9001)
    for options in FILTERS[:11:2]:
        whole = sample(logits, **options, generator_state=state.clone())
        order = torch.tensor([3, 0, 4, 1, 2])
        shuffled = sample(logits[order], **options, generator_state=state[order])
        for a, b in zip(whole, shuffled, strict=True):
            assert_bitwise_equal(a[order], b)
        for row in range(5):
            alone = sample(logits[row : row + 1], **options, generator_state=state[row : row + 1].clone())
            for a, b in zip(whole, alone, strict=True):
                assert_bitwise_equal(a[row : row + 1], b)


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    logits, state = inputs(4, 517, torch.bfloat16)
    wide = torch.empty(4, 700, dtype=logits.dtype)
    for options in (dict(top_k=5), dict(top_p=0.9), {}):
        expected = sample(logits, **options, generator_state=state.clone())
        views = [wide[:, offset : offset + 517].copy_(logits) for offset in (1, 3, 8)]
        for view in (*views, logits.t().contiguous().t()):
            view.copy_(logits)
            for a, b in zip(sample(view, **options, generator_state=state.clone()), expected, strict=True):
                assert_bitwise_equal(a, b)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_same_bits_for_every_number_of_threads(options):
    logits, state = inputs(9, 20011)
    same_for_any_threads(lambda: sample(logits, **options, generator_state=state.clone()), (1, 2, 3, 8))


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    """The portable code, as machines without AVX-512 run it."""
    files = [f"{__file__}::{test}" for test in ("test_ties", "test_rows_that_are_not_finite", "test_extreme_values")]
    run_on_target(target, files)


def test_no_gradient():
    logits, state = inputs(2, 50)
    assert not any(t.requires_grad for t in sample(logits.requires_grad_(), generator_state=state))


def test_opcheck():
    logits, state = inputs(3, 40)
    torch.library.opcheck(torch.ops.arfast.sample, (logits, 0.8, 5, 0.9, 0.1, state))
    torch.library.opcheck(torch.ops.arfast.sample, (logits.bfloat16(), 1.0, 0, 1.0, 0.0, state))


def test_compile():
    logits, state = inputs(3, 40)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    other = state.clone()
    for _ in range(3):
        expected = sample(logits, top_k=9, generator_state=state)
        for a, b in zip(compiled(logits, top_k=9, generator_state=other), expected, strict=True):
            assert_bitwise_equal(a, b)
        assert torch.equal(state, other)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(logits=torch.zeros(2, 9).int()), "logits must be float32, bfloat16, float16 or float64, got int32"),
        (dict(logits=torch.zeros(9)), r"logits must have shape \[R, V\] = \[\*, \*\], got \[9\]"),
        (dict(logits=torch.zeros(2, 0)), r"logits must have 1 <= V < 2\^24, got \[2, 0\]"),
        (
            dict(logits=torch.zeros(2, 1).expand(2, 2**24)),
            r"logits must have 1 <= V < 2\^24, got \[2, 16777216\]",
        ),
        *FILTER_ERRORS,
    ],
)
def test_errors(change, message):
    arguments = dict(logits=torch.zeros(2, 9), generator_state=torch.zeros(2, 3).long()) | change
    with pytest.raises(RuntimeError, match="sample: " + message):
        sample(**arguments)
