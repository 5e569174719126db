"""attention on the CPU: every head dimension, threads, and instruction sets, of which the matrix units are one."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from test_attention import DTYPES, check, inputs, packed_inputs, run, upstream_of, with_sink
from threads import same_for_any_threads

from arfast.ops import attention, attention_reference


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_head_dim(dtype):
    for head_dim in range(1, 257):
        q, k, v = inputs((1, 7, 18, 1, 1, head_dim), dtype)
        check([q, k, v], {}, upstream_of(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_as_accurate_as_torch(dtype, causal):
    q, k, v = inputs((2, 150, 150, 4, 2, 64), dtype)
    exact = attention_reference(q.double(), k.double(), v.double(), causal=causal)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    baseline = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert_accurate(attention(q, k, v, causal=causal), exact, baseline)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_for_every_number_of_threads_and_every_run(packed, dtype):
    if packed:
        tensors, options = packed_inputs([300, 0, 17, 200], [300, 0, 17, 200], dtype, heads=(2, 1))
    else:  # few heads and many keys: the keys are split
        tensors, options = inputs((1, 700, 700, 2, 1, 32), dtype), {}
    options = with_sink(options | dict(sink=True, deterministic=True), tensors[0])
    upstream = upstream_of(tensors[0], packed=packed)
    same_for_any_threads(lambda: run(attention, tensors, options, upstream))


def test_beside_products_of_torch():
    """Matrix units keep the shapes of their tiles from call to call, for whoever uses them."""
    q, k, v = inputs((1, 70, 70, 2, 2, 64), torch.bfloat16)
    matrix = torch.randn(100, 90).bfloat16()
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    calls = [
        lambda: run(attention, [q, k, v], {}, upstream)[2],
        lambda: matrix @ matrix.t(),
        lambda: F.scaled_dot_product_attention(*heads, is_causal=True),
    ]
    upstream = upstream_of(q)
    expected = [[call() for _ in range(3)][-1] for call in calls]
    for index in (0, 1, 0, 2, 0, 2, 1, 0):
        assert_bitwise_equal(calls[index](), expected[index])


@other_targets("avx512", "avx2", "baseline")
def test_other_instruction_sets(target):
    few = "cpu and (bfloat16 and forward_and_backward or nan_stays or extreme_values or as_accurate)"
    run_on_target(target, [__file__, __file__.replace("_cpu", "")], few)
