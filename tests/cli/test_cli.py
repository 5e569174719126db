"""The command line as a user runs it, in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import arfast, last_line

from arfast.cli.main import main

TINY = [
    "--preset",
    "tiny",
    "--vocab-size",
    "300",
    "--seqlen",
    "32",
    "--batch-size",
    "2",
    "--sample-tokens",
    "4",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run of 12 steps and what the command printed last."""
    directory = tmp_path_factory.mktemp("run") / "run"
    process = arfast("train", "--data", corpus, "--output-dir", directory, "--max-steps", 12, "--save-every", 5, *TINY)
    return directory, last_line(process), process


def test_train_leaves_a_run_and_prints_its_summary(run):
    directory, summary, process = run
    assert summary["step"] == 12 and summary["tokens"] == 12 * 64
    assert {"val_loss", "val_perplexity", "val_bits_per_byte"} <= summary.keys()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= trained[-1].keys()
    assert (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()
    assert "bits per byte" in process.stdout


def test_train_again_continues_and_changes_nothing(run, corpus):
    directory, summary, _ = run
    before = (directory / "model.safetensors").read_bytes()
    again = last_line(arfast("train", "--data", corpus, "--output-dir", directory, "--max-steps", 12, *TINY))
    assert again["step"] == 12 and again["val_loss"] == summary["val_loss"]
    assert (directory / "model.safetensors").read_bytes() == before


def test_a_killed_run_ends_with_the_same_weights(run, corpus, tmp_path):
    directory, _, _ = run
    command = ["train", "--data", corpus, "--output-dir", tmp_path / "run", "--max-steps", 12, "--save-every", 5, *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "arfast", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("step-*5")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last_line(arfast(*command))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (directory / name).read_bytes()


def test_generate_is_a_function_of_the_seed(run):
    directory, _, _ = run
    options = ["generate", directory, "--prompt", "line ", "--max-new-tokens", 12]
    first, second = (last_line(arfast(*options, "--seed", 7)) for _ in range(2))
    assert first["text"] == second["text"] and first["tokens"] <= 12
    process = arfast(*options, "--num-beams", 3)
    assert process.stdout.startswith("line ") and last_line(process)["tokens"] <= 12
    assert "tokens per second" in process.stderr


@pytest.mark.parametrize("drafts", [["--draft", "DIRECTORY", "--num-draft-tokens", 3], ["--prompt-lookup", 4]])
def test_drafts_change_no_greedy_text(drafts, run):
    directory = run[0]
    options = ["generate", directory, "--prompt", "line ", "--max-new-tokens", 12, "--temperature", 0]
    process = arfast(*options, *[directory if word == "DIRECTORY" else word for word in drafts])
    plain, drafted = last_line(arfast(*options)), last_line(process)
    assert drafted["text"] == plain["text"] and 0 <= drafted["accepted"] <= drafted["drafted"]
    assert "drafted tokens accepted" in process.stderr


def test_eval_scores_a_split_and_plain_text(run, corpus):
    directory, summary, _ = run
    split = last_line(arfast("eval", directory, "--data", directory / "data", "--seqlen", 32))
    assert split["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    text = last_line(arfast("eval", directory, "--data", corpus / "3.txt", "--seqlen", 32))
    assert 0 < text["bits_per_byte"] < 20


def test_tokenize_makes_a_data_set(corpus, tmp_path):
    result = last_line(arfast("tokenize", "--data", corpus, "--output-dir", tmp_path / "data", "--vocab-size", 300))
    assert sum(split["documents"] for split in result["splits"].values()) == 40
    assert (tmp_path / "data" / "dataset.json").is_file()


def test_info_and_doctor():
    facts = last_line(arfast("info"))
    assert facts["cpu instructions"] in ("baseline", "avx2", "avx512", "amx")
    process = arfast("doctor", "--device", "cpu")
    assert last_line(process)["failed"] == [] and "FAIL" not in process.stdout


@pytest.mark.parametrize(
    "verb", ["train", "generate", "score", "eval", "tokenize", "scale", "export", "info", "doctor"]
)
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([verb, "--help"])
    assert f"  arfast {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "--data", "nowhere.txt", "--max-steps", "1"], "nowhere.txt"),
        (["train", "--data", "empty.txt", "--max-steps", "1"], "empty.txt"),
        (["train", "--data", "binary.bin", "--max-steps", "1"], "UTF-8"),
        (["train", "--data", "short.txt", "--max-steps", "1"], "must"),
        (["train", "--batch-size", "0"], "TrainConfig: batch_size must be >= 1, got 0"),
        (["train", "--max-steps", "many"], "argument --max-steps: invalid int value: 'many'"),
        (["train", "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["generate", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--data", "short.txt"], "nowhere"),
        (["tokenize", "--data", "empty.txt", "--output-dir", "out"], "empty.txt"),
        (["sing"], "invalid choice: 'sing'"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "short.txt").write_text("too short")
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse
        status = end.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    errors = [line for line in printed.err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0], printed.err
    assert "Traceback" not in printed.err
    assert not list(Path(tmp_path).glob("runs/default/step-*"))


def test_wrong_input_ends_the_process_with_status_2(tmp_path):
    process = arfast("generate", "nowhere", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.returncode == 2 and process.stdout == "" and "Traceback" not in process.stderr
    assert len(re.findall("error: .*nowhere", process.stderr)) == 1
