"""Rows of segments against brute force: nothing lost, nothing twice, and the bins of the plain algorithm."""

import numpy as np
import pytest

from arfast.data.packing import (
    ContiguousRows,
    best_fit_decreasing,
    pack_documents,
    pad_documents,
    pad_segments,
    split_documents,
)

PACKINGS = [ContiguousRows, pack_documents, pad_documents, pad_segments]


def one_by_one(lengths, capacity):
    """The free space of each bin when the longest item goes first, each into the fullest bin that has room."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, bin) for bin, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting)[1]] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


def test_best_fit_decreasing():
    for seed in range(300):
        generator = np.random.default_rng(seed)
        capacity = int(generator.integers(1, 40))
        lengths = generator.integers(1, capacity + 1, int(generator.integers(0, 80)))
        bin_of = best_fit_decreasing(lengths, capacity)
        used = np.bincount(bin_of, weights=lengths).astype(int)
        assert (used > 0).all()
        assert sorted((capacity - used).tolist()) == one_by_one(lengths.tolist(), capacity), seed


def test_best_fit_wastes_little():
    lengths = np.minimum(512, np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 2)
    num_bins = best_fit_decreasing(lengths, 512).max() + 1
    assert lengths.sum() / (num_bins * 512) > 0.995


def test_many_documents_are_packed_in_one_way():
    """300,000 documents, each placed once, no bin too full; another run gives the same bins."""
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(6.2, 1.3, 300_000).astype(np.int64) + 2)
    bin_of = best_fit_decreasing(lengths, 2048)
    used = np.bincount(bin_of, weights=lengths)
    assert 0 < used.min() and used.max() <= 2048 and lengths.sum() / (len(used) * 2048) > 0.999
    np.testing.assert_array_equal(best_fit_decreasing(lengths, 2048), bin_of)


@pytest.mark.parametrize("seqlen", [2, 3, 8, 9, 100])
def test_split_documents(seqlen):
    lengths = [2, 3, 7, 8, 9, 15, 16, 17, 64, 2]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, sizes, _ = split_documents(offsets, seqlen)
    expected = []
    for first, end in zip(offsets[:-1], offsets[1:], strict=True):
        start = first
        while start < end - 1:
            expected.append((start, min(seqlen, end - start)))
            start += seqlen - 1
    assert list(zip(starts.tolist(), sizes.tolist(), strict=True)) == expected


@pytest.mark.parametrize("make_rows", PACKINGS)
@pytest.mark.parametrize("seqlen", [2, 3, 5, 8, 33])
@pytest.mark.parametrize("seed", range(5))
def test_rows(make_rows, seqlen, seed):
    """Every target once, or counted as truncated; the statistics are those of the rows."""
    lengths = np.random.default_rng(seed).integers(2, 30, size=seed * 7 + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = make_rows(offsets, seqlen)
    targets, filled, held = [], 0, set()
    for row in range(rows.statistics.num_samples):
        segments = rows.segments(row)
        assert sum(length for _, length in segments) <= seqlen
        for start, length in segments:
            filled += length
            held.update(range(start, start + length))
            targets += [t for t in range(start + 1, start + length) if t not in offsets]
            if make_rows is not ContiguousRows:
                assert document[start] == document[start + length - 1]
    wanted = set(range(offsets[-1])) - set(offsets.tolist())
    assert len(targets) == len(set(targets)) == rows.statistics.num_targets
    assert rows.statistics.num_padding == rows.statistics.num_samples * seqlen - filled
    assert rows.statistics.num_truncated == offsets[-1] - len(held)
    if make_rows is pad_documents:
        assert set(targets) == {t for t in wanted if t - offsets[document[t]] < seqlen}
    else:
        assert set(targets) == wanted


@pytest.mark.parametrize("make_rows", PACKINGS)
def test_empty_split(make_rows):
    statistics = make_rows(np.array([0]), 8).statistics
    assert statistics == type(statistics)(0, 0, 0, 0, 0, 0)
