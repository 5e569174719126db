"""The whole decode step on the CPU: logits and caches for every kind of dense model."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import num_threads, same_for_any_threads

from arfast.ops import decode_step, decode_step_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# V, d, I, L, H, Hkv, D, options
MODELS = {
    "grouped": (61, 32, 48, 2, 4, 2, 8, {}),
    "one head each": (40, 64, 96, 2, 4, 4, 16, {}),
    "odd sizes": (37, 33, 57, 2, 3, 1, 6, {}),
    "wide heads": (97, 48, 80, 1, 5, 1, 40, {}),
    "norms, biases": (50, 32, 33, 2, 4, 2, 18, dict(qk_norm=True, qkv_bias=True, o_bias=True)),
    "window": (33, 16, 31, 3, 2, 2, 10, dict(windows=[None, 4, 0], o_bias=True)),
    "long rows": (70, 257, 521, 1, 2, 1, 64, dict(qkv_bias=True, tied=True)),
    "smallest": (1, 1, 1, 1, 1, 1, 2, {}),
}


def make(name, dtype, batch, length=70, spare=2):
    """Arguments and options: sequences of 1 to `length` tokens, caches full of NaN past them."""
    vocab, d, wide, layers, heads, kv_heads, head_dim, options = MODELS[name]
    options = dict(windows=None, qkv_bias=False, o_bias=False, qk_norm=False) | options
    tied = options.pop("tied", False)

    def weight(*shape):
        return torch.randn(shape) / shape[-1] ** 0.5

    def norm(size):
        return 1 + torch.randn(size) / 4

    embedding, q, kv = torch.randn(vocab, d), heads * head_dim, kv_heads * head_dim
    weights = [embedding, norm(d), embedding if tied else weight(vocab, d)]
    for _ in range(layers):
        weights += [norm(d), weight(q, d), weight(kv, d), weight(kv, d), weight(d, q)]
        weights += [norm(d), weight(wide, d), weight(wide, d), weight(d, wide)]
        weights += [torch.randn(size) for size in (q, kv, kv)] if options["qkv_bias"] else []
        weights += [torch.randn(d)] if options["o_bias"] else []
        weights += [norm(head_dim), norm(head_dim)] if options["qk_norm"] else []
    seqlens = torch.randint(1, length + 1, (batch,), dtype=torch.int32)
    seqlens[:1] = length
    caches = torch.randn(2, layers, batch, length + spare, kv_heads, head_dim)
    for b, seqlen in enumerate(seqlens.tolist()):
        caches[:, :, b, seqlen - 1 :] = NAN
    angles = torch.arange(length + spare)[:, None] * torch.rand(head_dim // 2)
    weights, caches = [w.to(dtype) for w in weights], caches.to(dtype)
    arguments = [torch.randint(vocab, (batch,)), weights, angles.cos(), angles.sin(), *caches, seqlens]
    return arguments, options | dict(num_heads=heads, eps=1e-5)


def run(function, arguments, options, dtype=None):
    """Logits and caches, on copies of the caches."""
    tokens, weights, cos, sin, *caches, seqlens = arguments
    caches = [cache.to(dtype or cache.dtype, copy=True) for cache in caches]
    weights = [w.to(dtype or w.dtype) for w in weights]
    return function(tokens, weights, cos, sin, *caches, seqlens, **options), *caches


def check(arguments, options):
    actual, exact, baseline = (
        run(decode_step, arguments, options),
        run(decode_step_reference, arguments, options, torch.float64),
        run(decode_step_reference, arguments, options),
    )
    for name, a, e, b in zip(("logits", "k_cache", "v_cache"), actual, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)
    assert actual[0].isfinite().all()
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, dtype, poisoned):
    check(*make(name, dtype, 3))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5, 7, 8, 33, 64])
def test_every_batch(batch, dtype, poisoned):
    check(*make("grouped", dtype, batch))
    check(*make("norms, biases", dtype, batch, length=5, spare=0))


def test_a_long_context():
    check(*make("grouped", torch.float32, 2, length=1500))


def test_first_tokens():
    """Sequences of one token, which attend to nothing else."""
    check(*make("grouped", torch.float32, 3, length=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "batch", "num_tokens"), [("odd sizes", 3, 2), ("norms, biases", 1, 5), ("grouped", 6, 7)]
)
def test_several_tokens(name, batch, num_tokens, dtype, poisoned):
    """In one call as accurate as the reference, and to the last bit what one call after the other gives."""
    arguments, options = make(name, dtype, batch)
    tokens, weights, cos, sin, k_cache, v_cache, seqlens = arguments
    seqlens.clamp_(min=num_tokens)
    for b, seqlen in enumerate(seqlens.tolist()):
        for cache in (k_cache, v_cache):
            cache[:, b, seqlen - num_tokens :] = NAN
            cache[:, b, : seqlen - num_tokens].nan_to_num_(0.5)
    tokens = torch.randint(len(weights[0]), (batch, num_tokens))
    actual = check([tokens, *arguments[1:]], options)
    for t in range(num_tokens):
        part = [tokens[:, t], weights, cos, sin, k_cache, v_cache, seqlens - num_tokens + t + 1]
        assert_bitwise_equal(decode_step(*part, **options), actual[0][:, t], name=f"token {t}")
    assert_bitwise_equal(k_cache, actual[1])
    assert_bitwise_equal(v_cache, actual[2])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["odd sizes", "norms, biases", "long rows"])
def test_a_sequence_does_not_depend_on_the_others(name, dtype):
    arguments, options = make(name, dtype, 33)
    together = run(decode_step, arguments, options)
    tokens, weights, cos, sin, k_cache, v_cache, seqlens = arguments
    for some in ([0], [3, 4], [5, 6, 7], range(8, 16), range(20)):
        rows = torch.tensor(list(some))
        part = [tokens[rows], weights, cos, sin, k_cache[:, rows], v_cache[:, rows], seqlens[rows]]
        logits, k, v = run(decode_step, part, options)
        assert_bitwise_equal(logits, together[0][rows])
        assert_bitwise_equal(k, together[1][:, rows])
        assert_bitwise_equal(v, together[2][:, rows])


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("name", ["norms, biases", "long rows"])
def test_same_bits_for_every_number_of_threads(name, batch):
    arguments, options = make(name, torch.bfloat16, batch)
    same_for_any_threads(lambda: run(decode_step, arguments, options))


def test_steps_of_many_threads_at_a_time():
    """Calls from several Python threads, more of them than cores, share nothing but the weights."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [make(name, torch.float32, batch) for name in ("grouped", "long rows") for batch in (1, 3, 8)]
    expected = [run(decode_step, *case) for case in cases]
    with num_threads(3), ThreadPoolExecutor(6) as pool:
        for _ in range(20):
            for results, wanted in zip(pool.map(lambda case: run(decode_step, *case), cases), expected, strict=True):
                for a, e in zip(results, wanted, strict=True):
                    assert_bitwise_equal(a, e)


def permuted(arguments, rows):
    """The same sequences with positions scattered over `rows` rows of the caches: new caches and beam_slots."""
    *_, k_cache, v_cache, seqlens = arguments
    batch, size = k_cache.shape[1:3]
    slots = torch.full((batch, size), -7, dtype=torch.int32)
    caches = [torch.full_like(cache[:, :1], NAN).repeat(1, rows, 1, 1, 1) for cache in (k_cache, v_cache)]
    for position in range(size):
        own = torch.randperm(rows)[:batch]
        used = seqlens > position
        slots[used, position] = own[used].int()
        for new, old in zip(caches, (k_cache, v_cache), strict=True):
            new[:, own, position] = old[:, :, position]
    return caches, slots


def gathered(cache, slots, seqlens):
    """The rows of a permuted cache in the order of the sequences, NaN past their ends."""
    out = torch.full((cache.shape[0], *slots.shape, *cache.shape[3:]), NAN, dtype=cache.dtype)
    for b, seqlen in enumerate(seqlens.tolist()):
        out[:, b, :seqlen] = cache[:, slots[b, :seqlen].long(), torch.arange(seqlen)]
    return out


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["grouped", "window"])
@pytest.mark.parametrize("rows", [8, 11])
def test_beam_slots(rows, name, dtype):
    arguments, options = make(name, dtype, 8)
    wanted = run(decode_step, arguments, options)
    caches, slots = permuted(arguments, rows)
    moved = [*arguments[:4], *caches, arguments[-1]]
    actual = run(decode_step, moved, options | dict(beam_slots=slots))
    assert_bitwise_equal(actual[0], wanted[0])
    for a, w in zip(actual[1:], wanted[1:], strict=True):
        assert_bitwise_equal(gathered(a, slots, arguments[-1]), w)
        assert a.isfinite().sum() == w.isfinite().sum()  # nowhere else
    reference = run(decode_step_reference, moved, options | dict(beam_slots=slots))
    assert_accurate(reference[0], *(run(decode_step_reference, arguments, options, torch.float64)[0], wanted[0]))


def test_beams_share_their_past():
    """Two sequences read one row of the past and write rows of their own."""
    arguments, options = make("grouped", torch.float32, 2)
    tokens, weights, cos, sin, k_cache, v_cache, seqlens = arguments
    seqlens[1] = seqlens[0]
    k_cache[:, 1], v_cache[:, 1] = k_cache[:, 0], v_cache[:, 0]
    wanted = run(decode_step, arguments, options)
    slots = torch.zeros(2, k_cache.shape[2], dtype=torch.int32)
    slots[1, int(seqlens[1]) - 1] = 1
    k_cache[:, 1], v_cache[:, 1] = NAN, NAN
    assert_bitwise_equal(run(decode_step, arguments, options | dict(beam_slots=slots))[0], wanted[0])


def test_rows_and_positions_with_one_stride():
    """Slot r of position p lies at element row r + p of one long buffer: a view whose strides of both are equal."""
    arguments, options = make("grouped", torch.float32, 3, length=9, spare=0)
    tokens, weights, cos, sin, k_cache, v_cache, _ = arguments
    seqlens = torch.full((3,), 9, dtype=torch.int32)
    k_cache[:, :, :8], v_cache[:, :, :8] = torch.randn(2, 2, 3, 8, 2, 8)
    wanted = run(decode_step, [*arguments[:-1], seqlens], options)
    slots = (torch.arange(3)[:, None] * 9 + torch.zeros(9, dtype=torch.int64)).int()  # sequence b begins at b * 9
    layers, _, _, *head = k_cache.shape
    views = []
    for cache in (k_cache, v_cache):
        memory = cache.reshape(layers, 27, *head).clone()
        stride = memory.stride(1)
        views.append(
            memory.as_strided((layers, 19, 9, *head), (memory.stride(0), stride, stride, *memory.stride()[2:]))
        )
    logits = decode_step(tokens, weights, cos, sin, *views, seqlens, beam_slots=slots, **options)
    assert_bitwise_equal(logits, wanted[0])
    for view, w in zip(views, wanted[1:], strict=True):
        assert_bitwise_equal(view[:, ::9][:, :3], w)


def test_strided_arguments_give_the_same_bits():
    arguments, options = make("grouped", torch.bfloat16, 5)
    tokens, weights, cos, sin, k_cache, v_cache, seqlens = arguments
    wanted = run(decode_step, arguments, options)
    slots = torch.arange(5, dtype=torch.int32)[:, None].expand(5, k_cache.shape[2])
    heads_first = [cache.transpose(2, 3).contiguous().transpose(2, 3) for cache in (k_cache, v_cache)]
    with_gaps = [torch.stack([cache] * 2, 2)[:, :, 1] for cache in (k_cache, v_cache)]
    every_other = [torch.stack([x, x], 1)[:, 0] for x in (tokens, seqlens)]
    for new_tokens, new_seqlens, caches, beam_slots in (
        (tokens, seqlens, heads_first, None),
        (*every_other, with_gaps, slots),
        (tokens, seqlens, [k_cache.clone(), heads_first[1]], torch.stack([slots] * 2, 2)[..., 0]),
    ):
        heads_first[1].copy_(v_cache)
        logits = decode_step(new_tokens, weights, cos, sin, *caches, new_seqlens, beam_slots=beam_slots, **options)
        assert_bitwise_equal(logits, wanted[0])
        assert_bitwise_equal(caches[0], wanted[1])
        assert_bitwise_equal(caches[1], wanted[2])


def test_nan_in_the_past_stays_in_its_sequence():
    arguments, options = make("grouped", torch.float32, 3)
    arguments[4][1, 0, 0] = NAN
    logits = run(decode_step, arguments, options)[0]
    assert logits[0].isnan().all() and logits[1:].isfinite().all()


@pytest.mark.parametrize(("shape", "vocab"), [((0,), 61), ((0, 3), 61), ((3, 0), 61), ((0,), 0), ((3, 0), 0)], ids=str)
def test_nothing_to_do(shape, vocab):
    """No sequence, no token or an empty vocabulary: no logits, and the caches stay as they are."""
    arguments, options = make("grouped", torch.float32, shape[0])
    arguments[0] = torch.zeros(shape, dtype=torch.int64)
    arguments[1][0], arguments[1][2] = (arguments[1][i][:vocab] for i in (0, 2))
    logits, *caches = run(decode_step, arguments, options)
    assert logits.shape == (*shape, vocab) and logits.dtype == torch.float32
    for cache, before in zip(caches, arguments[4:6], strict=True):
        assert_bitwise_equal(cache, before)


def test_opcheck():
    arguments, options = make("norms, biases", torch.float32, 2)
    limits = [-1] * len(arguments[4])
    rest = (limits, options["num_heads"], 1e-5, True, True, True)
    arguments[4:6] = [cache.nan_to_num(0.5) for cache in arguments[4:6]]
    torch.library.opcheck(torch.ops.arfast.decode_step, (*arguments, None, *rest))
    slots = torch.arange(2, dtype=torch.int32)[:, None].expand(arguments[4].shape[1:3]).contiguous()
    torch.library.opcheck(torch.ops.arfast.decode_step, (*arguments, slots, *rest, False, True))


def test_compile():
    arguments, options = make("grouped", torch.float32, 2)
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, arguments, options), run(decode_step, arguments, options), strict=True):
        assert_bitwise_equal(a, e)


def test_gradients():
    arguments, options = make("grouped", torch.float32, 2)
    arguments[1][0].requires_grad_()
    with torch.no_grad():
        run(decode_step, arguments, options)
    with pytest.raises(RuntimeError, match="decode_step: inputs must not require a gradient"):
        decode_step(*arguments, **options)


def with_weight(index, tensor):
    def change(arguments, options):
        arguments[1][index] = tensor

    return change


def with_argument(index, tensor):
    def change(arguments, options):
        arguments[index] = tensor

    return change


def with_caches(*shape):
    def change(arguments, options):
        arguments[4:6] = Z(shape), Z(shape)

    return change


def with_option(**changes):
    return lambda arguments, options: options.update(changes)


Z, INT = torch.zeros, torch.int32
ERRORS = [
    (with_argument(1, []), "weights must begin with embed_tokens, norm and lm_head, got 0 tensors"),
    (lambda a, o: a[1].pop(), "weights must go on with down_proj, got 20 tensors"),
    (lambda a, o: a[1].append(Z(3)), "weights must hold no more than the model has, got 22"),
    (with_weight(0, Z(61)), r"embed_tokens must have shape \[V, d\] = \[\*, \*\], got \[61\]"),
    (with_weight(0, Z(61, 32, dtype=torch.float64)), "embed_tokens must be float32, bfloat16 or float16, got float64"),
    (with_weight(0, Z(61, 32, device="meta")), "tensors must be on one device"),
    (with_weight(0, Z(61, 0)), r"embed_tokens must have at least one column, got \[61, 0\]"),
    (with_weight(9, Z(0, 32)), r"gate_proj must have at least one row, got \[0, 32\]"),
    (with_weight(9, Z(48)), r"gate_proj must have shape \[I, d\] = \[0, 32\], got \[48\]"),
    (with_weight(2, Z(60, 32)), r"lm_head must have shape \[V, d\] = \[61, 32\], got \[60, 32\]"),
    (with_weight(4, Z(32, 32).half()), r"q_proj must have the dtype of embed_tokens \(float32\), got float16"),
    (with_weight(4, Z(32, 31)), r"q_proj must have shape \[H D, d\] = \[32, 32\], got \[32, 31\]"),
    (with_weight(4, Z(32, 64)[:, ::2]), "q_proj must be contiguous, got strides that are not"),
    (with_weight(9, Z(49, 32)), r"up_proj must have shape \[I, d\] = \[49, 32\], got \[48, 32\]"),
    (with_argument(0, Z(3, dtype=INT)), "tokens must be int64, got int32"),
    (with_argument(0, torch.ones(3, 1, 1, dtype=torch.int64)), r"tokens must have shape \[B\] or \[B, T\] = .*, got"),
    (with_argument(0, torch.tensor([1, 2, 3, 4])), r"seqlens must have shape \[B\] = \[4\], got \[3\]"),
    (with_argument(2, Z(72, 3)), r"cos must have shape \[positions, D / 2\] = \[\*, 4\], got \[72, 3\]"),
    (with_argument(3, Z(71, 4)), r"sin must have shape \[positions, D / 2\] = \[72, 4\], got \[71, 4\]"),
    (with_argument(2, Z(72, 4).double()), "cos must be float32, got float64"),
    (with_argument(2, Z(72, 8)[:, ::2]), "cos must be contiguous, got strides that are not"),
    (with_argument(4, Z(2, 3, 72, 2)), r"k_cache must have shape \[L, rows, S, Hkv, D\]"),
    (with_argument(5, Z(2, 3, 71, 2, 8)), r"v_cache must have shape .* = \[2, 3, 72, 2, 8\], got \[2, 3, 71, 2, 8\]"),
    (with_argument(5, Z(2, 3, 72, 2, 8).half()), r"v_cache must have the dtype of embed_tokens \(float32\)"),
    (with_argument(5, Z(2, 3, 72, 2, 16)[..., ::2]), "v_cache must have dense channels, got a stride of 2"),
    (with_caches(2, 2, 72, 2, 8), "tokens must be at most the rows of the caches, got 3"),
    (with_caches(2, 3, 72, 2, 7), "k_cache must have an even head_dim, got 7"),
    (with_argument(6, Z(3)), "seqlens must be int32, got float32"),
    (with_argument(6, torch.tensor([5, 0, 1], dtype=INT)), r"seqlens must be in \[1, 72\], .*, got 0 at position 1"),
    (with_argument(6, torch.tensor([5, 1, 73], dtype=INT)), r"seqlens must be in \[1, 72\], .*, got 73 at position 2"),
    (with_option(num_heads=3), "num_heads must be a multiple of the 2 key-value heads, got 3"),
    (with_option(eps=1.5), r"eps must be in \[0, 1\), got 1.5"),
    (with_option(windows=[None]), "windows must have one entry for each of 2 layers, got 1"),
    (with_option(beam_slots=Z(3, 71, dtype=INT)), r"beam_slots must have shape \[B, S\] = \[3, 72\], got \[3, 71\]"),
    (with_option(beam_slots=Z(3, 72)), "beam_slots must be int32, got float32"),
    (with_option(beam_slots=Z(3, 72, dtype=INT) + 3), r"beam_slots must be in \[0, 3\), got 3 for sequence 0"),
    (with_option(beam_slots=Z(3, 72, dtype=INT) - 1), r"beam_slots must be in \[0, 3\), got -1 for sequence 0"),
]


@pytest.mark.parametrize("change,message", ERRORS)
def test_errors(change, message):
    arguments, options = make("grouped", torch.float32, 3)
    change(arguments, options)
    before = arguments[4].clone()
    with pytest.raises(RuntimeError, match="decode_step: " + message):
        decode_step(*arguments, **options)
    assert_bitwise_equal(arguments[4], before)


@pytest.mark.parametrize("token", [-1, 61, 2**40])
def test_a_token_that_is_not_in_the_vocabulary(token):
    arguments, options = make("grouped", torch.float32, 3)
    arguments[0][1] = token
    with pytest.raises(
        IndexError, match=rf"decode_step: tokens must be in \[0, vocab_size=61\), got {token} at position 1"
    ):
        decode_step(*arguments, **options)


def test_capacity_is_that_of_the_tables_too():
    arguments, options = make("grouped", torch.float32, 3)
    arguments[2:4] = arguments[2][:40], arguments[3][:40]
    with pytest.raises(RuntimeError, match=r"decode_step: seqlens must be in \[1, 40\]"):
        decode_step(*arguments, **options)


@pytest.mark.gpu
def test_a_gpu_is_refused():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    arguments, options = make("grouped", torch.float32, 3)
    arguments = [[w.cuda() for w in a] if isinstance(a, list) else a.cuda() for a in arguments]
    with pytest.raises(RuntimeError, match="decode_step: weights must be on the CPU, got cuda:0"):
        decode_step(*arguments, **options)
