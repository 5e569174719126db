"""Forked processes that turn requests into replies, bytes both, over pipes; nothing is pickled.

A worker ends when its parent does: its end of the pipe then reads as closed.
"""

import errno
import os
import select
import signal
import struct
from collections.abc import Callable, Iterable, Iterator

_LENGTH = struct.Struct("<QI")
_OK, _OS_ERROR, _VALUE_ERROR, _IMPORT_ERROR, _OTHER = range(5)
_CODES = {OSError: _OS_ERROR, ValueError: _VALUE_ERROR, ImportError: _IMPORT_ERROR}


def _write(descriptor: int, code: int, data: bytes) -> None:
    for part in (_LENGTH.pack(len(data), code), data):
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _read(descriptor: int) -> tuple[int, bytes]:
    length, code = _LENGTH.unpack(_read_exactly(descriptor, _LENGTH.size))
    return code, _read_exactly(descriptor, length)


def _raise(code: int, data: bytes) -> None:
    """Raises in the parent what ended a request in a worker."""
    number, _, message = data.decode().partition(":")
    if code == _OS_ERROR:
        raise OSError(int(number), message)
    raise {_VALUE_ERROR: ValueError, _IMPORT_ERROR: ImportError}.get(code, RuntimeError)(message)


def _serve(function: Callable[[bytes], bytes], requests: int, replies: int) -> None:
    while True:
        try:
            _, data = _read(requests)
        except EOFError:
            return
        try:
            code, reply = _OK, function(data)
        except Exception as error:
            code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), _OTHER)
            message = (error.strerror or str(error)) if code == _OS_ERROR else str(error)
            number = getattr(error, "errno", None) or errno.EIO
            reply = f"{number}:{message or type(error).__name__}".encode(errors="replace")
        _write(replies, code, reply)


class Workers:
    """Processes that call one function; use it as a context, which ends them.

    They see the memory of the parent as it is now, so that large tables are shared and not sent.

    >>> with Workers(bytes.upper, 2) as workers:
    ...     sorted(workers.map([b"a", b"b", b"c"]))
    [b'A', b'B', b'C']
    """

    def __init__(self, function: Callable[[bytes], bytes], num_workers: int):
        self._function = function
        self._pipes: dict[int, int] = {}
        self._processes: list[int] = []
        try:
            for _ in range(num_workers if num_workers > 1 else 0):
                self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        requests, to_worker = os.pipe()
        from_worker, replies = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
                for descriptor in (to_worker, from_worker, *self._pipes, *self._pipes.values()):
                    os.close(descriptor)
                _serve(self._function, requests, replies)
                status = 0
            finally:
                os._exit(status)
        os.close(requests)
        os.close(replies)
        self._pipes[from_worker] = to_worker
        self._processes.append(process)

    def map(self, requests: Iterable[bytes]) -> Iterator[bytes]:
        """Replies in the order in which they are ready; one request per worker is under way at a time.

        Raises:
            OSError, ValueError, ImportError, RuntimeError: what the function raised, or a worker's death.
        """
        if not self._pipes:
            yield from map(self._function, requests)
            return
        idle, busy = list(self._pipes), []
        try:
            for request in requests:
                _write(self._pipes[idle[0]], _OK, request)
                busy.append(idle.pop(0))
                if not idle:
                    yield from self._collect(busy, idle)
            while busy:
                yield from self._collect(busy, idle)
        except (EOFError, BrokenPipeError):
            raise RuntimeError("prepare: workers must live until the end, got one that died (memory?)") from None

    @staticmethod
    def _collect(busy: list[int], idle: list[int]) -> Iterator[bytes]:
        for descriptor in select.select(busy, [], [])[0]:
            code, data = _read(descriptor)
            busy.remove(descriptor)
            idle.append(descriptor)
            if code != _OK:
                _raise(code, data)
            yield data

    def close(self) -> None:
        for process in self._processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for descriptor in (*self._pipes, *self._pipes.values()):
            os.close(descriptor)
        self._processes, self._pipes = [], {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
