"""Documents of a source in blocks, whose bounds depend on the documents alone and so are the same in every run."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arfast.data.builtin import builtin
from arfast.data.documents import Document, read_documents
from arfast.data.pipeline.recipe import Source
from arfast.data.pipeline.record import Record, kind_of, suffix_of
from arfast.data.prepare import BUILTIN_PREFIX

_BLOCK_CHARACTERS = 2 << 20
_BLOCK_DOCUMENTS = 2048
_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(slots=True)
class Block:
    """Some documents in a row of one source: the unit of work, and of what a killed run has to do again.

    records: before any stage; ``language`` holds the field of the data, or "".
    """

    source: int
    records: list[Record]

    def pack(self) -> bytes:
        """JSON, for a worker."""
        values = [record.values() for record in self.records]
        return json.dumps([self.source, values], ensure_ascii=False).encode()

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "Block":
        source, records = json.loads(str(data, "utf-8"))
        return cls(source, [Record(*values) for values in records])


class _Fields:
    """Looks up the record of a JSON-lines document, which is read again beside ``read_documents``."""

    def __init__(self):
        self._path, self._file, self._line = None, None, 0

    def find(self, document: Document) -> dict:
        path, _, number = document.source.rpartition(":")
        if not (path.endswith(_JSON_SUFFIXES) and number.isdigit()):
            return {}
        if path != self._path:
            self.close()
            self._path, self._file, self._line = path, open(path, "rb"), 0
        line = b""
        while self._line < int(number):
            line = self._file.readline()
            self._line += 1
        return json.loads(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _field(record: dict, key: str | None) -> str | None:
    value = record.get(key) if key else None
    return _encodable(value) if isinstance(value, str) and value else None


def _encodable(text: str) -> str:
    """With escapes for what is no Unicode: bytes of a file name, half a surrogate pair in JSON."""
    return text.encode(errors="backslashreplace").decode()


def _documents(source: Source) -> Iterator[Document]:
    if source.path.startswith(BUILTIN_PREFIX):
        return iter(builtin(source.path.removeprefix(BUILTIN_PREFIX)))
    return read_documents(source.path)


def read_records(source: Source) -> Iterator[Record]:
    """The documents of a source with what its fields and file names say, one at a time.

    Raises:
        ValueError: no file has one of the endings that the recipe asks for; else as ``read_documents``.
    """
    found_any = False
    fields = _Fields()
    try:
        for document in _documents(source):
            if source.suffixes and suffix_of(document.source) not in source.suffixes:
                continue
            wanted = source.language_field or source.url_field
            found = fields.find(document) if wanted else {}
            language, url = _field(found, source.language_field) or "", _field(found, source.url_field)
            found_any = True
            kind = kind_of(document.source) if source.kind == "auto" else source.kind
            yield Record(document.text, _encodable(document.source), kind, language, url)
        if not found_any:
            actual = f"none in {source.path!r}"
            raise ValueError(
                f"prepare: source {source.name!r} must hold files in {list(source.suffixes)}, got {actual}"
            )
    finally:
        fields.close()


def read_blocks(source: Source, index: int) -> Iterator[Block]:
    """The documents of source number ``index`` in blocks of about 2 million characters.

    Raises:
        ValueError, OSError: as ``read_documents``; a directory's files that are not text are left out with a warning.
    """
    records, size = [], 0
    for record in read_records(source):
        records.append(record)
        size += len(record.text)
        if size >= _BLOCK_CHARACTERS or len(records) >= _BLOCK_DOCUMENTS:
            yield Block(index, records)
            records, size = [], 0
    if records:
        yield Block(index, records)


def source_state(source: Source) -> str:
    """A hash that changes when a file of the source does: from names, sizes and times, without reading the text."""
    digest = hashlib.sha256()
    if source.path.startswith(BUILTIN_PREFIX):
        for document in _documents(source):
            digest.update(hashlib.sha256(document.text.encode()).digest())
        return digest.hexdigest()
    root = Path(source.path)
    paths = (
        [root] if root.is_file() else sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    )
    for path in paths:
        status = path.lstat()
        digest.update(json.dumps([str(path), status.st_size, status.st_mtime_ns, status.st_ino]).encode())
    return digest.hexdigest()
