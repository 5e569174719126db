"""beam_hypotheses against its reference, and its log-probabilities against the scores."""

import dataclasses

import pytest
import torch
from accuracy import assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import BeamState, beam_hypotheses, beam_hypotheses_reference, beam_step

# items, beams, length, hypotheses
SIZES = [
    (0, 2, 3, 1),
    (1, 1, 1, 1),
    (2, 3, 1, 3),
    (3, 4, 33, 2),
    (2, 9, 31, 9),
    (1, 8, 1025, 5),
    (2, 33, 600, 17),
    (1, 256, 130, 256),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def random_state(items, beams, length, device="cpu"):
    """Back-pointers that no search made, hypotheses of every length, also of none."""
    state = BeamState.start(items, beams, length)
    state.parents = torch.randint(beams, (length, items, beams), dtype=torch.int32)
    state.tokens = torch.randint(1000, (length, items, beams), dtype=torch.int32)
    state.log_probs = torch.randn(length, items, beams)
    last = torch.randint(-1, length, (items, beams))
    last[:, 0] = length - 1
    state.endings = torch.stack(
        [last, torch.randint(beams, (items, beams)), torch.randint(1000, (items, beams))], dim=-1
    ).int()
    state.ending_log_probs, state.scores = torch.randn(items, beams), torch.randn(items, beams)
    moved = {name: x.to(device) for name, x in vars(state).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(state, **moved)


@pytest.mark.random_schedules
@pytest.mark.parametrize("items, beams, length, count", SIZES)
def test_equals_reference(items, beams, length, count, device, poisoned):
    state = random_state(items, beams, length, device)
    for options in (dict(), dict(num_return_sequences=count, pad_token_id=-7)):
        actual = beam_hypotheses(state, **options)
        for a, e in zip(actual, beam_hypotheses_reference(state, **options), strict=True):
            assert_bitwise_equal(a, e)


@pytest.mark.parametrize("drawn", [False, True])
def test_log_probs_are_those_of_the_search(drawn, device):
    """Each token's log-probability is the model's after the tokens before it, and they sum up to the score."""
    items, beams, vocab_size, length = 3, 4, 30, 9
    tables = torch.randn(vocab_size, vocab_size, device=device) * 2
    state = BeamState.start(items, beams, length, ends=(3, 4), length_penalty=0.5, device=device)
    generator = torch.tensor([[5, item, 0] for item in range(items)], device=device) if drawn else None
    first = torch.randn(items, vocab_size, device=device)
    for step in range(length):
        beam_step(first if step == 0 else tables[state.next_tokens], state, generator_state=generator)
    tokens, log_probs, lengths, scores = beam_hypotheses(state, 3, pad_token_id=-1)
    for row, count in enumerate(lengths.tolist()):
        assert count > 0 and (tokens[row, count:] == -1).all() and (log_probs[row, count:] == 0).all()
        own = tokens[row, :count]
        logits = torch.cat([first[row // 3][None], tables[own[:-1]]])
        expected = logits.double().log_softmax(-1).gather(1, own[:, None])[:, 0]
        torch.testing.assert_close(log_probs[row, :count].double(), expected, rtol=1e-5, atol=1e-5)
        assert count == length or own[-1] in (3, 4)
        torch.testing.assert_close(scores[row].double(), expected.sum() / count**0.5, rtol=1e-5, atol=1e-5)
    assert (lengths < length).any()


def test_what_is_out_of_range_is_clamped(device):
    """Integers that nobody has checked: nothing outside the state is read."""
    state = random_state(2, 3, 40, device)
    state.parents[::3] = 2**31 - 1
    state.parents[1::3] = -(2**31)
    state.endings[0, :, 0] = torch.tensor([-(2**31), 40, 2**31 - 1])
    state.endings[:, :, 1] = torch.tensor([-1, 3, 2**31 - 1])
    clamped = dataclasses.replace(state, parents=state.parents.clamp(0, 2), endings=state.endings.clone())
    clamped.endings[:, :, 0].clamp_(-1, 39)
    clamped.endings[:, :, 1].clamp_(0, 2)
    for a, e in zip(beam_hypotheses(state), beam_hypotheses_reference(clamped), strict=True):
        assert_bitwise_equal(a, e)


def test_same_for_any_threads():
    state = random_state(40, 8, 700)
    same_for_any_threads(lambda: beam_hypotheses(state))


def test_strided():
    state = random_state(2, 3, 5)
    views = {
        name: torch.stack([x, x], -1)[..., 0]
        for name, x in vars(state).items()
        if name in ("parents", "tokens", "log_probs", "endings", "ending_log_probs")
    }
    for a, e in zip(beam_hypotheses(dataclasses.replace(state, **views)), beam_hypotheses(state), strict=True):
        assert_bitwise_equal(a, e)


def test_opcheck():
    s = random_state(2, 3, 5)
    arguments = (s.parents, s.tokens, s.log_probs, s.endings, s.ending_log_probs, 2, 0)
    torch.library.opcheck(torch.ops.arfast.beam_hypotheses.default, arguments)


def test_compiles_whole():
    state = random_state(2, 3, 5)
    compiled = torch.compile(lambda: beam_hypotheses(state, 2), fullgraph=True, backend="aot_eager")
    for a, e in zip(compiled(), beam_hypotheses(state, 2), strict=True):
        assert_bitwise_equal(a, e)


INT = torch.int32


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parents=torch.zeros(5, 6, dtype=INT)), r"parents must have shape \[L, B, K\] = \[\*, \*, \*\], got"),
        (dict(parents=torch.zeros(5, 2, 3)), "parents must be int32, got float32"),
        (dict(parents=torch.zeros(5, 2, 257, dtype=INT)), "parents must have at most 256 beams per group, got"),
        (dict(tokens=torch.zeros(5, 2, 2, dtype=INT)), r"tokens must have shape \[L, B, K\] = \[5, 2, 3\], got"),
        (dict(log_probs=torch.zeros(5, 2, 3).double()), "log_probs must be float32, got float64"),
        (dict(endings=torch.zeros(2, 3, 2, dtype=INT)), r"endings must have shape \[B, K, 3\] = \[2, 3, 3\], got"),
        (dict(ending_log_probs=torch.zeros(3, 2)), r"ending_log_probs must have shape \[B, K\] = \[2, 3\], got"),
        (dict(tokens=torch.zeros(5, 2, 3, dtype=INT, device="meta")), "tensors must be on one device, got cpu, meta"),
        (dict(count=4), r"num_return_sequences must be in \[1, 3\], the number of beams, got 4"),
        (dict(count=0), r"num_return_sequences must be in \[1, 3\], the number of beams, got 0"),
    ],
)
def test_errors(change, message):
    state = dataclasses.replace(random_state(2, 3, 5), **{name: x for name, x in change.items() if name != "count"})
    with pytest.raises(RuntimeError, match="beam_hypotheses: " + message):
        beam_hypotheses(state, change.get("count", 2))
