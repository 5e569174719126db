"""beam_step against the same step in torch: log_softmax, addition and topk, then the update of the state."""

import copy

import pytest
import torch
from bench_beam_prune import log_softmax_topk
from harness import Case

from arfast.ops import BeamState, beam_step, beam_step_reference

STEP = 5
CHANGED = ("lengths", "running", "scores", "endings", "improvable")


def from_the_same_state(step):
    """`step` as a function of the logits and the state before it, which every call finds again."""

    def restarted(logits, before, state):
        for name in CHANGED:
            getattr(state, name).copy_(getattr(before, name))
        step(logits, state)
        return state.running, state.scores, state.next_tokens, state.rows

    return restarted


def torch_prune(logits, scores, *, num_candidates, **options):
    best, parents, tokens = log_softmax_topk(logits, scores, num_candidates)
    return best, parents, tokens, best  # finite as lse is; the reference asks no more of it


@from_the_same_state
def torch_step(logits, state):
    beam_step_reference(logits, state, prune=torch_prune)


def check(outputs, logits, before, state):
    expected = copy.deepcopy(before)
    beam_step_reference(logits, expected)
    running, scores, next_tokens, rows = outputs
    assert torch.equal(next_tokens, expected.next_tokens) and torch.equal(rows, expected.rows)
    torch.testing.assert_close(running, expected.running)
    torch.testing.assert_close(scores, expected.scores)


def case(rows, vocab_size, beams, dtype):
    def make_inputs(device):
        logits = (torch.randn(rows, vocab_size, device=device) * 2).to(dtype)
        state = BeamState.start(rows // beams, beams, 128, ends=(0,), device=device)
        state.lengths.fill_(STEP)
        state.running.copy_(-torch.rand_like(state.running).sort(-1).values)
        return logits, copy.deepcopy(state), state

    return Case(
        name=f"{rows}x{vocab_size}-K{beams}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=from_the_same_state(beam_step),
        peers={"torch": torch_step},
        check=check,
        bytes=rows * vocab_size * dtype.itemsize,
    )


CASES = [case(*size, torch.float32) for size in ((4, 32000, 4), (32, 128256, 8))]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_beam_step(compare, case):
    compare(case)
