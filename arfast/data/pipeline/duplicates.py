"""Copies and near-copies across the corpus: the first document of each group of them stays.

Exact copies by digest. Near-copies as in Lee et al. 2022 (arXiv 2107.06499), section 4.2: MinHash proposes pairs, a
check of the texts decides, and of each connected component of the pairs one document stays.

Memory: 9 bytes per document, one partition (see spill.py), and the texts that are being compared. A group of documents
that agree in a band is compared with the first documents of it that do not resemble each other.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from arfast.data.pipeline.minhash import band_keys, choose_bands
from arfast.data.pipeline.parts import Parts
from arfast.data.pipeline.recipe import DeduplicationRecipe
from arfast.data.pipeline.spill import Spill
from arfast.data.pipeline.words import jaccard, shingles

KEPT, COPY, NEAR_COPY = range(3)
_MAX_LEADERS = 32
_CACHE_BYTES = 16 << 20
# Signatures are off by more standard deviations than this once in 30,000 pairs at the threshold.
_DEVIATIONS = 4


def find_copies(parts: Parts, status: np.ndarray, scratch: Path) -> Iterator[tuple[int, int]]:
    """Marks documents whose text came before as COPY, in ``status`` uint8 [N]; yields (copy, what stays)."""
    dtype = np.dtype([("key", "<u8"), ("low", "<u8"), ("document", "<u8")])
    with Spill(scratch, dtype, parts.num_documents) as spill:
        for part, start in zip(parts.parts, parts.starts.tolist()):
            index = parts.index(part)
            records = np.empty(len(index), dtype)
            records["key"], records["low"] = index["high"], index["low"]
            records["document"] = np.arange(start, start + len(index))
            spill.add(records)
        for group in spill.groups():
            first: dict[int, int] = {}
            for low, document in zip(group["low"].tolist(), group["document"].tolist()):
                if (kept := first.setdefault(low, document)) != document:
                    status[document] = COPY
                    yield document, kept


class _Comparer:
    """Decides whether two documents are near-copies: from their signatures when these are far apart, else exactly."""

    def __init__(self, parts: Parts, recipe: DeduplicationRecipe):
        self._parts, self._recipe = parts, recipe
        deviation = (recipe.threshold * (1 - recipe.threshold) / recipe.num_permutations) ** 0.5
        self._least = recipe.threshold - _DEVIATIONS * deviation
        self._shingles: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = 0

    def similar_signatures(self, left: np.ndarray, right: np.ndarray) -> bool:
        return np.count_nonzero(left == right) / len(left) >= self._least

    def near(self, left: int, right: int) -> bool:
        return jaccard(self._shingles_of(left), self._shingles_of(right)) >= self._recipe.threshold

    def _shingles_of(self, document: int) -> np.ndarray:
        if document in self._shingles:
            self._shingles.move_to_end(document)
            return self._shingles[document]
        found = shingles(self._parts.record(document).text, self._recipe.shingle_words)
        self._shingles[document] = found
        self._cached += found.nbytes
        while self._cached > _CACHE_BYTES and len(self._shingles) > 2:
            self._cached -= self._shingles.popitem(last=False)[1].nbytes
        return found


class Components:
    """Connected components of the documents 0 to N - 1; the smallest document of each is its root."""

    def __init__(self, num_documents: int):
        self._parents = np.arange(num_documents, dtype=np.int64)

    def root(self, document: int) -> int:
        parents = self._parents
        while (parent := int(parents[document])) != document:
            parents[document] = parents[parent]
            document = parent
        return document

    def join(self, left: int, right: int) -> None:
        left, right = sorted((self.root(left), self.root(right)))
        self._parents[right] = left

    def members(self) -> np.ndarray:
        """The documents that are not the root of their component, rising."""
        return np.flatnonzero(self._parents != np.arange(len(self._parents)))


def _join_group(documents: list[int], components: Components, comparer: _Comparer, parts: Parts) -> None:
    """Joins what is near among documents that agree in a band: each with the first leader that it resembles."""
    leaders: list[tuple[int, np.ndarray]] = []
    for document in documents:
        root = components.root(document)
        if any(components.root(leader) == root for leader, _ in leaders):
            continue
        signature = parts.row(document)["signature"]
        for leader, other in leaders:
            if comparer.similar_signatures(signature, other) and comparer.near(leader, document):
                components.join(leader, document)
                break
        else:
            if len(leaders) < _MAX_LEADERS:
                leaders.append((document, signature))


def find_near_copies(
    parts: Parts, recipe: DeduplicationRecipe, status: np.ndarray, scratch: Path
) -> Iterator[tuple[int, int]]:
    """Marks near-copies of earlier documents as NEAR_COPY, in ``status`` uint8 [N]; yields (near-copy, what stays)."""
    num_bands, num_rows = choose_bands(recipe.threshold, recipe.recall, recipe.num_permutations)
    dtype = np.dtype([("key", "<u8"), ("document", "<u8")])
    components = Components(parts.num_documents)
    comparer = _Comparer(parts, recipe)
    with Spill(scratch, dtype, parts.num_documents * num_bands) as spill:
        for part, start in zip(parts.parts, parts.starts.tolist()):
            places = np.flatnonzero(status[start : start + part.num_documents] == KEPT)
            keys = band_keys(parts.index(part)["signature"][places], num_bands, num_rows)
            records = np.empty(keys.size, dtype)
            records["key"], records["document"] = keys.reshape(-1), np.repeat(start + places, num_bands)
            spill.add(records)
        for group in spill.groups():
            _join_group(group["document"].tolist(), components, comparer, parts)
    for document in components.members().tolist():
        status[document] = NEAR_COPY
        yield document, components.root(document)
