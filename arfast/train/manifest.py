"""``manifest.json``: size and SHA-256 of every file of a directory, and of itself, so that no flipped bit is missed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8,})")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_FORMAT = "arfast-checkpoint"
_VERSION = 1
_BLOCK_BYTES = 1 << 20
_MAX_BYTES = 1 << 24


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or trusted; the message is one sentence."""


def write_manifest(directory: Path, step: int) -> None:
    """Synchronise every file of ``directory`` and write its manifest, last."""
    files = {}
    for name in sorted(os.listdir(directory)):
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"checkpoint: file names must match {FILE_NAME.pattern}, got {name!r}")
        path = directory / name
        # The digest is taken from the page cache, before the data goes to the disk: what `verify` reads back later
        # is compared with what was written, not with itself.
        files[name] = {"size": regular_file_size(path), "sha256": _sha256(path)}
        sync(path)
    path = directory / MANIFEST
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_serialize({"format": _FORMAT, "version": _VERSION, "step": step, "files": files}))
    sync(path)


def verify(directory: str | os.PathLike[str], *, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Args:
        part: (i, n): of the contents, check every n-th file's alone, from the i-th on, and leave the others to others.

    Returns:
        ``{"format": str, "version": int, "step": int, "files": {name: {"size": bytes, "sha256": hex}}}``

    Raises:
        CheckpointError: names the first file that is missing, is not a regular file, or has other bytes than were
            written; also for a manifest that was edited or is of an unknown version.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    for name, entry in manifest["files"].items():
        size = regular_file_size(directory / name)
        if size != entry["size"]:
            raise CheckpointError(f"checkpoint: {directory / name} must have {entry['size']} bytes, got {size}")
    for name, entry in list(manifest["files"].items())[part[0] :: part[1]]:
        digest = _sha256(directory / name)
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint: {directory / name} must have SHA-256 {entry['sha256'][:12]}..., got {digest[:12]}..."
            )
    return manifest


def _serialize(content: dict[str, Any]) -> bytes:
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True).encode() + b"\n"


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    raw = read_small(path, _MAX_BYTES)
    try:
        content = json.loads(raw.decode())
        content.pop("checksum")
        # Comparing the bytes, not the fields, leaves no position in the file where a flipped bit could hide.
        intact = raw == _serialize(content) and content["format"] == _FORMAT
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"checkpoint: {path} must be an unmodified manifest, got {len(raw)} bytes that are not")
    if content.get("version") != _VERSION:
        raise CheckpointError(f"checkpoint: {path} must have version {_VERSION}, got {content.get('version')!s:.50}")
    _check_content(path, content)
    return content


def _check_content(path: Path, content: dict[str, Any]) -> None:
    """A checksum proves that nobody changed the manifest by accident, not that its author meant well."""
    name, step, files = STEP_NAME.fullmatch(path.parent.name), content.get("step"), content.get("files")
    if type(step) is not int or step < 0 or (name and int(name[1]) != step):
        raise CheckpointError(f"checkpoint: {path} must belong to {path.parent.name}, got step {step!r:.50}")
    if not isinstance(files, dict) or not all(
        FILE_NAME.fullmatch(file)
        and isinstance(entry, dict)
        and type(entry.get("size")) is int
        and 0 <= entry["size"] < 2**63
        and isinstance(entry.get("sha256"), str)
        for file, entry in files.items()
    ):
        raise CheckpointError(f"checkpoint: {path} must list files matching {FILE_NAME.pattern}, got something else")


def regular_file_size(path: Path) -> int:
    """Bytes of ``path``, which must be a regular file and not a link to one."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} must exist, got no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"checkpoint: {path} must be a regular file, got {stat.filemode(status.st_mode)}")
    return status.st_size


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file that is no larger than such a file can be."""
    size = regular_file_size(path)
    if size > max_bytes:
        raise CheckpointError(f"checkpoint: {path} must have at most {max_bytes} bytes, got {size}")
    with open(path, "rb") as file:
        return file.read(max_bytes)


def sync(path: Path) -> None:
    """fsync a file or a directory, and drop a file's pages so that the next reader gets what the disk holds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
