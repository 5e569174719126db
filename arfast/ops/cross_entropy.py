"""Label-smoothed cross-entropy over logits, with its gradient computed in the same pass.

Label smoothing: Szegedy et al. 2015, arXiv 1512.00567, section 7. z-loss: de Brebisson and Vincent 2016, arXiv
1604.08859. With eps = label_smoothing and lse = logsumexp(z), a row costs lse - (1 - eps) z_y - eps mean(z) + z_loss
lse^2, and its gradient is (1 + 2 z_loss lse) softmax(z) - eps / V - (1 - eps) onehot(y).
"""

import math

import torch

from arfast.ops._library import needs_grad, register_fake

_ops = torch.ops.arfast
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """Cross-entropy in nats: value and gradient of `torch.nn.functional.cross_entropy`, plus `z_loss * lse**2`.

    Args:
        logits: [N, V], float32, bfloat16, float16, or float64 on the CPU. Arithmetic is in float32 (float64).
        targets: [N] int64, each in [0, V) or `ignore_index`.
        weight: [V] per class, or None.
        ignore_index: rows with this target cost nothing, have a gradient of exactly 0 and do not count in the mean.
        label_smoothing: eps in [0, 1].
        z_loss: coefficient of lse**2, averaged over the rows that count.
        softcap: replaces the logits by `softcap * tanh(logits / softcap)` first.
        reduction: "mean" (over the rows that count, by their class weights; NaN when there are none, as in torch),
            "sum", or "none".
        num_items: the denominator of the mean, when it is not the number of rows here: with gradient accumulation, the
            number of targets of the whole optimizer step.
        inplace: write the gradient over the logits, which saves a tensor of their size. The logits are then lost;
            autograd reports an error if something else still needs them.

    Returns:
        The loss in float32 (float64), [] or, for reduction="none", [N].

    Raises:
        RuntimeError for tensors, ValueError for options: `cross_entropy: <argument> must <rule>, got <actual>`.

    With "mean" and "sum" the gradient is made in the forward pass, while a row is in the cache; the backward pass
    multiplies it by the upstream gradient, at no cost when that is 1 (with `inplace` it can run once). Not twice
    differentiable: use `torch.nn.functional.cross_entropy` for that. Deterministic: the same bits for every number of
    threads.

    Example:
        >>> logits = torch.randn(8, 100, requires_grad=True)
        >>> cross_entropy(logits, torch.randint(100, (8,)), label_smoothing=0.1).backward()
    """
    weight = check_options("cross_entropy", logits, weight, label_smoothing, z_loss, softcap, reduction, num_items)
    if inplace and reduction == "none":
        raise ValueError("cross_entropy: inplace must be False with reduction='none', got True")
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if not needs_grad(logits):
        return _ops.cross_entropy_forward(logits, targets, weight, *options, _REDUCTIONS[reduction], num_items, False)[
            0
        ]
    if reduction == "none":
        return _PerRowCrossEntropy.apply(logits, targets, weight, options)
    # Under torch.compile the memory planner decides what is overwritten.
    inplace = inplace and not torch.compiler.is_compiling()
    return _CrossEntropy.apply(logits, targets, weight, options, _REDUCTIONS[reduction], num_items, inplace)


def cross_entropy_reference(
    logits, targets, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean",
    num_items=None,
):  # fmt: skip
    """The specification of `cross_entropy` in plain torch."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    options = dict(weight=None if weight is None else weight.to(wide.dtype), ignore_index=ignore_index)
    losses = torch.nn.functional.cross_entropy(
        wide, targets, label_smoothing=label_smoothing, reduction="none", **options
    )
    kept = targets != ignore_index
    z_losses = torch.where(kept, z_loss * wide.logsumexp(-1).square(), 0) if z_loss else torch.zeros_like(losses)
    if reduction == "none":
        return losses + z_losses
    if reduction == "sum":
        return losses.sum() + z_losses.sum()
    if num_items is not None:
        return (losses.sum() + z_losses.sum()) / num_items
    count = kept.sum() if weight is None else options["weight"][targets[kept]].sum()
    return losses.sum() / count + z_losses.sum() / kept.sum()


def check_options(op, logits, class_weight, label_smoothing, z_loss, softcap, reduction, num_items):
    """Check the options of both cross-entropy ops; returns the class weights in the dtype of the statistics."""

    def check(argument, condition, rule, got):
        if not condition:
            raise ValueError(f"{op}: {argument} must {rule}, got {got!r}")

    check("label_smoothing", 0 <= label_smoothing <= 1, "be in [0, 1]", label_smoothing)
    check("z_loss", 0 <= z_loss < math.inf, "be finite and at least 0", z_loss)
    check("softcap", softcap is None or 0 < softcap < math.inf, "be finite and positive, or None", softcap)
    check("reduction", reduction in _REDUCTIONS, f"be one of {sorted(_REDUCTIONS)}", reduction)
    check("num_items", num_items is None or 0 < num_items < math.inf, "be finite and positive, or None", num_items)
    if class_weight is None or not class_weight.is_floating_point():
        return class_weight
    return class_weight.to(_statistics_dtype(logits))


def scaled_gradient(gradient, scale):
    """gradient * scale, without touching memory for the usual upstream gradient of exactly 1 where looking is free."""
    if scale.device.type == "cpu" and not torch.compiler.is_compiling() and scale.item() == 1:
        return gradient
    return gradient * scale


class _CrossEntropy(torch.autograd.Function):
    """mean and sum: the forward pass makes the gradient."""

    @staticmethod
    def forward(ctx, logits, targets, weight, options, reduction, num_items, inplace):
        if inplace:
            loss, _ = _ops.cross_entropy_forward_(logits, targets, weight, *options, reduction, num_items)
            torch.autograd.graph.increment_version(logits)  # autograd then reports who still needs the logits
            gradient = logits
        else:
            loss, _, gradient = _ops.cross_entropy_forward(
                logits, targets, weight, *options, reduction, num_items, True
            )
        ctx.save_for_backward(gradient)
        ctx.inplace = inplace
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (gradient,) = ctx.saved_tensors
        if ctx.inplace:
            _ops.scale_gradient_(gradient, dloss)
            torch.autograd.graph.increment_version(gradient)  # a second backward pass is refused, not scaled twice
        else:
            gradient = scaled_gradient(gradient, dloss)
        return gradient, None, None, None, None, None, None


class _PerRowCrossEntropy(torch.autograd.Function):
    """none: the upstream gradients of the rows are only known in the backward pass."""

    @staticmethod
    def forward(ctx, logits, targets, weight, options):
        losses, statistics, _ = _ops.cross_entropy_forward(
            logits, targets, weight, *options, _REDUCTIONS["none"], None, False
        )
        ctx.save_for_backward(logits, targets, weight, statistics)
        ctx.options = options
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses):
        logits, targets, weight, statistics = ctx.saved_tensors
        return _ops.cross_entropy_backward(dlosses, logits, targets, weight, statistics, *ctx.options), None, None, None


def _statistics_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _loss_shape(logits, reduction):
    return (logits.shape[0],) if reduction == _REDUCTIONS["none"] else ()


@register_fake("cross_entropy_totals")
def _(like, targets, weight, vocab_size, ignore_index, reduction, num_items):
    return like.new_empty(3, dtype=torch.float64)


@register_fake("cross_entropy_forward")
def _(
    logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, num_items, with_gradient,
    totals=None,
):  # fmt: skip
    rows, classes = logits.shape
    wide = _statistics_dtype(logits)
    gradient = logits.new_empty((rows if with_gradient else 0, classes))
    return (
        logits.new_empty(_loss_shape(logits, reduction), dtype=wide),
        logits.new_empty((rows, 2), dtype=wide),
        gradient,
    )


@register_fake("cross_entropy_forward_")
def _(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, num_items, totals=None):
    wide = _statistics_dtype(logits)
    return logits.new_empty(_loss_shape(logits, reduction), dtype=wide), logits.new_empty(
        (logits.shape[0], 2), dtype=wide
    )


@register_fake("cross_entropy_backward")
def _(dloss, logits, targets, weight, statistics, ignore_index, label_smoothing, z_loss, softcap):
    return logits.new_empty(logits.shape)


@register_fake("scale_gradient_")
def _(gradient, scale):
    return None
