"""A training run on several ranks: each has its part of every batch, and of every parameter (FSDP2)."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from arfast.models import CausalLM, CausalLMConfig
from arfast.train import checkpoint as ckpt
from arfast.train.config import TrainConfig
from arfast.train.optimizer import gradient_norm
from arfast.train.strategy import OneProcess, SilentLog

from . import sharded_checkpoint, sharding
from .exchange import Exchange

# What settings must be on several ranks: Muon needs whole matrices, and who rewinds or repeats a step must agree.
_ONE_PROCESS_ALONE: dict[str, tuple] = {
    "optimizer": ("adamw",),
    "compile": (False,),
    "on_nonfinite": ("stop", "skip"),
    "on_spike": ("report", "ignore"),
    "recheck_every": (0,),
}


class DataParallel(OneProcess):
    """How engine and trainer run on all ranks of the default process group. All ranks make it.

    A step consumes the samples that it would consume in one process, an equal share on each rank, and its loss is
    divided by the targets of all ranks: up to the order of additions the weights are those of a run in one process,
    whatever the number of ranks. With experts that takes the same ``micro_batch_size``, since their auxiliary losses
    are of a micro-batch; without one, a rank's share is its micro-batch.

    Args:
        mesh: with a dimension "data", and maybe "context" and "tensor"; parameters are spread over "data" and
            "context" together. None: all ranks are "data".
        device: of this rank.
        dtype: "float32" or "bfloat16", of activations and of gathered parameters, as in `TrainConfig`.
        timeout: seconds that a rank waits for the others in what the hosts exchange; None: torch's half an hour.

    Raises:
        ValueError: the mesh does not fit the ranks.

    >>> with process_group(launch, device):  # doctest: +SKIP
    ...     strategy = DataParallel(device=device, dtype=config.dtype)
    ...     Trainer(strategy.build_model(model_config, seed=0), config, "data", strategy=strategy).fit()
    """

    casts_weights = True

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        timeout: float | None = None,
    ) -> None:
        super().__init__(device)
        self.dtype = dtype
        self.mesh = mesh or init_device_mesh(self.device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        names = self.mesh.mesh_dim_names or ()
        if "data" not in names or self.mesh.size() != dist.get_world_size():
            raise ValueError(
                f"DataParallel: mesh must have a dimension 'data' and the {dist.get_world_size()} ranks of the run, "
                f"got {names} of {tuple(self.mesh.shape)}"
            )
        self.exchange = Exchange(timeout)
        self._saving = Exchange(timeout)  # its own, since a save may be a thread beside the run
        self.rank, self.num_ranks = self.exchange.rank, self.exchange.size
        self.is_main = self.rank == 0
        self._data = self.mesh["data"]
        # What holds a part of the batch, along samples or along positions, holds a part of the parameters.
        self.shards = self.mesh["data", "context"]._flatten("shards") if "context" in names else self._data

    def describe(self) -> str:
        return f"{self.exchange.size} ranks of {self.device.type}"

    def build_model(self, config: CausalLMConfig, *, seed: int = 0) -> CausalLM:
        """A model with the values of ``CausalLM(config, seed=seed)``, of which each rank only makes its part."""
        model = CausalLM(config, device="meta")
        sharding.shard_model(model, self.shards, getattr(torch, self.dtype))
        sharding.initialize_shards(model, self.device, seed)
        return model

    def load_model(self, path: str | os.PathLike[str]) -> CausalLM:
        """A model with the weights of a Hugging Face directory, of which each rank reads its part."""
        config = sharded_checkpoint.read_config(Path(path))
        model = CausalLM(config, device="meta")
        sharding.shard_model(model, self.shards, getattr(torch, self.dtype))
        model.to_empty(device=self.device)
        sharded_checkpoint.load_weights(model, Path(path))
        return model

    def check(self, model: nn.Module, config: TrainConfig) -> None:
        if not isinstance(model, FSDPModule):
            raise ValueError(
                f"Trainer: model must be made by the strategy's build_model or load_model, got a {type(model).__name__}"
            )
        if config.dtype != self.dtype:
            raise ValueError(f"Trainer: dtype must be that of the strategy, {self.dtype!r}, got {config.dtype!r}")
        if config.cuda_graph:
            raise ValueError("Trainer: cuda_graph must be False on several ranks, got True")
        for name, allowed in _ONE_PROCESS_ALONE.items():
            if (value := getattr(config, name)) not in allowed:
                raise ValueError(f"Trainer: {name} must be {allowed[0]!r} on several ranks, got {value!r}")
        for stage in config.stages:
            self._share(stage.batch_size, config.micro_batch_size)

    def require_same(self, values: Mapping[str, Any]) -> None:
        self.exchange.require_same("Trainer", values)

    def from_main(self, function: Callable[[], Any]) -> Any:
        return self.exchange.from_main(function)

    def agreed_signal(self, number: int | None) -> int | None:
        return self.exchange.maximum(number or 0) or None

    def on_any_rank(self, flag: bool) -> bool:
        return bool(self.exchange.maximum(int(flag)))

    def sum_over_ranks(self, counts: Sequence[int]) -> list[int]:
        # Ranks that share their batch, along "tensor", have counted the same tokens.
        return [total // (self.exchange.size // self.shards.size()) for total in self.exchange.sum(counts)]

    def sum_losses(self, losses: Tensor) -> Tensor:
        dist.all_reduce(losses, group=self.shards.get_group())
        return losses

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        norms = [sharding.whole(gradient_norm(group)) for group in by_mesh.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def micro_batches(self, first: int, batch_size: int, micro_batch_size: int | None) -> Iterator[tuple[int, int]]:
        share = self._share(batch_size, micro_batch_size)
        return super().micro_batches(first + self._data.get_local_rank() * share, share, micro_batch_size)

    def _share(self, batch_size: int, micro_batch_size: int | None) -> int:
        """Samples of a step per rank."""
        ranks = self._data.size()
        if batch_size % ranks:
            raise ValueError(f"Trainer: batch_size must be a multiple of the {ranks} data ranks, got {batch_size}")
        share = batch_size // ranks
        if share % (micro_batch_size or share):
            raise ValueError(
                f"Trainer: micro_batch_size must divide the {share} sequences that each of {ranks} ranks has of a "
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
