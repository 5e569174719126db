"""attention and attention_decode where a GPU can fail and the CPU cannot: schedules, integers nobody has checked."""

import functools

import pytest
import test_attention_decode as decode
import torch
from accuracy import assert_bitwise_equal
from test_attention import check, inputs, packed_inputs, run, upstream_of, with_sink

from arfast.ops import attention, attention_decode


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_schedules(head_dim, deterministic, device):
    q, k, v = inputs((1, 140, 140, 2, 1, head_dim), torch.bfloat16, device)
    options = with_sink(dict(window=100, sink=True), q)
    check([q, k, v], options, upstream_of(q), functools.partial(attention, deterministic=deterministic))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_the_same_bits_in_any_order_of_blocks(causal, packed, device, implementation, request):
    """Where dq is summed in turns. All keys are the same, so that its sums are of what rounding left over."""
    if implementation == "cpu":
        pytest.skip("the order of its sums is fixed")
    lengths_q, lengths_k = [40, 0, 24], [500, 3, 400]
    if not packed:
        lengths_q, lengths_k = [sum(lengths_q)], [sum(lengths_k)]
    if causal:
        lengths_q = lengths_k = [150, 1, 0, 180] if packed else [300]
    tensors, documents = packed_inputs(lengths_q, lengths_k, torch.bfloat16, heads=(2, 1), head_dim=64)
    tensors[1] = tensors[1][:1].expand_as(tensors[1])
    if not packed:
        tensors, documents = [t[None] for t in tensors], {}
    options = with_sink(dict(causal=causal, sink=True), tensors[0]) | documents
    upstream = upstream_of(tensors[0], packed=packed)[0], None

    def results(deterministic):
        for seed in range(8):
            if implementation.startswith("emulated"):
                random = dict(schedule="random", asynchrony="mixed", seed=seed, jitter=20)
                request.getfixturevalue("emulator").configure(**random if seed > 0 else {})
            yield run(attention, tensors, options | dict(deterministic=deterministic), upstream)

    first, *others = results(True)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_bitwise_equal(a, b)
    if implementation.startswith("emulated") and not causal:  # causal: blocks come in this order anyway
        assert any(not torch.equal(first[2], other[2]) for other in results(False))


@pytest.mark.parametrize("wrong", [[0, 1 << 30, 90], [0, -5, 60], [50, 20, 200]], ids=str)
def test_documents_out_of_range_touch_nothing_outside(wrong, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the memory of the tensors is not left."""
    if request.node.callspec.params["device"] != "cuda":
        pytest.skip("the CPU refuses them; the emulated GPU finds documents that overlap, whose rows are written twice")
    tensors, _ = packed_inputs([40, 50], [40, 50], torch.bfloat16)
    tensors = [t.to(device) for t in tensors]
    ends = torch.tensor(wrong, dtype=torch.int32).to(device)
    run(attention, tensors, dict(cu_seqlens_q=ends, cu_seqlens_k=ends), upstream_of(tensors[0], packed=True))


def test_nan_past_the_documents_does_not_reach_the_sink(device):
    tensors, documents = packed_inputs([40], [40], torch.bfloat16, padding=20)
    options = with_sink(dict(sink=True, deterministic=True), tensors[0]) | documents
    dout, dlse = upstream_of(tensors[0], packed=True)
    dlse[:, 40:] = 0
    expected = run(attention, tensors, options, (dout, dlse))
    dlse[:, 40:] = float("nan")
    for a, b in zip(run(attention, tensors, options, (dout, dlse)), expected, strict=True):
        assert_bitwise_equal(a, b)


def test_no_documents(device, poisoned):
    tensors, documents = packed_inputs([], [], torch.bfloat16, padding=20)
    tensors, documents = [t.to(device) for t in tensors], {k: v.to(device) for k, v in documents.items()}
    out, lse, *gradients = run(attention, tensors, documents, upstream_of(tensors[0], packed=True))
    assert (lse == -torch.inf).all() and all((t == 0).all() for t in (out, *gradients))


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [4, 8], ids="{}/2".format)
def test_decode_schedules(heads, head_dim, device):
    q, k, v, seqlens = decode.inputs(([600, 200], 1, heads, 2, head_dim), torch.bfloat16, device)
    decode.check(q, k, v, seqlens, dict(sink=True))


@pytest.mark.parametrize("change", ["seqlens", "block_table", "beam_slots"])
@pytest.mark.parametrize("heads", [4, 8], ids="{}/2".format)
def test_decode_integers_out_of_range_read_nothing_outside(heads, change, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the cache's memory is not left."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("the CPU refuses them")
    q, k, v, seqlens = decode.inputs(([70, 20], 1, heads, 2, 40), torch.bfloat16, device)
    if change == "seqlens":
        attention_decode(q, k, v, decode.lengths(1 << 30, -5, device=device))
    elif change == "block_table":
        pages_k, pages_v, table = decode.paged(k, v, seqlens, 16, device)
        table[0, :3] = torch.tensor([1 << 30, -9, 10**6], dtype=torch.int32)
        attention_decode(q, pages_k, pages_v, seqlens, block_table=table)
    else:
        slots = torch.full(k.shape[:2], 1 << 30, dtype=torch.int32, device=device)
        attention_decode(q, k, v, seqlens, beam_slots=slots)
