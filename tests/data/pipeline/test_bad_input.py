"""Bad input to the pipeline: one clear sentence, and nothing that is half written."""

import os
from pathlib import Path

import pytest

from arfast.data.pipeline import prepare_corpus, source, stages


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"sources": [{"name": "a", "path": "/nowhere"}]},
            FileNotFoundError,
            "prepare: source 'a' must exist, got '/nowhere'",
        ),
        (
            {"sources": [{"name": "a", "path": "empty"}]},
            ValueError,
            "read_documents: source must hold text, got no file in 'empty'",
        ),
        (
            {"sources": [{"name": "a", "path": "blank.txt"}]},
            ValueError,
            "source must hold text, got only empty ones in 'blank.txt'",
        ),
        (
            {"sources": [{"name": "a", "path": "latin.txt"}]},
            ValueError,
            "read_documents: 'latin.txt' must be UTF-8 text, got",
        ),
        (
            {"sources": [{"name": "a", "path": "bad.jsonl"}]},
            ValueError,
            "read_documents: line 2 of 'bad.jsonl' must be a JSON object",
        ),
        ({"sources": [{"name": "a", "path": "locked"}]}, PermissionError, "Permission denied: 'locked'"),
        ({"sources": [{"name": "a", "path": "builtin:c"}]}, ValueError, "builtin: name must be one of"),
        (
            {"sources": [{"name": "a", "path": "few.txt"}]},
            ValueError,
            "prepare: source 'a' must have documents that stay, got none: of all sources, 1 by 'number of words'",
        ),
        (
            {"sources": [{"name": "a", "path": "one.py"}]},
            ValueError,
            "prepare: source 'a': assign_splits: corpus must hold at least 3 different documents, got 1",
        ),
        (
            {"sources": [{"name": "a", "path": "one.py", "suffixes": [".xyz"]}]},
            ValueError,
            r"prepare: source 'a' must hold files in \['.xyz'\], got none in 'one.py'",
        ),
        ({"language": {"keep": ["xx"]}}, ValueError, "prepare: language.keep must hold codes among .*, got 'xx'"),
        (
            {"safety": {"word_list": "/nowhere"}},
            FileNotFoundError,
            "prepare: safety.word_list must be a file, got '/nowhere'",
        ),
        (
            {"safety": {"word_list": "empty"}},
            FileNotFoundError,
            "prepare: safety.word_list must be a file, got 'empty'",
        ),
        (
            {"safety": {"url_list": "blank.txt"}},
            ValueError,
            "prepare: safety.url_list must hold an entry, got none in 'blank.txt'",
        ),
        ({"safety": {"url_list": "latin.txt"}}, ValueError, "prepare: safety.url_list must be UTF-8 text, got"),
        (
            {"decontamination": {"evaluation": ["/nowhere"]}},
            FileNotFoundError,
            "read_documents: source must exist, got '/nowhere'",
        ),
        (
            {"decontamination": {"evaluation": ["few.txt"]}},
            ValueError,
            r"decontamination.evaluation must hold a text of 8 words, got none in \['few.txt'\]",
        ),
        (
            {"tokenizer": {"path": "/nowhere"}},
            FileNotFoundError,
            "Tokenizer.load: path must hold a tokenizer.json, got '/nowhere'",
        ),
        (
            {"deduplication": {"threshold": 0.01, "num_permutations": 16}},
            ValueError,
            "prepare: deduplication.recall must be reachable",
        ),
    ],
)
def test_bad_input_leaves_nothing(folder, tmp_path, monkeypatch, changes, error, message, make_recipe):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    Path("blank.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Grüße".encode("latin-1"))
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    Path("few.txt").write_text("few words")
    Path("one.py").write_text("x = 1\n")
    Path("locked").write_text("text")
    if "locked" in str(changes):
        if os.geteuid() == 0:
            monkeypatch.setattr(source, "read_documents", lambda path: open_locked(path))
        else:
            os.chmod("locked", 0)
    before = sorted(os.listdir())
    with pytest.raises(error, match=message):
        prepare_corpus(make_recipe(folder, **changes), "out")
    assert sorted(set(os.listdir()) - {".out.prepare"}) == before


def open_locked(path):
    """What the superuser, whom no permission stops, would see as somebody else."""
    raise PermissionError(13, "Permission denied", path)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(workers=0), ValueError, r"prepare: workers must be an integer in \[1, 1024\], got 0"),
        (dict(recipe={}), TypeError, "prepare: recipe must be a Recipe, got dict"),
        (dict(out_dir="file"), ValueError, "prepare: output_dir must be a directory, got the file '.*file'"),
        (dict(out_dir="full"), ValueError, "prepare: output_dir must be empty or its own earlier work, got others' in"),
        (dict(out_dir="full/new", path="full"), ValueError, "prepare: output_dir must lie outside of the sources, got"),
    ],
)
def test_bad_arguments(folder, tmp_path, monkeypatch, arguments, error, message, make_recipe):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    os.mkdir("full")
    Path("full/file").write_text("x")
    path = arguments.pop("path", None)
    recipe = make_recipe(folder, sources=[{"name": "a", "path": path}]) if path else make_recipe(folder)
    with pytest.raises(error, match=message):
        prepare_corpus(**(dict(recipe=recipe, out_dir="new") | arguments))
    assert sorted(os.listdir()) == ["file", "full"] and os.listdir("full") == ["file"]


def test_errors_in_workers_are_the_same(folder, tmp_path, monkeypatch, make_recipe):
    for number, (kind, message) in enumerate(
        [(ValueError, "bad"), (OSError, "bad"), (ImportError, "bad"), (KeyError, "'bad'")]
    ):

        def fail(self, *arguments, kind=kind):
            raise kind("bad") if kind is not OSError else OSError(5, "bad")

        monkeypatch.setattr(stages.Cleaner, "clean", fail)
        expected = RuntimeError if kind is KeyError else kind
        with pytest.raises(expected, match=message):
            prepare_corpus(make_recipe(folder), tmp_path / str(number), workers=2)
    monkeypatch.setattr(stages.Cleaner, "clean", lambda *arguments: os._exit(3))
    with pytest.raises(RuntimeError, match="prepare: workers must live until the end, got one that died"):
        prepare_corpus(make_recipe(folder), tmp_path / "dead", workers=2)
    assert os.listdir(tmp_path) == []
