"""beam_hypotheses against a walk of all back-pointers at once in torch, a few operations per step."""

import pytest
import torch
from harness import Case

from arfast.ops import BeamState, beam_hypotheses, beam_hypotheses_reference


def check(outputs, state):
    for a, b in zip(outputs, beam_hypotheses_reference(state), strict=True):
        assert torch.equal(a, b)


def case(items, beams, length):
    def make_inputs(device):
        state = BeamState.start(items, beams, length, device=device)
        state.parents.random_(beams)
        state.tokens.random_(1000)
        state.log_probs.normal_()
        state.endings[:, :, 0] = length - 1
        state.endings[:, :, 1].random_(beams)
        return (state,)

    return Case(
        name=f"{items}x{beams}-L{length}",
        make_inputs=make_inputs,
        ours=beam_hypotheses,
        peers={"torch": beam_hypotheses_reference},
        check=check,
        bytes=items * beams * length * (12 + 12),  # of each hypothesis all is read and written once
    )


CASES = [case(*size) for size in ((1, 4, 128), (8, 8, 1024))]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_beam_hypotheses(compare, case):
    compare(case)
