"""Sequences split over ranks: attention of the pieces against the whole, documents that do not leak, shifted losses."""

import pytest
import torch
import torch.distributed as dist
from parallel_models import DENSE, MOE, parallel_model, raises, same_curve, same_step, text_tokens
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from arfast import ops
from arfast.distributed.collectives import Group
from arfast.distributed.context_parallel import ContextPlan, context_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
# Boundaries in and between the pieces, on their edges, documents of one token and of none, rows past the last one.
DOCUMENTS = ([0, 32], [0, 1, 2, 32], [0, 8, 8, 16, 32], [0, 5, 5, 5, 30, 31, 32], list(range(33)), [0, 13, 27, 31])


class _Ranks(Group):
    """A group of one of several ranks, for what needs no exchange."""

    def __init__(self, size, rank):
        super().__init__()
        self.size, self.rank = size, rank


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_pieces_cover_the_sequence_once_and_balance_causal_work(size):
    tokens = torch.arange(2 * 24).view(2, 24)
    parts = [ContextPlan(2, 24, _Ranks(size, rank)).own(tokens) for rank in range(size)]
    assert torch.equal(torch.cat(parts, 1).sort(1).values, tokens)
    assert len({int((part[0] + 1).sum()) for part in parts}) == 1  # keys that the queries of a rank see


def _world():
    return Group(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",)), "context")


def _compare(whole, plan, packed, cu_seqlens, options):
    """context_attention and its gradients against ops.attention over all tokens; whole: q, k, v [B, T, heads, D]."""
    leaves = [t.clone().requires_grad_() for t in whole]
    documents = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens) if packed else {}
    expected = ops.attention(*(t[0] if packed else t for t in leaves), **documents, **options)
    expected = expected[None] if packed else expected
    expected.sin().sum().backward()
    own = [plan.own(t).requires_grad_() for t in whole]
    out = context_attention(*(t[0] if packed else t for t in own), plan, **options)
    out.sin().sum().backward()
    torch.testing.assert_close(out[None] if packed else out, plan.own(expected.detach()), rtol=1e-12, atol=1e-13)
    for name, mine, leaf in zip("qkv", own, leaves, strict=True):
        torch.testing.assert_close(mine.grad, plan.own(leaf.grad), rtol=1e-11, atol=1e-12, msg=f"d{name} {options}")


def _attention_checks():
    group = _world()
    generator = torch.Generator().manual_seed(0)
    draw = lambda batch, heads: torch.randn(batch, 32, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
    for options in ({}, dict(window=3), dict(softcap=2.0), dict(window=11, softcap=5.0, softmax_scale=0.2)):
        whole = [draw(3, heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        _compare(whole, ContextPlan(3, 32, group), False, None, options)
        for documents in DOCUMENTS:
            cu_seqlens = torch.tensor(documents, dtype=torch.int32)
            whole = [draw(1, heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            plan = ContextPlan(1, 32, group, cu_seqlens, position_ids=torch.arange(32)[None])
            _compare(whole, plan, True, cu_seqlens, options)
    own = draw(2, 1)[:, : 32 // group.size]
    plan = ContextPlan(2, 32, group)
    assert torch.equal(plan.own(plan.gather(own.contiguous())), own)


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_of_pieces_is_that_of_the_whole(ranks):
    run_ranks(_attention_checks, ranks)


def _leak_probe(base):
    """Change the first document of two: what the model says about the second keeps its bits, also behind a window."""
    for changes in ({}, dict(sliding_window=6)):
        _, model = parallel_model(dict(context=dist.get_world_size()), base, torch.float32, **changes)
        ids = text_tokens(1, 48)
        cu_seqlens = torch.tensor([0, 19, 48], dtype=torch.int32)
        other = ids.clone()
        other[:, :19] = (other[:, :19] + 1) % 256
        for options in (dict(), dict(labels=ids, reduction="none")):
            before, after = (model(x, cu_seqlens=cu_seqlens, **options) for x in (ids, other))
            a, b = (out.logits if out.loss is None else out.loss for out in (before, after))
            assert torch.equal(a[:, 19:], b[:, 19:]), "document 2 sees document 1"
            assert not torch.equal(a[:, :18], b[:, :18]), "the probe sees nothing"
        # backward: a loss of document 2 alone moves no word that only document 1 holds
        model.zero_grad()
        words = other.clone()
        words[:, :19], words[:, 19:] = 7, ids[:, 19:] % 5 + 100
        loss = model(words, words, cu_seqlens, reduction="none").loss[:, 19:].sum()
        loss.backward()
        gradient = model.model.embed_tokens.weight.grad
        assert not gradient[7].any() and gradient[100:105].any(), "a gradient of document 2 reaches document 1"


def test_documents_do_not_leak():
    run_ranks(_leak_probe, 2, DENSE)


def _whole_results():
    """Losses per token, logits and positions of a split model are those of the whole one, at every place."""
    context = dict(context=dist.get_world_size())
    for documents in (None, torch.tensor([0, 3, 4, 21, 21, 64], dtype=torch.int32)):
        whole, split = parallel_model(context, DENSE, tie_word_embeddings=True)
        ids = text_tokens(4, 16)
        labels = ids.clone()
        labels[0, 3:6] = -100
        positions = torch.arange(16).expand(4, 16) * 3
        keep = torch.tensor([0, 9, 63, 20])
        for options in (
            dict(labels=labels, reduction="none", label_smoothing=0.1, z_loss=0.01),
            dict(labels=labels, reduction="sum"),
            dict(labels=labels),
            dict(labels=labels, num_items=torch.tensor(7.0)),
            dict(labels=labels, position_ids=positions),
            dict(position_ids=positions),
            dict(logits_to_keep=3),
            dict(logits_to_keep=keep),
            dict(),
        ):
            expected, got = (model(ids, cu_seqlens=documents, **options) for model in (whole, split))
            a, b = (out.loss if out.logits is None else out.logits for out in (expected, got))
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)
            assert (got.num_tokens is None) == (expected.num_tokens is None)
            assert got.num_tokens is None or got.num_tokens == expected.num_tokens
            whole.zero_grad(), split.zero_grad()
            a.sin().sum().backward()
            b.sin().sum().backward()
            expected, got = (model.model.embed_tokens.weight.grad for model in (whole, split))
            torch.testing.assert_close(split.groups.context.sum_(got.clone()), expected, rtol=1e-9, atol=1e-12)


def _refusals():
    _, model = parallel_model(dict(context=2), DENSE)
    raises(
        ValueError, "must have a sequence length .* multiple of 2 \\* context = 4, got 18", model, text_tokens(2, 18)
    )
    packed = dict(cu_seqlens=torch.tensor([0, 5, 18], dtype=torch.int32))
    raises(ValueError, "multiple of 2 \\* context = 4, got 18", model, text_tokens(1, 18), **packed)
    raises(ValueError, "cache must be None for a model that is split over ranks", model, text_tokens(1, 16), cache=1)
    raises(ValueError, "CausalLM: cache must be None", model.generate, text_tokens(1, 16), max_new_tokens=2)
    raises(IndexError, "input_ids must be in", model, text_tokens(1, 16) + 256)


def _two_rank_checks():
    _refusals()
    _whole_results()


def test_results_are_those_of_the_whole_batch():
    run_ranks(_two_rank_checks, 2)


def _steps(cases):
    for parallel, base, changes in cases:
        if "documents" in changes:
            documents = torch.tensor(changes.pop("documents"), dtype=torch.int32)
            changes["cu_seqlens"] = documents
        same_step(parallel, base, **changes)


def test_one_step_on_two_ranks():
    two = dict(context=2)
    packed = dict(documents=[0, 5, 30, 31, 64])
    windows = dict(sliding_window=9, layer_types=("sliding_attention", "full_attention"))
    cases = [(two, DENSE, windows), (two, DENSE, packed), (two, DENSE, packed | dict(num_key_value_heads=1))]
    cases += [(two, MOE, dict(packed, sliding_window=4)), (two, DENSE, dict(tie_word_embeddings=True, qkv_bias=True))]
    run_ranks(_steps, 2, cases)


def test_one_step_on_four_ranks():
    four = dict(context=4)
    run_ranks(_steps, 4, [(four, DENSE, dict(documents=[0, 17, 40, 64])), (four, MOE, dict(sliding_window=5))])


def _curve(parallel, base, documents):
    same_curve(parallel, base, cu_seqlens=torch.tensor(documents, dtype=torch.int32))


def test_fifty_steps_on_two_ranks():
    run_ranks(_curve, 2, dict(context=2), DENSE, [0, 30, 100, 128])


@pytest.mark.slow
@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("context", [2, 4])
def test_fifty_steps(context, base):
    run_ranks(_curve, context, dict(context=context), base, [0, 30, 100, 128], timeout=200)
