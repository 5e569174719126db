"""MinHash signatures of documents, by datasketch, and the bands that propose near-duplicates.

Broder, "On the resemblance and containment of documents" (SEQUENCES 1997): P[two signatures agree at a place] is the
Jaccard similarity J of the two sets. Indyk and Motwani (STOC 1998), as in Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4: with b bands of r rows, P[some band agrees] = 1 - (1 - J**r)**b.
"""

import numpy as np

from arfast.data.pipeline.packages import require
from arfast.data.pipeline.words import hash_ngrams, shingles

# datasketch makes an array of shingles x permutations: this many at a time stay in the cache, whatever the document.
_CHUNK = 512
_SEED = 1


class Signer:
    """Signatures of texts: one minimum over the shingles for each of ``num_permutations`` permutations."""

    def __init__(self, num_permutations: int, shingle_words: int):
        module = require("datasketch", "near-duplicate removal")
        self._empty = module.MinHash(num_permutations, _SEED, hashfunc=int, scheme="affine32")
        self._shingle_words = shingle_words

    def __call__(self, text: str) -> np.ndarray:
        """uint32 [num_permutations]."""
        minhash = self._empty.copy()
        hashes = (shingles(text, self._shingle_words) & np.uint64(0xFFFFFFFF)).tolist()
        for start in range(0, len(hashes), _CHUNK):
            minhash.update_batch(hashes[start : start + _CHUNK])
        return minhash.hashvalues


def proposal_probability(similarity: float, num_bands: int, num_rows: int) -> float:
    """P[a pair of Jaccard similarity ``similarity`` agrees in a band]: 1 - (1 - J**r)**b."""
    return 1 - (1 - similarity**num_rows) ** num_bands


def choose_bands(threshold: float, recall: float, num_permutations: int) -> tuple[int, int]:
    """(bands, rows): as many rows as possible, for few false proposals, with ``recall`` at the threshold.

    >>> choose_bands(0.8, 0.95, 128)
    (18, 7)

    Raises:
        ValueError: even bands of one row propose such pairs too seldom.
    """
    for num_rows in range(num_permutations, 0, -1):
        num_bands = num_permutations // num_rows
        if proposal_probability(threshold, num_bands, num_rows) >= recall:
            return num_bands, num_rows
    best = proposal_probability(threshold, num_permutations, 1)
    raise ValueError(f"prepare: deduplication.recall must be reachable with the permutations, {best:.3f}, got {recall}")


def band_keys(signatures: np.ndarray, num_bands: int, num_rows: int) -> np.ndarray:
    """uint64 [N, num_bands]: equal keys, equal rows of the same band; signatures uint32 [N, P]."""
    keys = np.empty((len(signatures), num_bands), np.uint64)
    for band in range(num_bands):
        rows = signatures[:, band * num_rows : (band + 1) * num_rows].astype(np.uint64)
        # The band is a further word of the n-gram, so that bands do not meet.
        words = np.concatenate([rows, np.full((len(rows), 1), band, np.uint64)], axis=1)
        keys[:, band] = hash_ngrams(words.T, num_rows + 1)[0]
    return keys
