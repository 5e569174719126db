"""How fast a run is, against what its device can do: model FLOPs utilisation with its convention said.

mfu = FLOPs that the model needs for a token * tokens per second / peak FLOPs per second. The model's FLOPs are 6 per
weight that multiplies a token, and attention to the keys that a token sees, not to masked ones (see
`CausalLMConfig.flops_per_token`); recomputed activations do not count (Chowdhery et al., arXiv:2204.02311, appendix B).
The peak is what a large matrix product in the run's dtype reaches here, or what `TrainConfig.peak_flops` says.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from arfast.peaks import matmul_rate

from .config import TrainConfig
from .engine import TrainState
from .notices import notice


def best_dtype() -> str:
    """For the arithmetic here: "bfloat16" where a GPU or the CPU has instructions for it, else "float32"."""
    instructions = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_available() or any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if fast else "float32"


def flops_per_token(model: nn.Module, seqlen: int) -> float | None:
    """Of forward and backward pass; None for a model whose configuration does not say."""
    count = getattr(getattr(model, "config", None), "flops_per_token", None)
    return None if count is None else count(seqlen)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Time, tokens and FLOPs since the last row of the log."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, num_ranks: int = 1) -> None:
        self._model, self._config, self._device = model, config, device
        self.peak = None  # of all ranks
        if flops_per_token(model, config.seqlen) is not None:
            of_one = config.peak_flops or matmul_rate(device, getattr(torch, config.dtype))
            self.peak = num_ranks * of_one
            given = "as given" if config.peak_flops else "as a matrix product reaches here"
            several = f"{num_ranks} times " if num_ranks > 1 else ""
            notice(
                f"Trainer: mfu is of {several}{of_one / 1e12:.3g} TFLOP/s, {given}; a token of {config.seqlen} takes "
                f"{flops_per_token(model, config.seqlen) / 1e6:.4g} MFLOP: 6 per weight that multiplies it, "
                "and attention to the keys it sees"
            )
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._waiting = self._flops = 0.0
        self._tokens = 0

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Count this time as training."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count this time, within training, as waiting for data."""
        start = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - start

    def count(self, tokens: int, seqlen: int) -> None:
        self._tokens += tokens
        if self.peak is not None:
            self._flops += tokens * flops_per_token(self._model, seqlen)

    def row(self, state: TrainState) -> dict[str, Any]:
        """Figures since the last call.

        tokens_per_second; data_wait: share of the time; memory_bytes: see `peak_memory`; seconds_left: at this speed;
        mfu: where the model says how many FLOPs it needs.
        """
        seconds = max(self._seconds, 1e-9)
        speed = self._tokens / seconds
        row = {
            "tokens_per_second": round(speed, 1),
            "data_wait": round(self._waiting / seconds, 4),
            "memory_bytes": peak_memory(self._device),
            "seconds_left": round((self._config.total_tokens - state.tokens) / max(speed, 1e-9), 3),
        }
        if self.peak is not None:
            row["mfu"] = round(self._flops / seconds / self.peak, 4)
        self._reset()
        return row
