"""Documents that repeat themselves: Rae et al. 2021 (arXiv 2112.11446), table A1."""

from collections import Counter

import numpy as np

from arfast.data.pipeline.recipe import GopherRepetition
from arfast.data.pipeline.record import Dropped
from arfast.data.pipeline.words import hash_ngrams, hash_words


def repeated_share(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that are copies of an earlier one.

    >>> repeated_share(["a", "bbb", "a", "a"])
    (0.5, 0.3333333333333333)
    """
    copies = characters = 0
    for part, count in Counter(parts).items():
        copies += count - 1
        characters += (count - 1) * len(part)
    return copies / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def top_ngram_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of the words' characters that lie in the n-gram with most of them, among those that occur twice.

    hashes: uint64 [N] of the words; lengths: int64 [N], their characters. Occurrences that overlap count in full.
    """
    ngrams = hash_ngrams(hashes, n)
    if not len(ngrams):
        return 0.0
    _, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    characters = (ends[first + n] - ends[first]) * counts * (counts > 1)
    return min(1.0, int(characters.max()) / max(int(lengths.sum()), 1))


def duplicate_ngram_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of the words' characters that lie in an n-gram that has occurred before; each counts once."""
    ngrams = hash_ngrams(hashes, n)
    if not len(ngrams):
        return 0.0
    # The sort is stable: of equal n-grams that stand in a row, the first is the first in the text.
    order = np.argsort(ngrams, kind="stable")
    repeated = order[1:][ngrams[order[1:]] == ngrams[order[:-1]]]
    # A word is covered when more repeated n-grams have begun at it or before than have ended.
    steps = np.zeros(len(hashes) + 1, np.int64)
    steps[repeated] += 1
    steps[repeated + n] -= 1
    covered = np.cumsum(steps[:-1]) > 0
    return int(lengths[covered].sum()) / max(int(lengths.sum()), 1)


def check_repetition(text: str, limits: GopherRepetition) -> None:
    """Raises Dropped for a text above one of the limits of table A1.

    Lines and paragraphs are those that are not empty; words are separated by white space.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    for name, parts, most, most_characters in (
        ("lines", lines, limits.max_duplicate_lines, limits.max_duplicate_line_characters),
        ("paragraphs", paragraphs, limits.max_duplicate_paragraphs, limits.max_duplicate_paragraph_characters),
    ):
        share, characters = repeated_share(parts)
        if share > most:
            raise Dropped(f"duplicate {name}", f"{share:.2f} of {len(parts)} are copies")
        if characters > most_characters:
            raise Dropped(f"characters in duplicate {name}", f"{characters:.2f} of the characters")
    words = text.split()
    hashes = hash_words(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    for n, most in enumerate(limits.max_top_ngram_characters, 2):
        if (share := top_ngram_share(hashes, lengths, n)) > most:
            raise Dropped(f"characters in the top {n}-gram", f"{share:.2f} of the characters")
    shares = limits.max_duplicate_ngram_characters
    for n, most in enumerate(shares, 5):
        if (share := duplicate_ngram_share(hashes, lengths, n)) > most:
            raise Dropped(f"characters in duplicate {n}-grams", f"{share:.2f} of the characters")
        # What lies in a longer n-gram that has occurred before lies in a shorter one too.
        if share <= min(shares):
            break
