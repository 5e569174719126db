"""Exposure bias of models for which it is known: none without memory, some where a mistake is kept."""

import doctest

import numpy as np
import pytest
import torch
from torch import Tensor

from arfast.lab import exposure
from arfast.lab.exposure import measure_exposure, repetition
from arfast.lab.ngram import NGramModel

LENGTHS, PROMPT, PASSAGE = (4, 16, 32), 4, 8
ALLOWED = torch.ones(8, dtype=torch.bool)


class Walker:
    """Stands for a model: the next token is the last one plus 1, modulo 8, but for some mistakes; with `stuck`, a
    token after a mistake is anything."""

    def __init__(self, mistakes: float, stuck: bool):
        self.mistakes, self.stuck = mistakes, stuck

    def generate(self, input_ids: Tensor, max_new_tokens: int, seed: int, **options) -> Tensor:
        generator = np.random.default_rng(seed)
        rows = input_ids.numpy()
        for _ in range(max_new_tokens):
            lost = self.stuck & (np.diff(rows) % 8 != 1).any(1)
            wrong = lost | (generator.random(len(rows)) < self.mistakes)
            new = np.where(wrong, generator.integers(0, 8, len(rows)), (rows[:, -1] + 1) % 8)
            rows = np.concatenate([rows, new[:, None]], axis=1)
        return torch.from_numpy(rows)


@pytest.fixture(scope="module")
def judge():
    noise = np.random.default_rng(0).random(20_000) < 0.02
    return NGramModel([(np.arange(20_000) + np.cumsum(3 * noise)) % 8], 3, 8)


@pytest.fixture(scope="module")
def windows():
    return torch.arange(48)[None] % 8 + torch.zeros(400, 1, dtype=torch.int64)


def measured(model, judge, windows):
    return measure_exposure(model, judge, windows, PROMPT, LENGTHS, PASSAGE, ALLOWED, 0).rows()


def test_a_perfect_model_is_as_likely_as_real_text(judge, windows):
    for row in measured(Walker(0.0, stuck=False), judge, windows):
        assert abs(row["own"]) < 1e-9 and abs(row["real"]) < 1e-9


def test_mistakes_that_are_forgotten_are_no_exposure_bias(judge, windows):
    for row in measured(Walker(0.1, stuck=False), judge, windows):
        assert row["real"] > 0.2 and abs(row["bias"]) < 4 * row["bias_error"]


def test_mistakes_that_are_kept_are_more_with_every_token(judge, windows):
    rows = measured(Walker(0.05, stuck=True), judge, windows)
    assert [row["length"] for row in rows] == list(LENGTHS)
    bias = [row["bias"] for row in rows]
    assert bias == sorted(bias) and bias[0] > 4 * rows[0]["bias_error"] and bias[-1] > 2 * bias[0]
    assert max(row["real"] for row in rows) - min(row["real"] for row in rows) < 0.15


def test_repetition():
    assert repetition(np.arange(40), 8) == 0
    assert repetition(np.arange(40) % 4, 8) == 1
    row = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 6])
    assert repetition(row, 5) == pytest.approx(1 / 3)  # of 1234, 2345, 3456 the first


def test_examples():
    assert doctest.testmod(exposure).failed == 0
