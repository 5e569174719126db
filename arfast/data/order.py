"""An order of samples that is a pure function of (seed, epoch, index) and needs no memory.

A generalized Feistel network on Z_a x Z_b with a * b >= size, and cycle walking back into range(size):
Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections 4 and 5.
"""

import hashlib
import math

import numpy as np

from arfast.data.checks import check_integer

_NUM_ROUNDS = 8
MAX_SIZE = 2**62


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """64 bits per round, uint64 [_NUM_ROUNDS]."""
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8 * _NUM_ROUNDS, person=b"arfast.order")
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _mix(word: np.ndarray) -> np.ndarray:
    """The upper 63 bits of the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Not 64: a sum that wraps at 2**64 before it is reduced modulo ``rows`` would not be a bijection of Z_rows.
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) >> np.uint64(1)


def _feistel(value: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(value, columns)
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right ^ left_key)) % rows
        right = (right + _mix(left ^ right_key)) % columns
    return left * columns + right


def permute(indices: np.ndarray, size: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """Images of ``indices`` under the permutation of ``range(size)`` that belongs to ``(seed, epoch)``.

    Args:
        indices: integers [N] in [0, size).
        size: number of samples, in [1, 2**62].
        seed, epoch: any integers; each pair has its own permutation.

    Returns:
        int64 [N]; time and memory grow with N, not with ``size``.

    Raises:
        ValueError: ``size`` or an index is out of range.

    >>> sorted(permute(np.arange(5), 5, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4]
    """
    size = check_integer("permute: size", size, 1, MAX_SIZE)
    indices = np.asarray(indices)
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"permute: indices must be in [0, size={size}), got {indices.min()} to {indices.max()}")
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(seed, epoch)
    value = _feistel(indices.astype(np.uint64), np.uint64(rows), np.uint64(columns), keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], np.uint64(rows), np.uint64(columns), keys)
    return value.astype(np.int64)
