"""Everything that a training run can be told, in one flat dataclass that refuses bad values by name."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

from .recipes import RECIPES
from .schedule import SHAPES
from .stages import Stages

PACKINGS = ("contiguous", "documents", "padded")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
NONFINITE_POLICIES = ("stop", "skip", "rewind")
SPIKE_POLICIES = ("ignore", "report", "rewind")
SCHEDULED_SAMPLING_SHAPES = ("linear", "sigmoid")
LOGS = ("tensorboard",)
_WARMUP_SHARE = 0.02
_DECAY_SHARE = 0.2  # of a constant rate: Haegele et al., arXiv:2405.18392, section 3


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a `Trainer`. What changes during a run (learning rate, batch size, length) is measured in tokens.

    A token is one input position, ``batch_size * seqlen`` of them per optimizer step, whether or not it is a target.
    The data set has rows of ``seqlen`` tokens, the longest length; while ``seqlen_ramp`` says that sequences are
    shorter, a row is cut into that many of them, so that the tokens of a step, and of a micro-batch, stay the same.

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
    batch_size: int = 8  # rows of seqlen tokens per optimizer step
    micro_batch_size: int | None = None  # rows per forward and backward; None: batch_size
    batch_ramp: tuple = ()  # [from_tokens, batch_size] of every stage; the last one has batch_size
    seqlen_ramp: tuple = ()  # [from_tokens, seqlen] or [from_tokens, seqlen, rope_theta]; the last one has seqlen
    packing: str = "contiguous"

    learning_rate: float = 1e-3  # at the end of the warm-up
    schedule: str = "cosine"  # from there: "cosine" or "linear" to the floor, or "constant"
    warmup_tokens: int | None = None  # None: 2 % of the run
    decay_tokens: int | None = None  # at the end, in a line to zero; None: 20 % of a constant schedule, 0 of others
    final_lr_ratio: float = 0.1  # the floor is final_lr_ratio * learning_rate

    optimizer: str = "adamw"  # or "muon" for matrices, AdamW for the rest: see arfast.train.optimizer
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.1
    decay_embeddings: bool = True  # weight decay for the embedding too, and with it for a tied head
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0  # None: no clipping

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    # Probability that an input token is the model's own prediction, at its peak: see arfast.train.scheduled_sampling.
    scheduled_sampling: float = 0.0
    scheduled_sampling_shape: str = "linear"  # from 0 to the peak: "linear" or "sigmoid"
    scheduled_sampling_tokens: int | None = None  # until the peak; None: the whole run

    router_bias_rate: float = 1e-3  # step of the experts' biases, of a model with router_bias: see arfast.nn.moe

    dtype: str = "float32"  # of activations and gradients; the weights that the optimizer sees are always float32
    activation_checkpointing: bool = False  # keep the input of each layer alone, and compute it again in the backward
    compile: bool = False  # torch.compile
    cuda_graph: bool = False  # launch forward and backward as a whole; their memory stays taken

    # A NaN or Inf in loss or gradients: stop, skip the step (three in a row stop), or rewind. A loss far above those
    # before it: see arfast.train.spikes. Rewind: go back at least so many steps, to a checkpoint, and leave out what
    # was read before the fault was seen.
    on_nonfinite: str = "stop"
    on_spike: str = "report"
    spike_window: int = 200  # steps that a spike is measured against
    rewind_steps: int = 100
    recheck_every: int = 0  # steps; those are computed twice and must give the same bits: see arfast.train.recheck

    peak_flops: float | None = None  # of the device, per second, for mfu; None: measured at the start
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

    log: tuple[str, ...] = ()  # beside metrics.jsonl: "tensorboard"
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, _as_tuple(getattr(self, field.name)))
        self._check_types()
        self._check_values()

    @classmethod
    def recipe(cls, name: str, **overrides: Any) -> TrainConfig:
        """A named recipe: one of `recipes()`, with any field overridden. See arfast.train.recipes for their sources.

        >>> [stage.tokens_per_step for stage in TrainConfig.recipe("llama3-405b").stages]
        [4194304, 8388608, 16777216, 16777216, 16777216, 16777216, 16777216]
        """
        if name not in RECIPES:
            raise ValueError(f"TrainConfig: recipe must be one of {', '.join(RECIPES)}, got {name!r}")
        return cls(**{**RECIPES[name], **overrides})

    @staticmethod
    def recipes() -> tuple[str, ...]:
        """Names that `recipe` takes."""
        return tuple(RECIPES)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from plain values (a JSON file); unknown names are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"TrainConfig: field must be one of {', '.join(sorted(names))}, got {unknown[0]!r:.100}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {field.name: _as_list(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @functools.cached_property
    def stages(self) -> Stages:
        """Batch size, sequence length and rotary base at every point of the run, and its length."""
        ramps, sizes = (self.batch_ramp, self.seqlen_ramp), (self.batch_size, self.seqlen)
        return Stages(*ramps, *sizes, self.max_tokens, self.max_steps)

    @property
    def tokens_per_step(self) -> int:
        """Of the last stage."""
        return self.batch_size * self.seqlen

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages.num_steps

    @property
    def total_tokens(self) -> int:
        return self.stages.total_tokens

    @property
    def num_warmup_tokens(self) -> int:
        return round(_WARMUP_SHARE * self.total_tokens) if self.warmup_tokens is None else self.warmup_tokens

    @property
    def num_decay_tokens(self) -> int:
        share = _DECAY_SHARE if self.schedule == "constant" else 0.0
        return round(share * self.total_tokens) if self.decay_tokens is None else self.decay_tokens

    @property
    def num_scheduled_sampling_tokens(self) -> int:
        tokens = self.scheduled_sampling_tokens
        return self.total_tokens if tokens is None else tokens

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, _, optional = str(field.type).partition(" | ")
            if value is None and optional:
                continue
            if kind == "tuple":  # a ramp, whose entries are checked by its schedule
                ok, kind = (
                    isinstance(value, tuple) and all(isinstance(item, tuple) for item in value),
                    "a list of lists",
                )
            elif kind.startswith("tuple"):
                ok, kind = isinstance(value, tuple) and all(isinstance(item, str) for item in value), "a list of str"
            elif kind == "float":
                ok = isinstance(value, (int, float)) and not isinstance(value, bool)
                ok = ok and abs(value) <= sys.float_info.max  # False for NaN, and takes an int of any size
                kind = "a finite float"
            else:
                # bool is a subclass of int: compared by exact type so that batch_size=True is an error.
                ok = type(value).__name__ == kind
                ok, kind = (ok and abs(value) < 2**63, "int below 2**63") if kind == "int" else (ok, kind)
            if not ok:
                raise ValueError(f"TrainConfig: {field.name} must be {kind}, got {value!r:.200}")

    def _check_values(self) -> None:
        if self.max_tokens is None and self.max_steps is None:
            raise ValueError("TrainConfig: max_tokens must be given (or max_steps), got neither")
        self._require("output_dir", self.output_dir != "", "not empty")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        for name in ("max_tokens", "max_steps", "batch_size", "micro_batch_size", "eval_batch_size", "eval_tokens"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        self._require("seqlen", self.seqlen >= 2, ">= 2")
        smallest = min(stage.batch_size for stage in self.stages)
        self._require("micro_batch_size", (self.micro_batch_size or 1) <= smallest, f"<= batch_size={smallest}")
        self._require("packing", self.packing in PACKINGS, f"one of {', '.join(PACKINGS)}")
        self._require("learning_rate", self.learning_rate > 0, "> 0")
        self._require("schedule", self.schedule in SHAPES, f"one of {', '.join(SHAPES)}")
        self._require("final_lr_ratio", 0 <= self.final_lr_ratio <= 1, "in [0, 1]")
        self._require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require("weight_decay", self.weight_decay >= 0, ">= 0")
        self._require("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._require("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._require("epsilon", self.epsilon > 0, "> 0")
        self._require("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "> 0")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("z_loss", self.z_loss >= 0, ">= 0")
        self._require("scheduled_sampling", 0 <= self.scheduled_sampling <= 1, "in [0, 1]")
        self._require("scheduled_sampling", not (self.scheduled_sampling and self.cuda_graph), "0 with cuda_graph")
        shapes = SCHEDULED_SAMPLING_SHAPES
        self._require(
            "scheduled_sampling_shape", self.scheduled_sampling_shape in shapes, f"one of {', '.join(shapes)}"
        )
        self._require("scheduled_sampling_tokens", (self.scheduled_sampling_tokens or 0) >= 0, ">= 0")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._require("router_bias_rate", self.router_bias_rate >= 0, ">= 0")
        for name, policies in (("on_nonfinite", NONFINITE_POLICIES), ("on_spike", SPIKE_POLICIES)):
            self._require(name, getattr(self, name) in policies, f"one of {', '.join(policies)}")
        self._require("compile", not (self.compile and self.cuda_graph), "False with cuda_graph")
        self._require("peak_flops", self.peak_flops is None or self.peak_flops > 0, "> 0")
        self._require("log", set(self.log) <= set(LOGS), f"of {', '.join(LOGS)}")
        for name in ("recheck_every", "save_every", "eval_every", "sample_every", "keep_last", "sample_temperature"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("log_every", "sample_tokens", "rewind_steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require("watchdog_seconds", self.watchdog_seconds is None or self.watchdog_seconds > 0, "> 0")
        self._require("spike_window", self.spike_window >= 8, ">= 8")
        self._check_rewind()
        total = self.total_tokens
        self._require("warmup_tokens", 0 <= (self.warmup_tokens or 0) <= total, f"in [0, total_tokens={total}]")
        rest = total - self.num_warmup_tokens
        self._require("decay_tokens", 0 <= (self.decay_tokens or 0) <= rest, f"in [0, {rest}] after the warm-up")

    @property
    def rewinds(self) -> bool:
        """Whether a run may go back to an earlier checkpoint by itself."""
        return "rewind" in (self.on_nonfinite, self.on_spike)

    def _check_rewind(self) -> None:
        """The checkpoint to go back to must be one of those that are kept."""
        if self.rewinds and self.keep_last:
            reach = self.save_every * (self.keep_last - 1)
            rule = f"<= save_every * (keep_last - 1) = {reach}, as far back as checkpoints are kept"
            self._require("rewind_steps", self.rewind_steps <= reach, rule)

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"TrainConfig: {name} must be {rule}, got {getattr(self, name)!r:.200}")


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    return list(map(_as_list, value)) if isinstance(value, tuple) else value
