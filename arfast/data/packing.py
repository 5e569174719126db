"""Rows of at most ``seqlen`` tokens from the documents of a split: which piece of the token stream stands where.

A row is a list of segments (start, length) of the stream. Labels are shifted inside the model, so that a segment of n
tokens has n - 1 targets, and two segments that continue one text share one token: then every token is a target once.
Best-fit decreasing for language models: Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024), 3.
"""

import bisect
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol

import numpy as np

from arfast.data.stream import TargetSpans


@dataclass(frozen=True, slots=True)
class PackingStatistics:
    """What a packing makes of one pass over a split, in tokens.

    num_samples: rows of ``seqlen`` positions.
    num_targets: positions that carry a loss.
    num_padding: positions that hold padding.
    num_truncated: tokens of the split that no row holds.
    num_positions: of all rows; num_tokens: of the split.
    """

    num_samples: int
    num_targets: int
    num_padding: int
    num_truncated: int
    num_positions: int
    num_tokens: int

    @property
    def target_share(self) -> float:
        """Of all positions, those that carry a loss."""
        return self.num_targets / max(1, self.num_positions)

    @property
    def padding_share(self) -> float:
        """Of all positions, those that hold padding."""
        return self.num_padding / max(1, self.num_positions)

    @property
    def truncated_share(self) -> float:
        """Of the tokens of the split, those that no row holds."""
        return self.num_truncated / max(1, self.num_tokens)

    def __add__(self, other: "PackingStatistics") -> "PackingStatistics":
        return PackingStatistics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


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

    def __init__(self, offsets: np.ndarray, seqlen: int, targets: TargetSpans | None = None):
        self._seqlen = seqlen
        self._num_tokens = num_tokens = int(offsets[-1])
        num_samples = max(0, _ceil_div(num_tokens - 1, seqlen - 1))
        num_positions = num_samples * seqlen
        # Each window but the first repeats one token.
        num_padding = num_positions - (num_tokens + num_samples - 1) if num_samples else 0
        num_targets = int(targets.count(0, num_tokens)) if targets else num_tokens - (len(offsets) - 1)
        self.statistics = PackingStatistics(num_samples, num_targets, num_padding, 0, num_positions, num_tokens)

    def segments(self, row: int) -> list[tuple[int, int]]:
        start = row * (self._seqlen - 1)
        return [(start, min(self._seqlen, self._num_tokens - start))]


class SegmentRows:
    """Rows given by explicit segments of a stream of ``num_tokens``: which row each segment is in, in ascending order.

    Two segments overlap by one token when one begins with the other's last, and not otherwise.
    """

    def __init__(self, segments: "Segments", row: np.ndarray, *, seqlen: int, num_tokens: int, isolated: bool):
        self.isolated = isolated
        order = np.argsort(row, kind="stable")
        self._starts, self._lengths = segments.starts[order], segments.lengths[order]
        self._row_offsets = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
        num_samples = len(self._row_offsets) - 1
        num_filled, num_positions = int(segments.lengths.sum()), num_samples * seqlen
        self.statistics = PackingStatistics(
            num_samples=num_samples,
            num_targets=int(segments.num_targets.sum()),
            num_padding=num_positions - num_filled,
            num_truncated=num_tokens - (num_filled - segments.num_overlaps),
            num_positions=num_positions,
            num_tokens=num_tokens,
        )

    def segments(self, row: int) -> list[tuple[int, int]]:
        first, last = self._row_offsets[row : row + 2].tolist()
        return list(zip(self._starts[first:last].tolist(), self._lengths[first:last].tolist(), strict=True))


class Segments(NamedTuple):
    """Pieces of documents in the order of the stream, int64 [S] each: first token, length, number of targets."""

    starts: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray

    @property
    def num_overlaps(self) -> int:
        """How many begin with the last token of the one before."""
        return int(np.count_nonzero(self.starts[1:] == (self.starts + self.lengths)[:-1] - 1))

    @classmethod
    def with_targets(cls, starts: np.ndarray, lengths: np.ndarray, targets: TargetSpans | None) -> "Segments":
        """Counts the targets, and drops segments without any: alone in their context they would teach nothing."""
        if targets is None:
            return cls(starts, lengths, lengths - 1)
        num_targets = targets.count(starts + 1, starts + lengths)
        kept = num_targets > 0
        return cls(starts[kept], lengths[kept], num_targets[kept])


def split_documents(offsets: np.ndarray, seqlen: int, targets: TargetSpans | None = None) -> Segments:
    """Cuts documents into segments of at most ``seqlen`` tokens that overlap by one token.

    Args:
        offsets: int64 [num_documents + 1], each document of two tokens at least.
        targets: which tokens carry a loss; None: all but each document's first.
    """
    num_segments = _ceil_div(np.diff(offsets) - 1, seqlen - 1)
    document = np.repeat(np.arange(len(num_segments)), num_segments)
    index = np.arange(len(document)) - (np.cumsum(num_segments) - num_segments)[document]
    starts = offsets[document] + index * (seqlen - 1)
    return Segments.with_targets(starts, np.minimum(seqlen, offsets[document + 1] - starts), targets)


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


def pack_documents(offsets: np.ndarray, seqlen: int, targets: TargetSpans | None = None) -> SegmentRows:
    """Rows filled with whole documents, best fit first; a document longer than a row is cut, and no target is lost."""
    segments = split_documents(offsets, seqlen, targets)
    row = best_fit_decreasing(segments.lengths, seqlen)
    return SegmentRows(segments, row, seqlen=seqlen, num_tokens=int(offsets[-1]), isolated=True)


def pad_documents(offsets: np.ndarray, seqlen: int, targets: TargetSpans | None = None) -> SegmentRows:
    """One document per row; what does not fit is truncated."""
    segments = Segments.with_targets(offsets[:-1], np.minimum(np.diff(offsets), seqlen), targets)
    return _one_per_row(segments, seqlen, int(offsets[-1]))


def pad_segments(offsets: np.ndarray, seqlen: int, targets: TargetSpans | None = None) -> SegmentRows:
    """One segment per row: as ``pad_documents``, but a long document continues in the next row."""
    return _one_per_row(split_documents(offsets, seqlen, targets), seqlen, int(offsets[-1]))


def _one_per_row(segments: Segments, seqlen: int, num_tokens: int) -> SegmentRows:
    rows = np.arange(len(segments.starts))
    return SegmentRows(segments, rows, seqlen=seqlen, num_tokens=num_tokens, isolated=False)
