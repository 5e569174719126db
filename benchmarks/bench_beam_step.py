"""beam_step against the same step in torch: log_softmax, addition and topk, or multinomial without replacement, then
the update of the state."""

import copy

import pytest
import torch
from bench_beam_prune import log_softmax_topk
from harness import Case

from arfast.ops import BeamState, beam_step, beam_step_reference

STEP = 5
CHANGED = ("lengths", "running", "scores", "endings", "ending_log_probs", "improvable")


def from_the_same_state(step):
    """`step` as a function of the logits and the state before it, which every call finds again."""

    def restarted(logits, before, state, generator):
        for name in CHANGED:
            getattr(state, name).copy_(getattr(before, name))
        if generator is not None:
            generator.zero_()
        step(logits, state, generator)
        return state.running, state.scores, state.next_tokens, state.rows

    return restarted


@from_the_same_state
def ours(logits, state, generator):
    beam_step(logits, state, generator_state=generator)


def topk(logits, scores, *, num_candidates, **options):
    best, parents, tokens = log_softmax_topk(logits, scores, num_candidates)
    return best, parents, tokens, best  # finite as lse is; the reference asks no more of it


def multinomial(logits, scores, *, num_candidates, **options):
    total = (torch.log_softmax(logits.float(), -1) + scores.view(-1, 1)).view(len(scores), -1)
    index = torch.multinomial(total.softmax(-1), num_candidates)
    best, vocab_size = total.gather(1, index), logits.shape[1]
    return best, (index // vocab_size).int(), (index % vocab_size).int(), best


@from_the_same_state
def torch_step(logits, state, generator):
    beam_step_reference(logits, state, prune=topk if generator is None else multinomial)


def check(outputs, logits, before, state, generator):
    expected = copy.deepcopy(before)
    first = None if generator is None else torch.zeros_like(generator)
    beam_step_reference(logits, expected, generator_state=first)
    running, scores, next_tokens, rows = outputs
    assert torch.equal(next_tokens, expected.next_tokens) and torch.equal(rows, expected.rows)
    torch.testing.assert_close(running, expected.running)
    torch.testing.assert_close(scores, expected.scores)


def case(rows, vocab_size, beams, *, drawn=False):
    def make_inputs(device):
        logits = torch.randn(rows, vocab_size, device=device) * 2
        state = BeamState.start(rows // beams, beams, 128, ends=(0,), device=device)
        state.lengths.fill_(STEP)
        state.running.copy_(-torch.rand_like(state.running).sort(-1).values)
        generator = torch.zeros(rows // beams, 3, dtype=torch.int64, device=device) if drawn else None
        return logits, copy.deepcopy(state), state, generator

    return Case(
        name=f"{rows}x{vocab_size}-K{beams}-{'drawn-' if drawn else ''}float32",
        make_inputs=make_inputs,
        ours=ours,
        peers={"torch": torch_step},
        check=check,
        bytes=rows * vocab_size * 4,
    )


CASES = [case(*size, drawn=drawn) for drawn in (False, True) for size in ((4, 32000, 4), (32, 128256, 8))]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_beam_step(compare, case):
    compare(case)
