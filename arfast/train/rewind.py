"""Going back to an earlier checkpoint after a bad step, in a way that a kill at any instant cannot spoil.

The decision is written to ``rewinds.json`` before anything else is done: a run that continues, from whatever
checkpoint, leaves out the same samples, whether or not the fault would come again. Checkpoints of the abandoned steps
are removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from arfast.data.checks import check_integer
from arfast.data.files import write_file

from . import checkpoint as ckpt
from .config import TrainConfig
from .engine import TrainState
from .manifest import CheckpointError
from .spikes import DELAY

JOURNAL = "rewinds.json"
_VERSION = 1
_MAX_TRIES = 3


class DivergedError(RuntimeError):
    """A run that went bad again and again from the same checkpoint; its checkpoints are as they were."""


@dataclass(frozen=True)
class Rewind:
    """from_step: the step that was bad; to_step: where the run continued; first, end: positions, in tokens, that are
    left out since; reason: what was bad."""

    from_step: int
    to_step: int
    first: int
    end: int
    reason: str


class Journal:
    """The rewinds of the run in ``root``, in order.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / JOURNAL
        self.rewinds: list[Rewind] = []
        if self._path.exists():
            try:
                content = json.loads(self._path.read_bytes())
                version, entries = content["version"], content["rewinds"]
                self.rewinds = [Rewind(**entry) for entry in entries] if version == _VERSION else []
                for rewind in self.rewinds:
                    check_integer("first", rewind.first, 0)
                    check_integer("end", rewind.end, rewind.first + 1)
                    check_integer("to_step", rewind.to_step, 0)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"Trainer: {self._path} must be a list of rewinds, got {error!r:.200}") from None
            if version != _VERSION:
                raise CheckpointError(f"Trainer: {self._path} must have version {_VERSION}, got {version!r:.100}")

    def add(self, rewind: Rewind) -> None:
        """Write a decision down; it holds from then on."""
        entries = [asdict(entry) for entry in (*self.rewinds, rewind)]
        content = json.dumps({"version": _VERSION, "rewinds": entries}, indent=1).encode() + b"\n"
        write_file(self._path, content)
        self.rewinds.append(rewind)

    def clear(self) -> None:
        """For a run that begins: its first checkpoint comes before its first rewind."""
        self._path.unlink(missing_ok=True)
        self.rewinds = []

    def left_out(self) -> list[list[int]]:
        return [[rewind.first, rewind.end] for rewind in self.rewinds]

    def abandons(self, state: TrainState) -> bool:
        """Whether a checkpoint is of steps that a later decision did away with."""
        return any(
            rewind.to_step < state.step and [rewind.first, rewind.end] not in state.left_out for rewind in self.rewinds
        )


def plan_rewind(root: Path, journal: Journal, config: TrainConfig, state: TrainState, reason: str,
                report: Callable[[str], None]) -> tuple[Path, Rewind]:  # fmt: skip
    """The checkpoint to go back to after the step that has just been done, and what to leave out.

    Left out is what was read in that step and in the two before it, since a fault may be seen that late.

    Raises:
        DivergedError: three rewinds from this checkpoint were not enough.
        CheckpointError: there is no intact checkpoint.
    """
    checkpoints = ckpt.list_checkpoints(root)
    far_enough = [path for path in checkpoints if int(path.name[5:]) <= state.step - config.rewind_steps]
    # The oldest one when none is far enough back: after a signal, checkpoints can lie closer than their period.
    for path in (*reversed(far_enough), *checkpoints[len(far_enough) :]):
        try:
            ckpt.verify(path)
            break
        except (CheckpointError, OSError) as error:
            report(f"{error}; trying another checkpoint")
    else:
        raise CheckpointError(f"Trainer: {root} must hold an undamaged checkpoint to rewind to, got none; {reason}")
    to_step = int(path.name[5:])
    tries = [rewind for rewind in journal.rewinds if rewind.to_step == to_step]
    if len(tries) >= _MAX_TRIES:
        raise DivergedError(
            f"Trainer: a step after {path} must be in line in one of {_MAX_TRIES} rewinds, "
            f"got step {state.step}: {reason}"
        )
    first_step = max(to_step, state.step - 1 - DELAY)
    first = state.position - (state.tokens - config.stages.tokens_after(first_step))
    return path, Rewind(state.step, to_step, first, state.position, reason)


def discard_newer(root: Path, good: Path) -> None:
    """Delete the checkpoints after ``good``, the newest first."""
    checkpoints = ckpt.list_checkpoints(root)
    for path in reversed(checkpoints[checkpoints.index(good) + 1 :]):
        ckpt.discard(path)
