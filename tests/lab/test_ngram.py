"""Kneser-Ney smoothing against its formula in plain Python, on numbers and on code."""

import collections
import doctest
import math
import textwrap

import numpy as np
import pytest

from arfast.lab import ngram
from arfast.lab.ngram import NGramModel


class Reference:
    """p(w | h) as in the head of the module, from dictionaries."""

    def __init__(self, documents, order, vocab_size):
        self.vocab_size, self.order = vocab_size, order
        grams = [tuple(d[i : i + order]) for d in documents for i in range(len(d) - order + 1)]
        self.counts = {order: collections.Counter(grams)}
        for size in range(order - 1, 0, -1):
            self.counts[size] = collections.Counter(gram[1:] for gram in self.counts[size + 1])

    def probability(self, history, token, size=None):
        size = min(len(history) + 1, self.order) if size is None else size
        if size == 0:
            return 1 / self.vocab_size
        history = tuple(history[len(history) - size + 1 :])
        counts = self.counts[size]
        once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        following = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        shorter = self.probability(history[1:], token, size - 1)
        if not following:
            return shorter
        taken = max(following.get(token, 0) - discount, 0)
        return (taken + discount * len(following) * shorter) / sum(following.values())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_formula(order):
    generator = np.random.default_rng(order)
    documents = [generator.integers(0, 6, size) ** 2 // 6 for size in (80, 3, 1, 40)]
    model, reference = NGramModel(documents, order, 7), Reference([d.tolist() for d in documents], order, 7)
    rows = generator.integers(0, 7, (5, 9))
    targets = generator.integers(0, 7, (5, 9))
    found = model.log_prob(rows, targets)
    for row, wanted, values in zip(rows.tolist(), targets.tolist(), found):
        expected = [math.log(reference.probability(row[:t], token)) for t, token in enumerate(wanted)]
        assert values.tolist() == pytest.approx(expected)
    assert np.array_equal(model.log_prob(rows), model.log_prob(rows, rows))


def test_probabilities_sum_to_one():
    generator = np.random.default_rng(0)
    model = NGramModel([generator.integers(0, 11, 300)], 3, 12)
    for context in ([], [3], [3, 4], [11, 11], [3, 4, 5]):
        rows = np.array([[*context, 0]] * 12)
        targets = rows.copy()
        targets[:, -1] = np.arange(12)
        assert np.exp(model.log_prob(rows, targets)[:, -1]).sum() == pytest.approx(1)


def test_longer_n_grams_know_unseen_code_better():
    text = open(textwrap.__file__, "rb").read()
    tokens = np.frombuffer(text, np.uint8).astype(np.int64)
    known, unseen = tokens[: len(tokens) * 3 // 4], tokens[len(tokens) * 3 // 4 :]
    losses = [-NGramModel([known], order, 256).log_prob(unseen[None]).mean() for order in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True) and losses[3] < 0.7 * losses[0]


def test_errors():
    with pytest.raises(ValueError, match=r"NGramModel: order must be at least 1, .* got 0"):
        NGramModel([np.arange(9)], 0, 10)
    with pytest.raises(ValueError, match=r"vocab_size\*\*order < 2\*\*63, got 6"):
        NGramModel([np.arange(9)], 6, 2000)
    with pytest.raises(ValueError, match="documents must hold an n-gram of 4 tokens, got none"):
        NGramModel([np.arange(3)], 4, 10)


def test_examples():
    assert doctest.testmod(ngram).failed == 0
