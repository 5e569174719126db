"""`arfast lab tokens`: its measures against counts by hand, its table, its errors."""

import re

import pytest

from arfast.data import Tokenizer
from arfast.lab.tokens import measure

STUDY = "tokens"


def test_measure():
    tokenizer = Tokenizer.train(["a bb ccc a bb a"], 100, "word")  # "a", " bb", " ccc", " a"
    found = measure(tokenizer, ["a bb dd a", "a 世"])
    assert found["bytes_per_token"] == (9 + 5) / 6
    assert found["unknown"] == 2 / 6 and found["used"] == 3 / 4
    assert found["lost"] == pytest.approx((3 + 4) / 14)
    assert measure(Tokenizer.train(["ab" * 99], 260), ["ab", "世"]) == pytest.approx(
        {"bytes_per_token": 5 / 4, "unknown": 0.0, "lost": 0.0, "used": 4 / 257}
    )


def test_study(tmp_path, lab):
    _, found = lab("--max-bytes", 500_000, "--vocab-sizes", 300, 600, "--output-dir", tmp_path)
    kinds = [one["kind"] for one in found["tokenizers"]]
    assert kinds in (["bpe"] * 2 + ["word"] * 2 + ["character"], ["bpe"] * 2 + ["word"] * 2 + ["character"] * 2)
    by_kind = {one["kind"]: one for one in found["tokenizers"]}
    assert by_kind["bpe"]["lost"] == 0 == by_kind["bpe"]["unknown"]
    assert by_kind["word"]["bytes_per_token"] > by_kind["bpe"]["bytes_per_token"] > 1
    assert by_kind["character"]["bytes_per_token"] == pytest.approx(1, abs=0.01)
    if found["figure"]:
        assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vocab-sizes", 258], "lab tokens: vocab_sizes must be at least 259, got 258"),
        (["--data", "nowhere"], "source must exist, got 'nowhere'"),
        (["--max-bytes", 9], "lab tokens: data must hold at least 10 documents, got "),
    ],
)
def test_errors(tmp_path, lab, options, message):
    assert re.search(message, lab("--output-dir", tmp_path / "out", *options, status=2))
    assert not (tmp_path / "out").exists()
