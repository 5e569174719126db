"""The published heuristics for text that is worth reading; each function is one paper's, and says which."""

import re

from arfast.data.pipeline.recipe import C4Quality, CodeQuality, FineWebQuality, GopherQuality
from arfast.data.pipeline.record import Dropped
from arfast.data.pipeline.repetition import repeated_share
from arfast.data.pipeline.words import UNSPACED

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf", "\u25aa", "-", "*")
_ELLIPSES = ("...", "\u2026")
_TERMINAL = frozenset(".!?\"'\u201d\u2019\u00bb\u3002\uff01\uff1f\u300d\u061f\u06d4\u0964\u0965")
_SENTENCE_END = re.compile(
    "[.!?\u2026]+[\"'\u201d\u2019\u00bb)]*(?=\\s|$)|[\u3002\uff01\uff1f\u061f\u06d4\u0964\u0965]+"
)
_C4_TERMINAL = (".", "?", "!", '"', "\u201d", "\u3002", "\uff01", "\uff1f", "\u061f", "\u06d4", "\u0964")
_CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_GENERATED = re.compile(r"auto[- ]?generated|automatically generated|generated automatically|this file is generated")
_GENERATED_LINES = 5
# Above this share of characters from scripts without spaces, white space does not separate words.
_MAX_UNSPACED = 0.2


def count_words(text: str) -> tuple[list[str], bool]:
    """(words, whether white space separates them): else each character of an unspaced script is one.

    >>> count_words("two words"), len(count_words("三个字")[0])
    ((['two', 'words'], True), 3)
    """
    words = text.split()
    if text.isascii():
        return words, True
    unspaced = UNSPACED.findall(text)
    if len(unspaced) <= _MAX_UNSPACED * len(text):
        return words, True
    return unspaced + UNSPACED.sub(" ", text).split(), False


def _share(hits: int, total: int) -> float:
    return hits / max(total, 1)


def _lines(text: str) -> list[str]:
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def check_gopher(text: str, language: str, limits: GopherQuality) -> None:
    """Rae et al. 2021 (arXiv 2112.11446), section A1.1; raises Dropped.

    The rules on the lengths of words hold where white space separates words, the one on English stop words for English.
    """
    words, spaced = count_words(text)
    if not limits.min_words <= len(words) <= limits.max_words:
        raise Dropped("number of words", f"{len(words)} words")
    mean = sum(map(len, words)) / len(words) if words else 0.0
    if spaced and not limits.min_mean_word_length <= mean <= limits.max_mean_word_length:
        raise Dropped("length of words", f"{mean:.1f} characters on average")
    for name, symbols in (("hashes", ("#",)), ("ellipses", _ELLIPSES)):
        ratio = _share(sum(map(text.count, symbols)), len(words))
        if ratio > limits.max_symbols_per_word:
            raise Dropped(f"{name} per word", f"{ratio:.2f}")
    lines = _lines(text)
    bullets = _share(sum(line.startswith(_BULLETS) for line in lines), len(lines))
    if bullets > limits.max_bullet_lines:
        raise Dropped("lines with bullets", f"{bullets:.2f} of the lines")
    ellipses = _share(sum(line.endswith(_ELLIPSES) for line in lines), len(lines))
    if ellipses > limits.max_ellipsis_lines:
        raise Dropped("lines that end in an ellipsis", f"{ellipses:.2f} of the lines")
    alphabetic = _share(sum(word.isalpha() or any(map(str.isalpha, word)) for word in words), len(words))
    if alphabetic < limits.min_alphabetic_words:
        raise Dropped("words without a letter", f"{1 - alphabetic:.2f} of the words")
    if language == "en":
        found = len(_STOP_WORDS.intersection(map(str.lower, words)))
        if found < limits.min_stop_words:
            raise Dropped("stop words", f"{found} of the English ones")


def clean_c4(text: str, limits: C4Quality) -> str:
    """The lines of a text that Raffel et al. 2020 (JMLR 21), section 2.2, keep; raises Dropped for the whole text.

    Citation marks as on Wikipedia go. Sentences are counted at their final punctuation.
    """
    lower = text.lower()
    if limits.drop_lorem_ipsum and "lorem ipsum" in lower:
        raise Dropped("lorem ipsum", "placeholder text")
    if limits.drop_curly_brackets and "{" in text:
        raise Dropped("curly bracket", f"at character {text.index('{')}")
    kept, sentences = [], 0
    for line in text.split("\n"):
        line = _CITATION.sub("", line) if "[" in line else line
        stripped = line.strip()
        if stripped and not _keeps_line(stripped, limits):
            continue
        sentences += max(len(_SENTENCE_END.findall(stripped)), 1) if stripped else 0
        # Of several empty lines that meet where lines went, one stays.
        if stripped or (kept and kept[-1]):
            kept.append(line.rstrip())
    if sentences < limits.min_sentences:
        raise Dropped("number of sentences", f"{sentences} in the lines that stay")
    return "\n".join(kept).strip()


def _keeps_line(line: str, limits: C4Quality) -> bool:
    words, _ = count_words(line)
    if len(words) < limits.min_words_per_line or max(map(len, words)) > limits.max_word_characters:
        return False
    if limits.terminal_punctuation and (not line.endswith(_C4_TERMINAL) or line.endswith(_ELLIPSES)):
        return False
    lower = line.lower()
    if limits.drop_javascript_lines and "javascript" in lower:
        return False
    return not (limits.drop_policy_lines and any(policy in lower for policy in _POLICIES))


def check_fineweb(text: str, limits: FineWebQuality) -> None:
    """Penedo et al. 2024 (arXiv 2406.17557), section 3.6; raises Dropped."""
    lines = _lines(text)
    punctuated = _share(sum(line[-1] in _TERMINAL for line in lines), len(lines))
    if punctuated <= limits.min_punctuated_lines:
        raise Dropped("lines without final punctuation", f"{1 - punctuated:.2f} of the lines")
    short = _share(sum(len(line) < limits.short_line_characters for line in lines), len(lines))
    if short >= limits.max_short_lines:
        raise Dropped("short lines", f"{short:.2f} of the lines")
    _, characters = repeated_share(lines)
    if characters >= limits.max_duplicate_line_characters:
        raise Dropped("characters in duplicate lines", f"{characters:.2f} of the characters")


def check_code(text: str, limits: CodeQuality) -> None:
    """Chen et al. 2021 (arXiv 2107.03374), section 3.1, and Li et al. 2023 (arXiv 2305.06161), section 3.1.

    Raises Dropped for machine-made files: long lines, few letters and digits, or a note of it in the first lines.
    """
    lines = text.split("\n")
    longest = max(map(len, lines))
    if longest > limits.max_line_characters:
        raise Dropped("longest line", f"{longest} characters")
    mean = len(text) / len(lines)
    if mean > limits.max_mean_line_characters:
        raise Dropped("mean length of lines", f"{mean:.0f} characters")
    alphanumeric = sum(map(str.isalnum, text)) / max(len(text), 1)
    if alphanumeric < limits.min_alphanumeric_characters:
        raise Dropped("letters and digits", f"{alphanumeric:.2f} of the characters")
    if limits.drop_generated and (match := _GENERATED.search("\n".join(lines[:_GENERATED_LINES]).lower())):
        raise Dropped("generated code", repr(match[0]))
