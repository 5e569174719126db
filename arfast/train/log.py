"""What a run tells: rows in ``metrics.jsonl`` and ``samples.jsonl``, a progress bar and notices on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arfast.generate.perplexity import CorpusScores

from .config import TrainConfig
from .engine import Engine, StepResult, TrainState
from .metrics import JsonLines, TensorBoard, plot_loss
from .notices import notice
from .performance import Meter
from .rewind import Rewind

_TERMINAL_INTERVAL, _FILE_INTERVAL = 0.2, 10.0  # seconds between redraws of the bar


class RunLog(contextlib.AbstractContextManager):
    """The open logs of a run that stands at ``state``; rows of later steps, from before a kill, are removed."""

    def __init__(self, root: Path, config: TrainConfig, state: TrainState, engine: Engine) -> None:
        self._config, self._root = config, root
        self.meter = Meter(engine.model, config, engine.device, engine.strategy.num_ranks)
        self._board: TensorBoard | None = None
        self._open(state)
        self._bar = tqdm(
            total=config.total_tokens,
            initial=state.tokens,
            unit="tok",
            unit_scale=True,
            mininterval=_TERMINAL_INTERVAL if sys.stderr.isatty() else _FILE_INTERVAL,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not config.progress,
        )

    def _open(self, state: TrainState) -> None:
        self.metrics = JsonLines(self._root / "metrics.jsonl", keep_through=state.step)
        self.samples = JsonLines(self._root / "samples.jsonl", keep_through=state.step)
        if "tensorboard" in self._config.log:
            self._board = TensorBoard(self._root / "tensorboard", keep_through=state.step)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._close()

    def _close(self) -> None:
        self.metrics.close()
        self.samples.close()
        if self._board is not None:
            self._board.close()

    def cut_back(self, state: TrainState) -> None:
        """Forget what came after ``state``, to which the run went back."""
        self._close()
        self._open(state)
        self._bar.n = state.tokens
        self._bar.refresh()

    @contextlib.contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Show on the bar what keeps it from moving."""
        self._bar.set_description(name)
        yield
        self._bar.set_description()

    def record_step(self, state: TrainState, result: StepResult, seqlen: int) -> None:
        self.meter.count(result.tokens, seqlen)
        if not result.applied:
            notice(f"Trainer: step {state.step} was not applied: loss {result.loss}, gradient norm {result.grad_norm}")
        if result.spike is not None:
            notice(f"Trainer: step {state.step} is out of line: {result.spike}")
        self._bar.update(result.tokens)
        if state.step % self._config.log_every and state.step < self._config.num_steps:
            return
        row: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "position": state.position,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "seqlen": seqlen,
            "batch_tokens": result.tokens,
            **self.meter.row(state),
        }
        if result.aux_loss is not None:
            row["aux_loss"] = result.aux_loss
        if result.expert_load is not None:
            row["expert_load"] = [round(load, 4) for load in result.expert_load]
        if not result.applied:
            row["skipped"] = True
        if result.spike is not None:
            row["spike"] = result.spike
        self._append(row)
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        """Behind the bar, which has speed and remaining time by itself."""
        shown = {"loss": f"{row['loss']:.4f}", "lr": f"{row['lr']:.2e}", "norm": f"{row['grad_norm']:.2f}"}
        if "mfu" in row:
            shown["mfu"] = f"{row['mfu']:.1%}"
        shown |= {"wait": f"{row['data_wait']:.1%}", "mem": f"{row['memory_bytes'] / 2**30:.1f}G"}
        self._bar.set_postfix(shown, refresh=False)

    def _append(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        if self._board is not None:
            self._board.append(row)

    def record_rewinds(self, state: TrainState, rewinds: Sequence[Rewind]) -> None:
        """The rewinds that led to ``state``, but for those that the log has."""
        known = [row["rewound_from"] for row in self.metrics.rows_of(state.step) if "rewound_from" in row]
        for rewind in [rewind for rewind in rewinds if rewind.to_step == state.step][len(known) :]:
            text = f"step {rewind.from_step} is out of line: {rewind.reason}; back to step {rewind.to_step}"
            notice(f"Trainer: {text}, without the tokens {rewind.first} to {rewind.end - 1}")
            row = {"step": state.step, "tokens": state.tokens, "rewound_from": rewind.from_step}
            self._append(row | {"left_out": [rewind.first, rewind.end], "reason": rewind.reason})

    def record_evaluation(self, state: TrainState, evaluation: CorpusScores) -> None:
        self._append(
            {
                "step": state.step,
                "tokens": state.tokens,
                "val_loss": evaluation.loss,
                "val_perplexity": evaluation.perplexity,
                "val_bits_per_byte": evaluation.bits_per_byte,
                "val_tokens": evaluation.num_tokens,
            }
        )

    def record_samples(self, state: TrainState, samples: list[dict[str, str]]) -> None:
        # One row for all of them: a kill leaves all or none.
        self.samples.append({"step": state.step, "tokens": state.tokens, "samples": samples})

    def plot(self) -> None:
        if not plot_loss(self.metrics.read(), self._root / "loss.png"):
            notice("Trainer: loss.png needs matplotlib (pip install 'arfast[plot]'); metrics.jsonl has the numbers")

    def sync(self) -> None:
        self.metrics.sync()
        self.samples.sync()
