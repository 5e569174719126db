"""Self-examination on the user's machine: each check does what training relies on and says by how much it holds.

Every check answers a kind of silent fault that real training code has had: an op that is wrong for one instruction set,
a mask that leaks the future or the neighbouring document, an accumulated loss that is a mean of means, a checkpoint
that does not come back as it was.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import arfast.ops as ops
from arfast.models import CausalLM, CausalLMConfig


@dataclass(frozen=True)
class Finding:
    """One check: whether it holds, and the figure it was judged by."""

    name: str
    passed: bool
    detail: str


def environment() -> dict:
    """Versions, build and devices, ready for JSON."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("arfast")
    except PackageNotFoundError:
        own = "source tree"
    cpu_target, architectures = torch.ops.arfast.build_info().split(";")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "arfast": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu instructions": cpu_target,
        "cuda kernels for": architectures.split(",") if architectures else "none (built without nvcc)",
        "gpus": gpus or "none",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "executable": sys.executable,
    }


def examine(device: str = "cpu") -> Iterator[Finding]:
    """Run all checks on a device, one finding at a time. A check that raises is a failed one."""
    torch.manual_seed(0)
    for name, check in (*_op_checks(device), *_model_checks(device)):
        try:
            yield Finding(name, *check())
        except Exception as error:  # whatever goes wrong in a check is its finding
            yield Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _close(actual, exact, baseline) -> tuple[bool, str]:
    """The tests' bound: at most twice the error of the reference in the same dtype, plus two ulp of the result."""
    worst = 0.0
    for a, e, b in zip(actual, exact, baseline, strict=True):
        error, allowed = ((t.double() - e).abs().max().item() for t in (a, b))
        floor = 2 * torch.finfo(a.dtype).eps * e.abs().max().item() + torch.finfo(a.dtype).tiny
        worst = max(worst, error / (2 * allowed + floor))
    return worst <= 1, f"error {worst:.2f} of what is allowed"


def _compare(function: Callable, reference: Callable, inputs: list[torch.Tensor]) -> tuple[bool, str]:
    """Outputs and gradients of an op and of its reference, which also runs in float64."""

    def run(f, tensors):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        out = f(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return _close(run(function, inputs), run(reference, wide), run(reference, inputs))


def _op_checks(device: str) -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")

        def draw(*shape, dtype=dtype):
            return torch.randn(shape, device=device).to(dtype)

        q, k, v = draw(2, 65, 4, 64), draw(2, 65, 2, 64), draw(2, 65, 2, 64)
        yield f"attention, {label}", lambda t=(q, k, v): _compare(ops.attention, ops.attention_reference, list(t))
        targets = torch.randint(0, 1003, (33,), device=device)
        for name in ("cross_entropy", "linear_cross_entropy"):
            first = [draw(33, 1003)] if name == "cross_entropy" else [draw(33, 48), draw(1003, 48)]
            op, reference = getattr(ops, name), getattr(ops, f"{name}_reference")

            def check(op=op, reference=reference, tensors=(*first, targets)):
                def smoothed(f):
                    return lambda *t: f(*t, label_smoothing=0.1, z_loss=1e-4)

                return _compare(smoothed(op), smoothed(reference), list(tensors))

            yield f"{name}, {label}", check
        norm = (draw(33, 257), draw(257))
        yield f"rms_norm, {label}", lambda t=norm: _compare(ops.rms_norm, ops.rms_norm_reference, list(t))
    yield "moe_route", lambda: _check_routing(device)
    yield "beam_prune", lambda: _check_beam_prune(device)
    yield "sample", lambda: _check_sample(device)


def _check_routing(device: str) -> tuple[bool, str]:
    logits = torch.randn(257, 64, device=device)
    routing = ops.moe_route(logits, 8)
    order = torch.argsort(routing.expert_ids.flatten().long(), stable=True)
    same = torch.equal(routing.source_token.long(), order // 8)
    weights, ids = torch.softmax(logits.double(), -1).topk(8)
    same &= torch.equal(ids.int(), routing.expert_ids)
    error = (weights / weights.sum(-1, keepdim=True) - routing.expert_weights).abs().max().item()
    return same and error < 1e-6, f"order {'equal' if same else 'differs'}, weights within {error:.1e}"


def _check_beam_prune(device: str) -> tuple[bool, str]:
    logits, scores = torch.randn(8, 5003, device=device), torch.randn(2, 4, device=device)
    best, parents, tokens, _ = ops.beam_prune(logits, scores, num_candidates=8)
    total = torch.log_softmax(logits.double(), -1).view(2, 4, -1) + scores.double()[..., None]
    values, flat = total.flatten(1).topk(8)
    same = torch.equal(parents.long() * 5003 + tokens.long(), flat)
    error = (best - values).abs().max().item()
    return same and error < 1e-5, f"candidates {'equal' if same else 'differ'}, scores within {error:.1e}"


def _check_sample(device: str) -> tuple[bool, str]:
    logits, state = torch.randn(8, 20011, device=device), torch.arange(24, device=device).view(8, 3)
    same = True
    for options in (dict(top_k=50, top_p=0.9), dict(top_p=0.9), {}):
        expected, _ = ops.sample_reference(logits, **options, generator_state=state)
        same &= torch.equal(ops.sample(logits, **options, generator_state=state)[0], expected)
    return same, f"tokens {'equal' if same else 'differ'}"


def _small_model(device: str) -> CausalLM:
    config = CausalLMConfig.preset("tiny", vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    return CausalLM(config, seed=1, device=device)


def _model_checks(device: str) -> Iterator[tuple[str, Callable]]:
    yield "no leak from the future", lambda: _check_causal_leak(device)
    yield "no leak between documents", lambda: _check_document_leak(device)
    yield "accumulation does not change gradients", lambda: _check_accumulation(device)
    yield "cached decoding equals the full pass", lambda: _check_cache(device)
    yield "checkpoint comes back as it was", lambda: _check_checkpoint(device)


def _ids(device: str, *shape: int) -> torch.Tensor:
    return torch.randint(0, 512, shape, device=device)


@torch.no_grad()
def _check_causal_leak(device: str) -> tuple[bool, str]:
    model, ids = _small_model(device), _ids(device, 1, 48)
    changed = ids.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 512
    before, after = (model(x).logits[0, :30] for x in (ids, changed))
    count = int((before != after).any(-1).sum())
    return count == 0, f"{count} of 30 earlier positions changed with the later ones"


@torch.no_grad()
def _check_document_leak(device: str) -> tuple[bool, str]:
    model, ids = _small_model(device), _ids(device, 1, 60)
    offsets = torch.tensor([0, 23, 60], dtype=torch.int32, device=device)
    changed = ids.clone()
    changed[0, :23] = (changed[0, :23] + 1) % 512
    before, after = (model(x, cu_seqlens=offsets).logits.reshape(60, -1)[23:] for x in (ids, changed))
    count = int((before != after).any(-1).sum())
    return count == 0, f"{count} of 37 positions changed with the document before"


def _check_accumulation(device: str) -> tuple[bool, str]:
    """One batch of unequal numbers of targets against its halves: a mean of means would differ by tens of per cent."""
    model, ids = _small_model(device), _ids(device, 4, 32)
    labels = ids.clone()
    labels[0, 5:] = -100
    items = int((labels[:, 1:] != -100).sum())

    def gradients(parts):
        model.zero_grad()
        for rows in parts:
            model(ids[rows], labels=labels[rows], num_items=items).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, halves = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    difference = ((whole - halves).norm() / whole.norm()).item()
    return difference < 1e-5, f"relative difference {difference:.1e}"


@torch.no_grad()
def _check_cache(device: str) -> tuple[bool, str]:
    from arfast.generate import generate

    model, ids = _small_model(device), _ids(device, 1, 9)
    cached = generate(model, ids, max_new_tokens=12)
    full = ids
    for _ in range(12):
        full = torch.cat([full, model(full).logits[:, -1:].argmax(-1)], 1)
    return torch.equal(cached, full), f"{int((cached != full).sum())} of 12 greedy tokens differ"


@torch.no_grad()
def _check_checkpoint(device: str) -> tuple[bool, str]:
    model, ids = _small_model(device), _ids(device, 2, 16)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = CausalLM.from_pretrained(directory, device=device)
    same = torch.equal(model(ids).logits, again(ids).logits)
    return same, f"logits {'bit-identical' if same else 'differ'}"
