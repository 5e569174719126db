"""Results must not depend on the number of threads."""

import contextlib

import torch
from accuracy import assert_bitwise_equal


@contextlib.contextmanager
def num_threads(count):
    """torch's threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_for_any_threads(function, counts=(1, 2, 3, 2)):
    """The result of `function()`, a tensor or a sequence of them, after checking that every number of threads gives the
    same bits."""
    results = []
    for count in counts:
        with num_threads(count):
            results.append(function())
    for count, other in zip(counts[1:], results[1:], strict=True):
        single = isinstance(other, torch.Tensor)
        for i, (a, b) in enumerate(zip(*([x] if single else x for x in (other, results[0])), strict=True)):
            assert_bitwise_equal(a, b, name=f"{count} threads, result {i}")
    return results[0]
