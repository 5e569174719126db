"""A training run on several ranks: what the Trainer asks of them, answered by FSDP2 over a model that may be split."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from arfast.models import CausalLM, CausalLMConfig
from arfast.train import checkpoint as ckpt
from arfast.train.config import TrainConfig
from arfast.train.strategy import OneProcess, SilentLog

from . import sharded_checkpoint, sharding
from .exchange import Exchange
from .mesh import ParallelConfig, init_mesh
from .parallel_model import gradient_norm, parallelize
from .parts import initialize, parts

# What settings must be on several ranks: Muon needs whole matrices.
_ON_SEVERAL_RANKS = {"optimizer": "adamw", "compile": False, "cuda_graph": False, "scheduled_sampling": 0.0}


class Parallel(OneProcess):
    """How engine and trainer run on all ranks of the default process group. All ranks make it.

    The model is split over "context", "tensor" and expert ranks (see `parallelize`), and FSDP2 spreads what that leaves
    a rank over the "data" and "context" ranks. A step consumes the samples that it would consume in one process, an
    equal share on each data rank, and its loss is divided by the targets of all of them: up to the order of additions
    the weights are those of a run in one process, whatever the number and the arrangement of the ranks. With experts
    that takes the same ``micro_batch_size``, since their auxiliary losses are of a micro-batch; without one, a data
    rank's share is its micro-batch.

    Args:
        parallel: how the ranks are arranged; None: all ranks are "data".
        device: of this rank.
        dtype: "float32" or "bfloat16", of activations and of gathered parameters, as in `TrainConfig`.
        sequence_parallel: split the activations between the layers over "tensor" too.
        timeout: seconds that a rank waits for the others in what the hosts exchange; None: torch's half an hour.

    Raises:
        TypeError, ValueError: the arrangement is none, is not that of the ranks, or not the same on all of them.

    Example:
        # train.py, run by: torchrun --nproc-per-node 4 train.py
        from arfast import CausalLMConfig, TrainConfig, Trainer
        from arfast.data import Document, prepare_dataset
        from arfast.distributed import Launch, Parallel, ParallelConfig, process_group

        documents = [Document(f"{n} and {n} make {2 * n}. " * 20, source="sums") for n in range(100)]
        launch = Launch.from_environment()
        with process_group(launch, launch.device):
            strategy = Parallel(ParallelConfig(data=2, tensor=2), device=launch.device)
            strategy.from_main(lambda: prepare_dataset(documents, "sums", vocab_size=320) and None)
            config = TrainConfig(output_dir="run", max_steps=10, seqlen=64, batch_size=4, progress=False)
            model = strategy.build_model(CausalLMConfig.preset("tiny", vocab_size=320))
            result = Trainer(model, config, "sums", strategy=strategy).fit()
            if strategy.is_main:
                print(result.loss)
    """

    casts_weights = True

    def __init__(
        self,
        parallel: ParallelConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        sequence_parallel: bool = False,
        timeout: float | None = None,
    ) -> None:
        super().__init__(device)
        if not isinstance(parallel, ParallelConfig | None):
            got = type(parallel).__name__
            raise TypeError(f"Parallel: parallel must be a ParallelConfig or None, got a {got}")
        self.dtype, self.sequence_parallel = dtype, sequence_parallel
        self.exchange = Exchange(timeout)
        self._saving = Exchange(timeout)  # its own, since a save may be a thread beside the run
        self.rank, self.num_ranks = self.exchange.rank, self.exchange.size
        self.is_main = self.rank == 0
        self.parallel = parallel or ParallelConfig(data=self.num_ranks)
        arrangement = dataclasses.asdict(self.parallel) | dict(sequence_parallel=sequence_parallel, dtype=dtype)
        self.exchange.require_same("Parallel", arrangement)
        self._mesh = init_mesh(self.parallel, self.device.type)
        self._data = self._mesh["data"]

    @property
    def arrangement(self) -> str:
        arranged = f" ({self.parallel.describe()})" if self.parallel.splits_model else ""
        return f"{self.num_ranks} ranks{arranged}" if self.num_ranks > 1 else ""

    def describe(self) -> str:
        return f"{self.device.type}, {self.arrangement}" if self.arrangement else self.device.type

    def build_model(self, config: CausalLMConfig, *, seed: int = 0) -> CausalLM:
        """A model with the values of ``CausalLM(config, seed=seed)``, of which each rank only makes its part.

        Raises:
            ValueError: a size of the model is not a multiple of the ranks that share it.
        """
        model = self._spread(CausalLM(config, device="meta"))
        initialize(model, seed)
        return model

    def load_model(self, path: str | os.PathLike[str]) -> CausalLM:
        """A model with the weights of a Hugging Face directory, of which each rank reads its part."""
        config, family = sharded_checkpoint.read_config(Path(path))
        model = self._spread(CausalLM(config, device="meta"))
        model.family = family
        sharded_checkpoint.load_weights(model, Path(path))
        return model

    def _spread(self, model: CausalLM) -> CausalLM:
        """From the meta device: with memory for this rank's part."""
        expert_mesh, shards = None, self._data
        if self.parallel.splits_model:
            parallelize(model, self._mesh, sequence_parallel=self.sequence_parallel, joint_aux_loss=False)
        if self.parallel.expert > 1:
            expert_mesh = self._mesh.expert_mesh["expert_data"]
        if self.parallel.context > 1:
            # What holds a part of the batch, along samples or along positions, holds a part of the parameters.
            both = self._mesh["data", "context"]
            shards = both._flatten("shards") if self.parallel.data > 1 else self._mesh["context"]
        sharding.shard_model(model, shards, getattr(torch, self.dtype), expert_mesh)
        return model.to_empty(device=self.device)

    def count_parameters(self, model: nn.Module) -> tuple[int, int]:
        sizes = [(math.prod(part.shape), part.tensor.requires_grad) for part in parts(model).values()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def check_settings(self, config: TrainConfig, model: CausalLMConfig | None = None) -> None:
        if model is not None:
            self.parallel.check_model(model)
        if config.dtype != self.dtype:
            raise ValueError(f"Trainer: dtype must be that of the strategy, {self.dtype!r}, got {config.dtype!r}")
        for name, needed in _ON_SEVERAL_RANKS.items():
            if (value := getattr(config, name)) != needed:
                raise ValueError(f"Trainer: {name} must be {needed!r} on several ranks, got {value!r}")
        for stage in config.stages:
            self._share(stage.batch_size, config.micro_batch_size)
            self._check_seqlen(stage.seqlen)

    def _check_seqlen(self, seqlen: int) -> None:
        context, tensor = self.parallel.context, self.parallel.tensor
        shared = [(f"2 * context = {2 * context}", 2 * context if context > 1 else 1)]
        if self.sequence_parallel:
            shared.append((f"context * tensor = {context * tensor}", context * tensor))
        for rule, pieces in shared:
            if seqlen % pieces:
                raise ValueError(f"Trainer: seqlen must be a multiple of {rule} in every stage, got {seqlen}")

    def check(self, model: nn.Module, config: TrainConfig) -> None:
        if not isinstance(model, FSDPModule):
            raise ValueError(
                f"Trainer: model must be made by the strategy's build_model or load_model, got a {type(model).__name__}"
            )
        self.check_settings(config)

    def require_same(self, values: Mapping[str, Any]) -> None:
        self.exchange.require_same("Trainer", values)

    def from_main(self, function: Callable[[], Any]) -> Any:
        return self.exchange.from_main(function)

    def agreed_signal(self, number: int | None) -> int | None:
        return self.exchange.maximum(number or 0) or None

    def on_any_rank(self, flag: bool) -> bool:
        return bool(self.exchange.maximum(int(flag)))

    def sum_over_ranks(self, counts: Sequence[int]) -> list[int]:
        # Ranks that share their batch, along "context" and "tensor", have counted the same tokens.
        return [total // (self.num_ranks // self._data.size()) for total in self.exchange.sum(counts)]

    def sum_losses(self, losses: Tensor) -> Tensor:
        # Of a batch that ranks share each has the whole loss.
        dist.all_reduce(losses, group=self._data.get_group())
        return losses

    def gradient_norm(self, model: nn.Module) -> Tensor:
        return gradient_norm(model)

    def micro_batches(self, first: int, batch_size: int, micro_batch_size: int | None) -> Iterator[tuple[int, int]]:
        share = self._share(batch_size, micro_batch_size)
        return super().micro_batches(first + self._data.get_local_rank() * share, share, micro_batch_size)

    def _share(self, batch_size: int, micro_batch_size: int | None) -> int:
        """Samples of a step per data rank."""
        ranks = self._data.size()
        if batch_size % ranks:
            raise ValueError(f"Trainer: batch_size must be a multiple of the {ranks} data ranks, got {batch_size}")
        share = batch_size // ranks
        if share % (micro_batch_size or share):
            raise ValueError(
                f"Trainer: micro_batch_size must divide the {share} sequences that each of {ranks} data ranks has of a "
                f"batch of {batch_size}, got {micro_batch_size}"
            )
        return share

    def score_batches(
        self, model: nn.Module, batches: Iterable[Any], device: torch.device
    ) -> Iterator[tuple[float, int]]:
        own, ranks = self._data.get_local_rank(), self._data.size()
        peers = dist.get_process_group_ranks(self._data.get_group())
        batches = iter(batches)
        try:
            while group := list(itertools.islice(batches, ranks)):
                # All ranks take part in putting the layers together; one that has no batch left repeats another's.
                (score,) = super().score_batches(model, [group[min(own, len(group) - 1)]], device)
                scores = self.exchange.gather_pairs(*score)
                yield from (scores[peer] for peer in peers[: len(group)])
        finally:
            sharding.reshard(model)

    def whole_model(self, compute_model: nn.Module) -> nn.Module | None:
        return sharding.whole_model(compute_model, getattr(torch, self.dtype), self.is_main)

    @contextlib.contextmanager
    def lock(self, root: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self.from_main(lambda: stack.enter_context(ckpt.lock_directory(root)))
            yield

    def open_log(self, make_log: Callable[[], Any]) -> Any:
        log = SilentLog()

        def open_on_main() -> None:
            nonlocal log
            log = make_log()

        self.from_main(open_on_main)
        return log

    def latest_checkpoint(self, root: Path, report: Callable[[str], None]) -> Path | None:
        names = self.from_main(lambda: [path.name for path in ckpt.list_checkpoints(root)])
        for name in reversed(names):
            try:
                self.verify(root / name)
            except (ckpt.CheckpointError, OSError) as error:
                report(f"{error}; trying the checkpoint before it")
            else:
                return root / name
        if names:
            raise ckpt.CheckpointError(
                f"checkpoint: {root} must hold an undamaged checkpoint, got {len(names)} damaged"
            )
        return None

    def verify(self, path: Path) -> None:
        """Every machine reads all files, each of its ranks some of them; the verdict is the same on all ranks."""
        part = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.exchange.together(lambda: ckpt.verify(path, part=part) and None)

    def snapshot(self, engine: Any, identity: dict[str, Any]) -> sharded_checkpoint.ShardedSnapshot:
        sharding.reshard(engine.model)
        return sharded_checkpoint.take_snapshot(engine, identity, self.rank, self.exchange.size)

    def save_checkpoint(
        self, root: Path, step: int, write: Callable[[Path], None], *, num_bytes: int, keep_last: int
    ) -> Path:
        """Rank 0 makes the directory and commits it; between the two every rank writes its files there."""
        asked = False

        def write_together(directory: Path | None) -> None:
            nonlocal asked
            asked = True
            name = self._saving.from_main(lambda: None if directory is None else str(directory))
            if name is not None:
                self._saving.together(lambda: write(Path(name)), OSError)

        def save() -> str:
            try:
                path = ckpt.save_checkpoint(root, step, write_together, num_bytes=num_bytes)
            finally:
                if not asked:  # the others wait to be asked
                    write_together(None)
            ckpt.prune(root, keep_last)
            return str(path)

        if not self.is_main:
            with contextlib.suppress(Exception):  # rank 0 hears of it, and tells it below
                write_together(None)
        return Path(self._saving.from_main(save))

    def load_engine(self, engine: Any, path: Path) -> None:
        sharding.reshard(engine.model)
        self.exchange.together(lambda: sharded_checkpoint.load_engine(engine, path, self.rank, self.exchange.size))
