"""What the per-document stages leave on the disk: for each block a file of texts, an index, and a description.

`00000007.jsonl` holds a JSON record per document, `00000007.index` a fixed number of bytes per document with its digest
and signature, `00000007.json` the tally and the hashes of both. It is written last: a part counts once it is there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arfast.data.files import write_file
from arfast.data.pipeline.record import Record

_MAX_DESCRIPTION_BYTES = 64 << 20


def index_dtype(num_permutations: int) -> np.dtype:
    """A row of the index.

    high, low: the document's digest; leading zeros do not vanish as they would from a string.
    offset, length: where its line is in the file of texts; num_bytes: UTF-8 bytes of its text.
    signature: uint32 [num_permutations], of MinHash.
    """
    fields = [("high", ">u8"), ("low", ">u8"), ("offset", "<u8"), ("length", "<u4"), ("num_bytes", "<u4")]
    return np.dtype([*fields, ("signature", "<u4", (num_permutations,))])


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is complete: its number, source, documents, and the hashes of its two files."""

    number: int
    source: int
    num_documents: int
    num_bytes: int
    texts_sha256: str
    index_sha256: str


class Parts:
    """The directory of the parts.

    starts: int64 [num_parts + 1], the number of the first document of each part, and that of all documents.
    """

    def __init__(self, directory: Path, dtype: np.dtype):
        self.directory, self.dtype = directory, dtype
        self.parts: list[Part] = []
        self.starts = np.zeros(1, np.int64)

    def use(self, parts: list[Part]) -> None:
        """Takes the parts, in their order, for the corpus."""
        self.parts = parts
        self.starts = np.concatenate([[0], np.cumsum([part.num_documents for part in parts])]).astype(np.int64)

    @property
    def num_documents(self) -> int:
        return int(self.starts[-1])

    def path(self, number: int, kind: str) -> Path:
        return self.directory / f"{number:08d}.{kind}"

    def write(self, number: int, source: int, records: list[Record], index: np.ndarray, description: dict) -> None:
        """Writes a part; ``index`` has all but the places in the file of texts."""
        lines = [_line(record) for record in records]
        index["length"] = lengths = [len(line) for line in lines]
        index["offset"] = np.cumsum([0, *lengths])[:-1]
        texts, table = b"".join(lines), index.tobytes()
        part = {
            "number": number,
            "source": source,
            "num_documents": len(records),
            "num_bytes": int(index["num_bytes"].sum(dtype=np.int64)),
            "texts_sha256": hashlib.sha256(texts).hexdigest(),
            "index_sha256": hashlib.sha256(table).hexdigest(),
        }
        write_file(self.path(number, "jsonl"), texts)
        write_file(self.path(number, "index"), table)
        write_file(self.path(number, "json"), json.dumps(description | {"part": part}).encode())

    def describe(self, number: int) -> dict | None:
        """The description of a part, None when it is not complete."""
        path = self.path(number, "json")
        with contextlib.suppress(FileNotFoundError, ValueError):
            if path.stat().st_size <= _MAX_DESCRIPTION_BYTES:
                return json.loads(path.read_bytes())
        return None

    def index(self, part: Part) -> np.ndarray:
        """The index of a part, [num_documents] of the dtype, checked."""
        data = self.path(part.number, "index").read_bytes()
        self._check(data, part.index_sha256, part.number, "index")
        return np.frombuffer(data, self.dtype)

    def records(self, part: Part) -> Iterator[Record]:
        """The documents of a part, one at a time, checked at the end."""
        data = self.path(part.number, "jsonl").read_bytes()
        self._check(data, part.texts_sha256, part.number, "jsonl")
        for line in data.splitlines():
            yield Record(*json.loads(line))

    def _check(self, data: bytes, expected: str, number: int, kind: str) -> None:
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"prepare: {str(self.path(number, kind))!r} must be as it was written, got other bytes")

    def locate(self, document: int) -> tuple[Part, int]:
        """The part of a document, and its place there."""
        position = int(np.searchsorted(self.starts, document, "right")) - 1
        return self.parts[position], document - int(self.starts[position])

    def row(self, document: int) -> np.void:
        """The row of the index of one document."""
        part, place = self.locate(document)
        size = self.dtype.itemsize
        with open(self.path(part.number, "index"), "rb") as file:
            return np.frombuffer(os.pread(file.fileno(), size, place * size), self.dtype)[0]

    def record(self, document: int, row: np.void | None = None) -> Record:
        """One document."""
        row = self.row(document) if row is None else row
        part, _ = self.locate(document)
        with open(self.path(part.number, "jsonl"), "rb") as file:
            return Record(*json.loads(os.pread(file.fileno(), int(row["length"]), int(row["offset"]))))


def _line(record: Record) -> bytes:
    return json.dumps(record.values(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
