"""Parallel text: a text and its translation, as documents of which the translation alone is a target.

A document is the source, a line feed and its translation; neither has another line feed. Its split follows from the
source alone, so that a sentence never lies on both sides, whatever its translations are.
"""

import gettext
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from arfast.data.records import Document

SEPARATOR = "\n"
# A translation that is longer than this is none, but for short texts.
_MAX_LENGTH_RATIO, _FREE_CHARACTERS = 2.5, 20
_ORIGINAL = "en-US"
_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
_CONTEXT = "\4"  # stands between a message's context and the message


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str


def pair_documents(pairs: Iterable[Pair], name: str, max_bytes: int | None = None) -> list[Document]:
    """Documents of clean pairs: white space is one space each, nothing is empty, untranslated or of a wildly different
    length, and no source comes twice (the first translation stays).

    Args:
        name: where they come from.
        max_bytes: leave out longer pairs; no tokenizer makes more tokens than there are bytes.

    >>> pair_documents([Pair("Save  as", "Speichern als"), Pair("Debian", "Debian")], "menu")[0].text
    'Save as\\nSpeichern als'
    """
    documents: dict[str, Document] = {}
    for pair in pairs:
        source, target = (" ".join(text.split()) for text in (pair.source, pair.target))
        text = source + SEPARATOR + target
        fits = max_bytes is None or len(text.encode()) <= max_bytes
        if fits and source not in documents and _is_translation(source, target):
            documents[source] = Document(text, name, ((len(source) + 1, len(text)),), key=source)
    return list(documents.values())


def _is_translation(source: str, target: str) -> bool:
    short, long = sorted((len(source), len(target)))
    return short > 0 and source != target and long <= _MAX_LENGTH_RATIO * short + _FREE_CHARACTERS


def read_pairs(source: str | os.PathLike, target: str | os.PathLike) -> list[Pair]:
    """Two UTF-8 files of which line i of one is the translation of line i of the other.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty or not UTF-8, or the numbers of lines differ.
    """
    sources, targets = _lines(source), _lines(target)
    if len(sources) != len(targets):
        counts = f"{len(sources)} in {os.fspath(source)!r} and {len(targets)} in {os.fspath(target)!r}"
        raise ValueError(f"read_pairs: files must have equally many lines, got {counts}")
    return [Pair(*texts) for texts in zip(sources, targets, strict=True)]


def _lines(path: str | os.PathLike) -> list[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"read_pairs: path must be a file, got {os.fspath(path)!r}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        actual = f"{error.reason} at byte {error.start}"
        raise ValueError(f"read_pairs: {os.fspath(path)!r} must be UTF-8 text, got {actual}") from None
    if not text.strip():
        raise ValueError(f"read_pairs: {os.fspath(path)!r} must hold lines of text, got {len(text)} characters of none")
    # Only line feeds end lines: splitlines() would find more in one language than in the other.
    return text.removesuffix("\n").split("\n")


def django_pairs(language: str) -> list[Pair]:
    """The messages of the installed Django and their translations, from its compiled catalogues; of plural forms the
    first.

    Args:
        language: as Django's folders are named, for example "de", "fr" or "zh_Hans".

    Raises:
        ImportError: Django is not installed. ValueError: it has no such language.
    """
    spec = importlib.util.find_spec("django")
    if spec is None:
        raise ImportError("django_pairs: Django must be installed (pip install 'arfast[lab]'), got none")
    folders = sorted(Path(spec.origin).parent.glob("**/locale/*/LC_MESSAGES"))
    catalogues = [path for folder in folders if folder.parent.name == language for path in sorted(folder.glob("*.mo"))]
    if not catalogues:
        known = ", ".join(sorted({folder.parent.name for folder in folders}))
        raise ValueError(f"django_pairs: language must be one of {known}, got {language!r}")
    pairs = []
    for path in catalogues:
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog
        for key, translation in messages.items():
            message, form = key if isinstance(key, tuple) else (key, 0)
            if form == 0:
                pairs.append(Pair(message.rpartition(_CONTEXT)[2], translation))
    return pairs


def handbook_pairs(folder: str | os.PathLike, language: str) -> list[Pair]:
    """The Debian Administrator's Handbook, HTML of the Debian package debian-handbook: titles and paragraphs that stand
    at the same place of the same page. Paragraphs with as many sentences on both sides are cut into them.

    Args:
        folder: has a folder of pages per language, en-US among them (/usr/share/doc/debian-handbook/html).
        language: a folder's name, or its beginning if that is unique ("de" for de-DE).

    Raises:
        ValueError: there is no such folder, or no page of it is like the original.
    """
    original, translated = Path(folder) / _ORIGINAL, _language_folder(Path(folder), language)
    pairs = []
    for page in sorted(original.glob("*.html")):
        other = translated / page.name
        sources, targets = _blocks(page), _blocks(other) if other.is_file() else []
        if len(sources) == len(targets):
            for texts in zip(sources, targets, strict=True):
                pairs += _sentence_pairs(*texts)
    if not pairs:
        raise ValueError(f"handbook_pairs: {str(translated)!r} must have pages like {_ORIGINAL}, got none")
    return pairs


def _language_folder(folder: Path, language: str) -> Path:
    if not (folder / _ORIGINAL).is_dir():
        raise ValueError(f"handbook_pairs: folder must have a folder {_ORIGINAL}, got {str(folder)!r}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and "-" in path.name)
    found = [name for name in names if name.partition("-")[0] == language or name == language]
    if len(found) != 1 or found == [_ORIGINAL]:
        known = ", ".join(name for name in names if name != _ORIGINAL)
        raise ValueError(f"handbook_pairs: language must be one of {known}, got {language!r}")
    return folder / found[0]


def _blocks(page: Path) -> list[str]:
    try:
        text = page.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"handbook_pairs: {str(page)!r} must be UTF-8 text, got {error.reason}") from None
    parser = _BlockParser()
    parser.feed(text)
    parser.close()
    return parser.blocks


class _BlockParser(HTMLParser):
    """Collects the text of titles and paragraphs; what stands inside of one belongs to it."""

    def __init__(self):
        super().__init__()
        self.blocks: list[str] = []
        self._parts: list[str] = []
        self._tag, self._depth = "", 0  # of the block that is open, and how many of its tags are

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self._depth += tag == self._tag
        elif tag in _BLOCKS or (tag == "div" and ("class", "para") in attributes):
            self._tag, self._depth, self._parts = tag, 1, []

    def handle_endtag(self, tag: str) -> None:
        if self._depth and tag == self._tag:
            self._depth -= 1
            if self._depth == 0:
                self.blocks.append("".join(self._parts))

    def handle_data(self, data: str) -> None:
        if self._depth:
            self._parts.append(data)


def _sentence_pairs(source: str, target: str) -> list[Pair]:
    sources, targets = _sentences(source), _sentences(target)
    if len(sources) == len(targets):
        return [Pair(*texts) for texts in zip(sources, targets, strict=True)]
    return [Pair(source, target)]


def _sentences(text: str) -> list[str]:
    """A sentence ends with a mark that is followed by white space and a capital; abbreviations are not
    known, and make most translations look different.

    >>> _sentences("Run it. Then wait (e.g. an hour). Done!")
    ['Run it.', 'Then wait (e.g. an hour).', 'Done!']
    """
    text, sentences, begin = " ".join(text.split()), [], 0
    for mark in re.finditer(r"[.!?…]\)? (?=\S)", text):
        if text[mark.end()].isupper():
            sentences.append(text[begin : mark.end() - 1])
            begin = mark.end()
    return [*sentences, text[begin:]]
