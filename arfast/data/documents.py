"""Documents from files of text or records and from directories, one at a time, with an error that names the file."""

import codecs
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from arfast.data.checks import one_line
from arfast.data.files import read_file
from arfast.data.records import RECORD_SUFFIXES, Document, read_records

# Unless it is the only file, a text of up to 16 MiB is one document.
_MAX_WHOLE_BYTES = 16 << 20
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 2 << 10, 256 << 10
_PIECES = 128
_READ_BYTES = 4096
_HUGGING_FACE_FILES = ("state.json", "dataset_info.json")
_MAX_JSON_BYTES = 16 << 20


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


def _hugging_face_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset that ``datasets.Dataset.save_to_disk`` wrote."""
    rule = f"read_documents: {str(folder / 'state.json')!r} must name the files of a Hugging Face dataset"
    try:
        names = [
            entry["filename"] for entry in json.loads(read_file(folder / "state.json", _MAX_JSON_BYTES))["_data_files"]
        ]
        files = [folder / Path(name).name for name in names]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{rule}, got: {type(error).__name__} {one_line(error)}") from None
    if missing := [path for path in files if not os.path.isfile(path)]:
        raise ValueError(f"{rule}, got {missing[0].name!r:.200}, which is absent")
    return files


def _files(directory: Path) -> list[Path]:
    """Regular files below a directory in the order of their names; hidden ones and linked directories are left out.

    Of a folder that is a Hugging Face dataset: its data.
    """
    files = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "dataset_dict.json" in names:
            actual = f"a Hugging Face DatasetDict with {', '.join(sorted(subfolders))} in {folder!r}"
            raise ValueError(f"read_documents: source must be one split of a dataset, got {actual}")
        if all(name in names for name in _HUGGING_FACE_FILES):
            files += _hugging_face_files(Path(folder))
        else:
            files += [path for name in names if not name.startswith(".") and (path := Path(folder, name)).is_file()]
    return sorted(files, key=lambda path: path.relative_to(directory).as_posix())


def _read_file(path: Path, alone: bool, column: str | None) -> Iterator[Document]:
    if path.name.endswith(RECORD_SUFFIXES):
        return read_records(path, column)
    size = path.stat().st_size
    if not alone and size <= _MAX_WHOLE_BYTES:
        return _read_text(path, None)
    # A power of two, so that the pieces stay the same while the file grows a little.
    piece_bytes = 1 << (max(size, 1) // _PIECES).bit_length()
    return _read_text(path, min(max(piece_bytes, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES))


def read_documents(source: str | os.PathLike, column: str | None = None) -> Iterator[Document]:
    """Documents of a file, or of all files below a directory, in a fixed order and in bounded memory.

    One document per record of ``.jsonl``, ``.ndjson`` (both also ``.gz``, ``.zst``), ``.parquet`` and ``.arrow`` files;
    a directory may be, or hold, datasets that ``datasets.Dataset.save_to_disk`` wrote. A record has the string "text";
    or the strings "prompt" and "completion", of which the completion alone is a target; or "messages", records with a
    "role" (system, user, assistant) and a "content", of which the assistant's contents are targets.

    Any other file: UTF-8 text, one document per file; a file that is alone or above 16 MiB is a stream without known
    documents, and is cut at the ends of lines into about 128 pieces of 2 to 256 KiB. In a directory, files that are not
    text are left out with a warning. Ends of lines are kept; documents of white space alone are left out.

    Args:
        source: path of a file or a directory.
        column: the field of a record that holds its text, or "messages"; None: as above.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ImportError: Parquet, Arrow or Zstandard without pyarrow (the extra ``arfast[data]``).
        ValueError: a file is damaged or not UTF-8 text, a record or a table lacks the text, or there is no document.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"prompt": "2 + 2 =", "completion": " 4"}'), file.flush()
    ...     [(document.text, document.targets) for document in read_documents(file.name)]
    [('2 + 2 = 4', ((7, 9),))]
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
            for document in _read_file(path, len(files) == 1, column):
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
