"""Small values and errors between the ranks, as JSON through gloo in the host's memory: nothing is pickled."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arfast.train.manifest import CheckpointError

T = TypeVar("T")


class Exchange:
    """The ranks of the default process group, with a gloo group of their own; all ranks make it, and make each call.

    Args:
        timeout: seconds that a rank waits for the others; None: torch's half an hour.
    """

    def __init__(self, timeout: float | None = None) -> None:
        limit = None if timeout is None else timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=limit)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Sequence[int]) -> list[int]:
        """Sums of integers over all ranks."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def maximum(self, value: int) -> int:
        """The largest of the ranks' integers."""
        largest = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def gather_pairs(self, loss: float, count: int) -> list[tuple[float, int]]:
        """A float64 and an integer of each rank, in the order of the ranks."""
        own = torch.tensor([loss, count], dtype=torch.float64)
        pairs = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(pairs, own, group=self._group)
        return [(float(pair[0]), int(pair[1])) for pair in pairs]

    def gather(self, value: Any) -> list[Any]:
        """A value, ready for JSON, of each rank, in the order of the ranks."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
        largest = max(map(int, sizes))
        texts = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(own, (0, largest - len(own))), group=self._group)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes)]

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, ready for JSON, or the error that it raises there, on every rank."""
        error, answer = None, None
        if self.rank == 0:
            try:
                answer = {"value": function()}
            except Exception as raised:
                error, answer = raised, {"error": describe_error(raised)}
        answer = self._broadcast(answer)
        if error is not None:
            raise error
        if "error" in answer:
            raise rebuild_error(answer["error"])
        return answer["value"]

    def together(self, function: Callable[[], T], kind: type[Exception] | None = None) -> T:
        """Call ``function`` on every rank and return its result; the first error is raised on all of them.

        Args:
            kind: of the error on the other ranks; None: as on the rank that has it.
        """
        error, result = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        described = self.gather(None if error is None else describe_error(error))
        if error is not None:
            raise error
        for rank, other in enumerate(described):
            if other is not None:
                text = f"rank {rank}: {other[1]}"
                raise rebuild_error([other[0], text]) if kind is None else kind(text)
        return result

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, unless ``values`` are equal on all ranks."""
        for rank, other in enumerate(everyone := self.gather(dict(values))):
            first = everyone[0]
            for name in [*first, *(other.keys() - first.keys())]:
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"{what}: {name} must be the same on every rank, got {first.get(name)!r} on rank 0 "
                        f"and {other.get(name)!r} on rank {rank}"
                    )

    def _broadcast(self, value: Any) -> Any:
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0, group=self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._group)
        return json.loads(bytes(content.tolist()))


def describe_error(error: Exception) -> list[str]:
    """Kind and text, ready for JSON."""
    return [type(error).__name__, str(error) or type(error).__name__]


def rebuild_error(described: Sequence[str]) -> Exception:
    """The error of another rank: of the same kind where that is one of Python's own or a `CheckpointError`."""
    kind, text = described
    if kind == CheckpointError.__name__:
        return CheckpointError(text)
    found = getattr(builtins, kind, None)
    plain = isinstance(found, type) and issubclass(found, (ValueError, TypeError, OSError, LookupError, RuntimeError))
    return found(text) if plain and not issubclass(found, UnicodeError) else RuntimeError(text)
