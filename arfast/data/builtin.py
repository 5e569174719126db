"""Text that every machine has: the standard library of the running interpreter."""

import os
import platform
import sysconfig
from pathlib import Path

from arfast.data.documents import Document

# Tests hold deliberately broken files; the others are machine-made, or not part of the standard library.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__pycache__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# Above this share of lines that earlier files have, a file is a copy with other constants: at 0.7 the dozens of
# generated character maps in encodings/ go (0.9 MB of CPython 3.11), which would otherwise leak from train to test.
_MAX_KNOWN_LINES = 0.7


def _source_files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        kept = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)]
        subfolders[:] = kept
        python = [name for name in names if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES)]
        files += [Path(folder, name) for name in python]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _python() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, known = [], set()
    for path in _source_files(root):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        lines = {stripped for line in text.splitlines() if (stripped := line.strip())}
        if lines and len(lines & known) <= _MAX_KNOWN_LINES * len(lines):
            known |= lines
            documents.append(Document(text, f"python-{platform.python_version()}/{path.relative_to(root).as_posix()}"))
    if not documents:
        raise FileNotFoundError(f"builtin: name must be a corpus on this machine, got 'python' with no .py in {root}")
    return documents


_BUILTIN = {"python": _python}


def builtin(name: str) -> list[Document]:
    """The documents of a corpus that needs no download, in an order that depends on file names alone.

    ``"python"``: one document per source file of the running interpreter's standard library, without tests, copies and
    near-copies; about 11 MB. ``source`` of each document names the interpreter's version.

    Raises:
        ValueError: no such corpus.
        FileNotFoundError: this machine lacks it (an interpreter without its sources).

    >>> builtin("python")[0].source.startswith("python-3.")
    True
    """
    if name not in _BUILTIN:
        raise ValueError(f"builtin: name must be one of {sorted(_BUILTIN)}, got {name!r}")
    return _BUILTIN[name]()
