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
from torch.distributed.tensor import DTensor

from arfast import hub
from arfast.models import CausalLM, CausalLMConfig
from arfast.models.families import choose_family, config_to_json, stored_tensors
from arfast.train.engine import Engine
from arfast.train.manifest import CheckpointError, sync
from arfast.train.state import (
    OPTIMIZER,
    RNG,
    STATE_FILE,
    file_names,
    optimizer_state,
    random_states,
    read_random_states,
    read_state,
    restore_random_states,
    state_content,
)

from .sharding import local_box, local_part, whole

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
    parameters = dict(model.named_parameters())
    layout = [(s, parameters[n], i) for n, s, i in stored_tensors(choose_family(model.config), _shapes(model))]
    state = [
        (f"{kind}.{name}", value, ())
        for name, parameter in parameters.items()
        for kind, value in engine.optimizer.state.get(parameter, {}).items()
    ]
    weights, weight_map, weight_bytes = _distribute("model", layout, rank, num_ranks)
    optimizer, _, optimizer_bytes = _distribute(OPTIMIZER, state, rank, num_ranks)
    own_states = {file_names(RNG, num_ranks)[rank]: random_states(engine.device)}
    texts: dict[str, Any] = {}
    if rank == 0:
        texts = {"config.json": config_to_json(model.config, "float32"), STATE_FILE: state_content(engine, identity)}
        if len(set(weight_map.values())) > 1:
            texts[hub.INDEX] = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
    return ShardedSnapshot({**weights, **optimizer, **own_states}, texts, weight_bytes + optimizer_bytes)


def _shapes(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    return iter(CausalLM(model.config, device="meta").named_parameters())


def _distribute(
    stem: str, entries: Sequence[tuple[str, Tensor, tuple]], rank: int, num_ranks: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], int]:
    """The tensors ``value[index]`` of this rank's files, the file name of each, and the bytes of all of them.

    Entries of one value follow one another, so that each value is put together once.
    """
    metas = [torch.empty(value.shape, dtype=value.dtype, device="meta")[index] for _, value, index in entries]
    numbers = assign_files([meta.nbytes for meta in metas], num_ranks)
    names = file_names(stem, max(numbers, default=0) + 1)
    files: dict[str, dict[str, Tensor]] = {}
    source, tensor = None, None
    for (key, value, index), number in zip(entries, numbers):
        if value is not source:
            source, tensor = value, whole(value)
        if number % num_ranks == rank:
            part = tensor[index]
            files.setdefault(names[number], {})[key] = torch.empty(part.shape, dtype=part.dtype).copy_(part)
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


def read_config(directory: Path) -> CausalLMConfig:
    """The configuration of a Hugging Face directory, once its tensors have been found to fit it."""
    with ExitStack() as stack:
        return hub.open_pretrained(directory, stack).model.config


@torch.no_grad()
def load_weights(model: CausalLM, directory: Path) -> None:
    """Read this rank's part of every parameter from a Hugging Face directory.

    Raises:
        FileNotFoundError, ValueError: see `arfast.hub.from_pretrained`; or it has another configuration.
    """
    with ExitStack() as stack:
        opened = hub.open_pretrained(directory, stack)
        parameters = dict(model.named_parameters())
        wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        found = {name: tuple(parameter.shape) for name, parameter in opened.model.named_parameters()}
        if wanted != found:
            name = next(name for name in [*wanted, *found] if wanted.get(name) != found.get(name))
            raise ValueError(
                f"load_weights: {directory} must hold {name} of shape {wanted.get(name)}, got {found.get(name)}"
            )
        for name, stored_name, index in opened.layout:
            parameter = parameters[name]
            if met := local_box(parameter).intersect(index, parameter.shape):
                there, here = met
                part = opened.stored[stored_name].get_slice(stored_name)
                local_part(parameter)[here].copy_(part[there])


def load_engine(engine: Engine, directory: Path, rank: int, num_ranks: int) -> None:
    """Take over this rank's part of a checkpoint that any number of ranks wrote.

    Random states are those of this rank where as many ranks wrote it, and new ones otherwise.

    Raises:
        CheckpointError: it was written for other parameters.
    """
    state, saved = read_state(directory)
    try:
        load_weights(engine.model, directory)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"checkpoint: {directory} must hold the model's parameters, got {error}") from None
    tensors = _local_state(engine, directory)
    engine.optimizer.load_state_dict(optimizer_state(engine.optimizer, engine.model, tensors, directory))
    names = file_names(RNG, num_ranks)
    if all((directory / name).is_file() for name in names):
        restore_random_states(engine.device, read_random_states(engine.device, directory / names[rank]))
    else:
        torch.manual_seed(engine.config.seed + rank)
    engine.weights_changed()
    engine.state = state


def _local_state(engine: Engine, directory: Path) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the optimizer's tensors, by the names ``<kind>.<parameter>``."""
    parameters = dict(engine.model.named_parameters())
    for path in sorted(directory.glob(f"{OPTIMIZER}*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                parameter = parameters.get(key.partition(".")[2])
                stored = file.get_slice(key)
                if parameter is None or not isinstance(parameter, DTensor) or not stored.get_shape():
                    yield key, file.get_tensor(key)
                    continue
                if stored.get_shape() != list(parameter.shape):
                    raise CheckpointError(
                        f"checkpoint: {path} must have shape {tuple(parameter.shape)} for {key}, "
                        f"got {tuple(stored.get_shape())}"
                    )
                yield key, _spread(stored, parameter)


def _spread(stored: Any, parameter: DTensor) -> DTensor:
    """A tensor of a file, placed as a parameter is."""
    box = local_box(parameter)
    part = torch.empty(box.shape, dtype=torch.float32)
    if met := box.intersect((), parameter.shape):
        part.copy_(stored[met[0]])
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
