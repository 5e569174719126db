"""Indicator vectors: what the matrix keeps and its row sums lose, the product that is a lookup, errors."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from arfast.nn import indicators as module
from arfast.nn.indicators import counts, embed, indicators, tokens


def test_examples():
    found = doctest.testmod(module)
    assert found.attempted >= 5 and found.failed == 0


def test_matrix_keeps_the_order_and_counts_lose_it():
    ids = torch.randint(0, 11, (40,))
    matrix = indicators(ids, 11)
    assert torch.equal(matrix, F.one_hot(ids, 11).T)
    assert torch.equal(tokens(matrix), ids)
    shuffled = indicators(ids[torch.randperm(40)], 11)
    assert torch.equal(counts(matrix), torch.bincount(ids, minlength=11))
    assert torch.equal(counts(shuffled), counts(matrix)) and not torch.equal(shuffled, matrix)
    assert indicators(ids[:0], 11).shape == (11, 0) and len(tokens(indicators(ids[:0], 11))) == 0


def test_product_is_a_lookup():
    ids, weight = torch.randint(0, 11, (40,)), torch.randn(11, 5, requires_grad=True)
    found = embed(indicators(ids, 11), weight)
    assert torch.equal(found, F.embedding(ids, weight))
    grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (found, F.embedding(ids, weight))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: indicators(torch.tensor([1.0]), 3), r"token_ids must be integers \[T\], got torch.float32 \[1\]"),
        (lambda: indicators(torch.tensor([[1]]), 3), r"token_ids must be integers \[T\], got torch.int64 \[1, 1\]"),
        (lambda: indicators(torch.tensor([0, 3]), 3), r"token_ids must be in \[0, vocab_size=3\), got 3"),
        (lambda: indicators(torch.tensor([-1]), 3), r"token_ids must be in \[0, vocab_size=3\), got -1"),
        (lambda: tokens(torch.tensor([[1, 0], [1, 1]])), "matrix must have a single one"),
        (lambda: tokens(torch.tensor([[2, 0], [-1, 1]])), "matrix must have a single one"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
