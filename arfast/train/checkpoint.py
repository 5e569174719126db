"""Atomic checkpoint directories: a checkpoint is there completely, with a checksum for every file, or it is not there.

Written to ``step-00001000.tmp-<random>`` beside its final place, every file synchronised, the manifest last, then
renamed; the rename is the commit. "Latest" is computed, never stored: it is the newest directory whose manifest
verifies. The order of the synchronisations follows Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014),
section 4. Nothing here reads or writes pickle.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .manifest import MANIFEST, STEP_NAME, CheckpointError, regular_file_size, sync, verify, write_manifest

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "discard",
    "latest_checkpoint",
    "list_checkpoints",
    "lock_directory",
    "prune",
    "publish",
    "save_checkpoint",
    "set_aside_damaged",
    "verify",
]

_TEMPORARY_DIRECTORY = re.compile(r"(?:step-\d{8,}|final)\.tmp-[0-9a-f]{16}")
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")
_TEMPORARY_FILE = re.compile(r"\.(?:metrics\.jsonl|samples\.jsonl|loss\.png|rewinds\.json)\.tmp-[0-9a-f]+")


@contextlib.contextmanager
def lock_directory(root: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``root`` (created when absent) for one writer; a second writer gets a `CheckpointError`.

    The lock is ``flock`` on the directory itself: it ends with its process, however that ends. Temporaries of killed
    writers are removed on entry.
    """
    try:
        os.makedirs(root, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"checkpoint: directory must be writable, got {root} ({error.strerror})") from error
    try:
        _lock(descriptor, root)
        _warn_of_others(descriptor, root)
        _remove_temporaries(root)
        yield
    finally:
        os.close(descriptor)


def save_checkpoint(
    root: str | os.PathLike[str], step: int, write: Callable[[Path], None], *, num_bytes: int = 0
) -> Path:
    """Write the checkpoint of ``step`` under ``root`` and return its directory; the caller holds `lock_directory`.

    Args:
        write: fills the (empty) directory that it is given with regular files, no sub-directories.
        num_bytes: what ``write`` is going to need; refused before anything is written when the disk has less.

    Raises:
        CheckpointError: the directory cannot take the bytes, or does not read back as written. Whatever was saved
            earlier is untouched and no temporary is left behind.

    >>> from tempfile import mkdtemp
    >>> save_checkpoint(mkdtemp(), 1000, lambda path: (path / "state.json").write_text("{}") and None).name
    'step-00001000'
    """
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"checkpoint: step must be an integer >= 0, got {step!r}")
    target = Path(root) / f"step-{step:08d}"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"checkpoint: {target} must be a directory or absent, got something else")
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise CheckpointError(f"checkpoint: {target} must find {num_bytes} bytes free on its disk, got {free}")
    temporary = _temporary(target)
    try:
        os.mkdir(temporary)
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        os.chmod(temporary, 0o700)  # until it is complete
        write(temporary)
        write_manifest(temporary, step)
        os.chmod(temporary, mode)
        sync(temporary)
        verify(temporary)
        _replace_directory(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: {target} must be writable and needs {max(num_bytes, _size(temporary))} bytes, got {error} "
            f"with {shutil.disk_usage(root).free} bytes free"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def list_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """The step directories under ``root``, oldest first, verified or not."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        steps = [
            (int(match[1]), Path(entry.path))
            for entry in entries
            if (match := STEP_NAME.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)
        ]
        return [path for _, path in sorted(steps)]
    return []


def _report_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def latest_checkpoint(root: str | os.PathLike[str], report: Callable[[str], None] = _report_to_stderr) -> Path | None:
    """The newest checkpoint under ``root`` that verifies, or None when there is none at all.

    Each damaged one on the way is reported in one sentence and passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one of them is damaged.
    """
    candidates = list_checkpoints(root)
    for path in reversed(candidates):
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            report(f"{error}; trying the checkpoint before it")
        else:
            return path
    if candidates:
        raise CheckpointError(f"checkpoint: {root} must hold an undamaged checkpoint, got {len(candidates)} damaged")
    return None


def set_aside_damaged(root: str | os.PathLike[str], good: Path) -> None:
    """Rename every checkpoint newer than ``good`` to ``<name>.damaged-<random>``: its place will be needed again."""
    candidates = list_checkpoints(root)
    for path in candidates[candidates.index(good) + 1 :]:
        os.rename(path, path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}"))


def prune(root: str | os.PathLike[str], keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints; 0 keeps all of them."""
    if keep_last < 0:
        raise CheckpointError(f"checkpoint: keep_last must be >= 0, got {keep_last}")
    for path in list_checkpoints(root)[:-keep_last] if keep_last else []:
        discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint."""
    # Renamed first: a kill in the middle must leave a temporary, never a checkpoint with files missing.
    doomed = _temporary(path)
    try:
        os.rename(path, doomed)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: {path.parent} must be writable to remove {path.name}, got {error}"
        ) from error
    shutil.rmtree(doomed, ignore_errors=True)


def publish(checkpoint: Path, root: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Put the files ``names`` of a checkpoint into ``root`` itself, each one replaced atomically.

    Weights are hard links where the file system has them (no second copy on the disk, nothing that could run full);
    other files are copies, since people edit a config.json and that must not change the checkpoint. Weights of another
    layout that were there before are removed: they would be loaded instead of the new ones, or mixed with them.

    Raises:
        CheckpointError: a target exists and is not a regular file, or ``root`` cannot be written.
    """
    root, names = Path(root), list(names)
    for name in names:
        if os.path.lexists(root / name):
            regular_file_size(root / name)
    temporary = _temporary(root / "final")
    try:
        os.mkdir(temporary)
        for name in names:
            _link_or_copy(checkpoint / name, temporary / name)
        for name in names:
            os.replace(temporary / name, root / name)
        for name in os.listdir(root):
            if _WEIGHTS.fullmatch(name) and name not in names:
                os.unlink(root / name)
        sync(root)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {root} must be writable, got {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(descriptor: int, root: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"checkpoint: directory must be used by one trainer at a time, got {root} that another one holds"
        ) from None


def _warn_of_others(descriptor: int, root: str | os.PathLike[str]) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        _report_to_stderr(f"checkpoint: {root} belongs to another user ({status.st_uid}), who can change what is in it")
    if status.st_mode & stat.S_IWOTH:
        _report_to_stderr(
            f"checkpoint: {root} can be written by everybody: a checkpoint in it is as trustworthy as they are"
        )


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")


def _remove_temporaries(root: str | os.PathLike[str]) -> None:
    with os.scandir(root) as entries:
        for entry in list(entries):
            if _TEMPORARY_DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif _TEMPORARY_FILE.fullmatch(entry.name):
                os.unlink(entry.path)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    sync(target)


def _replace_directory(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; an older directory there goes first, and counts as a temporary meanwhile."""
    if target.exists():
        old = _temporary(target)
        os.rename(target, old)
        os.rename(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(source, target)
    sync(target.parent)


def _size(directory: Path) -> int:
    """Bytes of the files written so far."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    return 0
