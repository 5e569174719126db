"""A training run: steps, checkpoints, evaluation and samples, in an order that a kill at any instant cannot spoil."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arfast.generate.perplexity import CorpusScores

from . import checkpoint as ckpt
from .config import TrainConfig
from .engine import Engine, StepResult, TrainState
from .evaluation import evaluate, evaluation_mode
from .inputs import check_identity, check_inputs, describe, describe_changes, open_data
from .log import RunLog
from .manifest import MANIFEST, CheckpointError
from .memory import keep_freed_memory
from .notices import notice
from .rewind import Journal, Rewind, discard_newer, plan_rewind
from .samples import continuations
from .saving import Saver
from .signals import StopRequest, TrainingInterrupted, Watchdog
from .stages import Stage
from .state import OPTIMIZER, RNG, STATE_FILE, environment, read_state
from .strategy import OneProcess


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run stands.

    loss: of the last step; evaluation: None without a validation split; samples: see `Trainer.sample`.
    """

    output_dir: str
    step: int
    tokens: int
    loss: float | None
    evaluation: CorpusScores | None
    samples: list[dict[str, str]]


class Trainer:
    """Trains a causal language model.

    `fit` continues by itself from the newest intact checkpoint in ``config.output_dir``. After a kill at any instant
    the weights that it ends with are, on the same machine with the same number of threads, those of a run that nobody
    killed, to the last bit: a run is a function of its configuration, the weights, the optimizer's tensors, torch's
    random state and a few integers (`TrainState`), and all of these are in a checkpoint.

    Args:
        model: a `CausalLM`, or another module with its call, ``config``, ``save_pretrained`` and ``from_pretrained``;
            float32 parameters, on the device where training is to happen.
        config: settings.
        data: a directory made by `arfast.data.prepare_dataset`, or data sets by split ("train", and "validation" if
            there is one).
        tokenizer: written beside the weights and used for samples; None: the one in the data directory.
        strategy: how the run is spread over ranks, for example `arfast.distributed.Parallel`; None: one process.
        generate: called as ``arfast.generate.generate``, the default, for samples.

    Raises:
        TypeError, ValueError: model, config, data and tokenizer are not what is asked for, or do not belong together.

    >>> trainer = Trainer(CausalLM(config), TrainConfig(max_tokens=4_000_000), "data")  # doctest: +SKIP
    >>> trainer.fit().evaluation.bits_per_byte  # doctest: +SKIP
    1.9
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        data: str | os.PathLike[str] | Mapping[str, Any],
        tokenizer: Any | None = None,
        *,
        strategy: OneProcess | None = None,
        generate: Callable[..., Tensor] | None = None,
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"Trainer: config must be a TrainConfig, got {type(config).__name__}")
        self.config = config
        self.strategy = strategy or OneProcess()
        self._notice = notice if self.strategy.is_main else lambda text: None
        self.strategy.check(model, config)
        self.datasets, self.tokenizer = open_data(data, config, tokenizer)
        check_inputs(model, config, self.datasets, self.tokenizer)
        self.engine = Engine(model, config, self.strategy)
        self._identity = describe(model, config, self.datasets["train"])
        settings = {f"config.{name}": value for name, value in config.to_dict().items()}
        self.strategy.require_same(settings | self._identity)
        self._generate = generate
        self._root = Path(config.output_dir)
        self._saver = Saver(
            self._root,
            self.engine,
            self._identity,
            self.tokenizer,
            self.strategy,
            keep_last=config.keep_last,
            background=config.async_save,
        )
        self._journal = Journal(self._root)

    @property
    def model(self) -> nn.Module:
        """The model with the float32 weights."""
        return self.engine.model

    @property
    def state(self) -> TrainState:
        return self.engine.state

    def step(self, batches: Sequence[Any]) -> StepResult:
        """One optimizer step over micro-batches: see `Engine.step`."""
        return self.engine.step(batches)

    def fit(self) -> TrainResult:
        """Train to the end of the schedule, and leave the model in Hugging Face layout in ``output_dir`` itself.

        Raises:
            TrainingInterrupted: after SIGTERM, SIGINT or SIGUSR1, once a checkpoint is written (a `SystemExit`).
            CheckpointError: ``output_dir`` is in use, holds the checkpoints of another run, or its disk is full.
            NonFiniteError: see `step`. DivergedError: a policy says "rewind", and three times were not enough.
        """
        if self.config.keep_freed_memory and self.engine.device.type == "cpu":
            keep_freed_memory()
        with (
            self.strategy.lock(self._root),
            StopRequest() as stop,
            self._saver,
            Watchdog(self.config.watchdog_seconds) as watchdog,
        ):
            self._start()
            with self.strategy.open_log(lambda: RunLog(self._root, self.config, self.state, self.engine)) as log:
                log.record_rewinds(self.state, self._journal.rewinds)
                self._work_between_steps(log, stop)
                self._warm_up()
                while self.state.step < self.config.num_steps:
                    watchdog.restart()
                    seqlen = self.engine.stage.seqlen
                    with log.meter.training():
                        with log.meter.waiting():
                            batches = list(self._next_batches())
                        result = self.step(batches)
                    if reason := self._reason_to_rewind(result):
                        self._rewind(log, reason)
                    else:
                        log.record_step(self.state, result, seqlen)
                    self._work_between_steps(log, stop)
                log.plot()
                return self._result(log)

    def save(self) -> Path:
        """Write a checkpoint of the present state and return its directory."""
        with self.strategy.lock(self._root):
            self._saver.save()
            self._saver.wait()
        return self._root / f"step-{self.state.step:08d}"

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over weights, optimizer, random state and counters of a checkpoint of this run.

        Raises:
            CheckpointError: it is damaged, belongs to another model, data set, tokenizer or order of samples, or is
                past the end of this schedule.
        """
        self.strategy.verify(Path(path))
        self._load(Path(path))

    def _load(self, path: Path) -> None:
        self._saver.wait()
        state, saved = read_state(path)
        check_identity(saved["identity"], self._identity, path)
        if state.step > self.config.num_steps:
            raise CheckpointError(
                f"Trainer: max_steps must be at least {state.step} to continue {path}, got {self.config.num_steps}"
            )
        self.strategy.load_engine(self.engine, path)
        self.state.left_out = self._journal.left_out() or self.state.left_out
        self._notice(f"Trainer: continuing {path}")
        if changes := describe_changes(saved["config"], self.config.to_dict()):
            self._notice(f"Trainer: its settings were others ({changes})")
        present = environment(self.engine.device, self.strategy.arrangement)
        if changes := describe_changes(saved["environment"], present):
            self._notice(f"Trainer: not bit-identical, since it was written under other conditions ({changes})")
        self._saver.step = self.state.step

    def evaluate(self, split: str = "validation", max_tokens: int | None = None) -> CorpusScores:
        """Loss on a split, without smoothing: the whole of it, or as many batches as hold ``max_tokens`` targets."""
        if split not in self.datasets:
            raise ValueError(f"Trainer: split must be one of {sorted(self.datasets)}, got {split!r}")
        evaluation = self._evaluate(split, max_tokens, lambda: False)
        assert evaluation is not None, "only a stop request ends an evaluation early"
        return evaluation

    def sample(self) -> list[dict[str, str]]:
        """Continuations of ``config.sample_prompts``: ``{"prompt": str, "text": str}``, the same for the same step."""
        return self._sample(lambda: False) or []

    def _sample(self, stop: Callable[[], bool]) -> list[dict[str, str]] | None:
        model = self.strategy.whole_model(self.engine.compute_model)
        return self.strategy.from_main(lambda: self._sample_from(model, stop))

    def _sample_from(self, model: nn.Module, stop: Callable[[], bool]) -> list[dict[str, str]] | None:
        samples = []
        with self._random_state_kept(), evaluation_mode(model):
            found = continuations(model, self.tokenizer, self.config, self.state.step, self._generate)
            while not stop():
                sample = next(found, None)
                if sample is None:
                    return samples
                samples.append(sample)
        return None

    def _start(self) -> None:
        """Continue from the newest intact checkpoint, or begin."""
        if not self.config.resume:
            self.strategy.from_main(self._refuse_checkpoints)
        self._journal = Journal(self._root)
        path = self.strategy.latest_checkpoint(self._root, self._notice)
        while path is not None and self._journal.abandons(read_state(path)[0]):
            # Killed within a rewind.
            self.strategy.from_main(functools.partial(ckpt.discard, path))
            path = self.strategy.latest_checkpoint(self._root, self._notice)
        if path is not None:
            self._load(path)
            self.strategy.from_main(lambda: ckpt.set_aside_damaged(self._root, path))
        elif self.state.step == 0:
            self.strategy.from_main(self._journal.clear)
            self._journal = Journal(self._root)
            torch.manual_seed(self.config.seed + self.strategy.rank)

    def _refuse_checkpoints(self) -> None:
        if existing := ckpt.list_checkpoints(self._root):
            raise CheckpointError(
                f"Trainer: output_dir must hold no checkpoint when resume is False, got {existing[-1]} "
                "(remove it, or choose another output_dir)"
            )

    def _next_batches(self) -> Iterator[Any]:
        return self._batches(self.engine.stage, self.state.next_position())

    def _batches(self, stage: Stage, position: int) -> Iterator[Any]:
        """The micro-batches of a step: as many rows each in every stage, cut into sequences of its length."""
        first, pieces = position // stage.seqlen, stage.pieces
        options = {} if pieces == 1 else {"seqlen": stage.seqlen}
        for start, size in self.strategy.micro_batches(0, stage.batch_size, self.config.micro_batch_size):
            yield self.datasets["train"].batch(first + start * pieces, size * pieces, **options)

    def _warm_up(self) -> None:
        """Compile or capture the steps of all stages to come before the first one, as far as their shapes are known."""
        if self.config.compile or self.config.cuda_graph:
            for stage in self.config.stages:
                if stage.from_tokens >= self.engine.stage.from_tokens:
                    batches = {tuple(batch.input_ids.shape): batch for batch in self._batches(stage, 0)}
                    with self._random_state_kept():
                        self.engine.warm_up(list(batches.values()))

    def _reason_to_rewind(self, result: StepResult) -> str | None:
        if not self.config.rewinds:
            return None
        reason = result.spike if self.config.on_spike == "rewind" else None
        if not result.applied and self.config.on_nonfinite == "rewind":
            reason = "loss or gradient is not finite"
        return self.strategy.from_main(lambda: reason)

    def _rewind(self, log: RunLog, reason: str) -> None:
        """Continue from an earlier checkpoint, without the samples that went before a bad step."""
        self._saver.wait()
        name, decided = self.strategy.from_main(lambda: self._decide_rewind(reason))
        if not self.strategy.is_main:
            self._journal.rewinds.append(Rewind(**decided))
        self._load(self._root / name)
        log.cut_back(self.state)
        log.record_rewinds(self.state, self._journal.rewinds)

    def _decide_rewind(self, reason: str) -> tuple[str, dict[str, Any]]:
        path, rewind = plan_rewind(self._root, self._journal, self.config, self.state, reason, notice)
        self._journal.add(rewind)
        discard_newer(self._root, path)
        return path.name, dataclasses.asdict(rewind)

    def _work_between_steps(self, log: RunLog, stop: StopRequest) -> None:
        """Save, then evaluate, then sample: what is expensive to lose comes first.

        A run that was killed in here and continues from the checkpoint of this step does the rest now.
        """
        self._saver.check()
        config, step = self.config, self.state.step
        last = step >= config.num_steps

        def due(period: int) -> bool:
            return step > 0 and (last or (period > 0 and step % period == 0))

        if due(config.save_every) or (step == 0 and config.rewinds):
            self._save_once(log)
        if last:
            self._saver.wait()
            self.strategy.from_main(self._publish)
        self._leave_when_asked(log, stop)

        def done(rows: str, key: str) -> bool:
            return self.strategy.from_main(lambda: getattr(log, rows).at_step(step, key) is not None)

        if "validation" in self.datasets and due(config.eval_every) and not done("metrics", "val_loss"):
            max_tokens = None if last else config.eval_tokens
            with log.activity("evaluating"):
                evaluation = self._evaluate(
                    "validation", max_tokens, lambda: self.strategy.agreed_signal(stop.signal) is not None
                )
            if evaluation:
                log.record_evaluation(self.state, evaluation)
        if config.sample_prompts and due(config.sample_every) and not done("samples", "samples"):
            with log.activity("sampling"):
                samples = self._sample(lambda: bool(stop))
            if samples:
                log.record_samples(self.state, samples)
        self._leave_when_asked(log, stop)

    def _leave_when_asked(self, log: RunLog, stop: StopRequest) -> None:
        number = self.strategy.agreed_signal(stop.signal)
        if number is None:
            return
        if self.state.step > 0:
            self._save_once(log)
            self._saver.wait()
        name = signal.Signals(number).name
        self._notice(f"Trainer: stopped by {name} after step {self.state.step}; run again to continue")
        raise TrainingInterrupted(128 + number)

    def _save_once(self, log: RunLog) -> None:
        if self._saver.step != self.state.step:
            # The rows first: a checkpoint promises that the logs before it are complete.
            log.sync()
            self._save()

    def _save(self) -> None:
        self._saver.save()

    def _publish(self) -> None:
        path = ckpt.list_checkpoints(self._root)[-1]
        own = re.compile(rf"({OPTIMIZER}|{RNG})(-\d+-of-\d+)?\.safetensors|{STATE_FILE}|{MANIFEST}")
        ckpt.publish(path, self._root, sorted(name for name in os.listdir(path) if not own.fullmatch(name)))

    def _evaluate(self, split: str, max_tokens: int | None, stop: Callable[[], bool]) -> CorpusScores | None:
        config, dataset = self.config, self.datasets[split]
        batch_size = config.eval_batch_size or config.micro_batch_size or config.batch_size
        # Not longer than what the model has been trained on so far.
        stage = self.engine.stage
        options = {} if stage.pieces == 1 else {"seqlen": stage.seqlen}
        with self._random_state_kept():
            return evaluate(
                self.engine.compute_model,
                dataset.evaluation_batches(batch_size, **options),
                bytes_per_token=dataset.num_bytes / max(1, dataset.num_targets),
                max_tokens=max_tokens,
                stop=stop,
                strategy=self.strategy,
            )

    def _random_state_kept(self) -> AbstractContextManager[None]:
        """Nothing that is done between the steps may change what the steps draw."""
        device = self.engine.device
        return torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type)

    def _result(self, log: RunLog) -> TrainResult:
        """From the logs, so that a run that was already finished gives the same."""
        result = self.strategy.from_main(lambda: dataclasses.asdict(self._result_from(log)))
        if result["evaluation"] is not None:
            result["evaluation"] = CorpusScores(**result["evaluation"])
        return TrainResult(**result)

    def _result_from(self, log: RunLog) -> TrainResult:
        state = self.state
        train, evaluation = (log.metrics.at_step(state.step, key) for key in ("loss", "val_loss"))
        samples = log.samples.at_step(state.step, "samples")
        if evaluation is not None:
            keys = ("val_loss", "val_perplexity", "val_bits_per_byte", "val_tokens")
            # null is how JSON has NaN and Inf.
            evaluation = CorpusScores(*(math.nan if evaluation[key] is None else evaluation[key] for key in keys))
        return TrainResult(
            output_dir=self.config.output_dir,
            step=state.step,
            tokens=state.tokens,
            loss=train["loss"] if train else None,
            evaluation=evaluation,
            samples=samples["samples"] if samples else [],
        )
