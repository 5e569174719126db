"""A document on its way through the pipeline, and the tally of what became of all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

NUM_EXAMPLES = 3
_EXCERPT_CHARACTERS = 60
_CODE_SUFFIXES = frozenset(
    ".py .pyi .pyx .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt .js .mjs .ts .tsx .jsx .rb .php .pl .lua .swift "
    ".scala .cs .sh .bash .sql .r .jl .hs .ml .el .lisp .clj .f90 .m .s .asm .zig .proto .cmake".split()
)
HTML_SUFFIXES = frozenset({".html", ".htm", ".xhtml"})


@dataclass(slots=True)
class Record:
    """A document and what is known about it.

    text, source: as in ``Document``.
    kind: "prose" or "code".
    language: a tag such as "en", "code", or "unknown".
    url: its address, or None.
    """

    text: str
    source: str
    kind: str = "prose"
    language: str = "unknown"
    url: str | None = None

    def values(self) -> list[str | None]:
        """The fields, for JSON: ``Record(*values)`` is the record again."""
        return [self.text, self.source, self.kind, self.language, self.url]


class Dropped(Exception):
    """A document does not go on: for a ``reason``, a word of the report's table, with the ``detail`` of this one."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def suffix_of(source: str) -> str:
    """The file ending in the source of a document, without the line or the piece that may follow it."""
    name = PurePosixPath(source).name
    return PurePosixPath(name.split("#")[0].partition(":")[0]).suffix.lower()


def kind_of(source: str) -> str:
    """ "code" for the usual endings of source files, else "prose"."""
    return "code" if suffix_of(source) in _CODE_SUFFIXES else "prose"


def text_bytes(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


class Tally:
    """Counts of documents and bytes by stage and reason, with the first examples of each; plain data underneath.

    stages: stage -> {"documents_in", "bytes_in", "documents_out", "bytes_out", "dropped": {reason: {"documents",
        "bytes", "examples"}}, "counts": {name: number}}.
    """

    def __init__(self, stages: dict | None = None):
        self.stages: dict[str, dict] = stages or {}

    def stage(self, name: str) -> dict:
        empty = {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0, "dropped": {}, "counts": {}}
        return self.stages.setdefault(name, empty)

    def passed(self, stage: str, bytes_in: int, bytes_out: int) -> None:
        self.add(stage, 1, bytes_in, 1, bytes_out)

    def add(self, stage: str, documents_in: int, bytes_in: int, documents_out: int, bytes_out: int) -> None:
        entry = self.stage(stage)
        entry["documents_in"] += documents_in
        entry["bytes_in"] += bytes_in
        entry["documents_out"] += documents_out
        entry["bytes_out"] += bytes_out

    def dropped(self, stage: str, record: Record, bytes_in: int, drop: Dropped) -> None:
        self.add(stage, 1, bytes_in, 0, 0)
        excerpt = " ".join(record.text[: 4 * _EXCERPT_CHARACTERS].split())[:_EXCERPT_CHARACTERS]
        example = {"source": record.source, "detail": drop.detail, "excerpt": excerpt}
        self.drop(stage, drop.reason, 1, bytes_in, [example])

    def drop(self, stage: str, reason: str, documents: int, num_bytes: int, examples: Iterable[dict]) -> None:
        """Counts documents that a stage, which has seen them already, lets fall."""
        entry = self.stage(stage)["dropped"].setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += documents
        entry["bytes"] += num_bytes
        entry["examples"] = [*entry["examples"], *examples][:NUM_EXAMPLES]

    def count(self, stage: str, name: str, number: int = 1) -> None:
        if number:
            counts = self.stage(stage)["counts"]
            counts[name] = counts.get(name, 0) + number

    def merge(self, stages: dict) -> None:
        """Adds the counts of another tally, whose examples come later."""
        for name, other in stages.items():
            self.add(name, *(other[key] for key in ("documents_in", "bytes_in", "documents_out", "bytes_out")))
            for reason, entry in other["dropped"].items():
                self.drop(name, reason, entry["documents"], entry["bytes"], entry["examples"])
            for key, number in other["counts"].items():
                self.count(name, key, number)
