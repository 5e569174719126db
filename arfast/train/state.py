"""What a checkpoint holds besides weights and tokenizer: counters, optimizer tensors, random states. No pickle."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .engine import Engine, TrainState
from .manifest import CheckpointError

OPTIMIZER, RNG = "optimizer", "rng"  # see `file_names`
STATE_FILE = "trainer_state.json"
_VERSION = 1
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


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of an engine consists of.

    identity: what must be equal for a run to continue from here, ready for JSON.
    """

    engine: Engine
    identity: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the weights and the two moments of AdamW."""
        return 3 * sum(parameter.nbytes for parameter in self.engine.model.parameters())

    def write(self, directory: Path) -> None:
        """Write weights (as a Hugging Face model), optimizer, random states and counters."""
        engine = self.engine
        engine.model.save_pretrained(directory)
        _save_optimizer(engine.optimizer, engine.model, directory / file_names(OPTIMIZER, 1)[0])
        save_file(random_states(engine.device), directory / file_names(RNG, 1)[0])
        content = state_content(engine, self.identity)
        (directory / STATE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def state_content(engine: Engine, identity: dict[str, Any]) -> dict[str, Any]:
    """Counters, and what they belong to, ready for JSON."""
    return {
        "version": _VERSION,
        "state": dataclasses.asdict(engine.state),
        "identity": identity,
        "config": engine.config.to_dict(),
        "environment": environment(engine.device),
    }


def load_engine(engine: Engine, directory: Path) -> None:
    """Take over what `Snapshot.write` wrote, or the ranks of a distributed run together.

    Raises:
        CheckpointError: it was written for other parameters.
    """
    state, _ = read_state(directory)
    weights = type(engine.model).from_pretrained(directory, dtype=torch.float32, device=engine.device).state_dict()
    try:
        engine.model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint: {directory} must hold the model's parameters, got {error}") from None
    files = sorted(directory.glob(f"{OPTIMIZER}*.safetensors"))
    tensors = itertools.chain.from_iterable(load_file(path).items() for path in files)
    restore_optimizer(engine.optimizer, engine.model, tensors, directory)
    if (path := directory / file_names(RNG, 1)[0]).is_file():
        restore_random_states(engine.device, load_file(path))
    else:  # of several ranks, none of which is this process
        torch.manual_seed(engine.config.seed)
    engine.weights_changed()
    engine.state = state


def read_state(directory: Path) -> tuple[TrainState, dict[str, Any]]:
    """Counters of a checkpoint, and all that is beside them: "identity", "config", "environment".

    Raises:
        CheckpointError: the file is of another version or lacks a part.
    """
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise CheckpointError(f"checkpoint: {path} must have version {_VERSION}, got {content['version']}")
        parts = {name: dict(content[name]) for name in ("identity", "config", "environment")}
        return TrainState(**content["state"]), parts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {path} must be a trainer state, got {error!r}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a run besides its configuration."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_ranks = torch.distributed.get_world_size() if distributed else 1
    ranks = f" on {num_ranks} ranks" if num_ranks > 1 else ""
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type) + ranks,
        "variables": {name: os.environ[name] for name in _ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Tensors by the names ``<kind>.<parameter>``, for example ``exp_avg.model.norm.weight``."""
    tensors = {
        f"{kind}.{name}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, path)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Iterable[tuple[str, Tensor]], path: Path
) -> None:
    """Take over the tensors of `_save_optimizer`, by name, in the shapes of the parameters; ``path`` is for errors."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, value in tensors:
        kind, _, name = key.partition(".")
        parameter = parameters.get(name)
        if parameter is None or (value.ndim > 0 and value.shape != parameter.shape):
            wanted = "parameters of the model" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise CheckpointError(f"checkpoint: {path} must have {wanted}, got {key} {tuple(value.shape)}")
        # A copy in memory of its own: the mapped file is aligned to 8 bytes only, and its pages come one by one.
        state.setdefault(parameter, {})[kind] = value.clone()
    parameters_in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {i: state[parameter] for i, parameter in enumerate(parameters_in_order) if parameter in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the CPU's and the device's generator, uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Take over what `random_states` gave."""
    torch.set_rng_state(states["cpu"].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
