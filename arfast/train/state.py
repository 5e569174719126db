"""What a checkpoint holds besides weights and tokenizer: counters, optimizer tensors, random states. No pickle."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arfast.adapter import load_adapter

from .engine import Engine, TrainState
from .manifest import CheckpointError, read_small
from .optimizer import state_shapes

OPTIMIZER, RNG = "optimizer", "rng"  # see `file_names`
STATE_FILE = "trainer_state.json"
_VERSION = 2
_MAX_BYTES = 1 << 24
_MAX_RANGES = 10_000
# What changes the last bits of a run on one machine; recorded so that a resume elsewhere does not surprise.
_ENVIRONMENT_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "CUBLAS_WORKSPACE_CONFIG",
    "ATEN_CPU_CAPABILITY",
)


def file_names(stem: str, count: int) -> list[str]:
    """``<stem>.safetensors``, or the names of ``count`` files of which each holds some of the tensors."""
    several = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return several if count > 1 else [f"{stem}.safetensors"]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of an engine consists of: the very tensors of the run, or a copy that it cannot change.

    model: has ``save_pretrained``; optimizer: tensors by the names ``<kind>.<parameter>``, for example
    ``exp_avg.model.norm.weight``; random_states: uint8 tensors of the CPU's and the device's generator; content: of
    the state file.
    """

    model: nn.Module
    optimizer: dict[str, Tensor]
    random_states: dict[str, Tensor]
    content: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in (*_saved_parameters(self.model), *self.optimizer.values()))

    def write(self, directory: Path) -> None:
        """Write weights (as a Hugging Face model), optimizer, random states and counters."""
        self.model.save_pretrained(directory)
        optimizer = {name: tensor.contiguous() for name, tensor in self.optimizer.items()}
        save_file(optimizer, directory / file_names(OPTIMIZER, 1)[0])
        save_file(self.random_states, directory / file_names(RNG, 1)[0])
        (directory / STATE_FILE).write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")

    def copied(self, buffers: Snapshot | None) -> Snapshot:
        """A copy in the host's memory, in that of an earlier copy where there is one: fresh pages cost more."""
        reusable = buffers is not None and buffers.optimizer.keys() == self.optimizer.keys()
        model = buffers.model if reusable else _copied_model(self.model)
        optimizer = buffers.optimizer if reusable else {name: _host_buffer(t) for name, t in self.optimizer.items()}
        targets, sources = [*_tensors(model), *optimizer.values()], [*_tensors(self.model), *self.optimizer.values()]
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()
        return Snapshot(model, optimizer, self.random_states, self.content)


def snapshot(engine: Engine, identity: dict[str, Any]) -> Snapshot:
    """The present state of an engine, its tensors not copied; identity: see `state_content`."""
    names = [(name, engine.optimizer.state.get(parameter, {})) for name, parameter in engine.model.named_parameters()]
    optimizer = {f"{kind}.{name}": value.detach() for name, state in names for kind, value in state.items()}
    return Snapshot(engine.model, optimizer, random_states(engine.device), state_content(engine, identity))


def state_content(engine: Engine, identity: dict[str, Any]) -> dict[str, Any]:
    """Counters, and what they belong to, ready for JSON.

    Args:
        identity: what must be equal for a run to continue from here, ready for JSON.
    """
    return {
        "version": _VERSION,
        "state": dataclasses.asdict(engine.state),
        "identity": identity,
        "config": engine.config.to_dict(),
        "environment": environment(engine.device, engine.strategy.arrangement),
    }


def load_engine(engine: Engine, directory: Path) -> None:
    """Take over what `Snapshot.write` wrote, or the ranks of a distributed run together.

    Raises:
        CheckpointError: it was written for other parameters.
    """
    files = sorted(directory.glob(f"{OPTIMIZER}*.safetensors"))
    tensors = itertools.chain.from_iterable(load_file(path).items() for path in files)
    take_over(engine, directory, tensors, lambda: _load_weights(engine, directory))


def take_over(
    engine: Engine,
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    load_weights: Callable[[], None],
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Continue from a checkpoint that any number of ranks wrote: all of it, or, with an error, nothing.

    Random states are those of this rank where as many ranks wrote it, and new ones otherwise.

    Args:
        tensors: of the optimizer, this rank's part of each, by the names ``<kind>.<parameter>``.
        load_weights: reads this rank's part of the parameters into the model, if all are of their shapes.

    Raises:
        CheckpointError: it was written for other parameters.
    """
    state, _ = read_state(directory)
    names = file_names(RNG, num_ranks)
    try:
        moments = optimizer_state(engine.optimizer, engine.model, tensors, directory)
        as_many = all((directory / name).is_file() for name in names)
        states = read_random_states(engine.device, directory / names[rank]) if as_many else None
        # Nothing has changed until here.
        load_weights()
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        text = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint: {directory} must hold the model's parameters, got {text:.300}") from None
    engine.optimizer.load_state_dict(moments)
    if states is None:
        torch.manual_seed(engine.config.seed + rank)
    else:
        restore_random_states(engine.device, states)
    engine.weights_changed()
    engine.state = state


def _load_weights(engine: Engine, directory: Path) -> None:
    if getattr(engine.model, "lora", None) is not None:
        load_adapter(engine.model, directory)
        return
    model = type(engine.model).from_pretrained(directory, dtype=torch.float32, device=engine.device)
    found = model.state_dict()
    # load_state_dict finds a difference only after it has copied what fits.
    check_shapes(directory, engine.model.state_dict(), found)
    engine.model.load_state_dict(found)


def check_shapes(directory: Path, wanted: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Whether the tensors of a directory are those that a model needs, by name and ``shape``.

    Raises:
        ValueError: they are not.
    """
    wanted_shapes, shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (wanted, found))
    for name in [*wanted, *found]:
        if (shape := wanted_shapes.get(name)) != (got := shapes.get(name)):
            raise ValueError(f"load_weights: {directory} must hold {name} of shape {shape}, got {got}")


def read_state(directory: Path) -> tuple[TrainState, dict[str, Any]]:
    """Counters of a checkpoint, and all that is beside them: "identity", "config", "environment".

    Raises:
        CheckpointError: the file is of another version or lacks a part.
    """
    path = directory / STATE_FILE
    try:
        content = json.loads(read_small(path, _MAX_BYTES).decode())
        if content["version"] == 1:
            # Counted in rows then.
            content |= {"version": 2, "state": dict(content["state"])}
            content["state"]["position"] *= content["config"]["seqlen"]
        if content["version"] != _VERSION:
            raise CheckpointError(f"checkpoint: {path} must have version {_VERSION}, got {content['version']!s:.50}")
        parts = {name: dict(content[name]) for name in ("identity", "config", "environment")}
        state = TrainState(**content["state"])
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            if field.type == "int" and not _is_count(value):
                raise ValueError(f"{field.name} that is no integer in [0, 2**63): {value!r:.50}")
            if field.type == "list[float]" and not (isinstance(value, list) and all(type(x) is float for x in value)):
                raise ValueError(f"{field.name} that is no list of floats: {value!r:.50}")
        _check_ranges(state.left_out)
        return state, parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} must be a trainer state, got {error!r:.200}") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_ranges(ranges: Any) -> None:
    """Of positions that are left out; a step looks for its place in all of them."""
    pairs = isinstance(ranges, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in ranges)
    if not (pairs and len(ranges) <= _MAX_RANGES and all(_is_count(a) and _is_count(b) and a < b for a, b in ranges)):
        raise ValueError(f"left_out that is no list of at most {_MAX_RANGES} ranges: {ranges!r:.50}")


def environment(device: torch.device, arrangement: str = "") -> dict[str, Any]:
    """What decides the last bits of a run besides its configuration.

    Args:
        arrangement: of the ranks, "" for one.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": f"{name} on {arrangement}" if arrangement else name,
        "variables": {name: os.environ[name] for name in _ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _saved_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that ``save_pretrained`` writes: of a model with adapters these alone."""
    has_adapters = getattr(model, "lora", None) is not None
    return [parameter for parameter in model.parameters() if parameter.requires_grad or not has_adapters]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*_saved_parameters(model), *model.buffers()]


def _host_buffer(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.contiguous_format)


def _copied_model(model: nn.Module) -> nn.Module:
    """The same modules around buffers in the host's memory, and the parameters that are not saved."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {
        id(tensor): nn.Parameter(_host_buffer(tensor), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else _host_buffer(tensor)
        for tensor in _tensors(model)
    }
    return copy.deepcopy(model, memo)


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Iterable[tuple[str, Tensor]], path: Path
) -> dict[str, Any]:
    """What the optimizer's ``load_state_dict`` takes, of stored tensors by name; ``path`` is for errors."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, value in tensors:
        kind, _, name = key.partition(".")
        parameter = parameters.get(name)
        shape = None if parameter is None else state_shapes(optimizer, parameter).get(kind)
        if shape is None or value.shape != shape or not value.is_floating_point():
            known = "parameters of the model and what its optimizer keeps of them"
            wanted = known if shape is None else f"floats of shape {tuple(shape)}"
            raise CheckpointError(
                f"checkpoint: {path} must have {wanted}, got {key!r:.100} {value.dtype} {tuple(value.shape)}"
            )
        # A copy in memory of its own: the mapped file is aligned to 8 bytes only, and its pages come one by one.
        state.setdefault(parameter, {})[kind] = value.clone()
    for name, parameter in parameters.items():
        missing = state_shapes(optimizer, parameter).keys() - state.get(parameter, {}).keys()
        if parameter in state and missing:
            raise CheckpointError(
                f"checkpoint: {path} must have all that the optimizer keeps of {name}, lacks {min(missing)}"
            )
    parameters_in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {i: state[parameter] for i, parameter in enumerate(parameters_in_order) if parameter in state}
    return {"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the CPU's and the device's generator, uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def read_random_states(device: torch.device, path: Path) -> dict[str, Tensor]:
    """The stored states of the generators that there are here, tried on new generators: not all bytes are a state."""
    stored, present = load_file(path), random_states(device)
    for name, own in present.items():
        found = stored.get(name)
        if found is None and name != "cpu":
            continue
        if found is None or found.dtype != own.dtype or found.shape != own.shape:
            got = None if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise CheckpointError(
                f"checkpoint: {path} must have a random state {name} of {own.nbytes} bytes, got {got}"
            )
        try:
            torch.Generator(name).set_state(found)
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint: {path} must have a random state {name} that a generator takes, got {error}"
            ) from None
    return {name: stored[name].clone() for name in present if name in stored}


def restore_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Take over what `read_random_states` gave."""
    for name, state in states.items():
        torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, device)
