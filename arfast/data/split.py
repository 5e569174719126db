"""Train, validation and test by the content of each document, so that a document never changes sides.

The split of a text does not depend on its position, its file name, or on what else the corpus holds.
"""

import hashlib
from collections.abc import Sequence
from numbers import Real

import numpy as np

SPLITS = ("train", "validation", "test")


def document_digest(text: str, seed: int = 0) -> bytes:
    """16 bytes that identify a text; another ``seed`` gives another, independent split."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode(), person=b"arfast.split").digest()


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Raises ValueError unless both are at least 0 and leave something to train on."""
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not (isinstance(value, Real) and 0 <= value < 1):
            raise ValueError(f"assign_splits: {name} must be in [0, 1), got {value!r}")
    if validation_fraction + test_fraction >= 1:
        total = validation_fraction + test_fraction
        raise ValueError(f"assign_splits: validation_fraction + test_fraction must be below 1, got {total}")


def splits_by_digest(leading: np.ndarray, validation_fraction: float, test_fraction: float) -> np.ndarray:
    """``assign_splits`` without its exception for small corpora: each document alone, whatever the others are.

    Args:
        leading: uint64 [num_documents], the first 8 bytes of the digests as big-endian numbers.
        validation_fraction, test_fraction: expected shares of the documents.

    Returns:
        uint8 [num_documents].
    """
    uniform = leading.astype(np.float64) / 2.0**64
    splits = np.zeros(len(leading), dtype=np.uint8)
    splits[uniform < validation_fraction + test_fraction] = 2
    splits[uniform < validation_fraction] = 1
    return splits


def assign_splits(digests: Sequence[bytes], validation_fraction: float, test_fraction: float) -> np.ndarray:
    """The split of each document, an index into ``SPLITS``.

    A document belongs to validation when its digest, read as a number u in [0, 1), is below ``validation_fraction``, to
    test when it is below the sum of both fractions, to train otherwise. Only a corpus so small that this leaves a split
    without a document is split by rank: the lowest u to validation, the next to test.

    Args:
        digests: of distinct documents, from ``document_digest``.
        validation_fraction, test_fraction: expected shares of the documents.

    Returns:
        uint8 [num_documents].

    Raises:
        ValueError: a fraction is out of range, or there are fewer documents than wanted splits.
    """
    check_fractions(validation_fraction, test_fraction)
    wanted = [split for split, fraction in ((1, validation_fraction), (2, test_fraction)) if fraction > 0]
    if len(digests) <= len(wanted):
        raise ValueError(
            f"assign_splits: corpus must hold at least {len(wanted) + 1} different documents, got {len(digests)}"
        )
    leading = np.frombuffer(b"".join(digest[:8] for digest in digests), dtype=">u8")
    splits = splits_by_digest(leading, validation_fraction, test_fraction)
    if len(np.unique(splits)) <= len(wanted):
        splits[:] = 0
        splits[np.argsort(leading, kind="stable")[: len(wanted)]] = wanted
    return splits
