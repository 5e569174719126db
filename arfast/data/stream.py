"""The tokens of the shards of a split as one array, with the documents and the targets in it."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from arfast.data.shards import Shard


class TargetSpans:
    """Which tokens of a stream are targets: int64 spans [num_spans, 2], rising and apart."""

    def __init__(self, spans: np.ndarray):
        self.starts, self.ends = spans[:, 0], spans[:, 1]
        self._before = np.concatenate([[0], np.cumsum(self.ends - self.starts)])

    def _rank(self, positions: np.ndarray) -> np.ndarray:
        """Number of targets before each position."""
        span = np.searchsorted(self.starts, positions, side="right")
        beyond = np.maximum(0, np.append(0, self.ends)[span] - positions)
        return self._before[span] - beyond

    def count(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Targets in each range of positions, int64 [N]."""
        return self._rank(ends) - self._rank(starts)

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of spans that lie in tokens[start:end]."""
        first, last = np.searchsorted(self.ends, start, side="right"), np.searchsorted(self.starts, end)
        starts, ends = np.maximum(self.starts[first:last], start), np.minimum(self.ends[first:last], end)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _spans_of(shard: Shard) -> np.ndarray:
    """Targets of a shard of either version, int64 [num_spans, 2]."""
    if shard.spans is not None:
        return shard.spans.astype(np.int64)
    offsets = shard.offsets.astype(np.int64)
    return np.stack([offsets[:-1] + 1, offsets[1:]], axis=1)


class TokenStream:
    """The tokens of one or more shards as one array.

    Attributes:
        num_tokens: int.
        offsets: int64 [num_documents + 1]: where each document starts, and the end.
        targets: ``TargetSpans``, or None where every token but each document's first is a target.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._tokens = [shard.tokens for shard in shards]
        self._ends = list(itertools.accumulate(len(tokens) for tokens in self._tokens))
        self.num_tokens = sum(map(len, self._tokens))
        offsets = [
            shard.offsets[:-1].astype(np.int64) + end - len(shard.tokens) for shard, end in zip(shards, self._ends)
        ]
        self.offsets = np.concatenate([*offsets, [self.num_tokens]])
        self.targets = None
        if any(shard.spans is not None for shard in shards):
            spans = [_spans_of(shard) + end - len(shard.tokens) for shard, end in zip(shards, self._ends)]
            self.targets = TargetSpans(np.concatenate(spans))

    def read(self, start: int, out: np.ndarray) -> None:
        """Copies tokens[start : start + len(out)] into ``out``, an integer array [N]."""
        if len(self._tokens) == 1:
            out[:] = self._tokens[0][start : start + len(out)]
            return
        filled = 0
        shard = bisect_right(self._ends, start)
        while filled < len(out):
            tokens = self._tokens[shard]
            first = start + filled - (self._ends[shard] - len(tokens))
            piece = tokens[first : first + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
