"""attention in the dtypes that GPUs have, on every device, against its reference in float64: edges of the tiles, masks,
packed documents, what must not leak."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from test_attention import NAMES, OPTIONS, check, inputs, packed_inputs, run, upstream_of, with_sink

from arfast.ops import attention, attention_reference

DTYPES = [torch.bfloat16, torch.float16]
# B, T, S, H, Hkv, D: around the tiles of 128 queries and 64 keys, and every head dimension that has a tile of its own
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 31, 31, 2, 1, 32),
    (1, 64, 64, 4, 2, 33),
    (2, 129, 129, 2, 1, 64),
    (1, 130, 65, 1, 1, 80),
    (1, 127, 127, 1, 1, 96),
    (1, 60, 193, 2, 2, 128),
    (1, 200, 70, 2, 1, 64),
    (1, 65, 65, 1, 1, 256),
    (1, 40, 70, 1, 1, 200),
    (3, 5, 41, 8, 2, 17),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-S{}-H{}-{}-D{}".format(*s))
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward(name, shape, dtype, device, poisoned):
    q, k, v = inputs(shape, dtype, device)
    dout, dlse = upstream_of(q)
    check([q, k, v], with_sink(OPTIONS[name], q), (dout, dlse if shape[2] > 1 else None))


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_schedules(head_dim, device):
    q, k, v = inputs((1, 140, 140, 2, 1, head_dim), torch.bfloat16, device)
    check([q, k, v], with_sink(dict(window=100, sink=True), q), upstream_of(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "lengths",
    [
        ([33, 0, 1, 130, 64], [33, 0, 1, 130, 64]),
        ([5, 70, 0, 31], [40, 20, 7, 0]),
        ([9], [9]),
        ([0, 0], [3, 0]),
        ([3, 0, 5] * 14, [3, 2, 4] * 14),  # more documents than lanes
    ],
    ids=["equal", "different", "one", "no queries", "many"],
)
def test_packed_documents(lengths, name, dtype, device, poisoned):
    tensors, documents = packed_inputs(*lengths, dtype, padding=3)
    tensors = [t.to(device) for t in tensors]
    documents = {k: v.to(device) for k, v in documents.items()}
    check(tensors, with_sink(OPTIONS[name], tensors[0]) | documents, upstream_of(tensors[0], packed=True))


def test_rows_that_see_nothing(device, poisoned):
    q, k, v = inputs((1, 90, 20, 2, 1, 16), torch.bfloat16, device)
    out, lse, dq, _, _ = run(attention, [q, k, v], {}, upstream_of(q))
    assert (out[:, :70] == 0).all() and (lse[..., :70] == -torch.inf).all() and (dq[:, :70] == 0).all()
    assert (out[:, 70:] != 0).all() and lse[..., 70:].isfinite().all()
    sink = torch.tensor([0.5, -torch.inf], device=q.device)
    out, lse = attention(q, k, v, sink=sink, return_lse=True)
    assert (out[:, :70] == 0).all()
    torch.testing.assert_close(lse[0, :, :70], sink[:, None].expand(-1, 70))


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1, 8), (2, 0, 4, 2, 1, 8), (2, 4, 0, 2, 1, 8)], ids=str)
def test_empty(shape, device, poisoned):
    q, k, v = inputs(shape, torch.bfloat16, device)
    check([q, k, v], {}, upstream_of(q))


def test_nan_stays_in_its_document(device):
    lengths = [40, 70, 1, 33]
    tensors, documents = packed_inputs(lengths, lengths, torch.bfloat16, padding=20)
    tensors = [x.to(device) for x in tensors]
    documents = {name: x.to(device) for name, x in documents.items()}
    dout, dlse = upstream_of(tensors[0], packed=True)
    expected = run(attention, tensors, documents, (dout, dlse))
    for t in (*tensors, dout):
        t[40:110] = t[144:] = float("nan")
    dlse[:, 40:110] = dlse[:, 144:] = float("nan")
    actual = run(attention, tensors, documents, (dout, dlse))
    kept = torch.cat([torch.arange(40), torch.arange(110, 144)]).to(dout.device)
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        rows = (lambda t: t.t()) if name == "lse" else (lambda t: t)
        assert_bitwise_equal(rows(a)[kept], rows(e)[kept], name=name)
    assert actual[0][40:110].isnan().all() and (actual[0][144:] == 0).all() and (actual[2][144:] == 0).all()


def test_nan_stays_in_its_row(device):
    q, k, v = inputs((1, 33, 33, 2, 1, 16), torch.bfloat16, device)
    expected = attention(q, k, v)
    q[0, 11, 1, 3] = float("nan")
    out = attention(q, k, v)
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = expected[0, 11, 1]
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("options", [dict(), dict(causal=False, window=3), dict(softcap=3.0)], ids=str)
def test_extreme_values(options, device):
    q, k, v = inputs((1, 40, 40, 2, 1, 16), torch.bfloat16, device)
    masked = k.clone()
    masked[:, 7] = float("-inf")  # a score of -inf is a weight of 0
    for tensors in ([q * 1e4, k, v * 1e4], [q.abs(), masked, v]):
        exact = attention_reference(*(t.double() for t in tensors), **options)
        assert_accurate(attention(*tensors, **options), exact, attention_reference(*tensors, **options))


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    q, k, v = inputs((2, 70, 70, 4, 2, 40), torch.bfloat16, device)
    upstream = upstream_of(q)
    expected = run(attention, [q, k, v], dict(window=20), upstream)
    projection = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    slices = [x.unflatten(-1, (-1, 40)) for x in projection.split([160, 80, 80], -1)]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x) for x in (q, k, v)]
    for views in (slices, by_head, misaligned):
        leaves = [x.detach().requires_grad_() for x in views]
        out, lse = attention(*leaves, window=20, return_lse=True)
        gradients = torch.autograd.grad([out, lse], leaves, upstream)
        for name, a, e in zip(NAMES, [out, lse, *gradients], expected, strict=False):
            assert_bitwise_equal(a, e, name=name)


def test_same_bits_whatever_the_batch(device):
    tensors = inputs((3, 150, 150, 2, 1, 24), torch.bfloat16, device)
    dout = torch.randn(tensors[0].shape).to(tensors[0])
    expected = run(attention, tensors, {}, (dout, None))
    alone = run(attention, [t[1:2] for t in tensors], {}, (dout[1:2], None))
    for name, a, e in zip(NAMES, alone, expected, strict=False):
        assert_bitwise_equal(a, e[1:2], name=name)
    ends = (torch.arange(4, dtype=torch.int32) * 150).to(device)
    options = dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
    packed = run(attention, [t.flatten(0, 1) for t in tensors], options, (dout.flatten(0, 1), None))
    for name, a, e in zip(NAMES, packed, expected, strict=False):
        assert_bitwise_equal(
            a if name == "lse" else a.unflatten(0, (3, 150)),
            e.transpose(0, 1).flatten(1) if name == "lse" else e,
            name=name,
        )


@pytest.mark.parametrize("wrong", [[0, 1 << 30, 90], [0, -5, 60], [50, 20, 200]], ids=str)
def test_documents_out_of_range_touch_nothing_outside(wrong, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the memory of the tensors is not left."""
    if request.node.callspec.params["device"] != "cuda":
        pytest.skip("the CPU refuses them; the emulated GPU finds documents that overlap, whose rows are written twice")
    tensors, _ = packed_inputs([40, 50], [40, 50], torch.bfloat16)
    tensors = [t.to(device) for t in tensors]
    ends = torch.tensor(wrong, dtype=torch.int32).to(device)
    run(attention, tensors, dict(cu_seqlens_q=ends, cu_seqlens_k=ends), upstream_of(tensors[0], packed=True))


def test_no_documents(device, poisoned):
    tensors, documents = packed_inputs([], [], torch.bfloat16, padding=20)
    tensors, documents = [t.to(device) for t in tensors], {k: v.to(device) for k, v in documents.items()}
    out, lse, *gradients = run(attention, tensors, documents, upstream_of(tensors[0], packed=True))
    assert (lse == -torch.inf).all() and all((t == 0).all() for t in (out, *gradients))
