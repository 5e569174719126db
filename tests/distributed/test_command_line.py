"""`arfast train` on ranks that share a model: what it trains, and what it refuses before it writes."""

import contextlib
import io
import json
import os
import textwrap
from pathlib import Path

import pytest
from ranks import run_ranks

from arfast.cli.main import main
from arfast.distributed import Parallel
from arfast.models import CausalLM, CausalLMConfig

SETTINGS = "--seqlen 32 --batch-size 4 --max-steps 3 --log-every 1 --eval-every 0 --dtype float32 --no-progress"


def command(data, output_dir, *more):
    """(status, last line on stdout, stderr) of `arfast train` in this process."""
    words = ["train", "--data", str(data), "--output-dir", str(output_dir), *SETTINGS.split(), *more]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main([*words, "--sample-prompts", "the "])
    return status, out.getvalue().strip().rpartition("\n")[2], errors.getvalue()


@pytest.mark.parametrize(
    "num_ranks, flags",
    [
        (2, "--tensor-parallel 2 --sequence-parallel"),
        pytest.param(2, "--context-parallel 2", marks=pytest.mark.slow),
        pytest.param(4, "--tensor-parallel 2 --context-parallel 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(data, tmp_path, num_ranks, flags):
    status, last, errors = command(data, tmp_path / "one")
    assert status == 0, errors
    first, *others = run_ranks(command, num_ranks, data, str(tmp_path / "several"), *flags.split(), init=False)
    assert first[0] == 0 and all(other[:2] == (0, "") for other in others)
    assert f"float32, on cpu, {num_ranks} ranks (" in first[2]
    one, several = json.loads(last), json.loads(first[1])
    for key in ("step", "tokens", "loss", "val_loss", "parameters", "trainable_parameters"):
        assert several[key] == pytest.approx(one[key], rel=1e-5), key


def test_the_vocabulary_that_counts_is_that_of_the_data(data, tmp_path):
    """320 words cannot be shared by three ranks, the preset's 50,257 neither: the message has what it looked at."""
    words = ("--preset", "gpt2-small", "--tensor-parallel", "3")
    for status, _, errors in run_ranks(command, 3, data, str(tmp_path / "run"), *words, init=False):
        assert status == 2 and "ParallelConfig: tensor must divide vocab_size=320, got 3" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fine_tuning_on_several_ranks(data, tmp_path):
    start = tmp_path / "start"
    CausalLM(CausalLMConfig.preset("tiny", vocab_size=320, num_hidden_layers=1), seed=1).save_pretrained(start)
    (start / "tokenizer.json").write_bytes(Path(data, "tokenizer.json").read_bytes())
    status, last, errors = command(data, tmp_path / "one", "--init-from", str(start))
    assert status == 0, errors
    words = ("--init-from", str(start), "--tensor-parallel", "2")
    first, _ = run_ranks(command, 2, data, str(tmp_path / "two"), *words, init=False)
    assert first[0] == 0, first[2]
    for key in ("loss", "val_loss"):
        assert json.loads(first[1])[key] == pytest.approx(json.loads(last)[key], rel=1e-5), key
    words = ("--init-from", str(start), "--lora-rank", "2")
    for status, _, errors in run_ranks(command, 2, data, str(tmp_path / "lora"), *words, init=False):
        assert status == 2 and "train: lora_rank must be left out on several ranks, got 2" in errors
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "num_ranks, flags, text",
    [
        (1, "--tensor-parallel 2", "train: tensor_parallel must be 1 in one process (start with torchrun), got 2"),
        (2, "--tensor-parallel 3", "world size must be a multiple of context * tensor = 1 * 3 = 3, got 2"),
        (2, "--expert-parallel 2", "ParallelConfig: expert must be 1 for a model without experts, got 2"),
        (2, "--context-parallel 2 --seqlen 30", "seqlen must be a multiple of 2 * context = 4 in every stage, got 30"),
        (2, "--batch-size 3", "batch_size must be a multiple of the 2 data ranks, got 3"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, num_ranks, flags, text):
    arguments = ("builtin:python", str(tmp_path / "run"), *flags.split())
    results = [command(*arguments)] if num_ranks == 1 else run_ranks(command, num_ranks, *arguments, init=False)
    for status, _, errors in results:
        assert status == 2 and text in errors
    assert not list(tmp_path.iterdir())


def _run_example(folder):
    """The example of Parallel's docstring, as torchrun would run it."""
    lines = Parallel.__doc__.split("Example:\n")[1].rstrip()
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(textwrap.dedent(lines), {"__name__": "__main__"})
    return printed.getvalue()


@pytest.mark.slow
def test_the_example_of_the_docstring(tmp_path):
    first, *others = run_ranks(_run_example, 4, str(tmp_path), init=False, timeout=120)
    assert 0 < float(first) < 6 and others == [""] * 3
