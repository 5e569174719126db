"""Checkpoints of a run on several ranks: whole tensors, each in the file of one rank, so that any number can read them.

The directory is that of a run in one process, a Hugging Face model in several files with its index; only the optimizer
and the random states have several files too. To write, the tensors are put together one at a time and kept by the rank
whose file they belong to; to read, every rank takes its part of each out of the mapped files. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arfast import hub
from arfast.models import CausalLM, CausalLMConfig
from arfast.models.families import choose_family, config_to_json, stored_tensors
from arfast.train.engine import Engine
from arfast.train.manifest import CheckpointError, sync
from arfast.train.state import (
    OPTIMIZER,
    RNG,
    STATE_FILE,
    check_shapes,
    file_names,
    random_states,
    state_content,
    take_over,
)

from .parts import Part, parts

_MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ShardedSnapshot:
    """What one rank writes of a checkpoint: a copy, in the host's memory, that later steps do not change.

    files: tensors by name, by file name; texts: values, ready for JSON, by file name; num_bytes: of the tensors of all
    ranks together.
    """

    files: dict[str, dict[str, Tensor]]
    texts: dict[str, Any]
    num_bytes: int

    def write(self, directory: Path) -> None:
        """Write this rank's files into a directory where the other ranks write theirs."""
        for name, value in self.texts.items():
            (directory / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        for name, tensors in self.files.items():
            path = directory / name
            path.touch()
            mode = path.stat().st_mode
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)  # save_file gives 0600 whatever the umask
        for name in (*self.texts, *self.files):
            sync(directory / name)

    def copied(self, buffers: ShardedSnapshot | None) -> ShardedSnapshot:
        """Itself: it is a copy already."""
        return self


def take_snapshot(engine: Engine, identity: dict[str, Any], rank: int, num_ranks: int) -> ShardedSnapshot:
    """What rank ``rank`` writes of the present state of an engine; every rank calls this.

    Args:
        identity: what must be equal for a run to continue from here, ready for JSON.
    """
    model = engine.model
    own = parts(model)
    layout = [(s, own[n], i) for n, s, i in stored_tensors(model.family or choose_family(model.config), _shapes(model))]
    state = [
        (f"{kind}.{name}", Part(value, part.splits if value.ndim else ()), ())
        for name, part in own.items()
        for kind, value in engine.optimizer.state.get(part.tensor, {}).items()
    ]
    weights, weight_map, weight_bytes = _distribute("model", layout, rank, num_ranks)
    optimizer, _, optimizer_bytes = _distribute(OPTIMIZER, state, rank, num_ranks)
    own_states = {file_names(RNG, num_ranks)[rank]: random_states(engine.device)}
    texts: dict[str, Any] = {}
    if rank == 0:
        texts = {
            "config.json": config_to_json(model.config, "float32", model.family),
            STATE_FILE: state_content(engine, identity),
        }
        if len(set(weight_map.values())) > 1:
            texts[hub.INDEX] = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
    return ShardedSnapshot({**weights, **optimizer, **own_states}, texts, weight_bytes + optimizer_bytes)


def _shapes(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    return iter(CausalLM(model.config, device="meta").named_parameters())


def _distribute(
    stem: str, entries: Sequence[tuple[str, Part, tuple]], rank: int, num_ranks: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], int]:
    """What stands at ``index`` in the whole of each part: the tensors of this rank's files, the file name of each, and
    the bytes of all of them.

    Entries of one part follow one another, so that each is put together once.
    """
    metas = [torch.empty(part.shape, dtype=part.tensor.dtype, device="meta")[index] for _, part, index in entries]
    numbers = assign_files([meta.nbytes for meta in metas], num_ranks)
    names = file_names(stem, max(numbers, default=0) + 1)
    files: dict[str, dict[str, Tensor]] = {}
    source, tensor = None, None
    for (key, part, index), number in zip(entries, numbers):
        if part is not source:
            source, tensor = part, part.whole()
        if number % num_ranks == rank:
            value = tensor[index]
            files.setdefault(names[number], {})[key] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
    placed = {key: names[number] for (key, _, _), number in zip(entries, numbers)}
    return files, placed, sum(meta.nbytes for meta in metas)


def assign_files(sizes: Sequence[int], num_ranks: int, max_bytes: int = _MAX_FILE_BYTES) -> list[int]:
    """The file of each tensor: consecutive ones share a file, and the files, one per rank at least, are about equal.

    Args:
        sizes: bytes of the tensors.
        max_bytes: of a file, about.

    >>> assign_files([4, 4, 4, 2, 2], num_ranks=2)
    [0, 0, 1, 1, 1]
    """
    total = max(1, sum(sizes))
    num_files = max(num_ranks, -(-total // max_bytes))
    files, done = [], 0
    for size in sizes:
        files.append(min(num_files - 1, (done + size // 2) * num_files // total))
        done += size
    numbers = {file: number for number, file in enumerate(sorted(set(files)))}  # none is empty
    return [numbers[file] for file in files]


def read_config(directory: Path) -> tuple[CausalLMConfig, str | None]:
    """Configuration and family of a Hugging Face directory, once its tensors have been found to fit them."""
    with ExitStack() as stack:
        model = hub.open_pretrained(directory, stack).model
        return model.config, model.family


@torch.no_grad()
def load_weights(model: CausalLM, directory: Path) -> None:
    """Read this rank's part of every parameter from a Hugging Face directory.

    Raises:
        FileNotFoundError, ValueError: see `arfast.hub.from_pretrained`; or it has another configuration.
    """
    with ExitStack() as stack:
        opened = hub.open_pretrained(directory, stack)
        own = parts(model)
        check_shapes(directory, own, dict(opened.model.named_parameters()))
        for name, stored_name, index in opened.layout:
            stored = opened.stored[stored_name].get_slice(stored_name)
            for box, memory in own[name].boxes():
                if met := box.intersect(index, own[name].shape):
                    there, here = met
                    memory[here].copy_(stored[there])


def load_engine(engine: Engine, directory: Path, rank: int, num_ranks: int) -> None:
    """Take over this rank's part of a checkpoint that any number of ranks wrote: see `take_over`."""
    tensors = _local_state(engine, directory)
    take_over(engine, directory, tensors, lambda: load_weights(engine.model, directory), rank, num_ranks)


def _local_state(engine: Engine, directory: Path) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the optimizer's tensors, by the names ``<kind>.<parameter>``."""
    own = parts(engine.model)
    for path in sorted(directory.glob(f"{OPTIMIZER}*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                part = own.get(key.partition(".")[2])
                stored = file.get_slice(key)
                if part is None or not stored.get_shape():
                    yield key, file.get_tensor(key)
                    continue
                if stored.get_shape() != list(part.shape):
                    raise CheckpointError(
                        f"checkpoint: {path} must have shape {part.shape} for {key}, got {tuple(stored.get_shape())}"
                    )
                value = torch.zeros_like(part.tensor, dtype=torch.float32, requires_grad=False)
                for box, memory in Part(value, part.splits).boxes():
                    memory.copy_(stored[box.slices])
                yield key, value
