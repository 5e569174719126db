"""Documents from text files, JSON lines and directories, one at a time, with an error that names the faulty file."""

import codecs
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Unless it is the only file, a text of up to 16 MiB is one document.
_MAX_WHOLE_BYTES = 16 << 20
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 2 << 10, 256 << 10
_PIECES = 128
_READ_BYTES = 4096
MAX_LINE_BYTES = 64 << 20
_JSON_SUFFIXES = {".jsonl", ".ndjson"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and the file (and line or piece) that it came from."""

    text: str
    source: str


class NotTextError(ValueError):
    """A file that is not UTF-8 text."""


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, offset: int, final: bool = False) -> str:
    try:
        text = decoder.decode(data, final)
    except UnicodeDecodeError as error:
        actual = f"{error.reason} near byte {offset}"
        raise NotTextError(f"read_documents: {str(path)!r} must be UTF-8 text, got {actual}") from None
    if "\0" in text:
        raise NotTextError(f"read_documents: {str(path)!r} must be UTF-8 text, got a NUL near byte {offset}")
    return text


def _read_text(path: Path, piece_bytes: int | None) -> Iterator[Document]:
    """The whole file, or pieces of about ``piece_bytes`` that end where the hash of a line says so.

    Cuts that depend on the content stay where they are when text is added elsewhere, and so does each piece's split.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    parts: list[str] = []
    size = offset = pieces = 0
    with open(path, "rb") as file:
        while data := file.readline(_READ_BYTES) if piece_bytes else file.read():
            parts.append(_decode(decoder, data, path, offset))
            offset += len(data)
            size += len(data)
            if piece_bytes is None or size < piece_bytes // 2:
                continue
            # A line of n bytes ends a piece with probability 2 n / piece_bytes: on average after as much again.
            if size >= 4 * piece_bytes or zlib.crc32(data) < (len(data) << 33) // piece_bytes:
                yield Document("".join(parts), f"{path}#{pieces}")
                parts, size, pieces = [], 0, pieces + 1
    parts.append(_decode(decoder, b"", path, offset, final=True))
    if text := "".join(parts):
        yield Document(text, f"{path}#{pieces}" if piece_bytes else str(path))


def _read_json_lines(path: Path) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            rule = f"read_documents: line {number} of {str(path)!r} must"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{rule} hold at most {MAX_LINE_BYTES} bytes, got more")
            try:
                record = json.loads(line)
                text = record.get("text") if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise ValueError(f"{type(record).__name__} with a 'text' of type {type(text).__name__}")
                text.encode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{rule} be a JSON object with a string 'text', got: {error}") from None
            yield Document(text, f"{path}:{number}")


def _files(directory: Path) -> list[Path]:
    """Regular files below a directory in the order of their names; hidden ones and linked directories are left out."""
    files = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in files if path.is_file()), key=lambda path: path.relative_to(directory).as_posix())


def _read_file(path: Path, alone: bool) -> Iterator[Document]:
    if path.suffix in _JSON_SUFFIXES:
        return _read_json_lines(path)
    size = path.stat().st_size
    if not alone and size <= _MAX_WHOLE_BYTES:
        return _read_text(path, None)
    # A power of two, so that the pieces stay the same while the file grows a little.
    piece_bytes = 1 << (max(size, 1) // _PIECES).bit_length()
    return _read_text(path, min(max(piece_bytes, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES))


def read_documents(source: str | os.PathLike) -> Iterator[Document]:
    """Documents of a text file, a JSON-lines file, or all such files below a directory, in a fixed order.

    ``.jsonl`` and ``.ndjson``: one document per line, the string under "text". Any other file: UTF-8 text, one document
    per file; a file that is alone or above 16 MiB is a stream without known documents, and is cut at the ends of lines
    into about 128 pieces of 2 to 256 KiB. In a directory, files that are not text are left out with a warning. Ends of
    lines are kept; documents of white space alone are left out.

    Args:
        source: path of a file or a directory.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: a file is not UTF-8 text, a line is not a record with a text, or there is no document at all.
    """
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"read_documents: source must exist, got {str(root)!r}")
    if not (root.is_dir() or root.is_file()):
        raise ValueError(f"read_documents: source must be a file or a directory, got {str(root)!r}")
    files = _files(root) if root.is_dir() else [root]
    skipped: list[Path] = []
    found = False
    for path in files:
        begun = root.is_file()
        try:
            for document in _read_file(path, alone=len(files) == 1):
                if document.text.strip():
                    found = begun = True
                    yield document
        except NotTextError:
            if begun:
                raise
            skipped.append(path)
    if not found:
        actual = f"{len(skipped)} files that are not text" if skipped else "only empty ones" if files else "no file"
        raise ValueError(f"read_documents: source must hold text, got {actual} in {str(root)!r}")
    if skipped:
        message = f"read_documents: left out {len(skipped)} files that are not text, first {str(skipped[0])!r}"
        warnings.warn(message, stacklevel=2)
