"""beam_step against its reference, to the last bit once both have the same candidates; against transformers it is
tested with the search (tests/generate/test_beam.py)."""

import copy
import dataclasses
import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import overlapping

from arfast.ops import BeamState, attention_decode_reference, beam_prune, beam_step, beam_step_reference
from arfast.ops.beam_step import CAN_CHANGE, GO_ON, NOT_FINITE

NAN, INF = math.nan, math.inf
MODES = [False, True, "never"]
SETTINGS = [(0.0, False, 0), (1.0, True, 2), (-1.0, False, 100)]
# items, beams, vocab_size, max_length, number of end tokens
SIZES = [
    (0, 2, 10, 3, 1),
    (1, 1, 1, 2, 1),
    (2, 1, 7, 4, 0),
    (3, 2, 5, 6, 2),
    (4, 2, 9, 12, 1),
    (2, 3, 33, 7, 8),
    (1, 4, 257, 5, 3),
    (2, 8, 1021, 4, 1),
    (1, 40, 33, 3, 2),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def tensors(state):
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def assert_same_state(actual, expected):
    for name, value in tensors(expected).items():
        assert_bitwise_equal(tensors(actual)[name], value, name=name)


def start(size, device, mode=False, length_penalty=1.0, cache=None, **options):
    items, beams, vocab_size, max_length, num_ends = size
    ends = torch.randperm(vocab_size)[:num_ends].tolist()
    options |= dict(ends=tuple(ends), length_penalty=length_penalty, early_stopping=mode, device=device)
    state = BeamState.start(items, beams, max_length, **options)
    if cache is not None:
        rows = torch.arange(items, dtype=torch.int32, device=device).repeat_interleave(beams) * beams
        state.slots = rows[:, None].repeat(1, cache).contiguous()
        state.prompt_lengths = (torch.arange(items, dtype=torch.int32, device=device) * 3 + 1) % cache
        state.own_slots = torch.randint(10**6, rows.shape, dtype=torch.int32).to(device)
    return state


def step_logits(size, state, first, dtype=torch.float32):
    """A coarse grid, so that scores tie; end tokens are likely."""
    items, beams, vocab_size = size[:3]
    logits = (torch.randn(items * (1 if first else beams), vocab_size) * 6).round() / 4
    logits[:, state.ends.cpu()] += 1.5
    return logits.to(dtype).to(state.running.device)


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.emulated_sample(3)
@pytest.mark.parametrize("length_penalty,log_probs,min_length", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(device, size, mode, length_penalty, log_probs, min_length):
    """Every tensor of the state after every step, and after one step too many."""
    compare_steps(size, device, mode, length_penalty, log_probs, min_length)


@pytest.mark.parametrize("length_penalty,log_probs,min_length", SETTINGS)
def test_most_beams(length_penalty, log_probs, min_length):
    compare_steps((1, 128, 40, 3, 2), "cpu", False, length_penalty, log_probs, min_length)


def compare_steps(size, device, mode, length_penalty, log_probs, min_length):
    ours = start(size, device, mode, length_penalty, cache=size[3] + 9, min_length=min_length)
    expected = copy.deepcopy(ours)
    for step in range(size[3] + 1):
        logits = step_logits(size, ours, step == 0)
        beam_step(logits, ours, log_probs=log_probs)
        if len(ours.lengths) > 0:
            beam_step_reference(logits, expected, log_probs=log_probs, prune=beam_prune)
        assert_same_state(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_reference_from_the_logits(device, dtype):
    """Its own candidates too, where they are far enough apart for rounding not to decide."""
    size = (2, 3, 50, 5, 2)
    ours = start(size, device)
    baseline, exact = copy.deepcopy(ours), copy.deepcopy(ours)
    for name in ("running", "scores", "log_probs", "length_powers"):
        setattr(exact, name, getattr(exact, name).double())
    for step in range(5):
        logits = torch.stack([torch.randperm(50) for _ in range(2 * (1 if step == 0 else 3))]).to(dtype) / 4
        beam_step(logits.to(device), ours)
        for state in (baseline, exact):
            beam_step_reference(logits.to(device), state)
        for name in ("parents", "tokens", "endings", "status", "next_tokens", "rows", "lengths", "improvable"):
            assert torch.equal(getattr(ours, name), getattr(exact, name)), (step, name)
        for name in ("running", "scores", "log_probs"):
            assert_accurate(*(getattr(state, name) for state in (ours, exact, baseline)), name=name)


def test_banned_tokens(device):
    size = (2, 3, 20, 3, 1)
    ours, banned = start(size, device), torch.rand(2, 20) < 0.5
    expected = copy.deepcopy(ours)
    logits = step_logits(size, ours, True)
    beam_step(logits, ours, banned=banned.to(device))
    beam_step_reference(logits, expected, banned=banned.to(device), prune=beam_prune)
    assert_same_state(ours, expected)
    assert not banned[torch.arange(2).repeat_interleave(3), ours.next_tokens.cpu()].any()


@pytest.mark.parametrize("vocab_size", [4, 9, 20000])
def test_minimum_length(vocab_size, device):
    """The best tokens are ends, which count in the normaliser. Items may be at different lengths."""
    state = start((2, 2, vocab_size, 6, 2), device, min_length=3)
    state.lengths[1] = 2
    for step in range(4):
        logits = torch.randn(2 if step == 0 else 4, vocab_size)
        logits[:, state.ends.cpu()] = 9.0
        log_probs = torch.log_softmax(logits, -1)
        beam_step(logits.to(device), state)
        beams = state.tokens[step, 0], state.tokens[step + 2, 1]
        for item, (tokens, first) in enumerate(zip(beams, (3, 1), strict=True)):
            accepted = state.endings[item, :, 0] >= 0
            assert accepted.any() == (step >= first), (step, item)
            if step < first:
                assert not torch.isin(tokens, state.ends).any()
                assert state.status[item] & GO_ON
        if step == 0:
            allowed = torch.ones(vocab_size, dtype=torch.bool)
            allowed[state.ends.cpu()] = False
            torch.testing.assert_close(state.running[0, 0].cpu(), log_probs[0, allowed].max())


def test_an_item_is_independent_of_the_others(device):
    size = (3, 4, 33, 5, 2)
    together = start(size, device, cache=12)
    alone = [dataclasses.replace(together) for _ in range(3)]
    for item, state in enumerate(alone):
        rows = slice(item * 4, item * 4 + 4)
        for name, value in tensors(together).items():
            if name in ("parents", "tokens", "log_probs"):
                value = value[:, item : item + 1]
            elif name in ("next_tokens", "rows", "slots", "own_slots"):
                value = value[rows]
            elif name not in ("ends", "length_powers"):
                value = value[item : item + 1]
            setattr(state, name, value.clone())
    for step in range(5):
        logits = step_logits(size, together, step == 0)
        beam_step(logits, together)
        for item, state in enumerate(alone):
            beam_step(logits.view(3, -1, 33)[item], state)
            assert torch.equal(state.running, together.running[item : item + 1])
            assert torch.equal(state.endings, together.endings[item : item + 1])
            assert torch.equal(state.slots, together.slots[item * 4 : item * 4 + 4])


def test_status(device):
    """One bit each: open, going on, broken."""

    def status(logits, **options):
        state = BeamState.start(1, 2, 3, ends=(0,), device=device, **options)
        beam_step(torch.tensor([logits], device=device), state)
        return state.status.item()

    assert status([0.0, 1.0, 2.0, 3.0]) == CAN_CHANGE | GO_ON
    assert status([0.0, -INF, -INF, -INF]) == CAN_CHANGE  # the only candidate ends
    for bad in (NAN, INF):
        assert status([0.0, bad, 1.0, 2.0]) & NOT_FINITE
    assert status([-INF] * 4) & NOT_FINITE
    state = BeamState.start(1, 2, 1, device=device)
    beam_step(torch.randn(1, 5, device=device), state)
    assert state.status.item() & GO_ON == 0  # at the largest length everything ends
    assert torch.equal(state.endings[0, :, 0].cpu(), torch.tensor([0, 0], dtype=torch.int32))


def test_a_beam_that_cannot_go_on(device):
    """Nothing but -inf: an error among logits; among log-probabilities, which somebody changed, the end of this beam,
    and the others of the item take its place."""
    for log_probs in (False, True):
        for value in (-INF, INF, NAN):
            state = BeamState.start(2, 3, 4, device=device)
            beam_step(torch.randn(2, 7).log_softmax(-1).to(device), state, log_probs=log_probs)
            logits = torch.randn(6, 7).log_softmax(-1)
            logits[1] = value
            expected = copy.deepcopy(state)
            beam_step(logits.to(device), state, log_probs=log_probs)
            beam_step_reference(logits.to(device), expected, log_probs=log_probs, prune=beam_prune)
            assert_same_state(state, expected)
            bits = CAN_CHANGE | GO_ON
            assert state.status.tolist() == [bits | NOT_FINITE * (not log_probs or value != -INF), bits]
            assert state.running.isfinite().all() and not (state.rows == 1).any()
    beam_step(torch.full((6, 7), -INF, device=device), state, log_probs=True)
    assert state.status.tolist() == [CAN_CHANGE] * 2
    assert (state.running == -INF).all()


def test_own_slots(device):
    """One buffer of tokens: prompts of several lengths once, then the tokens of each beam. A beam finds its past there
    as if the caches had been reordered at every step."""
    size, longest, prompts = (2, 3, 11, 4, 0), 5, (5, 2)
    items, beams, most = size[0], size[1], size[3]
    state = start(size, device)
    state.prompt_lengths = torch.tensor(prompts, dtype=torch.int32, device=device)
    lengths = state.prompt_lengths.repeat_interleave(beams)
    rows = torch.arange(items * beams, dtype=torch.int32, device=device)
    state.slots = (rows // beams * longest)[:, None].repeat(1, longest + most)
    state.own_slots = items * longest + rows * most - lengths
    expected = copy.deepcopy(state)
    buffer = torch.full((items * longest + items * beams * most + longest, 1, 2), NAN, device=device)
    cache = overlapping(buffer, longest + most)
    moved = torch.zeros(items * beams, longest + most, 1, 2, device=device)
    for item, prompt in enumerate(prompts):
        moved[item * beams : (item + 1) * beams, :prompt] = torch.randn(prompt, 1, 2, device=device)
        cache[item * longest, :prompt] = moved[item * beams, :prompt]
    for step in range(most):
        logits = step_logits(size, state, step == 0)
        beam_step(logits, state)
        beam_step_reference(logits, expected, prune=beam_prune)
        assert_same_state(state, expected)
        moved = moved[state.rows if step > 0 else rows.long()]
        new, positions = torch.randn(items * beams, 1, 2, device=device), lengths + step
        cache[state.slots.gather(1, positions[:, None].long())[:, 0].long(), positions.long()] = new
        moved[rows.long(), positions.long()] = new
        for row, length in enumerate((positions + 1).tolist()):
            past = cache[state.slots[row, :length].long(), torch.arange(length, device=device)]
            assert torch.equal(past, moved[row, :length])


def test_slots_are_those_of_attention_decode(device):
    """Attention through the slots equals attention over caches that were reordered at every step."""
    size, prompt, heads, dim = (2, 3, 11, 4, 0), 2, 1, 8
    state = start(size, device)
    state.slots = torch.zeros(6, prompt + 4, dtype=torch.int32, device=device)
    state.slots[:, :prompt] = (torch.arange(6, device=device) // 3 * 3)[:, None].int()
    state.prompt_lengths = torch.full((2,), prompt, dtype=torch.int32, device=device)
    cache = torch.zeros(6, prompt + 4, heads, dim, device=device)
    cache[::3, :prompt] = torch.randn(2, prompt, heads, dim, device=device)
    moved = cache.clone()
    for item in range(2):
        moved[item * 3 : item * 3 + 3] = moved[item * 3]
    for step in range(4):
        beam_step(step_logits(size, state, step == 0), state)
        rows = state.rows if step > 0 else state.rows * 3
        moved = moved[rows]
        new = torch.randn(6, heads, dim, device=device)
        cache[:, prompt + step] = new
        moved[:, prompt + step] = new
        seqlens = torch.full((6,), prompt + step + 1, dtype=torch.int32, device=device)
        q = torch.randn(6, 1, heads, dim, device=device)
        through = attention_decode_reference(q, cache, cache, seqlens, beam_slots=state.slots)
        assert torch.equal(through, attention_decode_reference(q, moved, moved, seqlens))


def test_same_for_any_threads():
    size = (5, 4, 20000, 3, 2)
    torch.manual_seed(0)
    first = start(size, "cpu")
    logits = [step_logits(size, first, step == 0) for step in range(3)]

    def run():
        state = copy.deepcopy(first)
        for x in logits:
            beam_step(x, state)
        return tuple(tensors(state).values())

    same_for_any_threads(run)


def test_opcheck():
    state = start((2, 2, 9, 3, 1), "cpu", cache=8)
    s = state
    arguments = (
        torch.randn(2, 9), None, False, s.ends, s.length_powers, 0, False, 0, s.lengths, s.running, s.parents, s.tokens,
        s.log_probs, s.scores, s.endings, s.ending_log_probs, s.improvable, s.status, s.next_tokens, s.rows, s.slots,
        s.prompt_lengths, s.own_slots, torch.zeros(2, 3, dtype=torch.int64),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.arfast.beam_step.default, arguments)


def test_compiles_whole():
    @torch.compile(fullgraph=True)
    def step(logits, state):
        beam_step(logits * 1.0, state)

    ours = start((2, 2, 9, 3, 1), "cpu")
    expected, logits = copy.deepcopy(ours), torch.randn(2, 9)
    step(logits, ours)
    beam_step(logits, expected)
    assert_same_state(ours, expected)


def changed(**changes):
    return lambda state: dataclasses.replace(state, **changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(early_stopping="always"), "early_stopping must be True, False or 'never', got 'always'"),
        (changed(running=torch.zeros(2, 129)), "running must have 1 to 128 beams per group, got"),
        (changed(running=torch.zeros(2)), "running must have shape"),
        (changed(running=torch.zeros(2, 3, dtype=torch.float64)), "running must be float32, got float64"),
        (changed(ends=torch.zeros(9, dtype=torch.int64)), "ends must have at most 8 tokens, got"),
        (changed(ends=torch.zeros(1, dtype=torch.int32)), "ends must be int64, got int32"),
        (changed(length_powers=torch.zeros(3)), r"length_powers must have shape \[L \+ 1\] = \[5\], got \[3\]"),
        (changed(lengths=torch.zeros(3, dtype=torch.int32)), r"lengths must have shape \[B\] = \[2\], got \[3\]"),
        (changed(parents=torch.zeros(0, 2, 3, dtype=torch.int32)), "parents must have room for a step"),
        (changed(tokens=torch.zeros(4, 2, 2, dtype=torch.int32)), "tokens must have shape"),
        (changed(log_probs=torch.zeros(4, 3, 2).mT), "log_probs must be contiguous"),
        (changed(endings=torch.zeros(2, 3, 2, dtype=torch.int32)), "endings must have shape"),
        (changed(improvable=torch.zeros(2)), "improvable must be bool, got float32"),
        (changed(status=torch.zeros(2)), "status must be int32"),
        (changed(next_tokens=torch.zeros(2, dtype=torch.int64)), "next_tokens must have shape"),
        (changed(rows=torch.zeros(6, dtype=torch.int32)), "rows must be int64"),
        (changed(slots=torch.zeros(6, 5, dtype=torch.int32)), "slots must come with prompt_lengths"),
        (changed(min_length=-1), "min_length must be at least 0, got -1"),
        (changed(own_slots=torch.zeros(6, dtype=torch.int32)), "own_slots must come with slots, got them alone"),
        (changed(scores=torch.zeros(2, 3, device="meta")), "tensors must be on one device"),
    ],
)
def test_errors(change, message):
    state = change(start((2, 3, 9, 4, 1), "cpu"))
    with pytest.raises(RuntimeError, match="beam_step: " + message):
        beam_step(torch.randn(2, 9), state)


SPOILED = {
    "dtype": lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
    "dimension": lambda t: t[None],
    "first size": lambda t: torch.cat([t, t[:1]]) if len(t) > 0 else t[None],
    "last size": lambda t: t[..., :-1],
    "device": lambda t: t.to("meta"),
    "layout": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("how", SPOILED)
def test_every_tensor_is_checked(how):
    for name, value in tensors(start((2, 3, 9, 4, 2), "cpu", cache=7)).items():
        if (name, how) in (("ends", "first size"), ("ends", "last size"), ("slots", "last size")):
            continue  # any number of end tokens, any length of the caches
        state = dataclasses.replace(start((2, 3, 9, 4, 2), "cpu", cache=7), **{name: SPOILED[how](value)})
        with pytest.raises(RuntimeError, match="^beam_step: "):
            beam_step(torch.randn(2, 9), state)


@pytest.mark.parametrize("bad", [-1, -(2**31), 4, 2**31 - 1])
def test_lengths_out_of_range_change_nothing(device, bad):
    state = start((1, 2, 9, 4, 1), device)
    state.lengths.fill_(bad)
    before = copy.deepcopy(state)
    beam_step(torch.randn(1, 9).to(device), state)
    assert_same_state(state, before)


@pytest.mark.parametrize("prompt", [-1, -(2**31), 7, 2**31 - 1])
def test_prompt_lengths_out_of_range_leave_the_slots(device, prompt):
    state = start((1, 2, 9, 4, 1), device, cache=7)
    state.prompt_lengths.fill_(prompt)
    before = state.slots.clone()
    for step in range(4):
        beam_step(step_logits((1, 2, 9, 4, 1), state, step == 0), state)
    assert torch.equal(state.slots, before)


@pytest.mark.parametrize("rows", [3, 5])
def test_refuses_other_rows(rows):
    with pytest.raises(RuntimeError, match=r"beam_step: logits must have B\*K rows, or B in the first step, got"):
        beam_step(torch.randn(rows, 9), start((2, 3, 9, 4, 1), "cpu"))
