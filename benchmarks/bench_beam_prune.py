"""beam_prune against torch: log_softmax, addition and topk as transformers does it, and the best eager form."""

import pytest
import torch
from accuracy import assert_accurate
from harness import Case, compiled

from arfast.ops import beam_prune, beam_prune_reference


def log_softmax_topk(logits, scores, num_candidates):
    groups, beams = scores.shape
    total = torch.log_softmax(logits, -1, dtype=torch.float32) + scores.view(-1, 1)
    best, index = total.view(groups, -1).topk(num_candidates)
    return best, index // logits.shape[1], index % logits.shape[1]


def row_topk_logsumexp(logits, scores, num_candidates):
    """Needs no [B*K, V] in between: top-k of each row's logits, then of the K * M scores."""
    groups, beams = scores.shape
    values, tokens = logits.topk(num_candidates, -1)
    lse = torch.logsumexp(logits.float(), -1, keepdim=True)
    total = ((values - lse) + scores.view(-1, 1)).view(groups, -1)
    best, index = total.topk(num_candidates)
    return best, index // num_candidates, tokens.view(groups, -1).gather(1, index)


def check(outputs, logits, scores, num_candidates):
    best, parents, tokens, lse = outputs
    exact = beam_prune_reference(logits, scores.double(), num_candidates=num_candidates)
    baseline = beam_prune_reference(logits, scores, num_candidates=num_candidates)
    assert_accurate(best, exact[0], baseline[0], name="scores")
    assert_accurate(lse, exact[3], baseline[3], name="lse")
    assert torch.equal(parents, exact[1]) and torch.equal(tokens, exact[2])


def case(rows, vocab_size, beams, dtype):
    def make_inputs(device):
        logits = (torch.randn(rows, vocab_size, device=device) * 2).to(dtype)
        return logits, torch.randn(rows // beams, beams, device=device), 2 * beams

    gated = (rows, vocab_size, dtype) == (32, 128256, torch.float32)
    return Case(
        name=f"{rows}x{vocab_size}-K{beams}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=lambda logits, scores, m: beam_prune(logits, scores, num_candidates=m),
        peers={
            "log_softmax+topk": log_softmax_topk,
            "row topk+logsumexp": row_topk_logsumexp,
            "torch.compile": compiled(log_softmax_topk),
        },
        check=check,
        bytes=rows * vocab_size * dtype.itemsize,
        gates={"log_softmax+topk": 15.0, "row topk+logsumexp": 5.0} if gated else {},
    )


CASES = [
    case(*size, dtype)
    for size in ((4, 32000, 4), (32, 32000, 8), (32, 128256, 8))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_beam_prune(compare, case):
    compare(case)
