"""sample against torch: division, masks by topk and by the sorted cumulative sum, softmax and multinomial, as
transformers does it."""

from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from harness import Case

from arfast.ops import sample, sample_reference


def warped(logits, temperature, top_k, top_p):
    """The scores [R, V] that transformers' warpers leave."""
    scores = logits.float() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return scores


def warpers_multinomial(logits, generator, *filters):
    return torch.multinomial(warped(logits, *filters).softmax(-1), 1).squeeze(1)


def ours(logits, generator, temperature, top_k, top_p):
    return sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator_state=generator.state)


def check(outputs, logits, generator, temperature, top_k, top_p):
    before = generator.state - torch.tensor([0, 0, 1], device=logits.device)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator_state=before)
    tokens, exact = sample_reference(logits.double(), **options)
    _, baseline = sample_reference(logits.float(), **options)
    assert torch.equal(outputs[0], tokens)
    assert_accurate(outputs[1], exact, baseline, name="logprobs")


def case(rows, vocab_size, temperature, top_k, top_p, dtype):
    def make_inputs(device):
        logits = (torch.randn(rows, vocab_size, device=device) * 2).to(dtype)
        # not a tensor among the arguments: a call that advances it needs no new logits
        generator = SimpleNamespace(state=torch.randint(2**62, (rows, 3), device=device))
        return logits, generator, temperature, top_k, top_p

    return Case(
        name=f"{rows}x{vocab_size}-k{top_k}-p{top_p}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=ours,
        peers={"warpers+multinomial": warpers_multinomial},
        check=check,
        bytes=rows * vocab_size * dtype.itemsize,
    )


FILTERS = [(0.8, 50, 0.9), (1.0, 0, 0.9), (1.0, 0, 1.0)]
CASES = [
    case(*size, *filters, dtype)
    for size in ((4, 32000), (32, 128256))
    for filters in FILTERS
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_sample(compare, case):
    compare(case)
