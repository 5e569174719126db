"""permute: a bijection for every size, different per seed and epoch, uniform, and without memory."""

import numpy as np
import pytest

from arfast.data import order
from arfast.data.order import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 31, 97, 1000, 1024, 1025, 65537, 99991])
@pytest.mark.parametrize("epoch", [0, 1, 10**12])
def test_permutation(size, epoch):
    images = permute(np.arange(size), size, seed=3, epoch=epoch)
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


def test_every_small_size():
    for size in range(1, 300):
        assert sorted(permute(np.arange(size), size, seed=size).tolist()) == list(range(size))


def test_pure_function_of_each_index():
    size = 1009
    together = permute(np.arange(size), size, seed=1, epoch=2)
    alone = [permute(np.array([index]), size, seed=1, epoch=2)[0] for index in range(size)]
    np.testing.assert_array_equal(together, alone)


def test_epochs_and_seeds_differ():
    size = 1000
    orders = [permute(np.arange(size), size, seed=s, epoch=e) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1), (11, 0)]]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two independent permutations agree in one place on average (Poisson); 12 has a chance below 1e-9.
            assert np.count_nonzero(first == second) < 12


@pytest.mark.parametrize("size", [2, 3, 5, 6, 13])
def test_uniform_over_epochs(size):
    num_epochs = 3000
    counts = np.zeros((size, size))
    for epoch in range(num_epochs):
        counts[np.arange(size), permute(np.arange(size), size, seed=7, epoch=epoch)] += 1
    deviation = (counts - num_epochs / size) / np.sqrt(num_epochs / size * (1 - 1 / size))
    assert np.abs(deviation).max() < 5


def test_neighbours_are_independent():
    images = permute(np.arange(100_000), 100_000, seed=0)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), images)[0, 1]) < 0.02


def test_sums_never_wrap():
    words = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    assert int(order._mix(words).max()) < 2**63


def test_largest_size():
    indices = np.arange(2**62 - 100, 2**62)
    images = permute(indices, 2**62, seed=0)
    assert len(set(images.tolist())) == 100 and images.min() >= 0 and images.max() < 2**62


def test_empty():
    assert permute(np.arange(0), 5, seed=0).tolist() == []


@pytest.mark.parametrize(
    "indices, size, message",
    [
        ([0], 0, r"permute: size must be an integer in \[1, 4611686018427387904\], got 0"),
        ([0], 1.5, "permute: size must be an integer in .*, got 1.5"),
        ([5], 5, r"permute: indices must be in \[0, size=5\), got 5 to 5"),
        ([-1, 2], 5, r"permute: indices must be in \[0, size=5\), got -1 to 2"),
    ],
)
def test_errors(indices, size, message):
    with pytest.raises(ValueError, match=message):
        permute(np.array(indices), size, seed=0)
