"""attention_decode in the dtypes that GPUs have, on every device, against its reference in float64."""

import pytest
import torch
from accuracy import assert_bitwise_equal
from test_attention_decode import NAN, OPTIONS, check, inputs, lengths, paged

from arfast.ops import attention, attention_decode

DTYPES = [torch.bfloat16, torch.float16]
# seqlens, Tq, H, Hkv, D: around the steps of 64 keys, the ranges of 512 and the tiles of 16 rows
SHAPES = [
    ([1], 1, 1, 1, 1),
    ([31, 0, 32], 1, 4, 2, 32),
    ([33, 64, 65], 1, 2, 2, 33),
    ([129], 2, 8, 1, 80),
    ([70, 3], 5, 12, 3, 64),
    ([513, 40], 1, 4, 1, 128),
    ([1100], 3, 2, 1, 96),
    ([17, 130], 1, 7, 1, 256),
]


def sinks(options, q):
    return options | dict(sink=torch.randn(q.shape[2], device=q.device)) if options.get("sink") else options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_layout(name, shape, dtype, device, poisoned):
    q, k, v, seqlens = inputs(shape, dtype, device)
    options = sinks(OPTIONS[name], q)
    expected = check(q, k, v, seqlens, options)
    pages_k, pages_v, table = paged(k, v, seqlens, 16, device)
    assert_bitwise_equal(
        attention_decode(q, pages_k, pages_v, seqlens, block_table=table, **options), expected, name="paged"
    )
    slots = torch.arange(len(seqlens), dtype=torch.int32)[:, None].expand(k.shape[:2]).to(device)
    assert_bitwise_equal(attention_decode(q, k, v, seqlens, beam_slots=slots, **options), expected, name="beams")


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_schedules(head_dim, device):
    q, k, v, seqlens = inputs(([600, 200], 1, 8, 2, head_dim), torch.bfloat16, device)
    check(q, k, v, seqlens, sinks(dict(sink=True), q))


def test_beams_share_their_past(device, poisoned):
    q, k, v, seqlens = inputs(([70, 70, 70], 1, 4, 2, 40), torch.bfloat16, device, spare=0)
    slots = torch.randint(0, 3, (3, 70), dtype=torch.int32).to(device)
    own = [x[slots.long(), torch.arange(70, device=x.device)] for x in (k, v)]
    assert_bitwise_equal(attention_decode(q, k, v, seqlens, beam_slots=slots), attention_decode(q, *own, seqlens))


def test_equals_attention(device):
    q, k, v, seqlens = inputs(([200, 200], 200, 4, 2, 64), torch.bfloat16, device, spare=0)
    torch.testing.assert_close(attention_decode(q, k, v, seqlens), attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_rows_that_see_nothing(device, poisoned):
    q, k, v, seqlens = inputs(([3, 0], 5, 2, 1, 16), torch.bfloat16, device)
    out = attention_decode(q, k, v, seqlens)
    assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).all() and (out[1] == 0).all()


def test_nan_stays_in_its_sequence_and_head(device):
    q, k, v, seqlens = inputs(([70, 600, 33], 1, 4, 2, 24), torch.bfloat16, device)
    expected = attention_decode(q, k, v, seqlens)
    for cache in (k, v):
        cache[1, :, 1] = NAN
    out = attention_decode(q, k, v, seqlens)
    assert out[1, :, 2:].isnan().all()
    out[1, :, 2:] = expected[1, :, 2:]
    assert_bitwise_equal(out, expected)


def test_same_bits_whatever_the_batch(device):
    q, k, v, seqlens = inputs(([70, 700, 33], 1, 4, 2, 24), torch.bfloat16, device)
    expected = attention_decode(q, k, v, seqlens)
    assert_bitwise_equal(attention_decode(q[1:2], k[1:2], v[1:2], seqlens[1:2]), expected[1:2])


@pytest.mark.parametrize("num_splits", [1, 2, 5, 1000])
def test_splits(num_splits, device):
    q, k, v, seqlens = inputs(([400, 5], 1, 4, 2, 24), torch.bfloat16, device)
    check(q, k, v, seqlens, dict(num_splits=num_splits))


def test_strided_and_misaligned_inputs_give_the_same_bits(device):
    q, k, v, seqlens = inputs(([70, 20], 1, 4, 2, 40), torch.bfloat16, device)
    expected = attention_decode(q, k, v, seqlens)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x) for x in (q, k, v)]
    for views in (by_head, misaligned):
        assert_bitwise_equal(attention_decode(*views, seqlens), expected)


@pytest.mark.parametrize("change", ["seqlens", "block_table", "beam_slots"])
def test_integers_out_of_range_read_nothing_outside(change, device, request):
    """On a GPU nobody can look at them without waiting: whatever they are, the cache's memory is not left."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("the CPU refuses them")
    q, k, v, seqlens = inputs(([70, 20], 1, 4, 2, 40), torch.bfloat16, device)
    if change == "seqlens":
        attention_decode(q, k, v, lengths(1 << 30, -5, device=device))
    elif change == "block_table":
        pages_k, pages_v, table = paged(k, v, seqlens, 16, device)
        table[0, :3] = torch.tensor([1 << 30, -9, 10**6], dtype=torch.int32)
        attention_decode(q, pages_k, pages_v, seqlens, block_table=table)
    else:
        slots = torch.full(k.shape[:2], 1 << 30, dtype=torch.int32, device=device)
        attention_decode(q, k, v, seqlens, beam_slots=slots)
