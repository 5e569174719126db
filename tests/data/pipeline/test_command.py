"""`arfast prepare` as a user calls it."""

import json
import os
from pathlib import Path

import pytest

from arfast.cli.main import main
from arfast.data import DatasetManifest

PAGES = Path(__file__).with_name("pages")
# One page is too short for Gopher's rule; the pages are technical.
RECIPE = {
    "quality": {"gopher": None, "c4": None, "repetition": None, "fineweb": None},
    "tokenizer": {"vocab_size": 300},
}


def run(capfd, *arguments):
    status = main(["prepare", *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_config(tmp_path, capfd):
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps({"sources": [{"name": "web", "path": str(PAGES)}]} | RECIPE))
    status, out, err = run(capfd, "--config", config, "--output-dir", tmp_path / "a", "--workers", "2")
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and result["sources"]["web"]["train"]["documents"] > 5 and "clean" in result["seconds"]
    assert "near-copies" in out and "like another document" in out and "clean:" in err
    DatasetManifest.load(tmp_path / "a").verify()
    status, again, _ = run(capfd, "--config", config, "--output-dir", tmp_path / "a")
    assert status == 0 and json.loads(again.splitlines()[-1])["content_sha256"] == result["content_sha256"]


def test_flags_are_a_recipe(tmp_path, capfd):
    flags = ["web=pages", "builtin:python", "--languages", "en", "de", "--word-list", "w", "--url-list", "u"]
    flags += ["--evaluation", "e1", "e2", "--jaccard", "0.7", "--vocab-size", "500", "--seed", "3", "--print-config"]
    status, out, _ = run(capfd, *flags, "--output-dir", tmp_path / "a")
    recipe = json.loads(out)
    assert status == 0 and [(s["name"], s["path"]) for s in recipe["sources"]] == [
        ("web", "pages"),
        ("source2", "builtin:python"),
    ]
    assert recipe["language"]["keep"] == ["en", "de"] and recipe["decontamination"]["evaluation"] == ["e1", "e2"]
    assert (recipe["safety"]["word_list"], recipe["safety"]["url_list"]) == ("w", "u")
    assert recipe["deduplication"]["threshold"] == 0.7 and recipe["split"]["seed"] == 3
    assert recipe["tokenizer"]["vocab_size"] == 500 and recipe["quality"]["fineweb"]["max_short_lines"] == 0.67
    (tmp_path / "recipe.json").write_text(out)
    status, same, _ = run(capfd, "--config", tmp_path / "recipe.json", "--output-dir", "a", "--print-config")
    assert status == 0 and same == out and os.listdir(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "prepare: SOURCE must be given without --config, got none"),
        (
            ["a", "--config", "c"],
            "prepare: config must come without sources and other parts of a recipe, got ['a'] too",
        ),
        (
            ["--seed", "1", "--config", "c"],
            "prepare: config must come without sources and other parts of a recipe, got",
        ),
        (["--config", "c"], "prepare: config must be a file, got 'c'"),
        (["nowhere"], "prepare: source 'source1' must exist, got 'nowhere'"),
        (["builtin:python", "--workers", "0"], "prepare: workers must be an integer in [1, 1024], got 0"),
        (["builtin:python", "--languages", "klingon"], "prepare: language.keep must hold codes among"),
    ],
)
def test_errors_are_one_line(tmp_path, capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capfd, *arguments, "--output-dir", "out")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"arfast prepare: error: {message}") and os.listdir() == []
