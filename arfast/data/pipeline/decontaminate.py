"""Documents that hold evaluation text: Brown et al. 2020 (arXiv 2005.14165), appendix C.

The rule: texts are compared in lower case, without punctuation, split into words; a document goes when it shares 13
words in a row with an evaluation document. An evaluation document of 8 to 12 words must occur as a whole; a shorter one
is not searched for. GPT-3 cut 200 characters around the place out and kept the rest; here all of the document goes.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from arfast.data.pipeline.record import Dropped
from arfast.data.pipeline.words import comparison_words, hash_ngrams, hash_words

_MIN_WORDS = 8


class Decontaminator:
    """Finds n words in a row that evaluation texts have too.

    >>> check = Decontaminator(["one two three four five six seven eight nine ten"], ngram_words=9)
    >>> check.find("Zero, one two three four five six seven EIGHT nine!")
    'one two three four five six seven eight nine'
    >>> check.find("one two three four five six seven eight ten") is None
    True
    """

    def __init__(self, texts: Iterable[str], ngram_words: int = 13):
        found: dict[int, list[np.ndarray]] = defaultdict(list)
        for text in texts:
            hashes = hash_words(comparison_words(text))
            n = min(ngram_words, len(hashes))
            if n >= min(_MIN_WORDS, ngram_words):
                found[n].append(np.unique(hash_ngrams(hashes, n)))
        self._ngrams = {n: np.unique(np.concatenate(arrays)) for n, arrays in sorted(found.items())}
        self.num_ngrams = sum(map(len, self._ngrams.values()))

    def fingerprint(self) -> str:
        """SHA-256 of what is searched for."""
        digest = hashlib.sha256()
        for n, ngrams in self._ngrams.items():
            digest.update(n.to_bytes(4, "little") + ngrams.astype("<u8").tobytes())
        return digest.hexdigest()

    def find(self, text: str) -> str | None:
        """The first words in a row that are evaluation text."""
        words = comparison_words(text)
        hashes = hash_words(words)
        for n, known in self._ngrams.items():
            ngrams = hash_ngrams(hashes, n)
            places = np.searchsorted(known, ngrams)
            hits = np.flatnonzero(known[np.minimum(places, len(known) - 1)] == ngrams)
            if len(hits):
                return " ".join(words[hits[0] : hits[0] + n])
        return None

    def check(self, text: str) -> None:
        if found := self.find(text):
            raise Dropped("evaluation text", f"shares {found!r}")
