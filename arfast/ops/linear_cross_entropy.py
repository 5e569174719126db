"""The language-model head and its loss together: logits = hidden weight^T + bias, then `cross_entropy`, a block of rows
at a time, so that the [N, V] logits never exist whole.

The cross-entropy runs in place on the block and leaves the gradient of the logits there, of which the gradients of
hidden and weight are made at once. So a training step multiplies three times, as the unfused form does, and keeps one
block instead of several [N, V] tensors. The matrix products are torch's on CUDA, on the CPU the fastest there is.
"""

import threading

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake
from arfast.ops.cross_entropy import _REDUCTIONS, check_options, cross_entropy_reference, scaled_gradient

_ops = torch.ops.arfast


def default_chunk_bytes(device_type: str) -> int:
    """Bound on a block of logits, in bytes. Small blocks make small products; a GPU has more memory, and needs larger
    products to be busy."""
    return 64 << 20 if device_type == "cpu" else 1 << 30


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of `hidden @ weight.T + bias`.

    Args:
        hidden: [N, d], float32, bfloat16, float16, or float64 on the CPU.
        weight: [V, d], the dtype of `hidden`.
        targets: [N] int64, each in [0, V) or `ignore_index`.
        bias: [V], the dtype of `hidden`, or None.
        class_weight: [V] per class, or None (`weight` of `cross_entropy`).
        ignore_index, label_smoothing, z_loss, softcap, reduction, num_items: as in `cross_entropy`.
        chunk_bytes: upper bound on the block of logits held at a time, in bytes (at least one row); 64 MiB by
            default, on a GPU 1 GiB.
            On the CPU a block is kept per thread and used again by the next call.

    Returns:
        The loss in float32 (float64), [] or, for reduction="none", [N].

    Raises:
        RuntimeError for tensors, ValueError for options: `linear_cross_entropy: <argument> must <rule>, got <actual>`.

    Gradients of hidden, weight and bias; with "mean" and "sum" they are made in the forward pass and scaled by the
    upstream gradient in the backward pass. With "none" the backward pass computes the logits again. Across blocks
    the gradient of `weight` is accumulated in its own dtype, with one rounding per block. Deterministic.

    Example:
        >>> hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> linear_cross_entropy(hidden, weight, torch.randint(100, (6,)), label_smoothing=0.1).backward()
    """
    _check(hidden, weight, targets, bias, chunk_bytes)
    options = (label_smoothing, z_loss, softcap, reduction, num_items)
    class_weight = check_options("linear_cross_entropy", hidden, class_weight, *options)
    if in_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options = (ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    chunk_bytes = chunk_bytes or default_chunk_bytes(hidden.device.type)
    wants = [t is not None and needs_grad(t) for t in (hidden, weight, bias)]
    if not any(wants):
        arguments = (*options, _REDUCTIONS[reduction], num_items, chunk_bytes)
        return _ops.linear_cross_entropy_forward(hidden, weight, bias, targets, class_weight, *arguments, *wants)[0]
    if reduction == "none":
        return _PerRowLinearCrossEntropy.apply(hidden, weight, bias, targets, class_weight, options, chunk_bytes)
    arguments = (*options, _REDUCTIONS[reduction], num_items, chunk_bytes)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, class_weight, arguments)


def linear_cross_entropy_reference(hidden, weight, targets, *, bias=None, class_weight=None, **options):
    """The specification of `linear_cross_entropy` in plain torch."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return cross_entropy_reference(logits, targets, weight=class_weight, **options)


def _check(hidden, weight, targets, bias, chunk_bytes):
    def fail(argument, rule, got):
        raise RuntimeError(f"linear_cross_entropy: {argument} must {rule}, got {got}")

    if hidden.dim() != 2:
        fail("hidden", "have shape [N, d]", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        fail("weight", f"have shape [V, d] = [*, {hidden.shape[1]}]", list(weight.shape))
    if targets.shape != hidden.shape[:1]:
        fail("targets", f"have shape [N] = [{hidden.shape[0]}]", list(targets.shape))
    if bias is not None and bias.shape != weight.shape[:1]:
        fail("bias", f"have shape [V] = [{weight.shape[0]}]", list(bias.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            fail(name, f"be on the device of hidden ({hidden.device})", tensor.device)
        if tensor is not None and tensor.dtype != hidden.dtype and not in_autocast(hidden):
            fail(name, f"have the dtype of hidden ({hidden.dtype})", tensor.dtype)
    if targets.dtype != torch.int64:
        fail("targets", "be int64", targets.dtype)
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"linear_cross_entropy: chunk_bytes must be positive or None, got {chunk_bytes}")


def _check_targets(targets, classes, ignore_index):
    """On the CPU, where looking costs no synchronisation: before a block names its own rows instead of the caller's."""
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        got = f"{int(targets[row])} at row {row}"
        raise RuntimeError(f"linear_cross_entropy: targets must be in [0, {classes}) or {ignore_index}, got {got}")


_workspace = threading.local()


def _block(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """An uninitialised [rows, columns] tensor. CUDA's allocator reuses memory; on the CPU touching fresh pages would
    cost more than the arithmetic on them, so each thread keeps its largest block."""
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    size = rows * columns * like.element_size()
    held = getattr(_workspace, "bytes", None)
    if held is None or held.numel() < size:
        _workspace.bytes = held = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(like.dtype).view(rows, columns)


def _chunks(hidden, weight, chunk_bytes):
    """The row ranges of the blocks: equal sizes within one row, from the sizes alone."""
    rows = hidden.shape[0]
    per_chunk = max(1, chunk_bytes // max(1, weight.shape[0] * hidden.element_size()))
    count = -(-rows // per_chunk)
    bounds = [rows * i // count for i in range(count + 1)] if count else [0]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _multiply(out, a, b, add=False):
    """out = a b, or out + a b: a block per thread where that is the fastest on the CPU, else by torch's product."""
    if out.device.type == "cpu" and torch.ops.arfast.matmul_(out, a, b, add):
        return
    if add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _logits(block, hidden, weight, bias):
    if bias is not None:
        block.copy_(bias)
    _multiply(block, hidden, weight.t(), add=bias is not None)
    return block


class _Accumulator:
    """Gradients of hidden, weight and bias, block by block."""

    def __init__(self, hidden, weight, bias, wants):
        self.hidden, self.weight = hidden, weight
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        self.gradients = [hidden.new_empty(s if w else 0) for s, w in zip(shapes, wants, strict=True)]
        self.wants = wants

    def add(self, begin, end, dlogits):
        dhidden, dweight, dbias = self.gradients
        hidden = self.hidden[begin:end]
        if self.wants[0]:
            _multiply(dhidden[begin:end], dlogits, self.weight)
        if self.wants[1]:
            _multiply(dweight, dlogits.t(), hidden, add=begin > 0)
        if self.wants[2] and begin == 0:
            torch.sum(dlogits, 0, out=dbias)
        elif self.wants[2]:
            dbias += dlogits.sum(0)


def _forward(
    hidden, weight, bias, targets, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, num_items,
    chunk_bytes, want_hidden, want_weight, want_bias,
):  # fmt: skip
    _check_targets(targets, weight.shape[0], ignore_index)
    wants = (want_hidden, want_weight, want_bias)
    gradients = _Accumulator(hidden, weight, bias, wants)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, classes = hidden.shape[0], weight.shape[0]
    per_row = reduction == _REDUCTIONS["none"]
    loss = hidden.new_zeros(rows if per_row else (), dtype=wide)
    statistics = hidden.new_empty((rows, 2), dtype=wide)
    if rows == 0 and not per_row:  # the mean of nothing, and no gradient
        nothing = float("nan") if reduction == _REDUCTIONS["mean"] and num_items is None else 0.0
        return loss.fill_(nothing), statistics, *(g.zero_() for g in gradients.gradients)
    # The rows of a block are a part of all: what the mean divides by comes from all of them.
    totals = _ops.cross_entropy_totals(hidden, targets, class_weight, classes, ignore_index, reduction, num_items)
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction, num_items)
    chunks = _chunks(hidden, weight, chunk_bytes)
    for begin, end in chunks:
        block = _logits(_block(hidden, end - begin, classes), hidden[begin:end], weight, bias)
        arguments = (block, targets[begin:end], class_weight, *options)
        if any(wants):
            part, statistics[begin:end] = _ops.cross_entropy_forward_(*arguments, totals)
            gradients.add(begin, end, block)
        else:
            part, statistics[begin:end], _ = _ops.cross_entropy_forward(*arguments, False, totals)
        if per_row:
            loss[begin:end] = part
        else:
            loss += part
    return loss, statistics, *gradients.gradients


def _backward(
    dloss, hidden, weight, bias, targets, class_weight, statistics, ignore_index, label_smoothing, z_loss, softcap,
    chunk_bytes, want_hidden, want_weight, want_bias,
):  # fmt: skip
    gradients = _Accumulator(hidden, weight, bias, (want_hidden, want_weight, want_bias))
    for begin, end in _chunks(hidden, weight, chunk_bytes):
        block = _logits(_block(hidden, end - begin, weight.shape[0]), hidden[begin:end], weight, bias)
        options = (ignore_index, label_smoothing, z_loss, softcap)
        dlogits = _ops.cross_entropy_backward(
            dloss[begin:end], block, targets[begin:end], class_weight, statistics[begin:end], *options
        )
        gradients.add(begin, end, dlogits)
    if hidden.shape[0] == 0:
        return tuple(g.zero_() for g in gradients.gradients)
    return tuple(gradients.gradients)


_SHARED = "int ignore_index, float label_smoothing, float z_loss, float softcap"
_WANTS = "int chunk_bytes, bool want_hidden, bool want_weight, bool want_bias"
_library = torch.library.Library("arfast", "FRAGMENT")
_library.define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weight, "
    f"{_SHARED}, int reduction, float? num_items, {_WANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"Tensor? class_weight, Tensor statistics, {_SHARED}, {_WANTS}) -> (Tensor, Tensor, Tensor)"
)
COMPOSITES = {"linear_cross_entropy_forward": _forward, "linear_cross_entropy_backward": _backward}
for _name, _function in COMPOSITES.items():  # ops made of others, on every device
    _library.impl(_name, _function, "CompositeExplicitAutograd")


class _LinearCrossEntropy(torch.autograd.Function):
    """mean and sum: the forward pass makes the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, class_weight, arguments):
        ctx.wants = ctx.needs_input_grad[:3]
        loss, _, *gradients = _ops.linear_cross_entropy_forward(
            hidden, weight, bias, targets, class_weight, *arguments, *ctx.wants
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        gradients = (
            scaled_gradient(g, dloss) if w else None for g, w in zip(ctx.saved_tensors, ctx.wants, strict=True)
        )
        return *gradients, None, None, None


class _PerRowLinearCrossEntropy(torch.autograd.Function):
    """none: the upstream gradients of the rows are only known in the backward pass, which computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, class_weight, options, chunk_bytes):
        arguments = (*options, _REDUCTIONS["none"], None, chunk_bytes, False, False, False)
        losses, statistics, *_ = _ops.linear_cross_entropy_forward(
            hidden, weight, bias, targets, class_weight, *arguments
        )
        ctx.save_for_backward(hidden, weight, bias, targets, class_weight, statistics)
        ctx.options, ctx.chunk_bytes = options, chunk_bytes
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses):
        wants = ctx.needs_input_grad[:3]
        arguments = (*ctx.saved_tensors, *ctx.options, ctx.chunk_bytes, *wants)
        gradients = _ops.linear_cross_entropy_backward(dlosses, *arguments)
        return *(g if w else None for g, w in zip(gradients, wants, strict=True)), None, None, None, None


def _fake_gradients(hidden, weight, wants):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(s if w else 0) for s, w in zip(shapes, wants, strict=True))


@register_fake("linear_cross_entropy_forward")
def _(hidden, weight, bias, targets, class_weight, *arguments):
    reduction, wants = arguments[4], arguments[-3:]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    loss = hidden.new_empty(rows if reduction == _REDUCTIONS["none"] else (), dtype=wide)
    return loss, hidden.new_empty((rows, 2), dtype=wide), *_fake_gradients(hidden, weight, wants)


@register_fake("linear_cross_entropy_backward")
def _(dloss, hidden, weight, bias, targets, class_weight, statistics, *arguments):
    return _fake_gradients(hidden, weight, arguments[-3:])
