"""What a run tells: rows in ``metrics.jsonl`` and ``samples.jsonl``, a progress bar and notices on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arfast.generate.perplexity import CorpusScores

from .config import TrainConfig
from .engine import StepResult, TrainState
from .metrics import JsonLines, plot_loss

_TERMINAL_INTERVAL, _FILE_INTERVAL = 0.2, 10.0  # seconds between redraws of the bar


def notice(text: str) -> None:
    """One line on stderr that leaves the progress bar in order."""
    tqdm.write(text, file=sys.stderr)


class RunLog(contextlib.AbstractContextManager):
    """The open logs of a run that stands at ``state``; rows of later steps, from before a kill, are removed."""

    def __init__(self, root: Path, config: TrainConfig, state: TrainState) -> None:
        self._config, self._root = config, root
        self.metrics = JsonLines(root / "metrics.jsonl", keep_through=state.step)
        self.samples = JsonLines(root / "samples.jsonl", keep_through=state.step)
        self._seconds, self._tokens = 0.0, 0
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

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self.metrics.close()
        self.samples.close()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count this time as training, in tokens per second."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Show on the bar what keeps it from moving."""
        self._bar.set_description(name)
        yield
        self._bar.set_description()

    def record_step(self, state: TrainState, result: StepResult) -> None:
        self._tokens += result.tokens
        if not result.applied:
            notice(f"Trainer: step {state.step} was not applied: loss {result.loss}, gradient norm {result.grad_norm}")
        self._bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
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
            "tokens_per_second": round(self._tokens / max(self._seconds, 1e-9), 1),
        }
        if result.aux_loss is not None:
            row["aux_loss"] = result.aux_loss
        if not result.applied:
            row["skipped"] = True
        self._seconds, self._tokens = 0.0, 0
        self.metrics.append(row)

    def record_evaluation(self, state: TrainState, evaluation: CorpusScores) -> None:
        self.metrics.append(
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
