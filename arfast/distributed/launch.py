"""Ranks as torchrun starts them: their environment, checked, and the process group around a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAREWELL = timedelta(seconds=5)


@dataclass(frozen=True)
class Launch:
    """The place of this process among all of a run, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Launch | None:
        """What torchrun says; None for a process that it did not start.

        Raises:
            ValueError: a variable is missing, is no integer, or contradicts another one.
        """
        if not any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return None
        for name in _VARIABLES:
            if name not in os.environ:
                raise ValueError(
                    f"launch: {name} must be set for a run of several ranks, got none (start with torchrun)"
                )
        rank, world_size, local_rank, local_world_size = (_integer(name) for name in _VARIABLES[:4])
        _integer("MASTER_PORT")
        if world_size < 1:
            raise ValueError(f"launch: WORLD_SIZE must be at least 1, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"launch: RANK must be in [0, WORLD_SIZE={world_size}), got {rank}")
        if not 0 <= local_rank < local_world_size <= world_size:
            raise ValueError(
                f"launch: LOCAL_RANK must be in [0, LOCAL_WORLD_SIZE={local_world_size}), which must be at most "
                f"WORLD_SIZE={world_size}, got {local_rank}"
            )
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def device(self) -> torch.device:
        """The GPU of this rank where there are any, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"launch: nproc_per_node must be at most the {torch.cuda.device_count()} GPUs of this machine, "
                f"got {self.local_world_size}"
            )
        return torch.device("cuda", self.local_rank)


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"launch: {name} must be an integer, got {os.environ[name]!r}") from None


@contextlib.contextmanager
def process_group(launch: Launch, device: torch.device, *, timeout: float = 1800.0) -> Iterator[None]:
    """The default process group: NCCL between GPUs, gloo between CPUs.

    Args:
        timeout: seconds that a rank waits for the others, to arrive and in every communication; then it gives up,
            which ends the run.

    Raises:
        RuntimeError: not all ranks have arrived in time.
    """
    options = dict(rank=launch.rank, world_size=launch.world_size, timeout=timedelta(seconds=timeout))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options |= dict(backend="cpu:gloo,cuda:nccl", device_id=device)
    else:
        options |= dict(backend="gloo")
    try:
        dist.init_process_group(init_method="env://", **options)
    except (RuntimeError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(
            f"launch: all {launch.world_size} ranks must meet at {address} within {timeout:g} s, got "
            f"{str(error).splitlines()[0]} on rank {launch.rank}"
        ) from error
    try:
        yield
    except SystemExit:  # a stop that all ranks have agreed upon
        _leave()
        raise
    except Exception:
        # Where all ranks have the same error each gets to tell it; where this one is alone, the others are stuck.
        with contextlib.suppress(Exception):
            dist.monitored_barrier(timeout=_FAREWELL)
            dist.destroy_process_group()
        raise
    _leave()


def _leave() -> None:
    # A rank that has gone while another one still communicates would end that one by SIGABRT.
    dist.barrier()
    dist.destroy_process_group()
