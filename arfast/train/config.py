"""Everything that a training run can be told, in one flat dataclass that refuses bad values by name."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

PACKINGS = ("contiguous", "documents", "padded")
DTYPES = ("float32", "bfloat16")
NONFINITE_POLICIES = ("stop", "skip")
_WARMUP_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a `Trainer`. Everything that changes during a run (the learning rate) is measured in tokens.

    A token is one input position, ``batch_size * seqlen`` of them per optimizer step, whether or not it is a target.

    >>> config = TrainConfig(max_tokens=4_000_000, seqlen=256, batch_size=16, learning_rate=1e-3)
    >>> config.tokens_per_step, config.num_steps
    (4096, 977)
    """

    output_dir: str = "runs/default"
    resume: bool = True  # continue from the newest checkpoint in output_dir; False requires that there is none
    seed: int = 0  # order of the samples; the model has its own

    # Length of the run: the first limit reached ends it, and at least one of them is required.
    max_tokens: int | None = None
    max_steps: int | None = None

    seqlen: int = 512
    batch_size: int = 8  # sequences per optimizer step
    micro_batch_size: int | None = None  # sequences per forward and backward; None: batch_size
    packing: str = "contiguous"

    learning_rate: float = 1e-3  # at the end of the warm-up
    warmup_tokens: int | None = None  # None: 2 % of the run
    final_lr_ratio: float = 0.1  # the cosine ends at final_lr_ratio * learning_rate
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0  # None: no clipping

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    dtype: str = "float32"  # of activations and gradients; the weights that the optimizer sees are always float32
    on_nonfinite: str = "stop"  # a NaN or Inf in loss or gradients: stop, or skip the step (three in a row stop)
    cuda_graph: bool = False  # launch forward and backward as a whole; their memory stays taken
    keep_freed_memory: bool = True  # process-wide: see arfast.train.memory

    # Periods in optimizer steps; 0: only at the end of the run.
    save_every: int = 500
    eval_every: int = 0
    sample_every: int = 0
    log_every: int = 1

    keep_last: int = 2  # checkpoints; 0: all of them
    async_save: bool = False  # write checkpoints from a copy in memory while training goes on: see arfast.train.saving
    watchdog_seconds: float | None = None  # without a step for so long, print the stacks of all threads; None: never
    eval_batch_size: int | None = None  # None: micro_batch_size
    eval_tokens: int | None = None  # at most so many targets per evaluation during the run; the last one is complete

    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    sample_temperature: float = 0.8

    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        if isinstance(self.sample_prompts, list):
            object.__setattr__(self, "sample_prompts", tuple(self.sample_prompts))
        self._check_types()
        self._check_values()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from plain values (a JSON file); unknown names are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"TrainConfig: field must be one of {', '.join(sorted(names))}, got {unknown[0]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "sample_prompts": list(self.sample_prompts)}

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seqlen

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        by_tokens = math.inf if self.max_tokens is None else -(-self.max_tokens // self.tokens_per_step)
        by_steps = math.inf if self.max_steps is None else self.max_steps
        return int(min(by_tokens, by_steps))

    @property
    def total_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    @property
    def num_warmup_tokens(self) -> int:
        return round(_WARMUP_SHARE * self.total_tokens) if self.warmup_tokens is None else self.warmup_tokens

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, _, optional = str(field.type).partition(" | ")
            if value is None and optional:
                continue
            if kind.startswith("tuple"):
                ok, kind = isinstance(value, tuple) and all(isinstance(item, str) for item in value), "a list of str"
            elif kind == "float":
                ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                kind = "a finite float"
            else:
                # bool is a subclass of int: compared by exact type so that batch_size=True is an error.
                ok = type(value).__name__ == kind
            if not ok:
                raise ValueError(f"TrainConfig: {field.name} must be {kind}, got {value!r}")

    def _check_values(self) -> None:
        if self.max_tokens is None and self.max_steps is None:
            raise ValueError("TrainConfig: max_tokens must be given (or max_steps), got neither")
        self._require("output_dir", self.output_dir != "", "not empty")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        for name in ("max_tokens", "max_steps", "batch_size", "micro_batch_size", "eval_batch_size", "eval_tokens"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        self._require("seqlen", self.seqlen >= 2, ">= 2")
        self._require("micro_batch_size", (self.micro_batch_size or 1) <= self.batch_size, "<= batch_size")
        self._require("packing", self.packing in PACKINGS, f"one of {', '.join(PACKINGS)}")
        self._require("learning_rate", self.learning_rate > 0, "> 0")
        self._require("final_lr_ratio", 0 <= self.final_lr_ratio <= 1, "in [0, 1]")
        self._require("weight_decay", self.weight_decay >= 0, ">= 0")
        self._require("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._require("epsilon", self.epsilon > 0, "> 0")
        self._require("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "> 0")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("z_loss", self.z_loss >= 0, ">= 0")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        policies = ", ".join(NONFINITE_POLICIES)
        self._require("on_nonfinite", self.on_nonfinite in NONFINITE_POLICIES, f"one of {policies}")
        for name in ("save_every", "eval_every", "sample_every", "keep_last", "sample_temperature"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("log_every", "sample_tokens"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require("watchdog_seconds", self.watchdog_seconds is None or self.watchdog_seconds > 0, "> 0")
        self._require("warmup_tokens", 0 <= (self.warmup_tokens or 0) <= self.total_tokens, "in [0, total_tokens]")

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"TrainConfig: {name} must be {rule}, got {getattr(self, name)!r}")
