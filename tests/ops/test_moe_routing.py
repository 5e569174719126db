"""moe_route against its reference in float64, transformers' routers, and every kind of odd logits."""

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from threads import same_for_any_threads

from arfast.ops import moe_route, moe_route_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, E, K): every edge of a tile (16 tokens), of a counting block (32 or 128 tokens) and of the experts' vectors
SIZES = [
    (0, 8, 2),
    (1, 1, 1),
    (1, 64, 8),
    (31, 2, 1),
    (32, 8, 3),
    (32, 1000, 5),
    (33, 96, 4),
    (128, 8, 8),
    (129, 64, 5),
    (257, 128, 6),
    (257, 256, 7),
]
GROUPS = dict(num_groups=4, top_groups=2)
VARIANTS = {
    "softmax": dict(scale=1.5),
    "softmax-plain": dict(renormalize=False, scale=2.5),
    "sigmoid": dict(score="sigmoid", scale=2.5),
    "sigmoid-plain": dict(score="sigmoid", renormalize=False),
}


def make_logits(tokens, experts, dtype=torch.float32):
    """1/32 and multiples of 1/8, exact in every dtype: many ties, and other scores differ by more than rounding."""
    return (torch.randint(-32, 32, (tokens, experts)) / 8 + 1 / 32).to(dtype)


def selection(variant, experts, *, bias=False, groups=False):
    options = dict(VARIANTS[variant])
    if bias:
        options["bias"] = torch.randint(-4, 5, (experts,)) / 16
    return options | (GROUPS if groups else {})


def widened(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def run(function, logits, top_k, options, dweights, dlse):
    """Routing, and the gradient of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    routing = function(leaf, top_k, **options)
    outs = (routing.expert_weights, routing.lse)
    gradients = [g.to(o.dtype) for g, o in zip((dweights, dlse), outs, strict=True)]
    return routing, torch.autograd.grad(outs, leaf, gradients)[0]


def check(logits, top_k, options):
    dweights, dlse = torch.randn(len(logits), top_k), torch.randn(len(logits))
    actual, dlogits = run(moe_route, logits, top_k, options, dweights, dlse)
    exact, exact_dlogits = run(moe_route_reference, logits.double(), top_k, widened(options), dweights, dlse)
    baseline, baseline_dlogits = run(moe_route_reference, logits, top_k, options, dweights, dlse)
    for name in ("expert_ids", "tokens_per_expert", "offsets", "source_token", "position"):
        assert_bitwise_equal(getattr(actual, name), getattr(exact, name), name=name)
    for name in ("expert_weights", "lse"):
        assert_accurate(getattr(actual, name), getattr(exact, name), getattr(baseline, name), name=name)
    assert_accurate(dlogits, exact_dlogits, baseline_dlogits, name="drouter_logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,experts,top_k", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(variant, tokens, experts, top_k, dtype, poisoned, device):
    check(make_logits(tokens, experts, dtype), top_k, selection(variant, experts))


@pytest.mark.parametrize("bias,groups", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("experts", [4, 8, 96, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bias_and_groups(variant, experts, bias, groups, poisoned, device):
    check(make_logits(67, experts), 2, selection(variant, experts, bias=bias, groups=groups))


@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4, float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_equal_takes_the_first_experts(variant, fill, device):
    routing = moe_route(torch.full((40, 96), fill), 5, **VARIANTS[variant])
    assert_bitwise_equal(routing.expert_ids, torch.arange(5, dtype=torch.int32).expand(40, 5))


@pytest.mark.parametrize("bias,groups", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ids_are_unique_and_in_range_whatever_the_logits_are(score, bias, groups, device):
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e38, -3e38, 1.0])
    logits = odd[torch.randint(len(odd), (300, 32))]
    logits[0], logits[1], logits[2] = float("nan"), float("-inf"), float("inf")
    options = selection(score, 32, bias=bias, groups=groups)
    routing = moe_route(logits, 8, **options)
    assert routing.expert_ids.min() >= 0 and routing.expert_ids.max() < 32
    assert all(len(set(row)) == 8 for row in routing.expert_ids.tolist())
    if groups:
        assert all(len({e // 8 for e in row}) <= 2 for row in routing.expert_ids.tolist())
    assert_bitwise_equal(routing.position.flatten().sort().values, torch.arange(2400, dtype=torch.int32))
    expected = moe_route_reference(logits, 8, **options)
    assert_bitwise_equal(routing.expert_weights.isnan(), expected.expert_weights.isnan())
    if not (bias and score == "softmax"):
        assert_bitwise_equal(routing.expert_ids, expected.expert_ids)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_nan_shows_in_its_row_alone(score, device):
    logits = make_logits(50, 64)
    logits[17, 60] = float("nan")
    row = torch.arange(50) == 17
    leaf = logits.requires_grad_()
    routing = moe_route(leaf, 4, score=score)
    assert routing.expert_weights[row].isnan().all() and not routing.expert_weights[~row].isnan().any()
    gradient = torch.autograd.grad(routing.expert_weights.square().sum(), leaf)[0]
    assert gradient[row].isnan().any() and not gradient[~row].isnan().any()


def test_masked_groups_lose_even_when_every_score_is_negative(device):
    """A mask of 0 instead of -inf would let experts of masked groups win (a known fault of other routers)."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.4]])
    routing = moe_route(logits, 2, score="sigmoid", bias=torch.full((4,), -3.0), num_groups=2, top_groups=1)
    assert routing.expert_ids.tolist() == [[0, 1]]


def test_transformers_mixtral_and_qwen3():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    hidden = torch.randn(70, 32)
    routers = [MixtralTopKRouter(MixtralConfig(num_local_experts=16, num_experts_per_tok=4, hidden_size=32))]
    for norm in (False, True):
        config = Qwen3MoeConfig(num_experts=16, num_experts_per_tok=4, hidden_size=32, norm_topk_prob=norm)
        routers.append(Qwen3MoeTopKRouter(config))
    for router, renormalize in zip(routers, (True, False, True), strict=True):
        torch.nn.init.normal_(router.weight)
        logits, weights, ids = router(hidden)
        routing = moe_route(logits, 4, renormalize=renormalize)
        assert_bitwise_equal(routing.expert_ids.long(), ids)
        torch.testing.assert_close(routing.expert_weights, weights)


def test_transformers_deepseek():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    sizes = dict(hidden_size=32, n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=6)
    router = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, norm_topk_prob=True, routed_scaling_factor=2.5))
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.uniform_(-0.5, 0.5)
    logits, weights, ids = router(torch.randn(90, 32))
    groups = dict(num_groups=8, top_groups=3)
    routing = moe_route(logits, 6, score="sigmoid", bias=router.e_score_correction_bias, scale=2.5, **groups)
    ids, order = ids.sort(-1)  # their order within a row is not defined
    ours = routing.expert_ids.long().sort(-1)
    assert_bitwise_equal(ours.values, ids)
    torch.testing.assert_close(routing.expert_weights.gather(1, ours.indices), weights.gather(1, order))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [False, True])
def test_gradcheck(variant, groups):
    logits = make_logits(9, 12, torch.float64) + torch.rand(9, 12, dtype=torch.float64) / 16
    options = widened(selection(variant, 12, bias=True, groups=groups))

    def function(x):
        routing = moe_route(x, 3, **options)
        return routing.expert_weights, routing.lse

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_one_gradient_alone(device):
    logits = make_logits(20, 24)
    dweights, dlse = torch.randn(20, 3), torch.randn(20)
    both = run(moe_route, logits, 3, {}, dweights, dlse)[1]
    leaf = logits.clone().requires_grad_()
    routing = moe_route(leaf, 3)
    from_weights = torch.autograd.grad(routing.expert_weights, leaf, dweights, retain_graph=True)[0]
    from_lse = torch.autograd.grad(routing.lse, leaf, dlse)[0]
    torch.testing.assert_close(from_weights + from_lse, both)
    chosen = torch.zeros(20, 24).scatter(1, routing.expert_ids.long(), 1) > 0
    assert not from_weights[~chosen].any()


def test_strided_inputs_give_the_same_bits(device):
    logits = make_logits(50, 40, torch.bfloat16)
    expected = moe_route(logits, 4)
    strided = torch.full((50, 77), float("nan"), dtype=logits.dtype)[:, 3:43].copy_(logits)
    for view in (strided, logits.t().contiguous().t(), torch.cat([logits, logits])[50:]):
        for a, b in zip(moe_route(view, 4), expected, strict=True):
            assert_bitwise_equal(a, b)


def test_same_bits_for_every_number_of_threads_and_every_batch():
    logits = torch.randn(1000, 64)
    dweights, dlse = torch.randn(1000, 6), torch.randn(1000)

    def route():
        routing, gradient = run(moe_route, logits, 6, {}, dweights, dlse)
        return (*routing, gradient)

    same_for_any_threads(route)
    routing, part = moe_route(logits, 6), moe_route(logits[333:350], 6)
    for name in ("expert_ids", "expert_weights", "lse"):
        assert_bitwise_equal(getattr(part, name), getattr(routing, name)[333:350])


def test_opcheck():
    logits = make_logits(20, 16)
    for arguments in [("softmax", True, None, 1, 1, 1.0), ("sigmoid", False, torch.zeros(16), 4, 2, 2.5)]:
        torch.library.opcheck(torch.ops.arfast.moe_route_forward, (logits, 3, *arguments))
    routing = moe_route(logits, 3)
    saved = (logits, routing.expert_ids, routing.expert_weights, routing.lse, "softmax", True, 1.0)
    torch.library.opcheck(torch.ops.arfast.moe_route_backward, (torch.randn(20, 3), torch.randn(20), *saved))
    torch.library.opcheck(torch.ops.arfast.moe_route_backward, (None, torch.randn(20), *saved))


def test_compile():
    logits, dweights, dlse = make_logits(20, 16), torch.randn(20, 3), torch.randn(20)
    options = dict(score="sigmoid", num_groups=4, top_groups=2, scale=2.0)
    compiled = torch.compile(moe_route, fullgraph=True, backend="aot_eager")
    routing, gradient = run(compiled, logits, 3, options, dweights, dlse)
    expected, expected_gradient = run(moe_route, logits, 3, options, dweights, dlse)
    assert type(routing) is type(expected)
    for a, b in zip((*routing, gradient), (*expected, expected_gradient), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(router_logits=torch.zeros(4)), r"router_logits must have shape \[T, E\] = \[\*, \*\], got \[4\]"),
        (dict(router_logits=torch.zeros(4, 8).int()), "router_logits must be float32, .* or float64, got int32"),
        (dict(top_k=0), r"top_k must be in \[1, num_experts=8\], got 0"),
        (dict(top_k=9), r"top_k must be in \[1, num_experts=8\], got 9"),
        (dict(score="tanh"), "score must be softmax or sigmoid, got tanh"),
        (dict(bias=torch.zeros(7)), r"bias must have shape \[E\] = \[8\], got \[7\]"),
        (dict(bias=torch.zeros(8).long()), "bias must be float32, bfloat16, float16 or float64, got int64"),
        (dict(num_groups=2), "top_groups must come with num_groups, got None and 2"),
        (dict(num_groups=3, top_groups=1), "num_groups must divide the number of experts, got 3"),
        (dict(num_groups=0, top_groups=1), "num_groups must divide the number of experts, got 0"),
        (
            dict(num_groups=4, top_groups=5),
            r"top_groups must be in \[1, num_groups\] and leave .* top_k experts, got 5",
        ),
        (
            dict(num_groups=8, top_groups=1),
            r"top_groups must be in \[1, num_groups\] and leave .* top_k experts, got 1",
        ),
        (dict(scale=0.0), "scale must be positive and finite, got 0"),
        (dict(scale=float("nan")), "scale must be positive and finite, got nan"),
        (dict(scale=float("inf")), "scale must be positive and finite, got inf"),
    ],
)
def test_errors(change, message):
    arguments = dict(router_logits=torch.zeros(4, 8), top_k=2) | change
    with pytest.raises(RuntimeError, match="moe_route: " + message):
        moe_route(arguments.pop("router_logits"), arguments.pop("top_k"), **arguments)


def test_errors_of_the_backward_op():
    routing = moe_route(torch.zeros(4, 8), 2)
    saved = [torch.zeros(4, 8), routing.expert_ids, routing.expert_weights, routing.lse]
    for index, wrong, message in [
        (0, torch.zeros(3, 8), r"expert_ids must have shape \[T, K\] = \[3, \*\], got \[4, 2\]"),
        (1, routing.expert_ids + 7, r"expert_ids must be in \[0, E\), got 8"),
        (1, routing.expert_ids.long(), "expert_ids must be int32, got int64"),
        (2, routing.expert_weights[:, :1], r"expert_weights must have shape \[T, K\] = \[4, 2\], got \[4, 1\]"),
        (3, routing.lse.double(), "lse must be float32, got float64"),
    ]:
        arguments = [*saved[:index], wrong, *saved[index + 1 :]]
        with pytest.raises(RuntimeError, match="moe_route: " + message):
            torch.ops.arfast.moe_route_backward(torch.zeros(4, 2), None, *arguments, "softmax", True, 1.0)
