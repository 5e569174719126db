"""The runs of a study: what they train on, how they are trained, what they have logged."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arfast.data import is_prepared, prepare_dataset
from arfast.generate.perplexity import CorpusScores
from arfast.train import TrainConfig, Trainer
from arfast.train.performance import best_dtype


@dataclass(frozen=True)
class TrainedRun:
    """The scores on the validation split at the end of a run, None without one, and its log, rows of steps and of
    evaluations."""

    evaluation: CorpusScores | None
    rows: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Of training, without evaluations and saves."""
        return sum(row["batch_tokens"] / row["tokens_per_second"] for row in self.rows if "tokens_per_second" in row)


def prepared_data(arguments: argparse.Namespace) -> str:
    """--data, where it is a data set; otherwise one of its text, in the output directory."""
    if is_prepared(arguments.data):
        return arguments.data
    directory = str(Path(arguments.output_dir) / "data")
    prepare_dataset(arguments.data, directory, vocab_size=arguments.vocab_size)
    return directory


def training_config(path: Path, max_tokens: int, seqlen: int, batch_size: int, **settings: Any) -> TrainConfig:
    """Of a run over about max_tokens tokens, kept in ``path``; an interrupted one goes on from its last quarter."""
    steps = max(1, max_tokens // (seqlen * batch_size))
    sizes = dict(max_steps=steps, seqlen=seqlen, batch_size=batch_size)
    saving = dict(save_every=max(1, steps // 4), keep_last=1)
    return TrainConfig(output_dir=str(path), dtype=best_dtype(), **sizes, **saving, **settings)


def train(model: torch.nn.Module, config: TrainConfig, data: str | Path) -> TrainedRun:
    """Train the model, which is left in evaluation mode."""
    result = Trainer(model, config, data).fit()
    model.eval()
    log = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return TrainedRun(result.evaluation, [json.loads(line) for line in log.splitlines()])
