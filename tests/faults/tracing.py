"""A child process that stops at its system calls, by ptrace(2): to be killed there, or to be told that they failed.

Unlike replaced functions of `os`, this sees every call of every thread, those of the libraries written in Rust too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_TRACEME, _SYSCALL, _GETREGS, _SETREGS, _SETOPTIONS = 0, 24, 12, 13, 0x4200
_OPTION_SYSGOOD, _OPTION_CLONE, _OPTION_EXITKILL = 0x1, 0x8, 0x100000
_WALL = 0x40000000
_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
    "fs_base gs_base ds es fs gs"
)
# System calls of x86-64 that change a file system or wait for it, and those that start what a file must not start.
_NAMES = {
    1: "write", 2: "open", 3: "close", 18: "pwrite64", 20: "writev", 26: "msync", 40: "sendfile", 74: "fsync",
    75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link",
    87: "unlink", 88: "symlink", 90: "chmod", 91: "fchmod", 257: "openat", 258: "mkdirat", 263: "unlinkat",
    264: "renameat", 265: "linkat", 266: "symlinkat", 268: "fchmodat", 285: "fallocate", 296: "pwritev",
    316: "renameat2", 326: "copy_file_range", 328: "pwritev2", 41: "socket", 42: "connect", 49: "bind", 56: "clone",
    57: "fork", 58: "vfork", 59: "execve", 322: "execveat", 435: "clone3",
}  # fmt: skip
STARTS = ("socket", "connect", "fork", "vfork", "execve", "execveat", "clone", "clone3", "bind")
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range")


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulong) for name in _REGISTERS.split()]


class Call(NamedTuple):
    """A system call about to be made by a thread; name: "other" for those that nobody asks for here."""

    name: str
    arguments: tuple[int, int, int]
    thread: int

    def path(self) -> str:
        """Of an open or an execve, as it was given."""
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            memory.seek(self.arguments[1 if self.name == "openat" else 0])
            return os.fsdecode(memory.read(4096).partition(b"\0")[0])

    @property
    def changes_files(self) -> bool:
        if self.name in ("open", "openat"):
            flags = self.arguments[1 if self.name == "open" else 2]
            return bool(flags & (os.O_CREAT | os.O_TRUNC))
        if self.name == "write":
            return self.arguments[0] > 2
        return self.name not in ("other", "close", *STARTS)


@dataclass(frozen=True)
class Do:
    """What to do to a call: make it fail, or write less; then kill, if so, before or after it.

    error: the call is not made and returns this; at_most: bytes that a write is to write.
    """

    kill_before: bool = False
    kill_after: bool = False
    error: int | None = None
    at_most: int | None = None


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: object = 0) -> None:
    pointer = ctypes.cast(ctypes.byref(data), ctypes.c_void_p) if isinstance(data, ctypes.Structure) else data
    if _libc.ptrace(request, pid, None, pointer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def unavailable() -> str | None:
    """Why tests that trace must be skipped; None: they need not."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tracing knows the system calls of x86-64 Linux only"
    try:
        return None if traced(lambda: None, lambda number, call: None) == 0 else "a traced child must end well"
    except OSError as error:
        return str(error)


def traced(work: Callable[[], object], decide: Callable[[int, Call], Do | None], *, quietly: bool = True) -> int:
    """Run ``work`` in a fork, asking ``decide`` before each of its system calls; they are numbered from 0.

    Returns:
        exit status: 0, 1 after an exception (then ``work`` is to have told about it), minus the signal's number.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            status = 0
        except BaseException:
            if not quietly:
                sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return follow(child, decide)


def follow(child: int, decide: Callable[[int, Call], Do | None]) -> int:
    """As `traced`, of a fork that has asked to be traced and stopped itself, the leader of its process group."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise OSError(f"ptrace: the child ended with status {status}")
    _ptrace(_SETOPTIONS, child, _OPTION_SYSGOOD | _OPTION_CLONE | _OPTION_EXITKILL)
    _ptrace(_SYSCALL, child)
    under_way: dict[int, Do | None] = {}  # by thread: what was decided about the call that it is in
    number = 0
    while True:
        thread, status = os.waitpid(-child, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == child:
                return os.waitstatus_to_exitcode(status)
            continue
        stop, delivered = os.WSTOPSIG(status), 0
        # A thread that was stopped may be killed with its process before it is asked anything.
        with contextlib.suppress(ProcessLookupError):
            if stop == signal.SIGTRAP | 0x80:
                if thread not in under_way:
                    registers = _registers(thread)
                    under_way[thread] = do = decide(number, _call(registers, thread))
                    number += 1
                    _enter(child, thread, registers, do)
                else:
                    _leave(child, thread, under_way.pop(thread))
            elif stop not in (signal.SIGTRAP, signal.SIGSTOP):
                delivered = stop
            _ptrace(_SYSCALL, thread, delivered)


def _registers(thread: int) -> _Registers:
    registers = _Registers()
    _ptrace(_GETREGS, thread, registers)
    return registers


def _call(registers: _Registers, thread: int) -> Call:
    return Call(_NAMES.get(registers.orig_rax, "other"), (registers.rdi, registers.rsi, registers.rdx), thread)


def _enter(child: int, thread: int, registers: _Registers, do: Do | None) -> None:
    if do is None:
        return
    if do.kill_before:
        os.kill(child, signal.SIGKILL)
    elif do.error is not None:
        registers.orig_rax = 2**64 - 1  # no such call
        _ptrace(_SETREGS, thread, registers)
    elif do.at_most is not None:
        registers.rdx = min(registers.rdx, do.at_most)
        _ptrace(_SETREGS, thread, registers)


def _leave(child: int, thread: int, do: Do | None) -> None:
    if do is None:
        return
    if do.error is not None:
        registers = _registers(thread)
        registers.rax = 2**64 - do.error
        _ptrace(_SETREGS, thread, registers)
    if do.kill_after:
        os.kill(child, signal.SIGKILL)
