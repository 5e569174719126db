"""The vocabulary split over ranks: embedding, and label-smoothed cross-entropy of logits that no rank holds whole.

Shoeybi et al. 2019, arXiv 1909.08053, section 3. Rank r holds the logits of its V / R words, and of a row needs from
the others only

    m = max_r m_r,    s = sum_r exp(m_r - m) s_r  (s_r = sum exp(z - m_r) of its words),    z_y,    sum(z),

so four numbers per row and rank are gathered, once, and combined by everybody in the order of the ranks: one collective
instead of a maximum and three sums, and the same bits everywhere. lse = m + log s is not rounded to one number where a
difference to it is taken, which would cost the digits of m.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from arfast.ops.cross_entropy import check_options, scaled_gradient
from arfast.ops.linear_cross_entropy import default_chunk_bytes

from .collectives import Group


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, group: Group) -> Tensor:
    """Rows of this rank's part [V / R, d] of an embedding: ids [N] -> [N, d], 0 for words of other ranks."""
    local = ids - group.rank * weight.shape[0]
    absent = (local < 0) | (local >= weight.shape[0])
    return F.embedding(local.masked_fill(absent, 0), weight).masked_fill(absent[:, None], 0)


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: Group,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """`arfast.ops.linear_cross_entropy` of a head whose rows are split over the ranks of a group.

    Args:
        hidden: [N, d], the same on every rank.
        weight: [V / R, d]: words r V / R to (r + 1) V / R of rank r, the dtype of `hidden` (under autocast both are
            cast to its dtype).
        targets: int64 [N], each in [0, V) or `ignore_index`, the same on every rank.
        ignore_index, label_smoothing, z_loss, softcap, reduction, num_items: see `arfast.ops.cross_entropy`.
        chunk_bytes: bound on a block of logits in the dtype of the statistics (at least one row), of which up to three
            exist at a time; 64 MiB by default, on a GPU 1 GiB.

    Returns:
        The loss of the whole vocabulary in float32 (float64), [] or, for reduction="none", [N]; the same bits on every
        rank.

    Raises:
        RuntimeError for tensors, ValueError for options:
        `vocab_parallel_cross_entropy: <argument> must <rule>, got <actual>`.

    Gradients of `weight`, and of `hidden` this rank's part: the gradient of hidden is the sum over the ranks, which
    `copy_to` (or, with rows gathered from the ranks, `gather_rows`) before this takes. With "mean" and "sum" they are
    made in the forward pass, as linear_cross_entropy makes them. Deterministic.
    """
    _check(hidden, weight, targets, ignore_index, group, chunk_bytes)
    options = (label_smoothing, z_loss, softcap, reduction, num_items)
    check_options("vocab_parallel_cross_entropy", hidden, None, *options)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    kept = targets != ignore_index
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale, nothing = kept.to(wide), 0.0
    if reduction == "mean":
        count = scale.sum() if num_items is None else num_items
        scale, nothing = torch.where(kept, scale / count, 0), 0 / count  # NaN, as torch's mean of nothing
    plan = _Plan(group, label_smoothing, z_loss, softcap, chunk_bytes or default_chunk_bytes(device_type))
    if reduction == "none":
        return _PerRow.apply(hidden, weight, targets, scale, plan)
    return _Summed.apply(hidden, weight, targets, scale, plan) + nothing


def _check(hidden, weight, targets, ignore_index, group, chunk_bytes):
    def fail(argument, rule, got):
        raise RuntimeError(f"vocab_parallel_cross_entropy: {argument} must {rule}, got {got}")

    if hidden.dim() != 2:
        fail("hidden", "have shape [N, d]", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        fail("weight", f"have shape [V / R, d] = [*, {hidden.shape[1]}]", list(weight.shape))
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        fail("weight", f"have the dtype of hidden ({hidden.dtype})", weight.dtype)
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        fail("targets", f"be int64 [N] = [{hidden.shape[0]}]", f"{targets.dtype} {list(targets.shape)}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"vocab_parallel_cross_entropy: chunk_bytes must be positive or None, got {chunk_bytes}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        classes = weight.shape[0] * group.size
        wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            fail("targets", f"be in [0, {classes}) or {ignore_index}", f"{int(targets[row])} at row {row}")


class _Plan:
    """What is the same for every block of rows."""

    def __init__(self, group: Group, label_smoothing: float, z_loss: float, softcap: float | None, chunk_bytes: int):
        self.group, self.chunk_bytes = group, chunk_bytes
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap

    def chunks(self, hidden: Tensor, weight: Tensor) -> list[slice]:
        rows = max(1, self.chunk_bytes // (weight.shape[0] * max(4, hidden.element_size())))
        return [slice(begin, begin + rows) for begin in range(0, hidden.shape[0], rows)]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """This rank's logits [n, V / R] in the dtype of the statistics, softcap applied."""
        logits = hidden @ weight.t()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide if self.softcap is None else wide.div_(self.softcap).tanh_().mul_(self.softcap)

    def local(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Column [n] of every target in this rank's logits, 0 where another rank has it, and whether this one has."""
        column = targets - self.group.rank * size
        own = (column >= 0) & (column < size)
        return column.masked_fill(~own, 0)[:, None], own[:, None]

    def losses(self, logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(loss times scale [n], (m, log s) [2, n]) of the whole vocabulary; the loss is 0 where the scale is 0."""
        column, own = self.local(targets, logits.shape[1])
        target_logit = logits.gather(1, column).masked_fill(~own, 0)[:, 0]
        largest = logits.amax(1)
        largest.masked_fill_(largest == -math.inf, torch.finfo(largest.dtype).min)
        summed = (logits - largest[:, None]).exp_().sum(1)
        statistics = torch.stack([largest, summed, target_logit, logits.sum(1)])  # [4, n]
        maxima, summed, target_logits, sums = self.group.gather(statistics).unbind(1)  # [R, n] each
        m = maxima.amax(0)
        log_s = (summed * (maxima - m).exp()).sum(0).log()
        loss = log_s + (m - target_logits.sum(0)) + self.z_loss * (m + log_s).square()
        if self.label_smoothing:
            mean = sums.sum(0) / (logits.shape[1] * self.group.size)
            loss = loss + self.label_smoothing * (target_logits.sum(0) - mean)
        return torch.where(scale != 0, loss * scale, 0), torch.stack([m, log_s])

    def gradient_(self, logits: Tensor, targets: Tensor, normalizer: Tensor, scale: Tensor) -> Tensor:
        """Overwrites this rank's logits with their gradient: rows times scale."""
        column, own = self.local(targets, logits.shape[1])
        slope = None if self.softcap is None else 1 - (logits / self.softcap).square()
        m, log_s = normalizer[:, :, None]
        gradient = logits.sub_(m).sub_(log_s).exp_().mul_(1 + 2 * self.z_loss * (m + log_s))
        gradient.sub_(self.label_smoothing / (logits.shape[1] * self.group.size))
        gradient.scatter_add_(1, column, (self.label_smoothing - 1) * own.to(logits.dtype))
        if slope is not None:
            gradient.mul_(slope)
        return gradient.mul_(scale[:, None]).masked_fill_((scale == 0)[:, None], 0)


class _Summed(torch.autograd.Function):
    """The sum of scale * loss over the rows: the forward pass makes the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, plan):
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        loss = scale.new_zeros(())
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight) if wants_weight else None
        for rows in plan.chunks(hidden, weight):
            logits = plan.logits(hidden[rows], weight)
            losses, normalizer = plan.losses(logits, targets[rows], scale[rows])
            loss += losses.sum()
            if wants_hidden or wants_weight:
                gradient = plan.gradient_(logits, targets[rows], normalizer, scale[rows]).to(hidden.dtype)
                _accumulate(dhidden, dweight, rows, gradient, hidden, weight)
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        gradients = (None if g is None else scaled_gradient(g, dloss) for g in ctx.saved_tensors)
        return *gradients, None, None, None


class _PerRow(torch.autograd.Function):
    """A loss per row, whose upstream gradients only the backward pass knows: it computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, plan):
        parts = [
            plan.losses(plan.logits(hidden[rows], weight), targets[rows], scale[rows])
            for rows in plan.chunks(hidden, weight)
        ]
        losses, normalizers = zip(*parts) if parts else ([scale.new_empty(0)], [scale.new_empty(2, 0)])
        ctx.save_for_backward(hidden, weight, targets, scale, torch.cat(normalizers, 1))
        ctx.plan = plan
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses):
        hidden, weight, targets, scale, normalizers = ctx.saved_tensors
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        scale = scale * dlosses
        for rows in ctx.plan.chunks(hidden, weight):
            logits = ctx.plan.logits(hidden[rows], weight)
            gradient = ctx.plan.gradient_(logits, targets[rows], normalizers[:, rows], scale[rows]).to(hidden.dtype)
            _accumulate(dhidden, dweight, rows, gradient, hidden, weight)
        return dhidden, dweight, None, None, None


def _accumulate(dhidden, dweight, rows, gradient, hidden, weight):
    if dhidden is not None:
        torch.mm(gradient, weight, out=dhidden[rows])
    if dweight is not None:
        dweight.addmm_(gradient.t(), hidden[rows])
