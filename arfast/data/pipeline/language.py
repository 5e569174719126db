"""Language tags: from a field, from the path, or identified by resiliparse's character profiles, which need no network.

The identifier compares hashed n-grams of the text with one profile for each of 101 languages; it is a fast first
choice, weaker than fastText on short texts and between close relatives (Norwegian and Danish, Spanish and Galician).
"""

import functools
import re
from pathlib import PurePosixPath

from arfast.data.pipeline.packages import require
from arfast.data.pipeline.record import Dropped, Record

UNKNOWN, CODE = "unknown", "code"
_TAG = re.compile(r"([a-z]{2,3})(?:[-_](?:[A-Z][a-z]{3}|[A-Z]{2}|[0-9]{3}))*")
# More text changes the answer of no page of the Debian handbook.
_MAX_CHARACTERS = 20_000
# Tags of one language that differ between the Debian and Hugging Face worlds and the identifier.
_SAME = {"nb": "no", "nn": "no", "iw": "he", "in": "id", "cmn": "zh"}


@functools.cache
def known_languages() -> frozenset[str]:
    """Codes that the identifier knows."""
    return frozenset(require("resiliparse.parse.lang", "identification of languages").supported_langs())


def check_languages(languages: tuple[str, ...]) -> None:
    """ValueError for the first code that no document could get from the identifier."""
    for language in languages:
        if _SAME.get(language, language) not in known_languages():
            known = ", ".join(sorted(known_languages()))
            raise ValueError(f"prepare: language.keep must hold codes among {known}, got {language!r}")


def primary_tag(tag: str) -> str | None:
    """The language of a BCP 47 tag such as "pt-BR" or "zh_Hans", None when it is none that is known.

    >>> primary_tag("pt-BR"), primary_tag("nb"), primary_tag("src")
    ('pt', 'no', None)
    """
    match = _TAG.fullmatch(tag)
    language = _SAME.get(match[1], match[1]) if match else None
    return language if language in known_languages() else None


def language_of_path(source: str) -> str | None:
    """The language that the folder nearest to the file names, as in ``html/de-DE/index.html``; None if none does."""
    tags = map(primary_tag, reversed(PurePosixPath(source).parts[:-1]))
    return next(filter(None, tags), None)


def detect_language(text: str) -> str:
    """The most similar profile's code, or "unknown" when none is near or there is no letter."""
    if not any(map(str.isalpha, text[:_MAX_CHARACTERS])):
        return UNKNOWN
    return require("resiliparse.parse.lang", "identification of languages").detect_fast(text[:_MAX_CHARACTERS])[0]


def tag_language(record: Record, field: str | None, identify: tuple[str, ...]) -> None:
    """Sets the language by the first origin in ``identify`` that knows it; ``field`` is what the data itself says."""
    if record.kind == "code":
        record.language = CODE
        return
    for origin in identify:
        if origin == "field":
            tag = primary_tag(field) if field else None
        elif origin == "path":
            tag = language_of_path(record.source)
        else:
            tag = detect_language(record.text)
        if tag:
            record.language = tag
            return


def keep_language(record: Record, keep: tuple[str, ...]) -> None:
    """Drops prose in other languages than those of ``keep``; an empty one keeps all."""
    if keep and record.kind != "code" and record.language not in {_SAME.get(tag, tag) for tag in keep}:
        raise Dropped(f"language {record.language}", f"not one of {', '.join(keep)}")
