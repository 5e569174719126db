"""When and how a run saves: at once, or from a copy in memory by a thread while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from . import checkpoint as ckpt
from .engine import Engine
from .log import notice
from .state import Snapshot, snapshot

_SMALL_FILES_BYTES = 32 << 20  # configuration, tokenizer, state: generous, for the check of free space


class Saver:
    """Writes the checkpoints of a run under ``root``; the caller holds `lock_directory`.

    In the background a save pauses the run for as long as its tensors take to be copied in memory; what is written is
    that copy, so that later steps do not leak into it. One save is in flight at most. A checkpoint appears, as ever,
    by one rename after all of it has been read back, and only then are older ones removed. Until then a kill loses the
    steps since the checkpoint before it.

    Args:
        identity: what must be equal for a run to continue, ready for JSON.
        keep_last: checkpoints to keep; 0: all of them.
        background: save in a thread. Costs memory on the host for a second set of weights and optimizer tensors.

    Attributes:
        step: of the checkpoint that was last saved, begun or loaded; None: none yet.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        identity: dict[str, Any],
        tokenizer: Any | None,
        *,
        keep_last: int,
        background: bool,
    ) -> None:
        self.step: int | None = None
        self._root, self._engine, self._identity, self._tokenizer = root, engine, identity, tokenizer
        self._keep_last, self._background = keep_last, background
        self._staged: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self) -> None:
        """Save the present state, or begin to.

        Raises:
            CheckpointError: see `save_checkpoint`; also of the save before this one.
        """
        self.wait()
        present, step = snapshot(self._engine, self._identity), self._engine.state.step
        if self._background:
            self._staged = present.copied(self._staged)
            # No daemon: an interpreter that ends waits for it.
            self._thread = threading.Thread(target=self._run, args=(self._staged, step), name="arfast save")
            self._thread.start()
        else:
            self._write(present, step)
        self.step = step

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; do not wait for one that has not."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except ckpt.CheckpointError as lost:
            if error is None:
                raise
            notice(f"Trainer: the last save failed too: {lost}")

    def _run(self, staged: Snapshot, step: int) -> None:
        try:
            self._write(staged, step)
        except BaseException as error:  # to be raised where the run can end for it
            self._error = error

    def _write(self, present: Snapshot, step: int) -> None:
        def write(directory: Path) -> None:
            present.write(directory)
            if self._tokenizer is not None:
                self._tokenizer.save(directory)

        ckpt.save_checkpoint(self._root, step, write, num_bytes=present.num_bytes + _SMALL_FILES_BYTES)
        ckpt.prune(self._root, self._keep_last)
