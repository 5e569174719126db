"""kv_append against its reference in float64 and, bit by bit, against rotary and copies."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads
from views import far_apart, misaligned, overlapping, with_gaps

from arfast.ops import attention_decode, attention_reference, kv_append, kv_append_reference, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# seqlens, T, H, Hkv, D
SHAPES = [
    ([1], 1, 1, 1, 2),
    ([31, 1, 32], 1, 4, 2, 64),
    ([33, 7], 7, 3, 1, 62),
    ([5, 9], 2, 8, 8, 80),
    ([257], 1, 32, 8, 128),
    ([40, 33, 34], 33, 1, 3, 16),
    ([6, 5], 4, 2, 1, 34),
    ([3], 1, 1, 1, 256),
]


def lengths(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def tables(rows, head_dim, device="cpu"):
    angles = torch.randn(rows, head_dim // 2) * 10
    return angles.cos().to(device), angles.sin().to(device)


def inputs(shape, dtype, device="cpu", *, spare=3):
    """q, k, v (parts of one projection), cos, sin, caches full of NaN, seqlens."""
    seqlens, num_tokens, num_heads, num_kv_heads, head_dim = shape
    batch, heads = len(seqlens), num_heads + 2 * num_kv_heads
    projection = torch.randn(batch, num_tokens, heads, head_dim).to(device, dtype)
    caches = torch.full((2, batch, max(seqlens, default=0) + spare, num_kv_heads, head_dim), NAN).to(device, dtype)
    qkv = projection.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    return *qkv, *tables(batch * num_tokens, head_dim, device), *caches, lengths(*seqlens, device=device)


def expected(q, k, v, cos, sin, k_cache, v_cache, seqlens):
    """q rotated, and the caches afterwards: by `rotary` and one copy per token."""
    q, k, k_cache, v_cache = rotary(q, cos, sin), rotary(k, cos, sin), k_cache.clone(), v_cache.clone()
    for b, length in enumerate(seqlens.tolist()):
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[b, length - new.shape[1] : length] = new[b]
    return q, k_cache, v_cache


def run(function, *arguments, **options):
    """The results on copies of the caches."""
    *inputs, k_cache, v_cache, seqlens = arguments
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return function(*inputs, k_cache, v_cache, seqlens, **options), k_cache, v_cache


def assert_same_bits(actual, wanted):
    for name, a, w in zip(("out", "k_cache", "v_cache"), actual, wanted, strict=True):
        assert_bitwise_equal(a, w, name=name)


def paged(k_cache, v_cache, seqlens, num_tokens, page, device="cpu"):
    """Empty pages in random order, a block table with garbage where no new token goes, and where every position is."""
    batch, size = k_cache.shape[:2]
    per_sequence = -(-size // page)
    order = torch.randperm(batch * per_sequence).view(batch, per_sequence)
    pages = torch.full((2, batch * per_sequence + 2, page, *k_cache.shape[2:]), NAN).to(device, k_cache.dtype)
    table = torch.full((batch, per_sequence), -7, dtype=torch.int32, device=device)
    for b, length in enumerate(seqlens.tolist()):
        used = slice((length - num_tokens) // page, (length - 1) // page + 1)
        table[b, used] = order[b, used].int().to(device)

    def gathered(cache):
        return cache[order.to(device)].flatten(1, 2)[:, :size]

    return *pages, table, gathered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout(shape, dtype, device, poisoned):
    arguments = inputs(shape, dtype, device)
    wanted = expected(*arguments)
    assert_same_bits(run(kv_append, *arguments), wanted)
    wide = [x.double() if x.dtype == dtype else x for x in arguments]
    exact, baseline = run(kv_append_reference, *wide), run(kv_append_reference, *arguments)
    for name, a, e, b in zip(("out", "k_cache", "v_cache"), wanted, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)
    for page in (1, 3, 16):
        *pages, table, gathered = paged(*arguments[5:], shape[1], page, device)
        out, *pages = run(kv_append, *arguments[:5], *pages, arguments[-1], block_table=table)
        assert_same_bits((out, *map(gathered, pages)), wanted)
        count = sum(cache.isfinite().sum() for cache in pages)
        assert count == 2 * arguments[1].numel()  # nowhere else


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beam_slots(shape, dtype, device, poisoned):
    """Every position of a sequence in a slot of its own choice, in caches with more slots than sequences."""
    arguments = inputs(shape, dtype, device)
    *new, k_cache, v_cache, seqlens = arguments
    batch, size = k_cache.shape[:2]
    order = torch.stack([torch.randperm(batch + 2) for _ in range(size)], 1)[:batch].int().to(device)
    slots = order.clone()
    for b, length in enumerate(seqlens.tolist()):
        slots[b, : length - shape[1]] = slots[b, length:] = 1_000_000  # nobody looks there
    caches = torch.full((2, batch + 2, *k_cache.shape[1:]), NAN).to(device, dtype)
    wanted = {kv_append: expected(*arguments), kv_append_reference: run(kv_append_reference, *arguments)}
    for function in wanted:
        out, *caches_after = run(function, *new, *caches, seqlens, beam_slots=slots)
        gathered = [cache[order.long(), torch.arange(size, device=device)] for cache in caches_after]
        assert_same_bits((out, *gathered), wanted[function])
        assert sum(cache.isfinite().sum() for cache in caches_after) == 2 * new[1].numel()  # nowhere else


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_of_one_buffer_of_tokens(dtype, device):
    """Prompts stored once before the tokens of all beams: slot s of the overlapping view begins at token s."""
    prompts, beams, most, (num_heads, num_kv_heads, head_dim) = (5, 3), 3, 4, (4, 2, 16)
    longest, rows = max(prompts), beams * len(prompts)
    buffers = torch.full((2, len(prompts) * longest + rows * most + longest, num_kv_heads, head_dim), NAN)
    buffers = buffers.to(device, dtype)
    caches = [overlapping(buffer, longest + most) for buffer in buffers]
    slots = torch.zeros(rows, longest + most, dtype=torch.int32)
    for row in range(rows):
        prompt = prompts[row // beams]
        slots[row, :prompt] = row // beams * longest
        slots[row, prompt:] = len(prompts) * longest + row * most - prompt
    slots, wanted = slots.to(device), [buffer.clone() for buffer in buffers]
    for step in range(most):
        seqlens = lengths(*(prompts[row // beams] + step + 1 for row in range(rows)), device=device)
        q, k, v = (
            torch.randn(rows, 1, heads, head_dim).to(device, dtype) for heads in (num_heads, *[num_kv_heads] * 2)
        )
        cos, sin = tables(rows, head_dim, device)
        kv_append(q, k, v, cos, sin, *caches, seqlens, beam_slots=slots)
        for buffer, new in zip(wanted, (rotary(k, cos, sin), v), strict=True):
            buffer[len(prompts) * longest :][: rows * most].unflatten(0, (rows, most))[:, step] = new[:, 0]
    for buffer, w in zip(buffers, wanted, strict=True):
        assert_bitwise_equal(buffer, w)


@pytest.mark.not_emulated
def test_float64(device):
    arguments = inputs(SHAPES[1], torch.float64, device)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="kv_append: q must be float32, bfloat16 or float16 on a GPU"):
            kv_append(*arguments)
        return
    for a, e in zip(run(kv_append, *arguments), run(kv_append_reference, *arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-14, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_rows_of_the_tables_are_taken_in_turn(rows, device):
    q, k, v, _, _, *rest = inputs(([4, 7], 3, 2, 1, 16), torch.float32, device)
    arguments = (q, k, v, *tables(rows, 16, device), *rest)
    assert_same_bits(run(kv_append, *arguments), expected(*arguments))


def test_steps_fill_the_cache(device):
    """Prompt, single tokens and several at once; then attention_decode with the same arguments is attention."""
    dtype = torch.bfloat16
    q, k, v = (torch.randn(2, 40, heads, 32).to(device, dtype) for heads in (4, 2, 2))
    cos, sin = tables(40, 32, device)
    k_cache, v_cache = torch.full((2, 2, 45, 2, 32), NAN).to(device, dtype)
    seqlens = lengths(0, 0, device=device)
    for begin, end in ((0, 30), (30, 31), (31, 36), (36, 40)):
        seqlens += end - begin
        new = [x[:, begin:end] for x in (q, k, v)]
        rotated = kv_append(*new, cos[begin:end], sin[begin:end], k_cache, v_cache, seqlens)
    assert_bitwise_equal(k_cache[:, :40], rotary(k, cos, sin))
    assert_bitwise_equal(v_cache[:, :40], v)
    assert k_cache[:, 40:].isnan().all() and v_cache[:, 40:].isnan().all()
    out = attention_decode(rotated, k_cache, v_cache, seqlens)
    whole = rotated, rotary(k, cos, sin), v
    assert_accurate(out, attention_reference(*(x.double() for x in whole)), attention_reference(*whole))


@pytest.mark.parametrize("seqlens", [[0, 4], [2, 4], [-5, 4], [9, 4], [2**31 - 1, 4], [-(2**31), 4]], ids=str)
def test_a_gpu_writes_nothing_without_a_place(seqlens, device, implementation):
    """Tokens before position 0 and past the last one; those that have a place get there."""
    if implementation == "cpu":
        pytest.skip("refused there")
    *new, k_cache, v_cache, _ = inputs(([8, 4], 3, 2, 1, 16), torch.bfloat16, device, spare=0)
    arguments = *new, k_cache, v_cache, lengths(*seqlens, device=device)
    out, k_after, v_after = run(kv_append, *arguments)
    assert_bitwise_equal(out, rotary(new[0], *new[3:]))
    k = rotary(new[1], *new[3:])
    for b, length in enumerate(seqlens):
        for t in range(3):
            if 0 <= length - 3 + t < 8:
                k_cache[b, length - 3 + t], v_cache[b, length - 3 + t] = k[b, t], new[2][b, t]
    assert_bitwise_equal(k_after, k_cache)
    assert_bitwise_equal(v_after, v_cache)


def test_a_gpu_writes_nothing_to_a_page_that_is_not_there(device, implementation):
    if implementation == "cpu":
        pytest.skip("refused there")
    *new, k_cache, v_cache, seqlens = inputs(([4, 4, 4], 2, 2, 1, 16), torch.bfloat16, device, spare=0)
    table = lengths(3, -1, 2**31 - 1, device=device)[:, None]
    _, k_after, v_after = run(kv_append, *new, k_cache, v_cache, seqlens, block_table=table)
    assert k_after.isnan().all() and v_after.isnan().all()


def test_a_gpu_writes_nothing_to_a_slot_that_is_not_there(device, implementation):
    if implementation == "cpu":
        pytest.skip("refused there")
    *new, k_cache, v_cache, seqlens = inputs(([4, 4, 4], 2, 2, 1, 16), torch.bfloat16, device, spare=0)
    slots = lengths(3, -1, 2**31 - 1, device=device)[:, None].expand(3, 4)
    _, k_after, v_after = run(kv_append, *new, k_cache, v_cache, seqlens, beam_slots=slots)
    assert k_after.isnan().all() and v_after.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [([], 1, 2, 1, 8), ([4], 0, 2, 1, 8)], ids=str)
def test_empty(shape, dtype, device):
    arguments = inputs(shape, dtype, device)
    assert_same_bits(run(kv_append, *arguments), expected(*arguments))


def test_same_bits_for_every_number_of_threads():
    arguments = inputs(([150, 130], 100, 8, 2, 64), torch.bfloat16)
    same_for_any_threads(lambda: run(kv_append, *arguments))


@pytest.mark.random_schedules
@pytest.mark.parametrize("head_dim", [64, 62, 48])
def test_strided_and_misaligned_inputs_give_the_same_bits(head_dim, device):
    q, k, v, cos, sin, k_cache, v_cache, seqlens = inputs(([9, 5], 2, 3, 2, head_dim), torch.bfloat16, device)
    wanted = expected(q, k, v, cos, sin, k_cache, v_cache, seqlens)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns_first = [x.mT.contiguous().mT for x in (q, k, v)]
    for views in (
        (q, k, v, misaligned(cos), misaligned(sin)),
        (misaligned(q), misaligned(k), misaligned(v), cos, sin),
        (with_gaps(q, 8), with_gaps(k, 1), with_gaps(v, 3), cos, sin),
        (*by_head, with_gaps(cos, 1), sin),
        (*columns_first, cos, sin),
    ):
        assert_same_bits(run(kv_append, *views, k_cache, v_cache, seqlens), wanted)
    wide = torch.stack([seqlens, seqlens], 1)[:, 0]
    layers = torch.stack([k_cache] * 3)
    heads_first = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    for caches in ((layers[2], layers[0]), (misaligned(k_cache), with_gaps(v_cache, 1)), (heads_first, v_cache)):
        out = kv_append(q, k, v, cos, sin, *caches, wide)
        assert_same_bits((out, *caches), wanted)
    assert layers[1].isnan().all()


def test_offsets_beyond_2_31(device):
    arguments = inputs(([5, 7, 6], 2, 2, 2, 16), torch.bfloat16, device)
    wanted = expected(*arguments)
    q, k, v, cos, sin, k_cache, v_cache, seqlens = arguments
    caches = far_apart(k_cache), far_apart(v_cache)
    out = kv_append(q, far_apart(k), v, cos, sin, *caches, seqlens)
    assert_same_bits((out, *caches), wanted)
    assert_bitwise_equal(run(kv_append, far_apart(q), *arguments[1:])[0], wanted[0])


def test_nan_and_infinity_stay_in_their_pair(device):
    q, k, v, *rest = (x.clone() for x in inputs(([4, 6], 2, 2, 2, 16), torch.float32, device))
    q[0, 1, 1, 3], k[1, 0, 0, 9], v[1, 1, 1, 2] = NAN, float("inf"), NAN
    assert_same_bits(run(kv_append, q, k, v, *rest), expected(q, k, v, *rest))
    out, k_cache, v_cache = run(kv_append, q, k, v, *rest)
    assert out.isnan().nonzero().tolist() == [[0, 1, 1, 3], [0, 1, 1, 11]]
    assert k_cache[1, 4:6].isinf().nonzero().tolist() == [[0, 0, 1], [0, 0, 9]]
    assert v_cache[1, 4:6].isnan().nonzero().tolist() == [[1, 1, 2]]


def test_opcheck():
    arguments = inputs(([9, 4], 2, 4, 2, 8), torch.float32)
    pages_k, pages_v, table, _ = paged(*arguments[5:], 2, 4)
    slots = torch.arange(2, dtype=torch.int32)[:, None].expand(2, arguments[5].shape[1])
    torch.library.opcheck(torch.ops.arfast.kv_append, (*arguments, None, None))
    torch.library.opcheck(torch.ops.arfast.kv_append, (*arguments, None, slots))
    torch.library.opcheck(torch.ops.arfast.kv_append, (*arguments[:5], pages_k, pages_v, arguments[-1], table, None))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    """The caches of the caller are changed, and what follows sees it."""

    def step(q, k, v, cos, sin, k_cache, v_cache, seqlens):
        seqlens = seqlens + 1
        return attention_decode(kv_append(q, k, v, cos, sin, k_cache, v_cache, seqlens), k_cache, v_cache, seqlens)

    *new, k_cache, v_cache, seqlens = inputs(([9, 4], 1, 4, 2, 8), torch.float32)
    arguments = *new, k_cache.nan_to_num(1), v_cache.nan_to_num(2), seqlens
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_same_bits(run(compiled, *arguments), run(step, *arguments))


def test_gradients():
    q, *rest = inputs(([9, 4], 1, 4, 2, 8), torch.float32)
    leaf = q.detach().requires_grad_()
    with torch.no_grad():
        assert_same_bits(run(kv_append, leaf, *rest), expected(q, *rest))
    with pytest.raises(RuntimeError, match="kv_append: inputs must not require a gradient"):
        kv_append(leaf, *rest)


def test_autocast_casts_to_the_dtype_of_the_caches():
    q, k, v, *rest = inputs(([9, 4], 1, 4, 2, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(kv_append, q.float(), k.float(), v, *rest), expected(q, k, v, *rest))


Z = torch.zeros
INT = torch.int32


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=Z(2, 1, 4, 8).int()), "q must be float32, bfloat16, float16 or float64, got int32"),
        (dict(q=Z(2, 4, 8)), r"q must have shape \[B, T, H, D\] = \[\*, \*, \*, \*\], got \[2, 4, 8\]"),
        (dict(q=Z(2, 1, 4, 7), k=Z(2, 1, 2, 7), v=Z(2, 1, 2, 7)), "q must have an even head_dim, got 7"),
        (dict(k=Z(2, 2, 2, 8)), r"k must have shape \[B, T, Hkv, D\] = \[2, 1, \*, 8\], got \[2, 2, 2, 8\]"),
        (dict(v=Z(2, 1, 3, 8)), r"v must have shape \[B, T, Hkv, D\] = \[2, 1, 2, 8\], got \[2, 1, 3, 8\]"),
        (dict(k=Z(2, 1, 2, 8).half()), r"k must have the dtype of q \(float32\), got float16"),
        (dict(cos=Z(2, 3)), r"cos must have shape \[P, D / 2\] = \[\*, 4\], got \[2, 3\]"),
        (dict(sin=Z(1, 4)), r"sin must have shape \[P, D / 2\] = \[2, 4\], got \[1, 4\]"),
        (dict(cos=Z(2, 4).double()), "cos must be float32, got float64"),
        (dict(cos=Z(3, 4), sin=Z(3, 4)), "cos must have rows that divide the 2 rows of q, got 3"),
        (dict(cos=Z(0, 4), sin=Z(0, 4)), "cos must have rows that divide the 2 rows of q, got 0"),
        (
            dict(k_cache=Z(3, 9, 2, 8)),
            r"k_cache must have shape \[B, S_max, Hkv, D\] = \[2, \*, 2, 8\], got \[3, 9, 2, 8\]",
        ),
        (
            dict(v_cache=Z(2, 8, 2, 8)),
            r"v_cache must have shape \[B, S_max, Hkv, D\] = \[2, 9, 2, 8\], got \[2, 8, 2, 8\]",
        ),
        (dict(v_cache=Z(2, 9, 2, 8).half()), r"v_cache must have the dtype of q \(float32\), got float16"),
        (dict(k_cache=Z(2, 9, 2, 16)[..., ::2]), "k_cache must have dense heads, got a stride of 2"),
        (dict(seqlens=Z(2)), "seqlens must be int32, got float32"),
        (dict(seqlens=Z(3, dtype=INT)), r"seqlens must have shape \[B\] = \[2\], got \[3\]"),
        (dict(seqlens=lengths(3, 10)), r"seqlens must be in \[1, 9\], from the new tokens .*, got 10 at position 1"),
        (dict(seqlens=lengths(0, 3)), r"seqlens must be in \[1, 9\], from the new tokens .*, got 0 at position 0"),
        (dict(block_table=Z(2, 3, dtype=INT) + 2), r"block_table must be in \[0, 2\), got 2 at \[0, 0\]"),
        (dict(block_table=Z(2, 3, dtype=INT) - 1), r"block_table must be in \[0, 2\), got -1 at \[0, 0\]"),
        (dict(block_table=Z(3, 3, dtype=INT)), r"block_table must have shape \[B, pages\] = \[2, \*\], got \[3, 3\]"),
        (dict(block_table=Z(2, 3)), "block_table must be int32, got float32"),
        (dict(beam_slots=Z(2, 9, dtype=INT) + 2), r"beam_slots must be in \[0, 2\), got 2 at \[0, 2\]"),
        (dict(beam_slots=Z(2, 9, dtype=INT) - 1), r"beam_slots must be in \[0, 2\), got -1 at \[0, 2\]"),
        (dict(beam_slots=Z(2, 8, dtype=INT)), r"beam_slots must have shape \[B, S_max\] = \[2, 9\], got \[2, 8\]"),
        (dict(beam_slots=Z(2, 9)), "beam_slots must be int32, got float32"),
        (
            dict(block_table=Z(2, 3, dtype=INT), beam_slots=Z(2, 9, dtype=INT)),
            "beam_slots must be None with block_table, got a tensor",
        ),
        (
            dict(block_table=Z(2, 3, dtype=INT), k_cache=Z(4, 0, 2, 8), v_cache=Z(4, 0, 2, 8)),
            "k_cache must have at least one token per page, got 0",
        ),
    ],
)
def test_errors(change, message):
    arguments = dict(q=Z(2, 1, 4, 8), k=Z(2, 1, 2, 8), v=Z(2, 1, 2, 8), cos=Z(2, 4), sin=Z(2, 4))
    arguments |= dict(k_cache=Z(2, 9, 2, 8), v_cache=Z(2, 9, 2, 8), seqlens=lengths(3, 9))
    with pytest.raises(RuntimeError, match="kv_append: " + message):
        kv_append(**arguments | change)
    assert not arguments["k_cache"].any() and not arguments["v_cache"].any()
