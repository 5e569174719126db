"""Every op once, small, against its reference on this machine: forward and, where there are any, gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from arfast import ops

from .finding import Check, Outcome

# Their CUDA kernels take 16-bit elements.
_SIXTEEN_BITS = ("attention", "grouped_mm", "moe_experts")


def op_checks(device: str) -> Iterator[Check]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, (function, reference, inputs) in _floating_ops(device, dtype).items():
            if device == "cpu" or not (dtype == torch.float32 and name in _SIXTEEN_BITS):
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                yield label, lambda f=function, r=reference, t=inputs: compare(f, r, t)
    checks = dict(
        moe_route=_moe_route,
        beam_prune=_beam_prune,
        beam_step=_beam_step,
        sample=_sample,
        sample_step=_sample_step,
        speculative_verify=_speculative_verify,
    )
    for name, check in checks.items():
        yield name, lambda check=check: check(device)


def compare(function: Callable, reference: Callable, inputs: list[Tensor]) -> Outcome:
    """Outputs and gradients of an op and of its reference, which also runs in float64."""

    def run(f: Callable, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = f(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        wanted = [t for t in leaves if t.requires_grad]
        connected = [out for out in outputs if out.requires_grad]
        upstream = [torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out) for out in connected]
        gradients = torch.autograd.grad(connected, wanted, upstream, allow_unused=True) if connected else []
        return [out.detach() for out in outputs] + [g for g in gradients if g is not None]

    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return close(run(function, inputs), run(reference, wide), run(reference, inputs))


def close(actual: list[Tensor], exact: list[Tensor], baseline: list[Tensor]) -> Outcome:
    """The tests' bound: at most twice the error of the reference in the same dtype, plus two ulp of the result."""
    worst = 0.0
    for a, e, b in zip(actual, exact, baseline, strict=True):
        error, allowed = ((t.double() - e).abs().max().item() for t in (a, b))
        floor = 2 * torch.finfo(a.dtype).eps * e.abs().max().item() + torch.finfo(a.dtype).tiny
        worst = max(worst, error / (2 * allowed + floor))
    return worst <= 1, f"error {worst:.2f} of what is allowed"


def _floating_ops(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """name: (op, reference, inputs)."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def by_name(name: str, *inputs: Tensor, **options) -> tuple[Callable, Callable, list[Tensor]]:
        pair = (getattr(ops, name), getattr(ops, f"{name}_reference"))
        return *(lambda *t, f=f: f(*t, **options) for f in pair), list(inputs)

    q, cache = draw(2, 65, 4, 64), draw(2, 65, 2, 64)
    targets = torch.randint(0, 1003, (33,), device=device)
    angles = torch.rand(65, 32, device=device)
    routing = ops.moe_route_reference(draw(33, 6, dtype=torch.float32), 2)
    loss = dict(label_smoothing=0.1, z_loss=1e-4)
    table = {
        "attention": by_name("attention", q, cache, draw(2, 65, 2, 64)),
        "attention_decode": _without_gradient(
            "attention_decode", q[:, :3], cache, draw(2, 65, 2, 64), _lengths(device)
        ),
        "kv_append": _kv_append(draw, device),
        "cross_entropy": by_name("cross_entropy", draw(33, 1003), targets, **loss),
        "linear_cross_entropy": by_name("linear_cross_entropy", draw(33, 48), draw(1003, 48), targets, **loss),
        "rms_norm": _rms_norm(draw(33, 257), draw(257), draw(33, 257)),
        "rotary": by_name("rotary", q, cos=angles.cos(), sin=angles.sin()),
        "swiglu": by_name("swiglu", draw(33, 257), draw(33, 257)),
        "moe_permute": by_name("moe_permute", draw(33, 48), routing=routing),
        "moe_combine": by_name("moe_combine", draw(66, 48), routing=routing),
        "grouped_mm": by_name("grouped_mm", draw(66, 48), draw(6, 48, 40), routing.offsets),
        "moe_experts": _moe_experts(draw, routing),
        "load_balancing_loss": by_name("load_balancing_loss", draw(33, 6), routing=routing),
        "router_z_loss": by_name("router_z_loss", draw(33, 6)),
    }
    if device == "cpu":
        table["decode_step"] = _decode_step(draw)
    return table


def _lengths(device: str) -> Tensor:
    return torch.tensor([65, 33], dtype=torch.int32, device=device)


def _without_gradient(name: str, *inputs: Tensor) -> tuple[Callable, Callable, list[Tensor]]:
    def run(f: Callable) -> Callable:
        return lambda *tensors: f(*(t.detach() for t in tensors))

    return run(getattr(ops, name)), run(getattr(ops, f"{name}_reference")), list(inputs)


def _on_copies(function: Callable, places: tuple[int, int]) -> Callable:
    """An op that writes to caches: what it returns, and the caches."""

    def run(*tensors: Tensor) -> list[Tensor]:
        tensors = [t.detach().clone() for t in tensors]
        return [function(*tensors), *(tensors[i] for i in places)]

    return run


def _kv_append(draw: Callable, device: str) -> tuple[Callable, Callable, list[Tensor]]:
    angles = torch.rand(6, 32, device=device)
    inputs = [draw(2, 3, 4, 64), draw(2, 3, 2, 64), draw(2, 3, 2, 64), angles.cos(), angles.sin()]
    inputs += [draw(2, 70, 2, 64), draw(2, 70, 2, 64), _lengths(device)]
    return _on_copies(ops.kv_append, (5, 6)), _on_copies(ops.kv_append_reference, (5, 6)), inputs


def _rms_norm(*inputs: Tensor) -> tuple[Callable, Callable, list[Tensor]]:
    pair = (lambda x, weight, r, f=f: f(x, weight, residual=r) for f in (ops.rms_norm, ops.rms_norm_reference))
    return *pair, list(inputs)


def _moe_experts(draw: Callable, routing: ops.Routing) -> tuple[Callable, Callable, list[Tensor]]:
    def run(f: Callable) -> Callable:
        def experts(hidden: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            weights = routing.expert_weights.to(torch.promote_types(hidden.dtype, torch.float32))
            return f(hidden, routing._replace(expert_weights=weights), w_gate_up, w_down)

        return experts

    return run(ops.moe_experts), run(ops.moe_experts_reference), [draw(33, 48), draw(6, 80, 48), draw(6, 48, 40)]


def _decode_step(draw: Callable) -> tuple[Callable, Callable, list[Tensor]]:
    """One layer: 4 query heads of 8 channels share 2 of keys and values."""
    shapes = [(61, 32), (32,), (61, 32), (32,), (32, 32), (16, 32), (16, 32), (32, 32), (32,), (48, 32), (48, 32)]
    weights = [draw(*shape) / shape[-1] ** 0.5 for shape in [*shapes, (32, 48)]]
    angles, tokens = torch.rand(70, 4), torch.randint(61, (2,))
    inputs = [tokens, angles.cos(), angles.sin(), draw(1, 2, 70, 2, 8), draw(1, 2, 70, 2, 8), _lengths("cpu"), *weights]

    def run(function: Callable) -> Callable:
        def step(tokens, cos, sin, k, v, lengths, *weights):
            return function(tokens, list(weights), cos.float(), sin.float(), k, v, lengths, num_heads=4, eps=1e-5)

        return _on_copies(step, (3, 4))

    return run(ops.decode_step), run(ops.decode_step_reference), inputs


def _moe_route(device: str) -> Outcome:
    logits = torch.randn(257, 64, device=device)
    routing = ops.moe_route(logits, 8)
    order = torch.argsort(routing.expert_ids.flatten().long(), stable=True)
    same = torch.equal(routing.source_token.long(), order // 8)
    weights, ids = torch.softmax(logits.double(), -1).topk(8)
    same &= torch.equal(ids.int(), routing.expert_ids)
    error = (weights / weights.sum(-1, keepdim=True) - routing.expert_weights).abs().max().item()
    return same and error < 1e-6, f"order {'equal' if same else 'differs'}, weights within {error:.1e}"


def _beam_prune(device: str) -> Outcome:
    logits, scores = torch.randn(8, 5003, device=device), torch.randn(2, 4, device=device)
    best, parents, tokens, _ = ops.beam_prune(logits, scores, num_candidates=8)
    total = torch.log_softmax(logits.double(), -1).view(2, 4, -1) + scores.double()[..., None]
    values, flat = total.flatten(1).topk(8)
    same = torch.equal(parents.long() * 5003 + tokens.long(), flat)
    error = (best - values).abs().max().item()
    return same and error < 1e-5, f"candidates {'equal' if same else 'differ'}, scores within {error:.1e}"


def _beam_step(device: str) -> Outcome:
    """A short search, and the sequences that it found."""
    states = [ops.BeamState.start(2, 3, 5, ends=(7,), device=device) for _ in range(2)]
    for step in range(5):
        logits = torch.randn(6 if step else 2, 101, device=device)
        ops.beam_step(logits, states[0])
        ops.beam_step_reference(logits, states[1], prune=ops.beam_prune)
    found, expected = ops.beam_hypotheses(states[0]), ops.beam_hypotheses_reference(states[1])
    same = all(torch.equal(a, e) for a, e in zip(found[:2], expected[:2], strict=True))
    return same, f"{found[0].numel()} tokens of hypotheses {'equal' if same else 'differ'}"


def _sample(device: str) -> Outcome:
    logits, state = torch.randn(8, 20011, device=device), torch.arange(24, device=device).view(8, 3)
    same = True
    for options in (dict(top_k=50, top_p=0.9), dict(top_p=0.9), {}):
        expected, _ = ops.sample_reference(logits, **options, generator_state=state)
        same &= torch.equal(ops.sample(logits, **options, generator_state=state.clone())[0], expected)
    return same, f"tokens {'equal' if same else 'differ'}"


def _sample_step(device: str) -> Outcome:
    """Sequences that end at different lengths."""
    generator = torch.arange(24, device=device).view(8, 3)
    states = [ops.SampleState.start(generator.clone(), 5, ends=range(0, 101, 3), top_k=50) for _ in range(2)]
    for _ in range(5):
        logits = torch.randn(8, 101, device=device)
        ops.sample_step(logits, states[0])
        ops.sample_step_reference(logits, states[1])
    same = all(torch.equal(*(getattr(state, name) for state in states)) for name in ("tokens", "lengths", "status"))
    return same, f"{int(states[0].lengths.sum())} tokens {'equal' if same else 'differ'}"


def _speculative_verify(device: str) -> Outcome:
    target, state = torch.randn(8, 5, 1009, device=device), torch.arange(24, device=device).view(8, 3)
    draft = target[:, :4] + torch.randn(8, 4, 1009, device=device)
    tokens = draft.argmax(-1)
    arguments = (target, tokens, draft)
    expected = ops.speculative_verify_reference(*arguments, generator_state=state)
    actual = ops.speculative_verify(*arguments, generator_state=state.clone())
    same = all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))
    return same, f"tokens {'equal' if same else 'differ'}, {int(actual[1].sum())} of 32 drafts accepted"
