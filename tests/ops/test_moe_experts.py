"""moe_experts against its reference in float64, and against transformers' mixture-of-experts blocks."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from cpu_targets import other_targets, run_on_target
from threads import same_for_any_threads

from arfast.ops import grouped_mm, moe_combine, moe_experts, moe_experts_reference, moe_permute, moe_route

pytestmark = pytest.mark.sixteen_bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, E, K, d, I), the last ones beyond a GPU's tile of 128 rows and columns (64 channels) and its steps of 64
SIZES = [
    (0, 4, 2, 8, 8),
    (1, 1, 1, 1, 1),
    (1, 8, 8, 33, 17),
    (31, 2, 1, 32, 31),
    (32, 64, 3, 16, 24),
    (33, 8, 4, 31, 32),
    (257, 96, 5, 33, 16),
    (257, 2, 2, 64, 48),
    (65, 256, 8, 16, 16),
    (140, 3, 2, 72, 200),
    (130, 1, 1, 200, 65),
]
NAMES = ["out", "dhidden", "dexpert_weights", "dw_gate_up", "dw_down"]


def inputs(tokens, experts, top_k, size, inner, dtype, logits=None):
    hidden = torch.randn(tokens, size).to(dtype)
    w_gate_up = (torch.randn(experts, 2 * inner, size) / size**0.5).to(dtype)
    w_down = (torch.randn(experts, size, inner) / inner**0.5).to(dtype)
    logits = torch.randn(tokens, experts) if logits is None else logits
    return hidden, moe_route(logits, top_k), w_gate_up, w_down


def widened(hidden, routing, *weights):
    routing = routing._replace(expert_weights=routing.expert_weights.double())
    return hidden.double(), routing, *(w.double() for w in weights)


def run(function, arguments, dout):
    """The output and the gradients of hidden, expert_weights, w_gate_up and w_down."""
    hidden, routing, *weights = arguments
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, routing.expert_weights, *weights)]
    out = function(leaves[0], routing._replace(expert_weights=leaves[1]), *leaves[2:])
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def results(arguments, function=moe_experts):
    """Of the function, of the reference in float64, and of the reference in the dtype of the arguments."""
    dout = torch.randn(arguments[0].shape).to(arguments[0])
    exact = run(moe_experts_reference, widened(*arguments), dout)
    return run(function, arguments, dout), exact, run(moe_experts_reference, arguments, dout)


def compare(actual, exact, baseline):
    for name, a, e, b in zip(NAMES, actual, exact, baseline, strict=True):
        assert_accurate(a, e, b, name=name)


def check(arguments, function=moe_experts):
    found = results(arguments, function)
    compare(*found)
    return found[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,experts,top_k,size,inner", SIZES)
def test_forward_and_backward(tokens, experts, top_k, size, inner, dtype, device, poisoned):
    # A single token has few sums, of which those of the baseline may happen to be all exact: its errors are compared
    # over several draws.
    draws = 20 if tokens == 1 and dtype == torch.float32 else 1
    found = [results(inputs(tokens, experts, top_k, size, inner, dtype)) for _ in range(draws)]
    compare(*([torch.stack(tensors) for tensors in zip(*kind, strict=True)] for kind in zip(*found, strict=True)))


@pytest.mark.random_schedules
@pytest.mark.older_gpu
def test_schedules(device):
    check(inputs(150, 5, 2, 136, 72, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_tokens_to_one_expert(dtype, device, poisoned):
    """On the CPU more rows than a wave has room for, and experts without any: their gradients are zero."""
    tokens = 2100 if device == "cpu" and dtype == torch.float32 else 260
    logits = torch.zeros(tokens, 8)
    logits[:, 5] = 1
    *_, dw_gate_up, dw_down = check(inputs(tokens, 8, 1, 16, 24, dtype, logits))
    for gradient in (dw_gate_up, dw_down):
        assert gradient[5].any() and not gradient[torch.arange(8) != 5].any()


def test_several_waves(poisoned):
    check(inputs(3000, 6, 2, 8, 8, torch.float32))


@pytest.mark.parametrize("scale", [1e2, 1e-4, 0.0])
def test_extreme_values(scale):
    hidden, *rest = inputs(40, 8, 2, 24, 16, torch.float32)
    check((hidden * scale, *rest))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_infinity_and_nan_stay_with_their_expert_and_token(dtype, device):
    """15 rows per expert: a row of padding takes part in the products over rows."""
    arguments = inputs(60, 4, 1, 16, 12, dtype, torch.eye(4).repeat(15, 1))
    hidden, *_, w_down = arguments
    hidden[8] = float("inf")  # expert 0
    hidden[9] = float("nan")  # expert 1
    w_down[2, 5, 3] = float("inf")
    out, dhidden, dexpert_weights, dw_gate_up, dw_down = run(moe_experts, arguments, torch.randn(60, 16).to(dtype))
    tokens = torch.arange(60)
    unharmed = (tokens % 4 == 3) | (tokens % 4 < 2) & (tokens != 8) & (tokens != 9)
    for result in (out, dhidden, dexpert_weights):
        assert result[unharmed].isfinite().all() and not result[[8, 9]].isfinite().any()
    for gradient in (dw_gate_up, dw_down):
        assert gradient[3].isfinite().all() and not gradient[0].isfinite().all() and not gradient[1].isfinite().any()
    assert dw_down[2].isfinite().all() and not dw_gate_up[2].isfinite().all()


def test_equals_the_composition_of_the_small_ops():
    hidden, routing, w_gate_up, w_down = inputs(90, 8, 3, 32, 24, torch.float32)
    gate, up = grouped_mm(moe_permute(hidden, routing), w_gate_up.transpose(1, 2), routing.offsets).chunk(2, -1)
    rows = grouped_mm(torch.nn.functional.silu(gate) * up, w_down.transpose(1, 2), routing.offsets)
    torch.testing.assert_close(moe_experts(hidden, routing, w_gate_up, w_down), moe_combine(rows, routing))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_blocks(family):
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        sizes = dict(hidden_size=32, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2)
        config, block_type = MixtralConfig(**sizes), MixtralSparseMoeBlock
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

        sizes = dict(hidden_size=32, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2)
        config, block_type = Qwen3MoeConfig(**sizes, norm_topk_prob=True), Qwen3MoeSparseMoeBlock
    config._experts_implementation = "eager"
    block = block_type(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gate, experts = block.gate.weight, block.experts
    leaves = (torch.randn(2, 20, 32, requires_grad=True), gate, experts.gate_up_proj, experts.down_proj)
    dout = torch.randn(2, 20, 32)

    flat = leaves[0].flatten(0, 1)
    ours = moe_experts(flat, moe_route(flat @ gate.T, 2), experts.gate_up_proj, experts.down_proj).view(2, 20, 32)
    theirs = block(leaves[0])
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, dout), torch.autograd.grad(theirs, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", ["offsets", "source_token", "position"])
def test_tables_out_of_range_touch_nothing_outside(table, device, implementation):
    """On a GPU nobody can look at them without waiting: whatever they are, the memory of the tensors is not left."""
    if implementation == "cpu":
        pytest.skip("the CPU refuses them")
    hidden, routing, *weights = inputs(20, 4, 2, 8, 8, torch.bfloat16)
    wrong = getattr(routing, table).clone()
    if table == "offsets":
        wrong.copy_(torch.tensor([0, -5, 1 << 30, 1 << 30, 40]))  # experts that overlap would be a race besides
    else:
        wrong.view(-1)[1::3] = 1 << 30
        wrong.view(-1)[2::3] = -7
    run(moe_experts, (hidden, routing._replace(**{table: wrong}), *weights), torch.randn(20, 8))


def test_gradcheck():
    hidden, _, *weights = inputs(6, 3, 2, 5, 4, torch.float64)
    logits = torch.randn(6, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, logits, *weights)]
    assert torch.autograd.gradcheck(lambda x, r, g, d: moe_experts(x, moe_route(r, 2), g, d), leaves)


@pytest.mark.parametrize("frozen", [(0,), (2, 3), (1, 2, 3), (0, 1, 2), (2,)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_only_the_gradients_that_are_asked_for(frozen, dtype, device):
    arguments, dout = inputs(20, 4, 2, 8, 8, dtype), torch.randn(20, 8).to(dtype)
    expected = run(moe_experts, arguments, dout)[1:]
    leaves = [t.detach().clone().requires_grad_() for t in (arguments[0], arguments[1].expert_weights, *arguments[2:])]
    for i in frozen:
        leaves[i].requires_grad_(False)
    moe_experts(leaves[0], arguments[1]._replace(expert_weights=leaves[1]), *leaves[2:]).backward(dout)
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_bitwise_equal(leaf.grad, gradient)


def test_inference_gives_the_same_bits(device):
    arguments = inputs(50, 8, 2, 24, 16, torch.bfloat16)
    expected = run(moe_experts, arguments, torch.randn(50, 24))[0]
    assert_bitwise_equal(moe_experts(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs_give_the_same_bits(dtype, device):
    hidden, routing, w_gate_up, w_down = inputs(30, 8, 2, 50, 16, dtype)
    dout = torch.randn(30, 50).to(dtype)
    expected = run(moe_experts, (hidden, routing, w_gate_up, w_down), dout)
    strided = torch.full((30, 77), float("nan"), dtype=dtype)[:, 3:53].copy_(hidden).requires_grad_()
    weights = [w.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for w in (w_gate_up, w_down)]
    expert_weights = routing.expert_weights.t().contiguous().t().requires_grad_()
    out = moe_experts(strided, routing._replace(expert_weights=expert_weights), *weights)
    gradients = torch.autograd.grad(out, (strided, expert_weights, *weights), dout.t().contiguous().t())
    for a, b in zip((out, *gradients), expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens,experts,top_k", [(700, 16, 4), (900, 2, 1), (1, 8, 1)])
def test_same_bits_for_every_number_of_threads(tokens, experts, top_k, dtype):
    arguments, dout = inputs(tokens, experts, top_k, 64, 96, dtype), torch.randn(tokens, 64)
    same_for_any_threads(lambda: run(moe_experts, arguments, dout))


@other_targets("avx2", "baseline")
def test_other_instruction_sets(target):
    """A few cases of this file and of the routing's."""
    few = "(float32 and (33-8-4 or 257-96) or cpu-sigmoid-96) and not emulated and not cuda"
    assert "5 passed" in run_on_target(target, [__file__, __file__.replace("experts", "routing")], few)


def test_opcheck():
    hidden, routing, *weights = inputs(20, 4, 2, 8, 6, torch.float32)
    tables = routing.position, routing.source_token, routing.offsets
    arguments = (hidden, routing.expert_weights, *tables, *weights)
    for save_h in (False, True):
        torch.library.opcheck(torch.ops.arfast.moe_experts_forward, (*arguments, save_h))
    h = torch.ops.arfast.moe_experts_forward(*arguments, True)[1]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.arfast.moe_experts_backward, (torch.randn(20, 8), *arguments, h, *needs))


def test_compile():
    arguments, dout = inputs(20, 4, 2, 8, 6, torch.float32), torch.randn(20, 8)
    compiled = torch.compile(moe_experts, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, arguments, dout), run(moe_experts, arguments, dout), strict=True):
        assert_bitwise_equal(a, b)


def test_autocast():
    hidden, routing, *weights = inputs(20, 4, 2, 8, 6, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_experts(hidden.float(), routing, *(w.float() for w in weights))
    assert_bitwise_equal(out, moe_experts(hidden, routing, *weights))


def test_second_derivative_is_refused():
    arguments = inputs(4, 4, 2, 8, 6, torch.float32)
    hidden = arguments[0].requires_grad_()
    gradient = torch.autograd.grad(moe_experts(*arguments).square().sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def routing_change(**tables):
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in tables.items()}


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(hidden=torch.zeros(2, 2, 8)), r"hidden must have shape \[T, d\] = \[\*, \*\], got \[2, 2, 8\]"),
        (dict(hidden=torch.zeros(4, 8).long()), "hidden must be float32, bfloat16, float16 or float64, got int64"),
        (dict(hidden=torch.zeros(5, 8)), r"expert_weights must have shape \[T, K\] = \[5, \*\], got \[4, 2\]"),
        (dict(w_down=torch.zeros(3, 9, 6)), r"w_down must have shape \[E, d, I\] = \[\*, 8, \*\], got \[3, 9, 6\]"),
        (dict(w_down=torch.zeros(3, 8, 0)), r"w_down must have no size of 0, got \[3, 8, 0\]"),
        (dict(w_gate_up=torch.zeros(3, 11, 8)), r"w_gate_up must have shape .* = \[3, 12, 8\], got \[3, 11, 8\]"),
        (dict(w_gate_up=torch.zeros(3, 12, 8).half()), r"w_gate_up must have the dtype of hidden .* got float16"),
        (dict(w_down=torch.zeros(3, 8, 6).double()), r"w_down must have the dtype of hidden \(float32\), got float64"),
        (dict(expert_weights=torch.zeros(4, 2).double()), "expert_weights must be float32, got float64"),
        (dict(position=torch.zeros(4, 2)), "position must be int32, got float32"),
        (dict(position=torch.zeros(4, 3).int()), r"position must have shape \[T, K\] = \[4, 2\], got \[4, 3\]"),
        (routing_change(source_token=[0, 1, 2, 3]), r"source_token must have shape \[T \* K\] = \[8\], got \[4\]"),
        (
            routing_change(source_token=[0, 1, 2, 3, 0, 1, 3, 2]),
            "source_token must name the token of every row as position does, got 3 for row 6",
        ),
        (routing_change(position=[[0, 1]] * 4), "position must name every row .* once, got 0 for choice 2"),
        (routing_change(offsets=[0, 4, 8]), r"offsets must have shape \[E \+ 1\] = \[4\], got \[3\]"),
        (routing_change(offsets=[0, 5, 4, 8]), "offsets must rise .* 8, without decreasing, got 4 at index 2"),
        (routing_change(offsets=[0, 4, 8, 9]), "offsets must rise .* 8, without decreasing, got 9 at index 3"),
        (
            routing_change(position=[[7, 6], [5, 4], [3, 2], [1, 0]], source_token=[3, 3, 2, 2, 1, 1, 0, 0]),
            "position must order the rows of an expert by token, got choice 6 after 7",
        ),
    ],
)
def test_errors(change, message):
    logits = torch.tensor([[1.0, 2.0, 0.0]]).expand(4, 3)
    arguments = dict(hidden=torch.zeros(4, 8), w_gate_up=torch.zeros(3, 12, 8), w_down=torch.zeros(3, 8, 6))
    arguments |= {name: value for name, value in change.items() if name in arguments}
    tables = {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(RuntimeError, match="moe_experts: " + message):
        moe_experts(routing=moe_route(logits, 2)._replace(**tables), **arguments)


def test_errors_of_the_backward_op():
    hidden, routing, *weights = inputs(4, 3, 2, 8, 6, torch.float32)
    arguments = [hidden, routing.expert_weights, routing.position, routing.source_token, routing.offsets, *weights]
    h = torch.ops.arfast.moe_experts_forward(*arguments, True)[1]
    for dout, wrong_h, message in [
        (torch.zeros(3, 8), h, r"dout must have shape \[T, d\] = \[4, 8\], got \[3, 8\]"),
        (torch.zeros(4, 8).half(), h, r"dout must have the dtype of hidden \(float32\), got float16"),
        (torch.zeros(4, 8), h[:7], r"h must have shape \[T \* K, 2 I\] = \[8, 12\], got \[7, 12\]"),
        (torch.zeros(4, 8), h.double(), r"h must have the dtype of hidden \(float32\), got float64"),
    ]:
        with pytest.raises(RuntimeError, match="moe_experts: " + message):
            torch.ops.arfast.moe_experts_backward(dout, *arguments, wrong_h, True, True)
