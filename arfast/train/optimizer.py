"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) on float32 weights, whatever computes gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: matrices decay, vectors (norm weights, biases) do not.

    A matrix is anything with two or more dimensions: also a stack of experts, and also the embedding, tied or not, as
    in nanoGPT and most recipes since; OLMo 2 (arXiv:2501.00656) leaves the embedding out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters),
    )


class WorkingCopy:
    """A low-precision twin of a model, which runs forward and backward for the float32 weights that are optimized.

    One cast per weight and step, instead of one per use as under autocast, and no operator runs in mixed precision.
    Each gradient is added to the float32 gradient of its master weight, and freed, as soon as it is complete, so that
    accumulation over micro-batches rounds once per micro-batch and the memory of low-precision gradients stays one
    tensor. Measured on a CPU (2026-11), a step of 2048 tokens: as fast as autocast with 4M parameters (160 and 161 ms),
    3 % faster with 11M (387 and 398 ms); casting the weights is below 1 % of a step.
    """

    def __init__(self, masters: nn.Module, dtype: torch.dtype) -> None:
        # Frozen parameters that have the dtype already are not copied but shared.
        shared = [p for p in masters.parameters() if not p.requires_grad and p.dtype == dtype]
        self.module = copy.deepcopy(masters, {id(parameter): parameter for parameter in shared})
        pairs = zip(masters.parameters(), self.module.parameters(), strict=True)
        self._pairs = [(master, working) for master, working in pairs if master is not working]
        for master, working in self._pairs:
            # Parameters only: a buffer such as the rotary frequencies keeps its precision.
            working.data = master.detach().to(dtype)
            if working.requires_grad:
                working.register_post_accumulate_grad_hook(self._move_gradient_to(master))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights over the working ones."""
        torch._foreach_copy_([working for _, working in self._pairs], [master for master, _ in self._pairs])

    @staticmethod
    def _move_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
        buffer = torch.empty_like(master, requires_grad=False)

        def move(working: Tensor) -> None:
            if master.grad is None:
                master.grad = buffer.copy_(working.grad)
            else:
                master.grad.add_(working.grad)
            working.grad = None

        return move


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, float32 scalar; NaN or Inf exactly when a gradient holds one
    (or when the sum of squares overflows, which is as bad)."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by ``factor``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
