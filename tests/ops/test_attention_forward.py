"""The forward pass of attention on every device against its reference in float64: edges of the tiles, masks, packed
documents, what must not leak."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from test_attention import OPTIONS, inputs, packed_inputs, with_sink

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


def check(tensors, options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    actual = attention(*tensors, return_lse=True, **options)
    exact = attention_reference(*(t.double() for t in tensors), return_lse=True, **wide)
    baseline = attention_reference(*tensors, return_lse=True, **options)
    for name, a, e, b in zip(("out", "lse"), actual, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-S{}-H{}-{}-D{}".format(*s))
@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name, shape, dtype, device, poisoned):
    q, k, v = inputs(shape, dtype, device)
    check([q, k, v], with_sink(OPTIONS[name], q))


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_schedules(head_dim, device):
    q, k, v = inputs((1, 140, 140, 2, 1, head_dim), torch.bfloat16, device)
    check([q, k, v], with_sink(dict(window=100, sink=True), q))


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
    check(tensors, with_sink(OPTIONS[name], tensors[0]) | documents)


def test_rows_that_see_nothing(device, poisoned):
    q, k, v = inputs((1, 90, 20, 2, 1, 16), torch.bfloat16, device)
    out, lse = attention(q, k, v, return_lse=True)
    assert (out[:, :70] == 0).all() and (lse[..., :70] == -torch.inf).all()
    assert (out[:, 70:] != 0).all() and lse[..., 70:].isfinite().all()
    sink = torch.tensor([0.5, -torch.inf], device=q.device)
    out, lse = attention(q, k, v, sink=sink, return_lse=True)
    assert (out[:, :70] == 0).all()
    torch.testing.assert_close(lse[0, :, :70], sink[:, None].expand(-1, 70))


def test_no_keys(device, poisoned):
    q, k, v = inputs((2, 4, 0, 2, 1, 8), torch.bfloat16, device)
    out, lse = attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_nan_stays_in_its_document(device):
    lengths = [40, 70, 1, 33]
    (q, k, v), documents = packed_inputs(lengths, lengths, torch.bfloat16, padding=20)
    q, k, v = (x.to(device) for x in (q, k, v))
    documents = {name: x.to(device) for name, x in documents.items()}
    expected = attention(q, k, v, **documents)
    for t in (q, k, v):
        t[40:110] = t[144:] = float("nan")
    out = attention(q, k, v, **documents)
    kept = torch.cat([torch.arange(40), torch.arange(110, 144)]).to(out.device)
    assert_bitwise_equal(out[kept], expected[kept])
    assert out[40:110].isnan().all() and (out[144:] == 0).all()


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
    check([q * 1e4, k, v * 1e4], options)
    check([q.abs(), masked, v], options)


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    q, k, v = inputs((2, 70, 70, 4, 2, 40), torch.bfloat16, device)
    expected = attention(q, k, v, window=20)
    projection = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    slices = [x.unflatten(-1, (-1, 40)) for x in projection.split([160, 80, 80], -1)]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x) for x in (q, k, v)]
    for views in (slices, by_head, misaligned):
        assert_bitwise_equal(attention(*views, window=20), expected)


def test_same_bits_whatever_the_batch(device):
    q, k, v = inputs((3, 150, 150, 2, 1, 24), torch.bfloat16, device)
    expected = attention(q, k, v)
    assert_bitwise_equal(attention(q[1:2], k[1:2], v[1:2]), expected[1:2])
    ends = (torch.arange(4, dtype=torch.int32) * 150).to(device)
    out = attention(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert_bitwise_equal(out.unflatten(0, (3, 150)), expected)
