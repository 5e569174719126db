"""Rows of at most ``seqlen`` tokens from the documents of a split: which piece of the token stream stands where.

A row is a list of segments (start, length) of the stream. Labels are shifted inside the model, so that a segment of n
tokens has n - 1 targets, and two segments that continue one text share one token: then every token is a target once.
Best-fit decreasing for language models: Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024), 3.
"""

import bisect
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class PackingStatistics:
    """What a packing makes of one pass over a split, in tokens.

    num_samples: rows of ``seqlen`` positions.
    num_targets: positions that carry a loss.
    num_padding: positions that hold padding.
    num_truncated: tokens of the split that no row holds.
    """

    num_samples: int
    num_targets: int
    num_padding: int
    num_truncated: int


def _ceil_div(a: int | np.ndarray, b: int) -> int | np.ndarray:
    return -(-a // b)


class Rows(Protocol):
    """Rows of segments; ``isolated`` says that a segment must not see the others of its row."""

    isolated: bool
    statistics: PackingStatistics

    def segments(self, row: int) -> list[tuple[int, int]]:
        """(start, length) of each segment of a row, from left to right."""


class ContiguousRows:
    """Windows of the whole stream that overlap by one token; documents follow one another. No memory per row."""

    isolated = False

    def __init__(self, offsets: np.ndarray, seqlen: int):
        self._seqlen = seqlen
        self._num_tokens = num_tokens = int(offsets[-1])
        num_samples = max(0, _ceil_div(num_tokens - 1, seqlen - 1))
        # Each window but the first repeats one token.
        num_padding = num_samples * seqlen - (num_tokens + num_samples - 1) if num_samples else 0
        self.statistics = PackingStatistics(num_samples, max(0, num_tokens - (len(offsets) - 1)), num_padding, 0)

    def segments(self, row: int) -> list[tuple[int, int]]:
        start = row * (self._seqlen - 1)
        return [(start, min(self._seqlen, self._num_tokens - start))]


class SegmentRows:
    """Rows given by explicit segments: row r holds segments row_offsets[r] to row_offsets[r + 1]."""

    def __init__(self, row_offsets: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *, seqlen: int, isolated: bool,
                 num_truncated: int = 0):  # fmt: skip
        self._row_offsets, self._starts, self._lengths = row_offsets, starts, lengths
        self.isolated = isolated
        num_samples, num_tokens = len(row_offsets) - 1, int(lengths.sum())
        num_padding = num_samples * seqlen - num_tokens
        self.statistics = PackingStatistics(num_samples, num_tokens - len(starts), num_padding, num_truncated)

    def segments(self, row: int) -> list[tuple[int, int]]:
        first, last = self._row_offsets[row : row + 2].tolist()
        return list(zip(self._starts[first:last].tolist(), self._lengths[first:last].tolist(), strict=True))


def split_documents(offsets: np.ndarray, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into segments of at most ``seqlen`` tokens that overlap by one token.

    Args:
        offsets: int64 [num_documents + 1], each document of two tokens at least.

    Returns:
        (starts, lengths) of the segments, int64 [S], in the order of the documents.
    """
    num_segments = _ceil_div(np.diff(offsets) - 1, seqlen - 1)
    document = np.repeat(np.arange(len(num_segments)), num_segments)
    index = np.arange(len(document)) - (np.cumsum(num_segments) - num_segments)[document]
    starts = offsets[document] + index * (seqlen - 1)
    return starts, np.minimum(seqlen, offsets[document + 1] - starts)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bins for items: from the longest to the shortest, each into the fullest bin that has room.

    All items of one length are placed together, and all bins of one free space are filled together, which gives the
    same bins as one by one, in time that depends on the number of different lengths.

    Args:
        lengths: int64 [N] in [1, capacity].

    Returns:
        int64 [N]: the bin of each item, bins numbered from 0 without gaps.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    spaces: list[int] = []  # ascending keys of `bins`
    bins: dict[int, list[np.ndarray]] = {}

    def put_back(some: np.ndarray, space: int) -> None:
        if space and len(some):
            if space not in bins:
                bisect.insort(spaces, space)
                bins[space] = []
            bins[space].append(some)

    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order], append=-1)) + 1
    for items in np.split(order, ends[:-1]):
        length = int(lengths[items[0]]) if len(items) else 0
        while len(items):
            place = bisect.bisect_left(spaces, length)
            if place < len(spaces):
                space = spaces.pop(place)
                candidates = np.concatenate(bins.pop(space))
            else:
                space = capacity
                candidates = num_bins + np.arange(_ceil_div(len(items), space // length))
                num_bins += len(candidates)
            per_bin = space // length
            used = candidates[: _ceil_div(len(items), per_bin)]
            placed, items = items[: len(used) * per_bin], items[len(used) * per_bin :]
            bin_of[placed] = np.repeat(used, per_bin)[: len(placed)]
            in_last = len(placed) - (len(used) - 1) * per_bin
            put_back(used[:-1], space - per_bin * length)
            put_back(used[-1:], space - in_last * length)
            put_back(candidates[len(used) :], space)
    return bin_of


def pack_documents(offsets: np.ndarray, seqlen: int) -> SegmentRows:
    """Rows filled with whole documents, best fit first; a document longer than a row is cut, and nothing is lost."""
    starts, lengths = split_documents(offsets, seqlen)
    row = best_fit_decreasing(lengths, seqlen)
    order = np.argsort(row, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return SegmentRows(row_offsets, starts[order], lengths[order], seqlen=seqlen, isolated=True)


def pad_documents(offsets: np.ndarray, seqlen: int) -> SegmentRows:
    """One document per row; what does not fit is truncated."""
    lengths = np.diff(offsets)
    kept = np.minimum(lengths, seqlen)
    rows = np.arange(len(lengths) + 1)
    num_truncated = int((lengths - kept).sum())
    return SegmentRows(rows, offsets[:-1], kept, seqlen=seqlen, isolated=False, num_truncated=num_truncated)


def pad_segments(offsets: np.ndarray, seqlen: int) -> SegmentRows:
    """One segment per row: as ``pad_documents``, but a long document continues in the next row."""
    starts, lengths = split_documents(offsets, seqlen)
    return SegmentRows(np.arange(len(starts) + 1), starts, lengths, seqlen=seqlen, isolated=False)
