"""speculative_verify against torch: the warpers of transformers on both rows of logits, acceptance of p / q, and
multinomial on the difference, for all positions at once, as the lengths are not known before."""

import pytest
import torch
from accuracy import assert_accurate
from bench_sample import warped
from harness import Case

from arfast.ops import sample, speculative_verify, speculative_verify_reference


def torch_verify(target_logits, draft_tokens, draft_logits, generator, *filters):
    batch, num_drafts, vocab_size = draft_logits.shape
    p = warped(target_logits.reshape(-1, vocab_size), *filters).softmax(-1).view(batch, num_drafts + 1, vocab_size)
    q = warped(draft_logits.reshape(-1, vocab_size), *filters).softmax(-1).view(batch, num_drafts, vocab_size)
    at = draft_tokens[..., None]
    accepted = torch.rand_like(draft_tokens, dtype=torch.float32) * q.gather(-1, at)[..., 0] < p.gather(-1, at)[..., 0]
    num_accepted = accepted.long().cumprod(-1).sum(-1)
    rest = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], 1)
    drawn = torch.multinomial(rest.gather(1, num_accepted[:, None, None].expand(-1, 1, vocab_size))[:, 0] + 1e-30, 1)
    places = torch.arange(num_drafts + 1, device=drawn.device)
    drafts = torch.cat([draft_tokens, drawn], 1)
    tokens = torch.where(places == num_accepted[:, None], drawn, drafts)
    return tokens.masked_fill(places > num_accepted[:, None], -1), num_accepted.int()


def ours(target_logits, draft_tokens, draft_logits, generator, temperature, top_k, top_p):
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return speculative_verify(target_logits, draft_tokens, draft_logits, **filters, generator_state=generator["state"])


def check(outputs, target_logits, draft_tokens, draft_logits, generator, temperature, top_k, top_p):
    tokens, num_accepted, logprobs = outputs
    before = generator["state"].clone()
    before[:, 2] -= num_accepted + 1
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator_state=before)
    expected, accepted, exact = speculative_verify_reference(
        target_logits.double(), draft_tokens, draft_logits.double(), **options
    )
    assert torch.equal(tokens, expected) and torch.equal(num_accepted, accepted)
    baseline = speculative_verify_reference(target_logits.float(), draft_tokens, draft_logits.float(), **options)[2]
    assert_accurate(logprobs, exact, baseline, name="logprobs")


def case(batch, num_drafts, vocab_size, temperature, top_k, top_p, dtype):
    def make_inputs(device):
        target = torch.randn(batch, num_drafts + 1, vocab_size, device=device) * 2
        draft = (target[:, :-1] + 0.3 * torch.randn(batch, num_drafts, vocab_size, device=device)).to(dtype)
        states = torch.randint(2**62, (2, batch, 3), device=device)
        filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        columns = [sample(logits, **filters, generator_state=states[0])[0] for logits in draft.unbind(1)]
        # no tensor among the arguments: a call that advances it needs no new logits
        generator = {"state": states[1]}
        return target.to(dtype), torch.stack(columns, 1), draft, generator, temperature, top_k, top_p

    return Case(
        name=f"{batch}x{num_drafts}x{vocab_size}-k{top_k}-p{top_p}-{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        ours=ours,
        peers={"torch": torch_verify},
        check=check,
        bytes=batch * (2 * num_drafts + 1) * vocab_size * dtype.itemsize,
    )


CASES = [
    case(*size, *filters, dtype)
    for size in ((1, 5, 32000), (8, 5, 32000))
    for filters in ((0.8, 50, 0.9), (1.0, 0, 1.0))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_speculative_verify(compare, case):
    compare(case)
