"""Every public op with arguments nobody wrote down: random sizes, dtypes, strides, devices, options, right and wrong.

A call may end in two ways: with the documented error, or with the result of the reference. To add an op, add a row to
OPS. ARFAST_FUZZ_EXAMPLES sets the number of calls per op and test.
"""

import math

import pytest
import torch
from accuracy import assert_accurate, assert_bitwise_equal
from fuzzing import SIZES, Op, Option, RoutingOf, Tensor, assert_same, fuzz, leaves, run

from arfast import ops

NAN, INF, HUGE = math.nan, math.inf, 2**40


def same_candidates(outputs, arguments):
    """beam_prune: distinct candidates that have the scores returned; scores and lse of the reference."""
    best, parents, tokens, lse = outputs
    logits, scores, options = arguments["logits"], arguments["scores"], dict(list(arguments.items())[2:])
    exact = ops.beam_prune_reference(logits, scores.double(), **options)
    baseline = ops.beam_prune_reference(logits, scores, **options)
    assert_accurate(best, exact[0], baseline[0], name="scores", ulps=16)
    assert_accurate(lse, exact[3], baseline[3], name="lse", ulps=16)
    total = (logits.float() - lse.view(-1, 1) + scores.reshape(-1, 1)).view(
        len(scores), scores.shape[1] * logits.shape[1]
    )
    for group in range(len(scores)):
        kept = best[group] > -INF
        index = (parents[group] * logits.shape[1] + tokens[group])[kept]
        assert len(index.unique()) == len(index), "a candidate appears twice"
        assert_bitwise_equal(best[group][kept], total[group][index], name="score of a candidate")


def same_tokens(outputs, arguments):
    """sample: the log-probabilities are float32 whatever the logits are."""
    (tokens, logprobs), logits = outputs, arguments["logits"]
    _, exact = ops.sample_reference(**arguments | {"logits": logits.double()})
    expected, baseline = ops.sample_reference(**arguments | {"logits": logits.float()})
    assert torch.equal(tokens, expected)
    assert_accurate(logprobs, exact, baseline, name="logprobs", ulps=16)


def same_new_tokens(outputs, arguments):
    """speculative_verify: the same of its log-probabilities."""
    wide, narrow = (
        ops.speculative_verify_reference(
            **{k: v.to(dtype) if k.endswith("logits") and v is not None else v for k, v in arguments.items()}
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert torch.equal(outputs[0], wide[0]) and torch.equal(outputs[1], wide[1])
    assert_accurate(outputs[2], wide[2], narrow[2], name="logprobs", ulps=16)


def appended(append):
    """kv_append on copies of the caches: what it returns, and the caches."""

    def run(k_cache, v_cache, **arguments):
        k_cache, v_cache = (x.clone(memory_format=torch.contiguous_format) for x in (k_cache, v_cache))
        return append(k_cache=k_cache, v_cache=v_cache, **arguments), k_cache, v_cache

    return run


LOSS = {
    "ignore_index": Option((-100, 0, 2)),
    "label_smoothing": Option((0.0, 0.1, 1.0), (-0.1, 1.5, NAN)),
    "z_loss": Option((0.0, 1e-3), (-1.0, NAN, INF)),
    "softcap": Option((None, 5.0), (0.0, -1.0, NAN)),
    "reduction": Option(("mean", "sum", "none"), ("average", "")),
    "num_items": Option((None, None, 7), (0, -1, NAN)),
}
ATTENTION = {
    "causal": Option((True, False)),
    "softmax_scale": Option((None, 0.1), (0.0, -1.0, NAN, INF)),
    "window": Option((None, None, 0, 5), (-1, -HUGE)),
    "softcap": Option((None, None, 5.0), (0.0, -1.0, NAN)),
    "sink": Tensor("H*G", "float32", True),
    "return_lse": Option((True,)),
}
DECODE = {
    "q": Tensor("B T H*G D"),
    "k_cache": Tensor("B S H D"),
    "v_cache": Tensor("B S H D"),
    "seqlens": Tensor("B", "up to S"),
    **{name: ATTENTION[name] for name in ("softmax_scale", "window", "softcap", "sink")},
    "num_splits": Option((0, 1, 3), (-1,)),
}
HEADS = {"B": (0, 1, 2), "H": (1, 2), "G": (1, 3), "D": (1, 2, 8, 17, 64), "C": (1, 3)}
ROUTE = {
    "router_logits": Tensor("T E", "grid"),
    "score": Option(("softmax", "sigmoid"), ("tanh", "")),
    "renormalize": Option((True, False)),
    "bias": Tensor("E", "grid", True),
    "scale": Option((1.0, 2.5), (0.0, -1.0, NAN, INF)),
}
OPS = {
    "rms_norm": Op(
        ops.rms_norm,
        ops.rms_norm_reference,
        {
            "x": Tensor("M N D"),
            "weight": Tensor("D"),
            "eps": Option((1e-6, 1e-2), (-1.0, 1.0, NAN, INF)),
            "residual": Tensor("M N D", optional=True),
        },
        gradients=("x", "weight", "residual"),
    ),
    "swiglu": Op(
        ops.swiglu, ops.swiglu_reference, {"gate": Tensor("M N D"), "up": Tensor("M N D")}, gradients=("gate", "up")
    ),
    "rotary": Op(
        ops.rotary,
        ops.rotary_reference,
        {"x": Tensor("B T H 2*D"), "cos": Tensor("T D", "float32"), "sin": Tensor("T D", "float32")},
        gradients=("x",),
        sizes={"B": (0, 1, 2), "T": (1, 3, 8), "H": (1, 3), "D": (1, 2, 7, 32)},
    ),
    "attention": Op(
        ops.attention,
        ops.attention_reference,
        {"q": Tensor("B T H*G D"), "k": Tensor("B S H D"), "v": Tensor("B S H D"), **ATTENTION},
        gradients=("q", "k", "v", "sink"),
        sizes=HEADS,
    ),
    "attention, packed": Op(
        ops.attention,
        ops.attention_reference,
        {
            "q": Tensor("T H*G D"),
            "k": Tensor("S H D"),
            "v": Tensor("S H D"),
            "cu_seqlens_q": Tensor("C", "partition T"),
            "cu_seqlens_k": Tensor("C", "partition S"),
            **ATTENTION,
        },
        gradients=("q", "k", "v", "sink"),
        sizes=HEADS,
        errors=("attention",),
    ),
    "attention_decode": Op(
        ops.attention_decode,
        ops.attention_decode_reference,
        DECODE | {"beam_slots": Tensor("B S", "index B", True)},
        sizes=HEADS | {"T": (1, 2, 5)},
    ),
    "attention_decode, paged": Op(
        ops.attention_decode,
        ops.attention_decode_reference,
        DECODE
        | {
            "k_cache": Tensor("P S H D"),
            "v_cache": Tensor("P S H D"),
            "block_table": Tensor("B 1", "index P"),
        },
        sizes=HEADS | {"T": (1, 2, 5), "P": (1, 2, 5), "S": SIZES[1:]},
        errors=("attention_decode",),
    ),
    "kv_append": Op(
        appended(ops.kv_append),
        appended(ops.kv_append_reference),
        {
            "q": Tensor("B T H*G 2*D"),
            "k": Tensor("B T H 2*D"),
            "v": Tensor("B T H 2*D"),
            "cos": Tensor("T D", "float32"),
            "sin": Tensor("T D", "float32"),
            "k_cache": Tensor("B S H 2*D"),
            "v_cache": Tensor("B S H 2*D"),
            "seqlens": Tensor("B", "T up to S"),
        },
        sizes=HEADS | {"T": (1, 2, 5), "S": (5, 8, 33)},
    ),
    "cross_entropy": Op(
        ops.cross_entropy,
        ops.cross_entropy_reference,
        {"logits": Tensor("N V"), "targets": Tensor("N", "below V"), "weight": Tensor("V", "float32", True), **LOSS},
        gradients=("logits",),
        sizes={"V": SIZES[1:]},
    ),
    "linear_cross_entropy": Op(
        ops.linear_cross_entropy,
        lambda chunk_bytes, **arguments: ops.linear_cross_entropy_reference(**arguments),
        {
            "hidden": Tensor("N D"),
            "weight": Tensor("V D"),
            "targets": Tensor("N", "below V"),
            "bias": Tensor("V", optional=True),
            "chunk_bytes": Option((None, 1, 1000), (0, -1)),
            **LOSS,
        },
        gradients=("hidden", "weight", "bias"),
        sizes={"V": SIZES[1:]},
    ),
    "beam_prune": Op(
        ops.beam_prune,
        ops.beam_prune_reference,
        {
            "logits": Tensor("B*K V"),
            "scores": Tensor("B K", "float32"),
            "num_candidates": Option((1, 2, 9), (0, -1, -HUGE)),
            "banned": Tensor("B*K V", "bool", True),
            "log_probs": Option((False, True)),
        },
        sizes={"K": SIZES[1:7], "V": SIZES[1:]},
        compare=same_candidates,
    ),
    "sample": Op(
        lambda generator_state, **arguments: ops.sample(**arguments, generator_state=generator_state.clone()),
        ops.sample_reference,
        {
            "logits": Tensor("R V"),
            "temperature": Option((1.0, 0.7, 0.0), (-1.0, NAN, INF)),
            "top_k": Option((0, 1, 3, 20, HUGE), (-1, -HUGE)),
            "top_p": Option((1.0, 0.9, 0.3, 0.0), (-0.1, 1.5, NAN)),
            "min_p": Option((0.0, 0.1, 1.0), (-0.1, 1.5, NAN)),
            "generator_state": Tensor("R 3", "below V"),
        },
        sizes={"V": SIZES[1:]},
        compare=same_tokens,
    ),
    "speculative_verify": Op(
        lambda generator_state, **arguments: ops.speculative_verify(
            **arguments, generator_state=generator_state.clone()
        ),
        ops.speculative_verify_reference,
        {
            "target_logits": Tensor("B G V"),
            "draft_tokens": Tensor("B H", "below V"),
            "draft_logits": Tensor("B H V", optional=True),
            "temperature": Option((1.0, 0.7, 0.0), (-1.0, NAN, INF)),
            "top_k": Option((0, 1, 3, 20, HUGE), (-1, -HUGE)),
            "top_p": Option((1.0, 0.9, 0.3, 0.0), (-0.1, 1.5, NAN)),
            "min_p": Option((0.0, 0.1, 1.0), (-0.1, 1.5, NAN)),
            "generator_state": Tensor("B 3", "below V"),
        },
        sizes={"V": SIZES[1:], "G": (3,), "H": (2,)},
        compare=same_new_tokens,
    ),
    "moe_route": Op(
        ops.moe_route,
        ops.moe_route_reference,
        ROUTE | {"top_k": Option((1, 2, 4), (0, -1, 66, HUGE))},
        gradients=("router_logits",),
        sizes={"E": (4, 7, 8, 33, 65)},
    ),
    "moe_route, groups": Op(
        ops.moe_route,
        ops.moe_route_reference,
        ROUTE
        | {
            "top_k": Option((1, 2), (0, 33, HUGE)),
            "num_groups": Option((2, 4), (0, -1, 3, HUGE)),
            "top_groups": Option((1, 2), (0, -1, 5, HUGE)),
        },
        gradients=("router_logits",),
        sizes={"E": (8, 16, 32)},
        errors=("moe_route",),
    ),
    "load_balancing_loss": Op(
        ops.load_balancing_loss,
        ops.load_balancing_loss_reference,
        {
            "router_logits": Tensor("T E"),
            "routing": RoutingOf(),
            "normalize": Option(("switch", "hf"), ("mean", "")),
            "mask": Tensor("T", "bool", True),
        },
        gradients=("router_logits",),
        sizes={"E": (2, 5)},
        errors=("load_balancing_loss", "router_losses"),
    ),
    "router_z_loss": Op(
        ops.router_z_loss,
        ops.router_z_loss_reference,
        {"router_logits": Tensor("T E"), "mask": Tensor("T", "bool", True)},
        gradients=("router_logits",),
        sizes={"E": SIZES[1:]},
        errors=("router_z_loss", "router_losses"),
    ),
    "moe_permute": Op(
        ops.moe_permute,
        ops.moe_permute_reference,
        {"hidden": Tensor("T D"), "routing": RoutingOf()},
        gradients=("hidden",),
        sizes={"E": (2, 5)},
        errors=("moe_permute", "moe_combine"),  # its backward pass is a moe_combine
    ),
    "moe_combine": Op(
        ops.moe_combine,
        ops.moe_combine_reference,
        {"expert_out": Tensor("2*T D"), "routing": RoutingOf()},
        gradients=("expert_out",),
        sizes={"E": (2, 5)},
    ),
    "grouped_mm": Op(
        ops.grouped_mm,
        ops.grouped_mm_reference,
        {"a": Tensor("M K"), "b": Tensor("E K N"), "offsets": Tensor("E", "partition M")},
        gradients=("a", "b"),
        sizes={"E": (1, 2, 5)},
    ),
    "moe_experts": Op(
        ops.moe_experts,
        ops.moe_experts_reference,
        {
            "hidden": Tensor("T D"),
            "routing": RoutingOf(),
            "w_gate_up": Tensor("E 2*I D"),
            "w_down": Tensor("E D I"),
        },
        gradients=("hidden", "w_gate_up", "w_down"),
        sizes={"E": (2, 5), "D": SIZES[1:], "I": SIZES[1:]},
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_right_arguments_give_the_result_of_the_reference(name):
    op = OPS[name]
    fuzz(lambda arguments: assert_same(op, run(op, op.function, arguments), arguments), op, spoiled=False)


@pytest.mark.parametrize("name", OPS)
def test_wrong_arguments_give_the_documented_error(name):
    op = OPS[name]
    documented = tuple(f"{prefix}: " for prefix in op.errors or (name,))

    def check(arguments):
        devices = {tensor.device.type for tensor in leaves(list(arguments.values()))}
        if devices == {"meta"}:  # shapes alone: nothing looks at options and sizes
            return
        try:
            outputs = run(op, op.function, arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            assert str(error).startswith(documented), f"{type(error).__name__}: {error}"
            return
        if "routing" in arguments:  # an op reads a part of it, and cannot know that a number in range is another's
            return
        assert len(devices) == 1, f"{name} accepts tensors of different devices"
        assert_same(op, outputs, arguments)  # what was changed may still be right

    fuzz(check, op, spoiled=True)


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_give_the_shapes(name):
    op = OPS[name]

    def to_meta(value):
        if isinstance(value, ops.Routing):
            return ops.Routing(*map(to_meta, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def check(arguments):
        on_meta = leaves(op.function(**{name: to_meta(value) for name, value in arguments.items()}))
        for out, real in zip(on_meta, leaves(op.function(**arguments)), strict=True):
            assert (out.shape, out.dtype, out.device.type) == (real.shape, real.dtype, "meta")

    fuzz(check, op, spoiled=False)
