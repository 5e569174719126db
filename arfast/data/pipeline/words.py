"""Words for comparing texts, and 64-bit hashes of n words in a row."""

import re
import zlib

import numpy as np

# Scripts written without spaces between words; there every character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
UNSPACED = re.compile(f"[{_UNSPACED}]")
_FINALIZER = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER = 0x9E3779B97F4A7C15


def comparison_words(text: str) -> list[str]:
    """Words in lower case without punctuation: what GPT-3's and FineWeb's comparisons see of a text.

    >>> comparison_words("Don't panic: 2 tea_cups!")
    ['don', 't', 'panic', '2', 'tea_cups']
    """
    return _WORD.findall(text.lower())


def hash_words(words: list[str]) -> np.ndarray:
    """uint64 [len(words)]; the same on every machine and in every process."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(N - n + 1, 0), ...] hashes of n words in a row, from the hashes uint64 [N, ...] of the words."""
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros((count, *hashes.shape[1:]), np.uint64)
    multiplier = 1
    for offset in range(n):
        multiplier = multiplier * _MULTIPLIER % 2**64
        total += (hashes[offset : offset + count] + np.uint64(offset + 1)) * np.uint64(multiplier)
    total ^= total >> np.uint64(32)
    total *= _FINALIZER
    return total ^ (total >> np.uint64(29))


def shingles(text: str, n: int) -> np.ndarray:
    """The different hashes of n words in a row, rising uint64 [S]; of all words of a text that has fewer than n."""
    hashes = hash_words(comparison_words(text))
    return np.unique(hash_ngrams(hashes, min(n, len(hashes)) or 1))


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets, given as rising arrays; 1 for two empty ones."""
    if not (len(left) or len(right)):
        return 1.0
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
