"""moe_permute and moe_combine against their references in float64."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import moe_combine, moe_combine_reference, moe_permute, moe_permute_reference, moe_route

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, E, K, d)
SIZES = [(0, 4, 2, 8), (1, 1, 1, 1), (1, 8, 8, 33), (31, 2, 1, 64), (33, 8, 3, 31), (257, 64, 8, 257)]


def make_routing(tokens, experts, top_k, dtype=torch.float32):
    return moe_route(torch.randn(tokens, experts).to(torch.float64 if dtype == torch.float64 else dtype), top_k)


def widened(routing):
    return routing._replace(expert_weights=routing.expert_weights.double())


def run_permute(function, hidden, routing, dout):
    leaf = hidden.detach().clone().requires_grad_()
    out = function(leaf, routing)
    return out, torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


def run_combine(function, rows, routing, dout):
    leaves = [rows.detach().clone().requires_grad_(), routing.expert_weights.detach().clone().requires_grad_()]
    out = function(leaves[0], routing._replace(expert_weights=leaves[1]))
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,experts,top_k,size", SIZES)
def test_permute(tokens, experts, top_k, size, dtype, poisoned, device):
    routing = make_routing(tokens, experts, top_k)
    hidden, dout = torch.randn(tokens, size).to(dtype), torch.randn(tokens * top_k, size).to(dtype)
    actual = run_permute(moe_permute, hidden, routing, dout)
    exact = run_permute(moe_permute_reference, hidden.double(), routing, dout)
    baseline = run_permute(moe_permute_reference, hidden, routing, dout)
    assert_bitwise_equal(actual[0], baseline[0], name="out")
    assert_accurate(actual[1], exact[1], baseline[1], name="dhidden")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,experts,top_k,size", SIZES)
def test_combine(tokens, experts, top_k, size, dtype, poisoned, device):
    routing = make_routing(tokens, experts, top_k)
    rows, dout = torch.randn(tokens * top_k, size).to(dtype), torch.randn(tokens, size).to(dtype)
    actual = run_combine(moe_combine, rows, routing, dout)
    exact = run_combine(moe_combine_reference, rows.double(), widened(routing), dout)
    baseline = run_combine(moe_combine_reference, rows, routing, dout)
    for name, a, e, b in zip(["out", "dexpert_out", "dexpert_weights"], actual, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


def test_combine_undoes_permute(device):
    """With weights that sum to one, equal rows add up to themselves."""
    routing, hidden = make_routing(40, 8, 4), torch.randn(40, 24)
    torch.testing.assert_close(moe_combine(moe_permute(hidden, routing), routing), hidden)


def test_rows_are_grouped_by_expert(device):
    routing = make_routing(50, 6, 2)
    experts = moe_permute(torch.arange(50.0)[:, None], routing)
    for expert in range(6):
        rows = experts[routing.offsets[expert] : routing.offsets[expert + 1], 0]
        tokens = (routing.expert_ids == expert).any(1).nonzero()[:, 0]
        assert_bitwise_equal(rows, tokens.float())


def test_nan_stays_with_its_token(device):
    routing, rows = make_routing(30, 8, 3), torch.randn(90, 16)
    rows[routing.position[12, 1]] = float("nan")
    out = moe_combine(rows, routing)
    assert out[12].isnan().all() and not out[torch.arange(30) != 12].isnan().any()


def test_gradcheck():
    routing = make_routing(5, 4, 2, torch.float64)
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    weights = routing.expert_weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, routing), hidden)
    assert torch.autograd.gradcheck(lambda y, w: moe_combine(y, routing._replace(expert_weights=w)), (rows, weights))


def test_strided_inputs_give_the_same_bits(device):
    routing = make_routing(20, 8, 2)
    for function, rows in ((moe_permute, 20), (moe_combine, 40)):
        x = torch.randn(rows, 50)
        strided = torch.full((rows, 77), float("nan"))[:, 3:53].copy_(x)
        for view in (strided, x.t().contiguous().t()):
            assert_bitwise_equal(function(view, routing), function(x, routing))


def test_same_bits_for_every_number_of_threads():
    routing = make_routing(301, 16, 4)
    hidden, rows = torch.randn(301, 96), torch.randn(1204, 96)
    same_for_any_threads(lambda: run_permute(moe_permute, hidden, routing, rows))
    same_for_any_threads(lambda: run_combine(moe_combine, rows, routing, hidden))


def test_opcheck():
    routing, rows = make_routing(10, 4, 2), torch.randn(20, 6)
    torch.library.opcheck(torch.ops.arfast.moe_permute, (rows[:10], routing.source_token))
    for weights in (None, routing.expert_weights):
        torch.library.opcheck(torch.ops.arfast.moe_combine_forward, (rows, weights, routing.position))
    saved = (rows[:10], rows, routing.expert_weights, routing.position)
    torch.library.opcheck(torch.ops.arfast.moe_combine_backward, saved)


def test_compile():
    routing = make_routing(10, 4, 2)
    hidden, rows = torch.randn(10, 6), torch.randn(20, 6)
    for run, function, x, dout in ((run_permute, moe_permute, hidden, rows), (run_combine, moe_combine, rows, hidden)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(run(compiled, x, routing, dout), run(function, x, routing, dout), strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(hidden=torch.zeros(4)), r"hidden must have shape \[T, d\] = \[\*, \*\], got \[4\]"),
        (dict(hidden=torch.zeros(4, 8).long()), "hidden must be float32, bfloat16, float16 or float64, got int64"),
        (dict(hidden=torch.zeros(3, 8)), r"hidden must have shape \[T, d\] with \[T\] = \[4\], got \[3, 8\]"),
        (dict(source_token=torch.zeros(4)), "source_token must be int32, got float32"),
        (dict(source_token=torch.tensor([0, -1]).int()), r"source_token must be in \[0, T=4\), got -1 at row 1"),
    ],
)
def test_errors_of_permute(change, message):
    routing = make_routing(4, 4, 2)
    hidden = change.pop("hidden", torch.zeros(4, 8))
    with pytest.raises(RuntimeError, match="moe_permute: " + message):
        moe_permute(hidden, routing._replace(**change))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(expert_out=torch.zeros(7, 8)), r"expert_out must have shape \[T \* K, d\] = \[8, \*\], got \[7, 8\]"),
        (dict(expert_out=torch.zeros(8, 8).int()), "expert_out must be float32, .* or float64, got int32"),
        (dict(position=torch.zeros(4, 2)), "position must be int32, got float32"),
        (
            dict(position=torch.zeros(4, 2).int()),
            r"position must name every row in \[0, T \* K = 8\) once, got 0",
        ),
        (dict(position=torch.full((4, 2), 8).int()), "position must name every row .* once, got 8 for choice 0"),
        (dict(position=torch.full((4, 2), -1).int()), "position must name every row .* once, got -1 for choice 0"),
        (dict(expert_weights=torch.zeros(4, 3)), r"expert_weights must have shape \[T, K\] = \[4, 2\], got \[4, 3\]"),
        (dict(expert_weights=torch.zeros(4, 2).half()), "expert_weights must be float32, got float16"),
    ],
)
def test_errors_of_combine(change, message):
    routing = make_routing(4, 4, 2)
    expert_out = change.pop("expert_out", torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match="moe_combine: " + message):
        moe_combine(expert_out, routing._replace(**change))
