"""attention against its reference in float64 and against torch, over the checklist that every op has."""

import itertools

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal

from arfast.ops import attention, attention_reference

pytestmark = pytest.mark.sixteen_bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, S, H, Hkv, D: edges of the CPU's tiles, of a GPU's (128 or 64 queries, 64 or 32 keys), and head dimensions for
# every kernel
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 31, 31, 2, 1, 32),
    (1, 32, 32, 4, 2, 33),
    (1, 33, 33, 2, 2, 64),
    (2, 129, 129, 2, 1, 64),
    (1, 130, 65, 1, 1, 80),
    (1, 127, 127, 1, 1, 96),
    (1, 60, 193, 2, 2, 128),
    (1, 257, 257, 2, 1, 80),
    (1, 200, 70, 2, 1, 64),
    (1, 65, 65, 1, 1, 256),
    (1, 40, 70, 1, 1, 200),
    (3, 5, 41, 8, 2, 17),
    (1, 9, 520, 1, 1, 31),
]
OPTIONS = {
    "causal": {},
    "full": dict(causal=False),
    "window": dict(window=7),
    "one-sided": dict(causal=False, window=40),
    "softcap": dict(softcap=5.0, softmax_scale=0.3),
    "sink": dict(sink=True),
    "all": dict(window=100, softcap=4.0, softmax_scale=0.2, sink=True),
}
FEW_OPTIONS = [dict(), dict(causal=False, window=3), dict(softcap=3.0)]
NAMES = ["out", "lse", "dq", "dk", "dv", "dsink"]


def inputs(shape, dtype, device="cpu"):
    b, t, s, h, hkv, d = shape
    return [torch.randn(size).to(device, dtype) for size in ((b, t, h, d), (b, s, hkv, d), (b, s, hkv, d))]


def packed_inputs(lengths_q, lengths_k, dtype, *, heads=(4, 2), head_dim=32, padding=0):
    """q, k, v of packed documents, and their boundaries as options."""
    ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)]
    rows = [int(e[-1]) + padding for e in ends]
    shapes = (rows[0], heads[0]), (rows[1], heads[1]), (rows[1], heads[1])
    tensors = [torch.randn(*shape, head_dim).to(dtype) for shape in shapes]
    return tensors, dict(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])


def with_sink(options, q):
    if options.get("sink") is not True:
        return options
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return options | dict(sink=torch.randn(q.shape[-2], device=q.device, dtype=wide))


def run(function, tensors, options, upstream):
    """[out, lse, gradients] on leaf copies of q, k, v and the sink, upstream = (dout, dlse or None)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    if options.get("sink") is not None:
        leaves.append(options["sink"].detach().clone().requires_grad_())
        options = options | dict(sink=leaves[3])
    outs = function(*leaves[:3], return_lse=True, **options)
    used, gradients = zip(
        *((o, u.to(o.dtype)) for o, u in zip(outs, upstream, strict=True) if u is not None), strict=True
    )
    return [*(o.detach() for o in outs), *torch.autograd.grad(used, leaves, gradients)]


def upstream_of(q, *, packed=False):
    rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return torch.randn(q.shape).to(q.device, q.dtype), torch.randn(rows).to(q.device)


def check(tensors, options, upstream, function=attention):
    wide = {k: v.double() if k == "sink" and v is not None else v for k, v in options.items()}
    actual = run(function, tensors, options, upstream)
    exact = run(attention_reference, [t.double() for t in tensors], wide, upstream)
    baseline = run(attention_reference, tensors, options, upstream)
    for name, a, e, b in zip(NAMES, actual, exact, baseline, strict=False):
        # Gradients are sums of differences p * (dp - delta), which the baseline takes of the very same rounded numbers.
        assert_accurate(a, e, b, name=name, ulps=4 if name.startswith("d") else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-S{}-H{}-{}-D{}".format(*s))
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward(name, shape, dtype, device, poisoned):
    q, k, v = inputs(shape, dtype, device)
    dout, dlse = upstream_of(q)
    check([q, k, v], with_sink(OPTIONS[name], q), (dout, dlse if shape[2] > 1 else None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "lengths",
    [
        ([33, 0, 1, 130, 64], [33, 0, 1, 130, 64]),
        ([5, 70, 0, 31], [40, 20, 7, 0]),
        ([9], [9]),
        ([0, 0], [3, 0]),
        ([3, 0, 5] * 14, [3, 2, 4] * 14),  # more than a warp has lanes
    ],
    ids=["equal", "different", "one", "no queries", "many"],
)
def test_packed_documents(lengths, name, dtype, device, poisoned):
    tensors, documents = packed_inputs(*lengths, dtype, padding=3)
    options = with_sink(OPTIONS[name], tensors[0]) | documents
    check(tensors, options, upstream_of(tensors[0], packed=True))


@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
def test_equal_scores(options):
    q, k, v = inputs((1, 40, 40, 2, 1, 16), torch.float32)
    check([torch.ones_like(q), torch.ones_like(k), v], options, (upstream_of(q)[0], None))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("options", [*FEW_OPTIONS, dict(causal=False)], ids=str)
def test_extreme_values(options, dtype, device):
    q, k, v = inputs((1, 40, 40, 2, 1, 16), dtype, device)
    upstream = upstream_of(q)[0], None
    large = [q * 1e4, k, v * 1e4]
    negative = [q.abs() * 1e4, -k.abs(), v]  # the weight of a score of 0, as of rows that do not exist, is infinite
    masked = k.clone()
    masked[:, 7] = float("-inf")  # a score of -inf is a weight of 0
    for tensors in (large, negative, [q.abs(), masked, v]):
        exact = attention_reference(*(t.double() for t in tensors), **options)
        assert_accurate(attention(*tensors, **options), exact, attention_reference(*tensors, **options))
    assert all(t.isfinite().all() for x in (large, negative) for t in run(attention, x, options, upstream))


def test_rows_whose_only_score_is_minus_infinity():
    q, k, v = (x.abs() for x in inputs((1, 40, 40, 2, 1, 16), torch.float32))
    k[:, 7] = float("-inf")
    upstream = upstream_of(q)[0], None
    actual, expected = (run(f, [q, k, v], dict(window=0), upstream) for f in (attention, attention_reference))
    for index, name in ((0, "out"), (1, "lse"), (4, "dv")):
        torch.testing.assert_close(actual[index], expected[index], msg=name)
    assert (actual[0][0, 7] == 0).all() and (actual[4][0, 7] == 0).all()
    assert (actual[3] == 0).all()  # rows that see one key have no gradient of its score


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1, 8), (2, 0, 4, 2, 1, 8), (2, 4, 0, 2, 1, 8)], ids=str)
def test_empty(shape, sink, dtype, device, poisoned):
    q, k, v = inputs(shape, dtype, device)
    check([q, k, v], with_sink(dict(sink=sink or None), q), upstream_of(q))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_that_see_nothing(dtype, device, poisoned):
    q, k, v = inputs((1, 90, 20, 2, 1, 16), dtype, device)
    out, lse, dq, _, _ = run(attention, [q, k, v], {}, upstream_of(q))
    assert (out[:, :70] == 0).all() and (lse[..., :70] == -torch.inf).all() and (dq[:, :70] == 0).all()
    assert (out[:, 70:] != 0).all() and lse[..., 70:].isfinite().all()
    sink = torch.tensor([0.5, -torch.inf])
    out, lse = attention(q, k, v, sink=sink, return_lse=True)
    assert (out[:, :70] == 0).all()
    torch.testing.assert_close(lse[0, :, :70], sink[:, None].expand(-1, 70))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_stays_in_its_document(dtype, device):
    lengths = [40, 70, 1, 33]
    (q, k, v), documents = packed_inputs(lengths, lengths, dtype, padding=20)
    dout, dlse = upstream_of(q, packed=True)
    expected = run(attention, [q, k, v], documents, (dout, dlse))
    spoiled = [t.clone() for t in (q, k, v, dout)]
    for t in spoiled:
        t[40:110] = t[144:] = float("nan")
    dlse[:, 40:110] = dlse[:, 144:] = float("nan")
    actual = run(attention, spoiled[:3], documents, (spoiled[3], dlse))
    kept = torch.cat([torch.arange(40), torch.arange(110, 144)])
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        rows = (lambda t: t.t()) if name == "lse" else (lambda t: t)
        assert_bitwise_equal(rows(a)[kept], rows(e)[kept], name=name)
    assert actual[0][40:110].isnan().all() and (actual[0][144:] == 0).all() and (actual[2][144:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_stays_in_its_row(dtype, device):
    q, k, v = inputs((1, 33, 33, 2, 1, 16), dtype, device)
    expected = attention(q, k, v)
    q[0, 11, 1, 3] = float("nan")
    out = attention(q, k, v)
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = expected[0, 11, 1]
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    leaves = [t.requires_grad_() for t in inputs((1, 4, 5, 2, 1, 3), torch.float64)]
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    used = options | dict(sink=None)

    def function(q, k, v, sink):
        return attention(q, k, v, return_lse=True, **used | (dict(sink=sink) if "sink" in options else {}))

    assert torch.autograd.gradcheck(function, (*leaves, sink) if "sink" in options else (*leaves, None))


def test_gradcheck_packed():
    tensors, documents = packed_inputs([3, 0, 4], [3, 2, 6], torch.float64, heads=(2, 1), head_dim=2)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, return_lse=True, **documents), leaves)


def test_some_gradients():
    q, k, v = inputs((1, 20, 20, 2, 2, 16), torch.float32)
    dout, dlse = upstream_of(q)
    expected = run(attention, [q, k, v], {}, (dout, dlse))
    v.requires_grad_()
    out = attention(q, k, v)
    assert_bitwise_equal(torch.autograd.grad(out, v, dout)[0], expected[4])
    q.requires_grad_()
    lse = attention(q, k, v.detach(), return_lse=True)[1]
    (dq,) = torch.autograd.grad(lse, q, dlse)
    wide = q.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        attention_reference(wide, k.double(), v.double(), return_lse=True)[1], wide, dlse.double()
    )
    baseline = torch.autograd.grad(attention_reference(q, k, v, return_lse=True)[1], q, dlse)
    assert_accurate(dq, exact[0], baseline[0])


def test_not_twice_differentiable():
    q, k, v = (t.requires_grad_() for t in inputs((1, 4, 4, 1, 1, 8), torch.float32))
    dout = torch.ones(1, 4, 1, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(attention(q, k, v), q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    q, k, v = inputs((2, 70, 70, 4, 2, 40), torch.bfloat16, device)
    upstream = upstream_of(q)
    expected = run(attention, [q, k, v], dict(window=20), upstream)
    projection = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    slices = [x.unflatten(-1, (-1, 40)) for x in projection.split([160, 80, 80], -1)]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x) for x in (q, k, v)]
    columns_first = [x.mT.contiguous().mT for x in (q, k, v)]
    for views in (slices, by_head, misaligned, columns_first):
        copies = [x.clone() for x in views]
        leaves = [x.detach().requires_grad_() for x in views]
        out, lse = attention(*leaves, window=20, return_lse=True)
        gradients = torch.autograd.grad([out, lse], leaves, upstream)
        for name, a, e in zip(NAMES, [out, lse, *gradients], expected, strict=False):
            assert_bitwise_equal(a, e, name=name)
        for view, copy in zip(views, copies, strict=True):
            assert_bitwise_equal(view, copy, name="input")


def same_bits(*variants):
    """The output and the gradients of q, k, v are the same, whatever the layout."""
    found = []
    for tensors in variants:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attention(*leaves)
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    list(map(assert_bitwise_equal, *found))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_expanded_inputs(dtype, device):
    q, k, v = inputs((3, 33, 33, 2, 2, 16), dtype, device)
    shared = [x[:1, :, :1].expand(3, -1, 2, -1) for x in (k, v)]
    same_bits((q, *shared), (q, *(x.contiguous() for x in shared)))


def test_offsets_beyond_32_bits():
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # virtual: only a few pages of it are touched
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")
    q, k, v = inputs((2, 20, 20, 2, 2, 16), torch.bfloat16)
    far = memory.as_strided(q.shape, (2**31, 32, 16, 1)).copy_(q)
    same_bits((far, k, v), (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_whatever_the_batch(dtype, device):
    tensors = inputs((3, 150, 150, 2, 1, 24), dtype, device)
    dout = torch.randn(tensors[0].shape).to(dtype)
    expected = run(attention, tensors, {}, (dout, None))
    alone = run(attention, [t[1:2] for t in tensors], {}, (dout[1:2], None))
    for name, a, e in zip(NAMES, alone, expected, strict=False):
        assert_bitwise_equal(a, e[1:2], name=name)
    ends = torch.arange(4, dtype=torch.int32) * 150
    options = dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
    packed = run(attention, [t.flatten(0, 1) for t in tensors], options, (dout.flatten(0, 1), None))
    for name, a, e in zip(NAMES, packed, expected, strict=False):
        assert_bitwise_equal(
            a if name == "lse" else a.unflatten(0, (3, 150)),
            e.transpose(0, 1).flatten(1) if name == "lse" else e,
            name=name,
        )


def op_arguments(*, packed=False, sink=None):
    cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32) if packed else None
    return (sink, cu_seqlens, cu_seqlens, 9 if packed else None, None, 0.3, True, 4, 5.0)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    q, k, v = inputs((2, 9, 9, 4, 2, 8), torch.float32)
    if packed:
        q, k, v = q[0], k[0], v[0]
    dout, dlse = upstream_of(q, packed=packed)
    for sink in (None, torch.randn(4)):
        arguments = op_arguments(packed=packed, sink=sink)
        torch.library.opcheck(torch.ops.arfast.attention_forward, (q, k, v, *arguments))
        out, lse = torch.ops.arfast.attention_forward(q, k, v, *arguments)
        for upstream in (None, dlse):
            backward = (dout, upstream, q, k, v, out, lse, *arguments, False)
            torch.library.opcheck(torch.ops.arfast.attention_backward, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (12, 17):
        q, k, v = inputs((1, seqlen, seqlen, 4, 2, 8), torch.float32)
        options, upstream = with_sink(dict(sink=True, window=5), q), upstream_of(q)
        expected = run(attention, [q, k, v], options, upstream)
        for a, b in zip(run(compiled, [q, k, v], options, upstream), expected, strict=True):
            assert_bitwise_equal(a, b)


def test_autocast_casts_the_inputs():
    q, k, v = inputs((1, 9, 9, 2, 1, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    assert_bitwise_equal(out, attention(*(x.bfloat16() for x in (q, k, v))))


def test_the_sink_may_have_any_dtype():
    q, k, v = inputs((1, 9, 9, 2, 1, 16), torch.bfloat16)
    sink = torch.randn(2).bfloat16().requires_grad_()
    out = attention(q, k, v, sink=sink)
    assert_bitwise_equal(out, attention(q, k, v, sink=sink.float()))
    assert torch.autograd.grad(out.sum(), sink)[0].dtype == torch.bfloat16
