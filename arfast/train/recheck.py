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
from .strategy import OneProcess


class UnrepeatableError(RuntimeError):
    """Three passes over one step gave three results; weights and optimizer are as they were before the step."""


def repeated(
    compute: Callable[[], list[Tensor]], parameters: Sequence[nn.Parameter], step: int, strategy: OneProcess
) -> list[Tensor]:
    """What ``compute`` returns and leaves as gradients, all float32, once it has done so twice with the same bits.

    Of several ranks all repeat what one of them could not: its gradients have gone into those of the others.

    Args:
        compute: sets the gradients of ``parameters``, from none, and returns losses.
        step: for the messages.
        strategy: of the run.

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
        result = [None if t is None else _local(t).clone() for t in (*losses, *(p.grad for p in parameters))]
        if any(not strategy.on_any_rank(not _same_bits(result, other)) for other in results):
            if len(results) == 2 and strategy.is_main:
                notice(f"Trainer: step {step} gave other bits in one of three passes; two that agree were taken")
            return losses
        results.append(result)
    raise UnrepeatableError(
        f"Trainer: step {step} must give the same bits twice, got three results in three passes "
        "(hardware that computes wrong, or an operation that is not deterministic); the step was not applied"
    )


def _local(tensor: Tensor) -> Tensor:
    """A tensor, or of one that is spread over ranks the memory of this one."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _same_bits(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    if [t is None for t in a] != [t is None for t in b]:
        return False
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b) if x is not None)
