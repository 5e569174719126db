"""`arfast tokenize` on every kind of input, its statistics, and `arfast train` on a mixture of what it made."""

import json

import numpy as np
import pytest

from arfast.cli.main import main
from arfast.data import PackedDataset, Tokenizer


@pytest.fixture
def arfast(capsys, monkeypatch, tmp_path):
    """Runs a verb in this process: what it printed before the last line, and that line's record."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        if status:
            return captured.err
        *lines, last = captured.out.splitlines()
        return lines, json.loads(last)

    return run


def write_records(path, count=60, kind="text"):
    records = [{kind: f"{path.stem} document {i}, some words of it"} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_records_statistics_and_token_ids(arfast, tmp_path):
    write_records(tmp_path / "a.jsonl", kind="content")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow.json").read_json(tmp_path / "a.jsonl")
    parquet.write_table(table, tmp_path / "a.parquet")
    _, made = arfast(
        "tokenize", "--data", "a.parquet", "--column", "content", "--output-dir", "data", "--vocab-size", 290
    )
    assert sum(split["documents"] for split in made["splits"].values()) == 60

    lines, found = arfast("tokenize", "--statistics", "data", "--seqlen", 32)
    assert lines[0].split() == ["packing", "rows", "targets", "of", "places", "padding", "truncated"]
    assert [line.split()[0] for line in lines[1:]] == ["contiguous", "documents", "padded"] == list(found)
    statistics = PackedDataset("data", "train", 32, "documents").statistics
    assert found["documents"]["num_targets"] == statistics.num_targets
    assert f"{statistics.padding_share:.2%}" in lines[2]
    arfast("tokenize", "--statistics", "data", "--seqlen", 32, "--split", "test")

    tokenizer = Tokenizer.load("data")
    ids = [token for i in range(60) for token in [*tokenizer.encode(f"text {i}")[1:], tokenizer.eos_token_id]]
    np.array(ids, dtype=np.uint16).tofile("ids.bin")
    _, imported = arfast("tokenize", "--data", "ids.bin", "--tokenizer", "data", "--output-dir", "imported")
    assert sum(split["documents"] for split in imported["splits"].values()) == 60
    _, whole = arfast(
        "tokenize", "--data", "ids.bin", "--tokenizer", "data", "--output-dir", "whole", "--undivided",
        "--validation-fraction", 0, "--test-fraction", 0,
    )  # fmt: skip
    assert whole["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "tokenize: data must be given (or statistics), got none"),
        (["--data", "a.jsonl"], "tokenize: output_dir must be given (or statistics), got none"),
        (["--statistics", "data"], "tokenize: seqlen must be given with statistics, got none"),
        (["--statistics", "nowhere", "--seqlen", "8"], "dataset: path must hold a dataset.json, got 'nowhere'"),
        (["--data", "a.jsonl", "--seqlen", "8"], "tokenize: seqlen must be left out without statistics, got 8"),
        (["--data", "a.jsonl", "--output-dir", "x", "--undivided"], "undivided must be left out with text, got True"),
        (["--data", "a.jsonl", "--output-dir", "x", "--end-token-id", "1"], "end_token_id must be left out with text"),
        (["--data", "a.bin", "--output-dir", "x"], "tokenize: tokenizer must be given with token ids, got none"),
        (["--data", "a.bin", "--output-dir", "x", "--tokenizer", "t", "--column", "a"], "column must be left out with"),
        (
            ["--data", "a.jsonl", "--output-dir", "x", "--column", "body"],
            "with a string 'body', got: dict with a 'body'",
        ),
    ],
)
def test_errors(arfast, tmp_path, arguments, message):
    write_records(tmp_path / "a.jsonl")
    error = arfast("tokenize", *arguments, status=2)
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_train_on_a_mixture(arfast, tmp_path):
    for name in ("web", "code"):
        write_records(tmp_path / f"{name}.jsonl")
        more = ["--tokenizer", "web"] if name == "code" else ["--vocab-size", 290]
        arfast("tokenize", "--data", f"{name}.jsonl", "--output-dir", name, *more)
    sources = [{"data": "web", "fraction": 0.75, "max_epochs": None}, {"data": "code", "fraction": 0.25}]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    options = ["--seqlen", 32, "--batch-size", 4, "--sample-tokens", 2, "--dtype", "float32"]
    command = ["train", "--data", "mixture.json", "--preset", "tiny", *options]
    lines, summary = arfast(*command, "--max-steps", 3, "--output-dir", "run")
    train = [PackedDataset(name, "train", 32) for name in ("web", "code")]
    assert summary["sources"]["web"]["epochs"] == 9 / train[0].num_samples
    assert summary["sources"]["code"]["epochs"] == 3 / train[1].num_samples
    assert any(line.startswith("code: ") and "bits per byte" in line for line in lines)
    evaluations = [arfast("eval", "run", "--data", data, "--seqlen", 32)[1] for data in ("mixture.json", "web", "code")]
    assert evaluations[0]["tokens"] == evaluations[1]["tokens"] + evaluations[2]["tokens"]
    assert evaluations[0]["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert evaluations[2]["loss"] == pytest.approx(summary["sources"]["code"]["val_loss"], rel=1e-5)
    error = arfast(*command, "--max-steps", 5000, "--output-dir", "other", status=2)
    assert "sources must hold the 640,000 tokens of the run in their fractions, got: 'code' lacks " in error
    assert not (tmp_path / "other").exists()
