"""The auxiliary losses of a router: load balancing (Fedus et al. 2021, arXiv 2101.03961, equation 4) and the z-loss
(Zoph et al. 2022, arXiv 2202.08906, equation 5)."""

import torch

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.moe_routing import Routing

_ops = torch.ops.arfast


def load_balancing_loss(
    router_logits: torch.Tensor, routing: Routing, *, normalize: str = "switch", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """E * sum_e f_e P_e: f_e the fraction of choices (or tokens) that expert e got, P_e its mean softmax probability.

    Args:
        router_logits: [T, E] float32, bfloat16, float16, or float64 on the CPU; what `routing` was made of.
        routing: from `moe_route`.
        normalize: "switch" divides the choices by T * K, so that balance gives 1; "hf" divides them by T, so that
            balance gives K, as transformers' Mixtral counts.
        mask: [T], False (0) for tokens that do not count, such as padding; or None.

    Returns:
        float32 scalar (float64 for float64 logits); 0 when no token counts, NaN when one that counts has no finite
        log-sum-exp. Gradient of router_logits alone. Deterministic: the same bits for every number of threads.

    Raises:
        RuntimeError: `load_balancing_loss: <argument> must <rule>, got <actual>`, or the same of `router_losses`, the
            op of both losses.

    Example:
        >>> logits = torch.zeros(6, 4)
        >>> load_balancing_loss(logits, moe_route(logits, 4))
        tensor(1.)
    """
    if normalize not in ("switch", "hf"):
        raise RuntimeError(f"load_balancing_loss: normalize must be switch or hf, got {normalize}")
    divisor = routing.expert_ids.shape[1] if normalize == "switch" else 1
    keep = _checked_mask("load_balancing_loss", router_logits, mask)
    return _losses(router_logits, routing.expert_ids, keep, float(divisor))[0]


def router_losses(router_logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """`load_balancing_loss` with normalize="hf" and `router_z_loss`, of all tokens, in one pass over the logits.

    Example:
        >>> logits = torch.zeros(6, 1)
        >>> router_losses(logits, moe_route(logits, 1))
        (tensor(1.), tensor(0.))
    """
    return _losses(router_logits, routing.expert_ids, None, 1.0)


def router_z_loss(router_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of the squared log-sum-exp of their router logits [T, E].

    Args:
        router_logits: [T, E] float32, bfloat16, float16, or float64 on the CPU.
        mask: [T], False (0) for tokens that do not count; or None.

    Returns:
        float32 scalar (float64 for float64 logits); 0 when no token counts. Deterministic.

    Raises:
        RuntimeError: `router_z_loss: <argument> must <rule>, got <actual>`, or the same of `router_losses`.

    Example:
        >>> router_z_loss(torch.zeros(5, 1))
        tensor(0.)
    """
    return _losses(router_logits, None, _checked_mask("router_z_loss", router_logits, mask), 1.0)[1]


def load_balancing_loss_reference(router_logits, routing, *, normalize="switch", mask=None):
    """The specification of `load_balancing_loss` in plain torch."""
    wide, keep = _kept(router_logits, mask)
    num_experts, top_k = wide.shape[1], routing.expert_ids.shape[1]
    num_tokens = keep.sum().clamp(min=1)
    probability = (wide.softmax(-1) * keep[:, None]).sum(0) / num_tokens
    ones = keep.to(wide.dtype).repeat_interleave(top_k)
    choices = wide.new_zeros(num_experts).index_add(0, routing.expert_ids.flatten(), ones)
    fraction = choices / (num_tokens * (top_k if normalize == "switch" else 1))
    return num_experts * (fraction * probability).sum()


def router_z_loss_reference(router_logits, mask=None):
    """The specification of `router_z_loss` in plain torch."""
    wide, keep = _kept(router_logits, mask)
    return (wide.logsumexp(-1).square() * keep).sum() / keep.sum().clamp(min=1)


def _kept(router_logits, mask):
    """Wide logits, zeros for tokens that do not count, and which do: 0 * NaN would reach the others."""
    keep = torch.ones_like(router_logits[:, 0], dtype=torch.bool) if mask is None else mask != 0
    wide = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    return wide.masked_fill(~keep[:, None], 0), keep


def _checked_mask(op, router_logits, mask):
    """bool [T] or None."""
    if mask is None:
        return None
    if mask.shape != router_logits.shape[:1]:
        raise RuntimeError(f"{op}: mask must have shape [T] = [{router_logits.shape[0]}], got {list(mask.shape)}")
    return mask != 0


def _losses(router_logits, expert_ids, mask, divisor):
    """(load-balancing loss, z-loss)."""
    if needs_grad(router_logits):
        return _RouterLosses.apply(router_logits, expert_ids, mask, divisor)
    return _ops.router_losses_forward(router_logits, expert_ids, mask, divisor)[:2]


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, router_logits, expert_ids, mask, divisor):
        balance, z, *saved = _ops.router_losses_forward(router_logits, expert_ids, mask, divisor)
        ctx.save_for_backward(router_logits, mask, *saved)
        ctx.set_materialize_grads(False)
        return balance, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dbalance, dz):
        return _ops.router_losses_backward(dbalance, dz, *ctx.saved_tensors), None, None, None


@register_fake("router_losses_forward")
def _(router_logits, expert_ids, mask, divisor):
    tokens, experts = router_logits.shape
    dtype = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    wide = [router_logits.new_empty(shape, dtype=dtype) for shape in ((), (), (experts,), (tokens,))]
    return *wide, router_logits.new_empty(1, dtype=torch.int32)


@register_fake("router_losses_backward")
def _(dbalance, dz, router_logits, mask, fractions, lse, num_counted):
    return router_logits.new_empty(router_logits.shape)
