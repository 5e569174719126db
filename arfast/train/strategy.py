"""How a run is spread over processes: what engine and trainer ask, answered here for one process.

`arfast.distributed.Parallel` answers for several ranks. Every method is called by all ranks alike, in the same
order, since most of them communicate there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arfast.models import CausalLM, CausalLMConfig
from arfast.nn.lora import count_parameters

from . import checkpoint as ckpt
from .config import TrainConfig
from .inputs import model_inputs
from .optimizer import gradient_norm

T = TypeVar("T")


class OneProcess:
    """Everything here, nothing to agree upon.

    Args:
        device: where `build_model` makes the model.

    Attributes:
        rank, num_ranks: of this process, and of all. is_main: whether it writes logs, samples and notices.
        arrangement: of the ranks, for people; "" for one.
        casts_weights: whether the model itself computes in the dtype of the configuration.
    """

    rank = 0
    num_ranks = 1
    is_main = True
    arrangement = ""
    casts_weights = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def describe(self) -> str:
        """Where a run takes place, for people."""
        return str(self.device)

    def build_model(self, config: CausalLMConfig, *, seed: int = 0) -> CausalLM:
        """A new model to be trained, or this rank's part of it."""
        return CausalLM(config, seed=seed, device=self.device)

    def check_settings(self, config: TrainConfig, model: CausalLMConfig | None = None) -> None:
        """Refuse settings, and sizes of a model, that this strategy cannot train, before anything is written."""

    def check(self, model: nn.Module, config: TrainConfig) -> None:
        """Refuse a model and settings that this strategy cannot train."""

    def count_parameters(self, model: nn.Module) -> tuple[int, int]:
        """(trainable parameters, all parameters) of the whole model."""
        return count_parameters(model)

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuse values, ready for JSON, that are not the same on all ranks."""

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the main rank, ready for JSON, or the error that it raises there, everywhere."""
        return function()

    def agreed_signal(self, number: int | None) -> int | None:
        """A signal that some rank has got."""
        return number

    def on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return flag

    def sum_over_ranks(self, counts: Sequence[int]) -> list[int]:
        """Sums of integers that each rank has of its own batches."""
        return list(counts)

    def sum_losses(self, losses: Tensor) -> Tensor:
        """Sums of values that each rank has of its own batches, on the device; the host does not wait."""
        return losses

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Euclidean norm of the whole gradient, scalar."""
        return gradient_norm(model.parameters())

    def micro_batches(self, first: int, batch_size: int, micro_batch_size: int | None) -> Iterator[tuple[int, int]]:
        """(first sample, number of samples) of this rank's micro-batches of a step on ``batch_size`` samples."""
        size = micro_batch_size or batch_size
        for start in range(0, batch_size, size):
            yield first + start, min(size, batch_size - start)

    def score_batches(
        self, model: nn.Module, batches: Iterable[Any], device: torch.device
    ) -> Iterator[tuple[float, int]]:
        """(summed loss, number of targets) of each batch, in order."""
        for batch in batches:
            output = model(**model_inputs(batch, device), reduction="sum")
            yield float(output.loss), int(output.num_tokens)

    def whole_model(self, compute_model: nn.Module) -> nn.Module | None:
        """A model that can generate, on the main rank."""
        return compute_model

    def lock(self, root: Path) -> AbstractContextManager[None]:
        """Hold ``root`` for this run: see `lock_directory`."""
        return ckpt.lock_directory(root)

    def open_log(self, make_log: Callable[[], Any]) -> Any:
        """The log that ``make_log`` opens, or on other ranks than the main one something that writes nothing."""
        return make_log()

    def latest_checkpoint(self, root: Path, report: Callable[[str], None]) -> Path | None:
        """See `arfast.train.latest_checkpoint`."""
        return ckpt.latest_checkpoint(root, report)

    def verify(self, path: Path) -> None:
        """See `arfast.train.verify`."""
        ckpt.verify(path)

    def snapshot(self, engine: Any, identity: dict[str, Any]) -> Any:
        """What this rank writes of a checkpoint: see `arfast.train.state.Snapshot`."""
        from .state import snapshot

        return snapshot(engine, identity)

    def save_checkpoint(
        self, root: Path, step: int, write: Callable[[Path], None], *, num_bytes: int, keep_last: int
    ) -> Path:
        """See `arfast.train.save_checkpoint` and `prune`. May run in a thread while the run goes on."""
        path = ckpt.save_checkpoint(root, step, write, num_bytes=num_bytes)
        ckpt.prune(root, keep_last)
        return path

    def load_engine(self, engine: Any, path: Path) -> None:
        """Take over what a snapshot of any number of ranks wrote."""
        from .state import load_engine

        load_engine(engine, path)


class SilentLog(contextlib.AbstractContextManager):
    """Stands for the log of a run on the ranks that write none: takes every call, and every ``with``."""

    def __getattr__(self, name: str) -> SilentLog:
        return self

    def __call__(self, *args: object, **kwargs: object) -> SilentLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
