"""`arfast train --model linear`, and every verb that takes its checkpoint."""

import json

import pytest

from arfast.cli.main import main
from arfast.models import LinearLM

TINY = ["--vocab-size", 300, "--seqlen", 32, "--batch-size", 2, "--max-steps", 6, "--dtype", "float32", "--no-progress"]


def arfast(capsys, *arguments, status=0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else json.loads(captured.out.splitlines()[-1])


@pytest.mark.usefixtures("one_thread")
def test_checkpoint_through_every_verb(corpus, tmp_path, capsys):
    path = tmp_path / "run"
    options = ["--model", "linear", "--linear-size", 24, "--linear-window", 3, "--linear-ngram", "--sample-tokens", 4]
    trained = arfast(capsys, "train", "--data", corpus, "--output-dir", path, *options, *TINY)
    assert trained["step"] == 6 and trained["parameters"] == 4 * 24 * 300
    model = LinearLM.from_pretrained(path)
    assert (model.config.window, model.config.ngram, model.config.eos_token_id) == (3, True, 1)

    sampled = ("generate", path, "--prompt", "line 3", "--max-new-tokens", 8, "--temperature", 1, "--seed", 1)
    assert arfast(capsys, *sampled)["text"] == arfast(capsys, *sampled)["text"]
    arfast(capsys, "generate", path, "--prompt", "line 3", "--max-new-tokens", 8, "--num-beams", 3)
    scored = arfast(capsys, "score", path, "--prompt", "line ", "--text", "4 of a small corpus")
    assert scored["logprob"] < 0
    found = arfast(capsys, "eval", path, "--data", path / "data", "--split", "validation", "--seqlen", 32)
    assert found["loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    (tmp_path / "notes.txt").write_text("line 7 of a small corpus, and so on\n" * 9)
    arfast(capsys, "eval", path, "--data", tmp_path / "notes.txt", "--seqlen", 16, "--stride", 8)
    again = arfast(capsys, "train", "--data", corpus, "--output-dir", path, *options, *TINY)
    assert again == trained
    error = arfast(capsys, "export", path, tmp_path / "out", status=2)
    assert "checkpoint must have a configuration that transformers knows" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--linear-window", 3], "model must be linear with linear_window, got None"),
        (["--model", "transformer", "--linear-ngram"], "model must be linear with linear_ngram, got transformer"),
        (["--model", "linear", "--preset", "tiny"], "preset must be left out with a linear model, got 'tiny'"),
        (["--model", "linear", "--init-from", "x"], "init_from must be left out with a linear model, got 'x'"),
        (["--model", "linear", "--linear-ngram"], "window must be at most 4096 with ngram, got None"),
        (["--model", "linear", "--linear-size", 12], "hidden_size must be a multiple of 8, got 12"),
    ],
)
def test_errors(corpus, tmp_path, capsys, options, message):
    assert message in arfast(
        capsys, "train", "--data", corpus, "--output-dir", tmp_path / "run", *options, *TINY, status=2
    )
    assert not (tmp_path / "run").exists()
