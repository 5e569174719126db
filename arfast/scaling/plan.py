"""A sweep on paper: for each compute budget models of several sizes, each trained for as long as the budget lasts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arfast.data.checks import check_integer, one_line
from arfast.data.files import read_file, write_file
from arfast.models import CausalLMConfig
from arfast.models.checks import is_number
from arfast.train import TrainConfig

from .shapes import model_shape, non_embedding_parameters

PLAN_NAME = "plan.json"
_FORMAT = "arfast-sweep-1"
_MAX_BYTES = 16 << 20
_MIN_STEPS = 50
_EVAL_TOKENS = 4096  # per batch: rows of a small batch alone would cost more than a small run


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    name: of its directory. budget: FLOPs that were asked for; flops: those it takes, by
    `CausalLMConfig.flops_per_token`. parameters: all, a tied head once. model, train: fields of `CausalLMConfig` and
    `TrainConfig`. held_out: the run that the others are to predict. epochs: how often it sees the data.
    """

    name: str
    budget: float
    held_out: bool
    parameters: int
    non_embedding_parameters: int
    tokens: int
    flops: float
    epochs: float | None
    model: dict[str, Any]
    train: dict[str, Any]

    def model_config(self) -> CausalLMConfig:
        return CausalLMConfig(**self.model)

    def train_config(self, output_dir: str, **options: Any) -> TrainConfig:
        return TrainConfig(**self.train, output_dir=output_dir, **options)

    def check(self) -> None:
        """ValueError unless this is a run that can be done: a plan may come from anybody."""
        if self.name != Path(self.name).name or self.name.startswith(".") or "\0" in self.name:
            raise ValueError(f"a run whose name is no file name: {self.name!r}")
        for name in ("budget", "flops", "parameters", "non_embedding_parameters", "tokens", "epochs"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0) and not (name == "epochs" and value is None):
                raise ValueError(f"{self.name}: {name} that is no number above 0: {value!r:.100}")
        if not isinstance(self.held_out, bool):
            raise ValueError(f"{self.name}: held_out that is neither true nor false")
        if self.model_config().num_parameters() != self.parameters:
            raise ValueError(f"{self.name}: parameters that are not those of its model")
        self.train_config(self.name, progress=False)


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep, in ascending order of their cost, and what they were planned from.

    data: of a prepared data set, a path that starts at the directory of the plan.
    """

    settings: dict[str, Any]
    data: str
    runs: tuple[PlannedRun, ...]

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``plan.json``; the same plan gives the same bytes.

        Raises:
            ValueError: another plan is there.
        """
        path = Path(directory) / PLAN_NAME
        content = (json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n").encode()
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"SweepPlan: directory must be without another plan, got {str(path)!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        return path

    def table(self) -> str:
        """The runs, for people."""
        head = ("run", "FLOPs", "parameters", "non-embedding", "tokens", "D / N", "C / 6ND", "epochs", "peak rate")
        rows = [head]
        for run in self.runs:
            ratios = (run.tokens / run.parameters, run.flops / (6 * run.parameters * run.tokens))
            epochs = "" if run.epochs is None else f"{run.epochs:.2f}"
            counts = (f"{run.parameters:,}", f"{run.non_embedding_parameters:,}", f"{run.tokens:,}")
            cells = (run.name, f"{run.flops:.3g}", *counts, *(f"{ratio:.2f}" for ratio in ratios), epochs)
            rows.append((*cells, f"{run.train_config(run.name).learning_rate:g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SweepPlan:
        """Read ``plan.json`` of a directory.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged.
        """
        path = Path(directory) / PLAN_NAME
        if not path.exists():
            raise FileNotFoundError(f"SweepPlan: directory must hold a {PLAN_NAME}, got {str(directory)!r}")
        try:
            record = json.loads(read_file(path, _MAX_BYTES))
            if record["format"] != _FORMAT:
                raise ValueError(f"format {record['format']!r} instead of {_FORMAT!r}")
            runs = tuple(PlannedRun(**run) for run in record["runs"])
            for run in runs:
                run.check()
            if len({run.name for run in runs}) != len(runs):
                raise ValueError("names of runs that are not different")
            if not isinstance(record["data"], str) or not isinstance(record["settings"], dict):
                raise ValueError("data that is no path, or settings that are no record")
            return cls(record["settings"], record["data"], runs)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"SweepPlan: {str(path)!r} must be an intact plan, got: {one_line(error)}") from None


def plan_sweep(
    budgets: Sequence[float],
    *,
    vocab_size: int,
    target: float | None = None,
    num_sizes: int = 4,
    size_range: float = 2.0,
    tokens_per_parameter: float = 12.0,
    seqlen: int = 128,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    dtype: str = "float32",
    data: str = "data",
    data_tokens: int | None = None,
    special_tokens: dict[str, int] | None = None,
) -> SweepPlan:
    """Plan a grid of runs: ``num_sizes`` models for each budget of training compute, and one for ``target``.

    * **Parameters** N are all of them, the head tied to the embedding and counted once: so the weights that multiply a
      token are N, and 6 N D leaves out attention's scores alone. Hoffmann et al. (arXiv:2203.15556) count so, too;
      counting without the embeddings bends the law at small sizes (Pearce and Song, arXiv:2406.12907).
    * **Compute** C is `CausalLMConfig.flops_per_token` times the tokens D.
    * **Sizes**: from N0 / ``size_range`` to N0 * ``size_range`` in equal ratios, where N0 is the size at which
      C = 6 N D gives D / N = ``tokens_per_parameter``; the nearest shapes of `model_shape`.
    * **Batch**: the same tokens per step in all runs, so that smaller budgets are fewer steps of the same kind, and few
      of them: too short runs bend the law. (At width 64, 300,000 tokens in steps of 1024: 4.85 nats, of 512: 4.56.)
      After a few hundred steps size hardly matters yet, and alpha stays undetermined: see docs/scaling.
    * **Learning rate**: see `peak_learning_rate`. Each run has a warm-up and a decay of its own length: losses in the
      middle of a longer schedule are too high (Hoffmann et al., section 3, as against Kaplan et al.).

    Args:
        budgets: FLOPs. target: FLOPs of one more run, of N0 parameters, which the fit must not see.
        learning_rate: of a model of width 256.
        dtype: of the arithmetic, see `TrainConfig`.
        data, data_tokens: where the data set is, from the directory of the plan, and how many tokens it has to train
            on; with them, the plan says how often a run sees its data.
        special_tokens: fields of `CausalLMConfig`.

    Raises:
        ValueError: an argument is out of range, or a budget too small for 50 steps of its largest model.

    >>> plan = plan_sweep([1e12, 2e12, 4e12, 8e12], vocab_size=1024, target=1e14)
    >>> [(run.parameters, run.tokens) for run in plan.runs][:2]
    [(172352, 883712), (104688, 1426432)]
    """
    _check_budgets(budgets, target)
    for name, value, least in (
        ("num_sizes", num_sizes, 1),
        ("vocab_size", vocab_size, 1),
        ("batch_size", batch_size, 1),
    ):
        check_integer(f"plan_sweep: {name}", value, least)
    check_integer("plan_sweep: seqlen", seqlen, 2)
    _require_positive(size_range=size_range, tokens_per_parameter=tokens_per_parameter, learning_rate=learning_rate)
    if size_range < 1:
        raise ValueError(f"plan_sweep: size_range must be at least 1, got {size_range}")
    settings = dict(
        budgets=[float(budget) for budget in sorted(budgets)],
        target=target,
        num_sizes=num_sizes,
        size_range=size_range,
        tokens_per_parameter=tokens_per_parameter,
        learning_rate=learning_rate,
        seqlen=seqlen,
        batch_size=batch_size,
        dtype=dtype,
        data_tokens=data_tokens,
    )
    options = dict(vocab_size=vocab_size, max_position_embeddings=seqlen, **special_tokens or {})
    runs = [_plan_run(budget, shape, settings, held_out) for budget, shape, held_out in _grid(settings, options)]
    runs.sort(key=lambda run: (run.held_out, run.flops))
    names = (f"run-{number:03d}" for number in range(1, len(runs) + 1))
    return SweepPlan(settings, data, tuple(dataclasses.replace(run, name=name) for run, name in zip(runs, names)))


def peak_learning_rate(base: float, hidden_size: int) -> float:
    """``base`` at a width of 256, falling with the root of the width.

    The default base is what a width of 64 asks for: after 300,000 tokens of Python in steps of 512 (CPU, bfloat16,
    November 2026), peaks of 1e-3, 2e-3 and 4e-3 gave 4.88, 4.56 and 4.78 nats per token.
    """
    return float(f"{base * math.sqrt(256 / hidden_size):.4g}")


def _grid(settings, options):
    """(budget, shape, whether it is held out); a shape that is the nearest to two sizes comes once."""
    ratio, num_sizes = settings["size_range"], settings["num_sizes"]
    steps = [2 * i / (num_sizes - 1) - 1 for i in range(num_sizes)] if num_sizes > 1 else [0.0]
    for budget in settings["budgets"]:
        middle = math.sqrt(budget / (6 * settings["tokens_per_parameter"]))
        shapes = [model_shape(middle * ratio**step, **options) for step in steps]
        for shape in {shape.hidden_size: shape for shape in shapes}.values():
            yield budget, shape, False
    if settings["target"] is not None:
        middle = math.sqrt(settings["target"] / (6 * settings["tokens_per_parameter"]))
        yield settings["target"], model_shape(middle, **options), True


def _plan_run(budget: float, shape: CausalLMConfig, settings: dict[str, Any], held_out: bool) -> PlannedRun:
    tokens_per_step = settings["batch_size"] * settings["seqlen"]
    per_token = shape.flops_per_token(settings["seqlen"])
    steps = round(budget / per_token / tokens_per_step)
    if steps < _MIN_STEPS:
        raise ValueError(
            f"plan_sweep: budgets must last for {_MIN_STEPS} steps of {tokens_per_step} tokens, got {budget:.3g}, "
            f"which is {steps} of a model of {shape.num_parameters():,} parameters"
        )
    tokens = steps * tokens_per_step
    train = dict(
        max_tokens=tokens,
        seqlen=settings["seqlen"],
        batch_size=settings["batch_size"],
        learning_rate=peak_learning_rate(settings["learning_rate"], shape.hidden_size),
        schedule="linear",
        final_lr_ratio=0.0,
        warmup_tokens=round(0.05 * tokens),
        beta2=0.98,
        dtype=settings["dtype"],
        eval_batch_size=max(settings["batch_size"], _EVAL_TOKENS // settings["seqlen"]),
        save_every=100,
        keep_last=1,
        log_every=10,
    )
    TrainConfig(**train)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    data_tokens = settings["data_tokens"]
    return PlannedRun(
        name="",
        budget=float(budget),
        held_out=held_out,
        parameters=shape.num_parameters(),
        non_embedding_parameters=non_embedding_parameters(shape),
        tokens=tokens,
        flops=per_token * tokens,
        epochs=round(tokens / data_tokens, 3) if data_tokens else None,
        model={name: getattr(shape, name) for name in names},
        train=train,
    )


def _check_budgets(budgets, target):
    if not budgets:
        raise ValueError("plan_sweep: budgets must hold at least one, got none")
    for budget in budgets:
        _require_positive(budgets=budget)
    if len(set(budgets)) != len(budgets):
        raise ValueError(f"plan_sweep: budgets must be different, got {list(budgets)}")
    if target is not None:
        _require_positive(target=target)
        if target <= max(budgets):
            raise ValueError(f"plan_sweep: target must be above the budgets, got {target:g} with {max(budgets):g}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"plan_sweep: {name} must be finite and above 0, got {value!r}")
