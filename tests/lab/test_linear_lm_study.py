"""`arfast lab linear-lm`: it finds order where there is some, goes on where it stopped, refuses bad sizes."""

import random

import numpy as np
import pytest

from arfast.data import Tokenizer
from arfast.lab import linear_lm
from arfast.lab.linear_lm import describe, frequent_words

STUDY = "linear-lm"

TINY = ["--max-tokens", 512 * 60, "--vocab-size", 261, "--hidden-size", 16, "--window", 3, "--order", 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Letters of which each tells the next one, four times out of five."""
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(60):
        places = [number % 11]
        while len(places) < 1500:
            places.append((7 * places[-1] + 3) % 11 if generator.random() < 0.8 else generator.randrange(11))
        (folder / f"{number}.txt").write_text("".join("abcdefghijk"[place] for place in places))
    return folder


@pytest.mark.usefixtures("one_thread")
def test_study(corpus, tmp_path, lab, monkeypatch):
    monkeypatch.setattr(linear_lm, "_SEQLEN", 64)
    arguments = ["--data", corpus, "--output-dir", tmp_path, *TINY]
    text, found = lab(*arguments)
    models = found["models"]
    assert list(models) == ["counts", "mean", "last 3", "3-gram", "transformer"]
    assert models["3-gram"]["parameters"] == 3 * 16 * 261 and models["mean"]["parameters"] == 2 * 16 * 261
    assert models["3-gram"]["bits_per_byte"] < 0.7 * models["counts"]["bits_per_byte"]
    assert all(one["perplexity"] > 1 for one in models.values())
    assert all(f"{one['perplexity']:.2f}" in text for one in models.values())
    if found["figure"]:
        assert (tmp_path / "linear-lm.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "mean" / "metrics.jsonl").read_bytes()
    assert lab(*arguments) == (text, found)
    assert (tmp_path / "mean" / "metrics.jsonl").read_bytes() == before


def test_frequent_words():
    tokenizer = Tokenizer.train(["the cat sat the cat the\n\n  ( ab"] * 3, 100, "word")
    counts = np.bincount(tokenizer.encode("x the cat the sat the cat ab ab ab ab"), minlength=tokenizer.vocab_size)
    assert [tokenizer.decode([token]) for token in frequent_words(tokenizer, counts, 2)] == [" the", " cat"]


def test_table():
    one = dict(perplexity=12.345, bits_per_byte=1.5, parameters=1234, seconds=9.87)
    assert describe({"mean": one}).splitlines()[1].split() == ["mean", "12.35", "1.5000", "1,234", "9.9"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-tokens", 0], "lab linear-lm: max_tokens must be at least 1, got 0"),
        (["--window", 0], "lab linear-lm: window must be at least 1, got 0"),
        (["--order", 1], "lab linear-lm: order must be at least 2, got 1"),
        (["--hidden-size", 12], "LinearLMConfig: hidden_size must be a multiple of 8, got 12"),
        (["--data", "nowhere"], "source must exist, got 'nowhere'"),
    ],
)
def test_errors(corpus, tmp_path, lab, options, message):
    path = tmp_path / "out"
    assert message in lab("--data", corpus, "--output-dir", path, *options, status=2)
    assert not path.exists() or not list(path.iterdir())
