"""The recipe: a closed schema, whose every error names the key."""

import json

import pytest

from arfast.data.pipeline import Recipe

SOURCE = {"name": "a", "path": "x"}


def test_round_trip():
    value = {
        "sources": [
            SOURCE | {"fraction": 0.25, "kind": "code"},
            {"name": "b", "path": "y", "fraction": 0.75, "suffixes": [".md"]},
        ],
        "quality": {"gopher": {"min_words": 20}, "c4": None},
        "language": {"keep": ["en"]},
        "mixture": {"num_tokens": 1000, "max_epochs": 2},
    }
    recipe = Recipe.from_json(value)
    assert recipe.quality.gopher.min_words == 20 and recipe.quality.gopher.max_words == 100_000
    assert recipe.quality.c4 is None and recipe.quality.repetition.max_top_ngram_characters == (0.2, 0.18, 0.16)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    "value, message",
    [
        ([], r"prepare: recipe must be an object, got \[\]"),
        ({}, "prepare: sources must be given, got None"),
        ({"sources": []}, r"prepare: sources must name at least one source, got \[\]"),
        ({"sources": [SOURCE], "colour": 1}, "prepare: recipe must hold only known keys, got 'colour'"),
        ({"sources": [SOURCE | {"weight": 1}]}, "prepare: sources must hold only known keys, got 'weight'"),
        ({"sources": [{"path": "x"}]}, "prepare: sources.name must be given, got None"),
        ({"sources": [SOURCE, SOURCE]}, "prepare: sources must have different names, got"),
        ({"sources": [SOURCE | {"name": "../a"}]}, "prepare: sources.name must be a word, got '../a'"),
        (
            {"sources": [SOURCE | {"kind": "poem"}]},
            "prepare: sources.a.kind must be one of auto, prose, code, got 'poem'",
        ),
        ({"sources": [SOURCE | {"suffixes": ["md"]}]}, 'prepare: sources.a.suffixes must start with ".", got'),
        ({"sources": [SOURCE | {"fraction": 0}]}, r"prepare: sources.a.fraction must be in \(0, 1\], got 0.0"),
        (
            {"sources": [SOURCE | {"fraction": 0.5}]},
            r"fractions of the sources must be given for none, or for all with sum 1, got \[0.5\]",
        ),
        ({"sources": [SOURCE | {"fraction": "half"}]}, "prepare: sources.fraction must be of type float, got 'half'"),
        (
            {"sources": [SOURCE], "normalization": "NFQ"},
            "prepare: normalization must be one of NFC, NFKC, none, got 'NFQ'",
        ),
        (
            {"sources": [SOURCE], "language": {"identify": ["ask"]}},
            "language.identify must hold only field, path, detect, got",
        ),
        (
            {"sources": [SOURCE], "quality": {"gopher": {"min_word": 1}}},
            "prepare: quality.gopher must hold only known keys, got 'min_word'",
        ),
        (
            {"sources": [SOURCE], "quality": {"gopher": {"min_words": 1.5}}},
            "prepare: quality.gopher.min_words must be of type int, got 1.5",
        ),
        ({"sources": [SOURCE], "quality": {"gopher": {"min_words": True}}}, "min_words must be of type int, got True"),
        (
            {"sources": [SOURCE], "quality": {"fineweb": {"max_short_lines": 2.0}}},
            r"quality.fineweb.max_short_lines must be in \[0, 1\], got 2.0",
        ),
        ({"sources": [SOURCE], "safety": {"mask": ["name"]}}, "prepare: safety.mask must hold only email, .*, got"),
        ({"sources": [SOURCE], "safety": {"mask": "email"}}, "prepare: safety.mask must be a list, got 'email'"),
        (
            {"sources": [SOURCE], "deduplication": {"threshold": 1}},
            r"prepare: deduplication.threshold must be in \(0, 1\), got 1.0",
        ),
        (
            {"sources": [SOURCE], "deduplication": {"num_permutations": 4}},
            r"deduplication.num_permutations must be an integer in \[16, 1024\], got 4",
        ),
        (
            {"sources": [SOURCE], "decontamination": {"ngram_words": 1}},
            r"decontamination.ngram_words must be an integer in \[2, 1000\], got 1",
        ),
        (
            {"sources": [SOURCE], "mixture": {"num_tokens": 0}},
            "prepare: mixture.num_tokens must be an integer at least 1, got 0",
        ),
        ({"sources": [SOURCE], "mixture": {"max_epochs": 0}}, "prepare: mixture.max_epochs must be above 0, got 0.0"),
        (
            {"sources": [SOURCE, SOURCE | {"name": "b"}], "mixture": {"num_tokens": 9}},
            "mixture.num_tokens must come with a fraction for each",
        ),
        (
            {"sources": [SOURCE], "tokenizer": {"vocab_size": 2}},
            r"prepare: tokenizer.vocab_size must be an integer in \[259, .*\], got 2",
        ),
        ({"sources": [SOURCE], "split": {"seed": -1}}, r"prepare: split.seed must be an integer in \[0, .*\], got -1"),
        (
            {"sources": [SOURCE], "split": {"test_fraction": 1.5}},
            r"assign_splits: test_fraction must be in \[0, 1\), got 1.5",
        ),
    ],
)
def test_errors(value, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(value)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare: config must be a file, got '.*recipe.json'"):
        Recipe.load(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="prepare: config '.*recipe.json' must be JSON, got: Expecting"):
        Recipe.load(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text(json.dumps({"sources": [SOURCE]}))
    assert Recipe.load(tmp_path / "recipe.json").sources[0].name == "a"
