"""Splits depend on the content of a document alone, and have the expected sizes."""

import hashlib
import random

import numpy as np
import pytest

from arfast.data.split import assign_splits, document_digest

TEXTS = [f"document number {i}" for i in range(4000)]


def assignment(texts, seed=0, fractions=(0.1, 0.05)):
    splits = assign_splits([document_digest(text, seed) for text in texts], *fractions)
    return dict(zip(texts, splits.tolist(), strict=True))


def test_rule():
    """Recomputed from the definition: the leading 8 bytes of a keyed BLAKE2b, as a fraction of 2**64."""
    found = assignment(TEXTS, seed=5)
    for text in TEXTS:
        digest = hashlib.blake2b(text.encode(), digest_size=16, key=b"5", person=b"arfast.split").digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        assert found[text] == (1 if share < 0.1 else 2 if share < 0.1 + 0.05 else 0)


def test_independent_of_order_and_of_other_documents():
    before = assignment(TEXTS)
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert assignment(shuffled) == before
    larger = assignment(["new " + text for text in TEXTS] + shuffled[:3000])
    assert all(larger[text] == before[text] for text in shuffled[:3000])


def test_sizes():
    counts = np.bincount(list(assignment(TEXTS).values()), minlength=3)
    for count, share in zip(counts, [0.85, 0.1, 0.05], strict=True):
        assert abs(count - 4000 * share) < 5 * np.sqrt(4000 * share * (1 - share))


def test_seeds_are_independent():
    first, second = assignment(TEXTS, seed=0), assignment(TEXTS, seed=1)
    common = sum(first[text] == 1 and second[text] == 1 for text in TEXTS)
    assert common < 40 + 5 * np.sqrt(40)


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("fractions", [(0.01, 0.01), (0.45, 0.45), (0.9, 0.05)])
def test_small_corpus_has_every_split(count, fractions):
    for start in range(0, 400, count):
        texts = TEXTS[start : start + count]
        found = assignment(texts, fractions=fractions)
        assert set(found.values()) == {0, 1, 2}
        assert assignment(texts[::-1], fractions=fractions) == found


def test_unwanted_splits_stay_empty():
    assert set(assignment(TEXTS, fractions=(0.1, 0.0)).values()) == {0, 1}
    assert set(assignment(TEXTS[:1], fractions=(0, 0)).values()) == {0}


@pytest.mark.parametrize(
    "count, fractions, message",
    [
        (9, (-0.1, 0), r"validation_fraction must be in \[0, 1\), got -0.1"),
        (9, (float("nan"), 0), r"validation_fraction must be in \[0, 1\), got nan"),
        (9, ("0.1", 0), r"validation_fraction must be in \[0, 1\), got '0.1'"),
        (9, (0.1, 1), r"test_fraction must be in \[0, 1\), got 1"),
        (9, (0.5, 0.5), r"validation_fraction \+ test_fraction must be below 1, got 1.0"),
        (2, (0.1, 0.1), "corpus must hold at least 3 different documents, got 2"),
        (0, (0, 0), "corpus must hold at least 1 different documents, got 0"),
    ],
)
def test_errors(count, fractions, message):
    with pytest.raises(ValueError, match="assign_splits: " + message):
        assignment(TEXTS[:count], fractions=fractions)
