"""Durable files and directories: temporary name, fsync, rename, and a lock that dies with its process."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: after a crash or a full disk it holds the old content or the new one."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"write_file: path must be a regular file or absent, got {str(path)!r}")
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; a link is refused, so that a data set cannot point outside itself."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"open_regular: path must be a regular file, got {str(path)!r}")
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most ``max_bytes``."""
    with open(open_regular(path), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"read_file: {str(path)!r} must hold at most {max_bytes} bytes, got more")
    return content


def sha256(buffer: memoryview | bytes) -> str:
    """SHA-256 in hex, in pieces, so that a memory-mapped file is read once from front to back."""
    digest = hashlib.sha256()
    view = memoryview(buffer)
    for start in range(0, len(view), _CHUNK_BYTES):
        digest.update(view[start : start + _CHUNK_BYTES])
    return digest.hexdigest()


def _create_and_lock(path: Path) -> tuple[int, bool]:
    """A locked descriptor of the directory that bears the name ``path`` now, and whether this call created it."""
    while True:
        try:
            os.mkdir(path)
            created = True
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The previous holder may have renamed its result over this name while we waited: then we hold a ghost.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, created
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of a directory, made if absent, and removed at the end if it was made and is empty.

    The lock is ``flock`` on the directory itself: it leaves no file behind and ends with the process, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, created = _create_and_lock(path)
    try:
        yield
    finally:
        if created:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its name when the block ends well, and vanishes otherwise.

    Call it with ``locked_directory(path)`` held and ``path`` empty. Siblings that a killed process left are removed:
    only the holder of the lock makes them.
    """
    prefix = f".{path.name}.tmp-"
    for stale in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        shutil.rmtree(stale, ignore_errors=True)
    temporary = path.parent / (prefix + secrets.token_hex(4))
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
