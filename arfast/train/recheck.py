"""Doing the backward pass of a step again, to find arithmetic that does not repeat: silent data corruption.

A processor that computes wrong without saying so spoils a run for good (Dixit et al., arXiv:2102.11245). The ops here
are deterministic, so the same step gives the same bits; where it does not, a third pass tells which of the two was
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .notices import notice


class UnrepeatableError(RuntimeError):
    """Three passes over one step gave three results; weights and optimizer are as they were before the step."""


def repeated(compute: Callable[[], list[Tensor]], parameters: Sequence[nn.Parameter], step: int) -> list[Tensor]:
    """What ``compute`` returns and leaves as gradients, all float32, once it has done so twice with the same bits.

    Args:
        compute: sets the gradients of ``parameters``, from none, and returns losses.
        step: for the messages.

    Raises:
        UnrepeatableError: no two of three passes agree.
    """
    device = parameters[0].device
    cpu_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    results: list[list[Tensor | None]] = []
    for _ in range(3):
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)
        for parameter in parameters:
            parameter.grad = None
        losses = compute()
        result = [None if t is None else t.detach().clone() for t in (*losses, *(p.grad for p in parameters))]
        if any(_same_bits(result, other) for other in results):
            if len(results) == 2:
                notice(f"Trainer: step {step} gave other bits in one of three passes; two that agree were taken")
            return losses
        results.append(result)
    raise UnrepeatableError(
        f"Trainer: step {step} must give the same bits twice, got three results in three passes "
        "(hardware that computes wrong, or an operation that is not deterministic); the step was not applied"
    )


def _same_bits(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    if [t is None for t in a] != [t is None for t in b]:
        return False
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b) if x is not None)
