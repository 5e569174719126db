"""When and how a run saves: at once, or from a copy in memory by a thread while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from . import checkpoint as ckpt
from .engine import Engine
from .log import notice
from .strategy import OneProcess

_SMALL_FILES_BYTES = 32 << 20  # configuration, tokenizer, state: generous, for the check of free space


class Saver:
    """Writes the checkpoints of a run under ``root``; the caller holds `lock_directory`.

    In the background a save pauses the run for as long as its tensors take to be copied in memory; what is written is
    that copy, so that later steps do not leak into it. One save is in flight at most. A checkpoint appears, as ever,
    by one rename after all of it has been read back, and only then are older ones removed. Until then a kill loses the
    steps since the checkpoint before it.

    Args:
        identity: what must be equal for a run to continue, ready for JSON.
        strategy: how the run is spread over ranks, of which each has a Saver.
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
        strategy: OneProcess,
        *,
        keep_last: int,
        background: bool,
    ) -> None:
        self.step: int | None = None
        self._root, self._engine, self._identity, self._tokenizer = root, engine, identity, tokenizer
        self._strategy, self._keep_last, self._background = strategy, keep_last, background
        self._staged: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self) -> None:
        """Save the present state, or begin to.

        Raises:
            CheckpointError: see `save_checkpoint`; also of the save before this one.
        """
        self.wait()
        present, step = self._strategy.snapshot(self._engine, self._identity), self._engine.state.step
        if self._background:
            self._staged = present.copied(self._staged)
            # No daemon: an interpreter that ends waits for it.
            self._thread = threading.Thread(target=self._run, args=(self._staged, step), name="arfast save")
            self._thread.start()
        else:
            self._write(present, step)
        self.step = step

    def check(self) -> None:
        """Raise what went wrong with a save that has ended, on any rank; do not wait for one that goes well."""
        if self._thread is not None and self._strategy.on_any_rank(self._error is not None):
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

    def _run(self, staged: Any, step: int) -> None:
        try:
            self._write(staged, step)
        except BaseException as error:  # to be raised where the run can end for it
            self._error = error

    def _write(self, present: Any, step: int) -> None:
        def write(directory: Path) -> None:
            present.write(directory)
            if self._tokenizer is not None and self._strategy.is_main:
                self._tokenizer.save(directory)

        options = dict(num_bytes=present.num_bytes + _SMALL_FILES_BYTES, keep_last=self._keep_last)
        self._strategy.save_checkpoint(self._root, step, write, **options)
