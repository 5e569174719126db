"""Documents from records: JSON lines (plain, gzip, Zstandard), Parquet files and Arrow files of Hugging Face datasets.

A record is a text, a prompt with its completion, or a conversation; of the last two only what the model is to say has a
loss. Conversations are written as in Lambert et al., "Tulu 3" (2024), whose markers are ordinary text.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from arfast.data.checks import one_line

MAX_LINE_BYTES = 64 << 20
JSON_SUFFIXES = (".jsonl", ".ndjson")
_COMPRESSIONS = ("", ".gz", ".zst")
RECORD_SUFFIXES = (*(suffix + end for suffix in JSON_SUFFIXES for end in _COMPRESSIONS), ".parquet", ".arrow")
_ROLES = ("system", "user", "assistant")
_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True, slots=True)
class Document:
    """A text, the file (and line, row or piece) that it came from, and the parts of it that are targets.

    targets: rising ranges (start, end) of characters; None: all of the text. A range may be empty: the end token that
        follows each range is a target too.
    key: what decides the split that it goes to, and makes another document with the same a copy of it; None: the text.

    Raises:
        ValueError: the ranges do not rise, or leave the text.
    """

    text: str
    source: str
    targets: tuple[tuple[int, int], ...] | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.targets is not None:
            edges = [0, *(edge for start, end in self.targets for edge in (start, end)), len(self.text)]
            if edges != sorted(edges):
                raise ValueError(f"Document: targets must be rising ranges of the text, got {self.targets}")

    def pieces(self) -> list[tuple[str, bool]]:
        """The text in pieces, and whether each is a target."""
        pieces, place = [], 0
        for start, end in self.targets or ():
            pieces += [(self.text[place:start], False)] * (start > place) + [(self.text[start:end], True)]
            place = end
        return pieces + [(self.text[place:], False)] * (place < len(self.text))


class _Content(NamedTuple):
    text: str
    targets: tuple[tuple[int, int], ...] | None


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{type(record).__name__} with a {name!r} of type {type(value).__name__}")
    value.encode()
    return value


def _conversation(messages: object) -> _Content:
    """``<|role|>``, a line feed and the content of each message; the assistant's contents are the targets."""
    if not (isinstance(messages, Sequence) and messages and all(isinstance(message, Mapping) for message in messages)):
        raise ValueError("'messages' that are no list of records")
    text, targets = "", []
    for message in messages:
        role, content = _string(message, "role"), _string(message, "content")
        if role not in _ROLES:
            raise ValueError(f"a message with the role {role!r} instead of {', '.join(_ROLES)}")
        text += f"<|{role}|>\n"
        if role == "assistant":
            targets.append((len(text), len(text) + len(content)))
        text += content + "\n"
    if not targets:
        raise ValueError("'messages' of which none is the assistant's")
    return _Content(text[:-1] if messages[-1]["role"] == "assistant" else text, tuple(targets))


def _fields(names: Sequence[str], column: str | None) -> tuple[str, ...]:
    """The fields of a record that make its document."""
    if column is not None or "text" in names:
        return (column or "text",)
    if "prompt" in names and "completion" in names:
        return "prompt", "completion"
    return ("messages",) if "messages" in names else ("text",)


def _content(record: Mapping[str, Any], column: str | None) -> _Content:
    fields = _fields(tuple(record), column)
    if fields == ("messages",):
        return _conversation(record.get("messages"))
    strings = [_string(record, name) for name in fields]
    if len(strings) == 1:
        return _Content(strings[0], None)
    text = "".join(strings)
    return _Content(text, ((len(strings[0]), len(text)),))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        message = f"read_documents: {str(path)!r} must have pyarrow to be read (pip install 'arfast[data]'), got none"
        raise ImportError(message) from None
    return pyarrow


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        # A mode of reading that is a file to Python, for readline.
        return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _lines(path: Path) -> Iterator[bytes]:
    with _open_lines(path) as file:
        try:
            yield from iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        except (OSError, EOFError, zlib.error) as error:
            if path.suffix in JSON_SUFFIXES:
                raise
            raise ValueError(
                f"read_documents: {str(path)!r} must be an intact archive, got: {one_line(error)}"
            ) from None


def read_json_lines(path: Path, column: str | None) -> Iterator[Document]:
    """One document per line that is not empty."""
    wanted = f"a string {column or 'text'!r}" + ("" if column else " (or 'prompt' and 'completion', or 'messages')")
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        rule = f"read_documents: line {number} of {str(path)!r} must"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{rule} hold at most {MAX_LINE_BYTES} bytes, got more")
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(type(record).__name__)
            content = _content(record, column)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{rule} be a JSON object with {wanted}, got: {one_line(error)}") from None
        yield Document(content.text, f"{path}:{number}", content.targets)


def _check_schema(path: Path, schema: Any, column: str | None) -> list[str]:
    """The columns to read; ValueError when they are not there or hold something else."""
    types = _pyarrow(path).types
    fields = _fields(schema.names, column)
    for name in fields:
        wanted = "messages" if name == "messages" else "strings"
        rule = f"read_documents: {str(path)!r} must have a column {name!r} of {wanted}"
        if name not in schema.names:
            others = "" if column else " (or 'prompt' and 'completion', or 'messages')"
            raise ValueError(f"{rule}{others}, got {', '.join(schema.names) or 'no columns'}")
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_list = types.is_list(kind) or types.is_large_list(kind)
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not (is_list if name == "messages" else is_text):
            raise ValueError(f"{rule}, got {name!r} of type {kind}")
    return list(fields)


def _parquet_batches(path: Path, column: str | None) -> Iterator[Any]:
    # Without pre_buffer: it would hold the compressed bytes of all row groups at once.
    with _pyarrow(path).parquet.ParquetFile(path, pre_buffer=False) as file:
        columns = _check_schema(path, file.schema_arrow, column)
        yield from file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)


def _arrow_batches(path: Path, column: str | None) -> Iterator[Any]:
    pyarrow = _pyarrow(path)
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        columns = _check_schema(path, reader.schema, column)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS).select(columns)


def read_table(path: Path, column: str | None) -> Iterator[Document]:
    """One document per row of a Parquet or Arrow file; at most a row group, or 1024 rows, in memory."""
    pyarrow = _pyarrow(path)
    make_batches, kind = (_parquet_batches, "Parquet") if path.suffix == ".parquet" else (_arrow_batches, "Arrow")
    batches, number = make_batches(path, column), 0
    while True:
        try:
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # its buffers are used as they are: an offset could point anywhere
            records = [] if batch is None else batch.to_pylist()
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError, EOFError) as error:
            rule = f"read_documents: {str(path)!r} must be an intact {kind} file"
            raise ValueError(f"{rule}, got: {one_line(error) or type(error).__name__}") from None
        if batch is None:
            return
        for record in records:
            number += 1
            try:
                content = _content(record, column)
            except ValueError as error:
                rule = f"read_documents: row {number} of {str(path)!r} must hold text"
                raise ValueError(f"{rule}, got: {one_line(error)}") from None
            yield Document(content.text, f"{path}:{number}", content.targets)


def read_records(path: Path, column: str | None) -> Iterator[Document]:
    """Documents of a file whose name ends in one of ``RECORD_SUFFIXES``."""
    return (read_table if path.suffix in (".parquet", ".arrow") else read_json_lines)(path, column)
