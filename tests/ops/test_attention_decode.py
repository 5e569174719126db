"""attention_decode against its reference in float64, over contiguous, paged and indirect caches."""

import functools

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import overlapping

from arfast.ops import attention, attention_decode, attention_decode_reference
from arfast.ops.attention_decode import PLAIN, TENSOR_CORES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# seqlens, Tq, H, Hkv, D
SHAPES = [
    ([1], 1, 1, 1, 1),
    ([31, 0, 32], 1, 4, 2, 32),
    ([33, 64, 65], 1, 2, 2, 33),
    ([257], 2, 8, 1, 80),
    ([129], 2, 8, 1, 80),
    ([300, 2], 3, 2, 2, 72),
    ([70, 3], 5, 6, 3, 64),
    ([70, 3], 5, 12, 3, 64),  # more than 16 rows
    ([513, 40], 1, 4, 1, 128),
    ([1100], 3, 2, 1, 96),
    ([17, 130], 1, 7, 1, 256),
]
OPTIONS = {
    "plain": {},
    "window": dict(window=20),
    "own key": dict(window=0),
    "softcap": dict(softcap=4.0, softmax_scale=0.3),
    "sink": dict(sink=True),
    "all": dict(window=90, softcap=5.0, sink=True, num_splits=3),
}


@pytest.fixture(params=[PLAIN, TENSOR_CORES], ids=["plain", "tensor cores"])
def decode(request, device, implementation):
    """attention_decode by each kernel of a GPU."""
    float32 = request.node.callspec.params.get("dtype") == torch.float32
    if request.param == TENSOR_CORES and (implementation == "cpu" or float32):
        pytest.skip("the CPU has one implementation, float32 one kernel")
    return functools.partial(attention_decode, _kernel=request.param)


def lengths(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def inputs(shape, dtype, device="cpu", *, spare=7):
    """q, caches with NaN past every sequence, seqlens."""
    seqlens, num_queries, num_heads, num_kv_heads, head_dim = shape
    q = torch.randn(len(seqlens), num_queries, num_heads, head_dim).to(device, dtype)
    caches = torch.randn(2, len(seqlens), max(seqlens) + spare, num_kv_heads, head_dim).to(device, dtype)
    for b, length in enumerate(seqlens):
        caches[:, b, length:] = NAN
    return q, caches[0], caches[1], lengths(*seqlens, device=device)


def paged(k, v, seqlens, page, device="cpu"):
    """The same caches in pages of random order, NaN wherever no token is; a block table with garbage past the end."""
    batch, size = k.shape[:2]
    per_sequence = -(-size // page)
    pages = torch.full((2, batch * per_sequence + 3, page, *k.shape[2:]), NAN, dtype=k.dtype, device=device)
    order = torch.randperm(batch * per_sequence).view(batch, per_sequence)
    table = torch.full((batch, per_sequence), -7, dtype=torch.int32, device=device)
    for b, length in enumerate(seqlens.tolist()):
        for position in range(length):
            index = order[b, position // page]
            table[b, position // page] = index
            pages[:, index, position % page] = torch.stack([k[b, position], v[b, position]])
    return pages[0], pages[1], table


def check(q, k, v, seqlens, options, *, decode=attention_decode, **layout):
    if options.get("sink") is True:
        options = options | dict(sink=torch.randn(q.shape[2], device=q.device))
    wide = {name: x.double() if name == "sink" else x for name, x in options.items()}
    actual = decode(q, k, v, seqlens, **options, **layout)
    exact = attention_decode_reference(q.double(), k.double(), v.double(), seqlens, **wide, **layout)
    assert_accurate(actual, exact, attention_decode_reference(q, k, v, seqlens, **options, **layout))
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_layout(name, shape, dtype, device, decode, poisoned):
    q, k, v, seqlens = inputs(shape, dtype, device)
    options = OPTIONS[name]
    if options.get("sink"):
        options = options | dict(sink=torch.randn(q.shape[2], device=device))
    expected = check(q, k, v, seqlens, options, decode=decode)
    pages_k, pages_v, table = paged(k, v, seqlens, 16, device)
    out = decode(q, pages_k, pages_v, seqlens, block_table=table, **options)
    assert_bitwise_equal(out, expected, name="paged")
    slots = torch.arange(len(seqlens), dtype=torch.int32)[:, None].expand(k.shape[:2]).to(device)
    out = decode(q, k, v, seqlens, beam_slots=slots, **options)
    assert_bitwise_equal(out, expected, name="beam_slots")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beams_share_their_past(dtype, device, decode):
    q, k, v, _ = inputs(([150] * 6, 1, 4, 2, 64), dtype)
    q, seqlens = q[:4], lengths(150, 99, 0, 1)
    slots = torch.randint(6, (4, k.shape[1]), dtype=torch.int32)
    slots[:, 150:] = 1_000_000  # nobody looks there
    check(q, k, v, seqlens, dict(window=60), beam_slots=slots, decode=decode)
    moved = [x[slots.clamp(max=5).long(), torch.arange(x.shape[1])] for x in (k, v)]
    expected = decode(q, *moved, seqlens)
    assert_bitwise_equal(decode(q, k, v, seqlens, beam_slots=slots), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_may_overlap(dtype, device, decode):
    """Caches that are one buffer of tokens, of which slot s begins at token s: a prompt is there once for all beams."""
    tokens = torch.randn(2, 700, 2, 64).to(device, dtype)
    k, v = (overlapping(x, 150) for x in tokens)
    q, seqlens = torch.randn(4, 1, 4, 64).to(device, dtype), lengths(150, 99, 0, 1, device=device)
    slots = torch.randint(len(k), (4, 150), dtype=torch.int32, device=device)
    slots[:, :80] = 5
    actual = check(q, k, v, seqlens, {}, beam_slots=slots, decode=decode)
    moved = [x[slots.long(), torch.arange(150, device=device)] for x in (k, v)]
    assert_bitwise_equal(actual, decode(q, *moved, seqlens))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("page", [1, 3, 64])
def test_pages_outside_the_window_are_not_needed(page, dtype, device, decode):
    q, k, v, seqlens = inputs(([200, 90], 2, 4, 2, 40), dtype, device)
    pages_k, pages_v, table = paged(k, v, seqlens, page, device)
    expected = decode(q, pages_k, pages_v, seqlens, block_table=table, window=30)
    for b, length in enumerate(seqlens.tolist()):
        unused = (length - 2 - 30) // page
        pages_k[table[b, :unused].long()] = NAN
        table[b, :unused] = 2**30
    assert_bitwise_equal(decode(q, pages_k, pages_v, seqlens, block_table=table, window=30), expected)


def test_equals_attention():
    q, k, v, seqlens = inputs(([90, 90], 90, 4, 2, 32), torch.float32, spare=0)
    exact = attention(q.double(), k.double(), v.double())
    assert_accurate(attention_decode(q, k, v, seqlens), exact, attention(q, k, v))


def test_every_head_dim():
    for head_dim in range(1, 257):
        check(*inputs(([70], 1, 3, 1, head_dim), torch.float32), {})


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_values(scale, dtype, device, decode):
    q, k, v, seqlens = inputs(([100, 7], 1, 4, 2, 16), dtype, device)
    check(q * scale, k, v, seqlens, {}, decode=decode)
    infinite = v.clone()
    infinite[1, 6] = float("inf")  # the last key
    check(q, k, infinite, seqlens, {}, decode=decode)
    k[:, 5] = float("-inf")  # a score of -inf is a weight of 0
    check(q.abs(), k, v, seqlens, {}, decode=decode)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_that_see_nothing(dtype, device, decode, poisoned):
    q, k, v, seqlens = inputs(([3, 0], 5, 2, 1, 16), dtype, device)
    out = decode(q, k, v, seqlens, sink=torch.tensor([0.3, float("-inf")]))
    assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).all() and (out[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [([], 1, 2, 1, 8), ([4], 0, 2, 1, 8)], ids=str)
def test_empty(shape, dtype, device, decode):
    seqlens, *_ = shape
    q, k = (torch.zeros(size, dtype=dtype) for size in ((len(seqlens), shape[1], 2, 8), (len(seqlens), 9, 1, 8)))
    assert decode(q, k, k, lengths(*seqlens)).shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_stays_in_its_sequence_and_head(dtype, device, decode):
    q, k, v, seqlens = inputs(([80, 80, 80], 2, 4, 2, 24), dtype, device)
    expected = decode(q, k, v, seqlens)
    k[1, 30, 0] = NAN
    out = decode(q, k, v, seqlens)
    assert out[1, :, :2].isnan().all()
    out[1, :, :2] = expected[1, :, :2]
    assert_bitwise_equal(out, expected)


def test_same_bits_for_every_number_of_threads():
    arguments = inputs(([1300, 700, 41], 1, 4, 2, 64), torch.bfloat16)
    same_for_any_threads(lambda: attention_decode(*arguments))


def test_same_bits_whatever_the_batch(device, decode):
    q, k, v, seqlens = inputs(([1300, 700, 41], 1, 4, 2, 64), torch.bfloat16, device)
    for num_splits in (0, 3):
        together = decode(q, k, v, seqlens, num_splits=num_splits)
        for b in range(3):
            alone = [x[b : b + 1] for x in (q, k, v, seqlens)]
            assert_bitwise_equal(decode(*alone, num_splits=num_splits), together[b : b + 1])


@pytest.mark.parametrize(
    "num_queries,group,dtype,kernel",
    [
        (1, 1, torch.bfloat16, PLAIN),
        (1, 3, torch.float16, PLAIN),
        (3, 1, torch.bfloat16, PLAIN),
        (1, 4, torch.bfloat16, TENSOR_CORES),
        (2, 2, torch.float16, TENSOR_CORES),
        (1, 4, torch.float32, PLAIN),
    ],
    ids=str,
)
def test_the_kernel_is_chosen_by_rows_alone(num_queries, group, dtype, kernel, device):
    for seqlens in ([200], [200, 1, 30] * 2):
        arguments = inputs((seqlens, num_queries, 2 * group, 2, 64), dtype, device)
        assert_bitwise_equal(attention_decode(*arguments), attention_decode(*arguments, _kernel=kernel))


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_tensor_cores_refuse_float32(dtype, device, implementation):
    if implementation == "cpu":
        pytest.skip("the CPU has one implementation")
    with pytest.raises(RuntimeError, match="attention_decode: dtype must be bfloat16 or float16"):
        attention_decode(*inputs(([20], 1, 2, 2, 8), dtype, device), _kernel=TENSOR_CORES)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("num_splits", [1, 2, 7, 100])
def test_splits(num_splits, dtype, device, decode):
    check(*inputs(([1500, 30], 2, 4, 2, 64), dtype, device), dict(num_splits=num_splits, window=1000), decode=decode)


def test_strided_and_misaligned_inputs_give_the_same_bits(device, decode):
    q, k, v, seqlens = inputs(([70, 20], 1, 4, 2, 40), torch.bfloat16, device)
    expected = decode(q, k, v, seqlens)
    layers = torch.stack([k, v, k])  # a layer of a larger cache
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x) for x in (q, k, v)]
    columns_first = [x.mT.contiguous().mT for x in (q, k, v)]
    for views in ([q, layers[2], layers[1]], by_head, misaligned, columns_first):
        assert_bitwise_equal(decode(*views, seqlens), expected)
    wide = torch.stack([seqlens, seqlens], 1)[:, 0]
    assert_bitwise_equal(decode(q, k, v, wide), expected)


def test_offsets_beyond_32_bits():
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # virtual: only a few pages of it are touched
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")
    q, k, v, seqlens = inputs(([20, 20], 1, 2, 2, 16), torch.bfloat16)
    far = memory.as_strided(k.shape, (2**31, 32, 16, 1)).copy_(k)
    assert_bitwise_equal(attention_decode(q, far, v, seqlens), attention_decode(q, k, v, seqlens))


def test_opcheck():
    q, k, v, seqlens = inputs(([9, 4], 1, 4, 2, 8), torch.float32)
    pages_k, pages_v, table = paged(k, v, seqlens, 4)
    slots = torch.zeros(2, k.shape[1], dtype=torch.int32)
    op = torch.ops.arfast.attention_decode
    torch.library.opcheck(op, (q, k, v, seqlens, None, None, None, None, None, None, 0, 0))
    torch.library.opcheck(op, (q, k, v, seqlens, None, 0.3, 4, 5.0, torch.randn(4), slots, 2, 0))
    torch.library.opcheck(op, (q, pages_k, pages_v, seqlens, table, None, None, None, None, None, 0, 0))


def test_compile():
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    q, k, v, seqlens = inputs(([9, 4], 1, 4, 2, 8), torch.float32)
    assert_bitwise_equal(compiled(q, k, v, seqlens, window=3), attention_decode(q, k, v, seqlens, window=3))


def test_autocast_casts_the_query():
    q, k, v, seqlens = inputs(([9, 4], 1, 4, 2, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_decode(q.float(), k, v, seqlens)
    assert_bitwise_equal(out, attention_decode(q, k, v, seqlens))


Z = torch.zeros
INT = torch.int32


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=Z(2, 1, 4, 8).int()), "q must be float32, bfloat16, float16 or float64, got int32"),
        (dict(q=Z(2, 4, 8)), r"q must have shape \[B, Tq, H, D\] = \[\*, \*, \*, \*\], got \[2, 4, 8\]"),
        (dict(q=Z(2, 1, 0, 8)), "q must have at least one head, got 0"),
        (dict(q=Z(2, 1, 4, 300), k_cache=Z(2, 9, 2, 300), v_cache=Z(2, 9, 2, 300)), r"head_dim in \[1, 256\], got 300"),
        (
            dict(k_cache=Z(3, 9, 2, 8)),
            r"k_cache must have shape \[B, S_max, Hkv, D\] = \[2, \*, \*, 8\], got \[3, 9, 2, 8\]",
        ),
        (
            dict(v_cache=Z(2, 8, 2, 8)),
            r"v_cache must have shape \[B, S_max, Hkv, D\] = \[2, 9, 2, 8\], got \[2, 8, 2, 8\]",
        ),
        (
            dict(k_cache=Z(2, 9, 3, 8), v_cache=Z(2, 9, 3, 8)),
            "k_cache must have a number of heads that divides q's 4, got 3",
        ),
        (dict(k_cache=Z(2, 9, 2, 8).half()), r"k_cache must have the dtype of q \(float32\), got float16"),
        (dict(seqlens=Z(2)), "seqlens must be int32, got float32"),
        (dict(seqlens=Z(3, dtype=INT)), r"seqlens must have shape \[B\] = \[2\], got \[3\]"),
        (
            dict(seqlens=lengths(3, 10)),
            r"seqlens must be in \[0, 9\], the keys that the cache holds, got 10 at position 1",
        ),
        (
            dict(seqlens=lengths(-1, 3)),
            r"seqlens must be in \[0, 9\], the keys that the cache holds, got -1 at position 0",
        ),
        (dict(block_table=Z(2, 3, dtype=INT) + 2), r"block_table must be in \[0, 2\), got 2 at \[0, 0\]"),
        (dict(block_table=Z(3, 3, dtype=INT)), r"block_table must have shape \[B, pages\] = \[2, \*\], got \[3, 3\]"),
        (dict(block_table=Z(2, 3)), "block_table must be int32, got float32"),
        (dict(beam_slots=Z(2, 9, dtype=INT) - 1), r"beam_slots must be in \[0, 2\), got -1 at \[0, 0\]"),
        (dict(beam_slots=Z(2, 8, dtype=INT)), r"beam_slots must have shape \[B, S_max\] = \[2, 9\], got \[2, 8\]"),
        (
            dict(block_table=Z(2, 3, dtype=INT), beam_slots=Z(2, 9, dtype=INT)),
            "beam_slots must be None with block_table, got a tensor",
        ),
        (dict(sink=Z(5)), r"sink must have shape \[H\] = \[4\], got \[5\]"),
        (dict(softmax_scale=-1.0), "softmax_scale must be finite and positive, got -1"),
        (dict(softcap=0.0), "softcap must be finite and positive, got 0"),
        (dict(window=-2), "window must be at least 0, got -2"),
        (dict(num_splits=-1), "num_splits must be at least 0, got -1"),
        (dict(_kernel=3), r"kernel must be in \[0, 2\], got 3"),
        (dict(_kernel=-1), r"kernel must be in \[0, 2\], got -1"),
        (dict(q=Z(2, 1, 4, 8, requires_grad=True)), "inputs must not require a gradient"),
    ],
)
def test_errors(change, message):
    caches = dict(k_cache=Z(2, 9, 2, 8), v_cache=Z(2, 9, 2, 8), seqlens=lengths(3, 9))
    with pytest.raises(RuntimeError, match="attention_decode: .*" + message):
        attention_decode(**dict(q=Z(2, 1, 4, 8)) | caches | change)
