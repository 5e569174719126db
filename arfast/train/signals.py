"""Ending a run in good order: the first signal asks, the second one ends the process at once; and telling why a run
stands still."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class TrainingInterrupted(SystemExit):
    """A run that was asked to end by a signal, after it saved; the exit status is 128 + the signal's number."""


class StopRequest:
    """While active, notes SIGTERM, SIGINT and SIGUSR1 (what batch systems send before they kill) instead of dying.

    After the first one the default action is back, so that a second signal ends the process immediately, even inside
    a long kernel; what is on the disk is complete at every instant. Outside the main thread, where Python delivers no
    signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: it was not installed from Python, so Python cannot put it back.
            if handler is not None:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)


class Watchdog:
    """While active, prints the stacks of all threads on stderr when nobody calls `restart` for ``seconds``.

    It prints again after each further ``seconds``, and neither ends the process nor needs the interpreter's lock, so
    it also tells of a thread that hangs in C. None: it does nothing. There is one such timer in a process
    (`faulthandler.dump_traceback_later`).
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def __enter__(self) -> Watchdog:
        self.restart()
        return self

    def restart(self) -> None:
        """Count from now."""
        if self._seconds is not None:
            # What stands in for stderr, in a notebook or under pytest, may have no descriptor to write to.
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=sys.__stderr__)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
