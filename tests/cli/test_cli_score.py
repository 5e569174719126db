"""`arfast score` and `arfast eval` against the library, on a small random model."""

import functools
import json
import math
import os
import re
import shlex
import textwrap

import pytest
import torch
from command_line import arfast, last_line

from arfast.cli import eval as eval_verb
from arfast.cli import score as score_verb
from arfast.cli.main import main
from arfast.data import Tokenizer
from arfast.generate import corpus_perplexity, rank
from arfast.models import CausalLM, CausalLMConfig

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(_name, "1")
TEXT = open(textwrap.__file__, encoding="utf-8").read()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, max_position_embeddings=256)
    return CausalLM(CausalLMConfig.preset("tiny", initializer_range=0.2, **sizes, **special), seed=3)


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model.save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture
def run(capsys):
    """A verb in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as stop:  # of the parser
            status = stop.code
        return status, *capsys.readouterr()

    return call


def result_of(run):
    status, out, error = run
    assert status == 0, error
    return json.loads(out.splitlines()[-1])


def test_text_token_by_token(checkpoint, model, tokenizer):
    process = arfast("score", checkpoint, "--text", "def wrap(", "--tokens")
    result = last_line(process)
    tokens = tokenizer.encode("def wrap(")
    scores = model.score(torch.tensor([tokens]))
    assert result["tokens"] == len(tokens) - 1 == len(result["token_logprobs"])
    assert "".join(text for text, _ in result["token_logprobs"]) == "def wrap("
    expected = scores.token_logprobs[0, 1:].tolist()
    assert [logprob for _, logprob in result["token_logprobs"]] == pytest.approx(expected, rel=1e-5)
    assert result["logprob"] == pytest.approx(float(scores.sums), rel=1e-6)
    assert result["perplexity"] == pytest.approx(float(scores.perplexity), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(-float(scores.sums) / math.log(2) / 9, rel=1e-6)
    lines = process.stdout.splitlines()
    assert len(lines) == len(tokens) - 1 + 2 and lines[0].endswith(repr(result["token_logprobs"][0][0]))


def test_text_after_a_prompt(run, checkpoint, model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("wrap(")
    given = result_of(run("score", checkpoint, "--prompt", "def ", "--file", tmp_path / "text.txt"))
    row, length = tokenizer.encode("def wrap("), len(tokenizer.encode("def"))
    assert given["logprob"] == pytest.approx(float(model.score(torch.tensor([row]), [length]).sums), rel=1e-6)
    assert given["tokens"] == len(row) - length and "token_logprobs" not in given


def test_alternatives(run, checkpoint, model, tokenizer):
    texts = ["wrap", "fill", "a longer alternative"]
    for options in ([], ["--normalize", "bytes"]):
        finished = run("score", checkpoint, "--prompt", "def ", "--alternatives", *texts, *options)
        expected = rank(model, tokenizer, "def ", texts, normalize=options[1] if options else "none")
        result = result_of(finished)
        assert [item["alternative"] for item in result["ranking"]] == [item.alternative for item in expected]
        assert [item["score"] for item in result["ranking"]] == pytest.approx(
            [item.score for item in expected], rel=1e-5
        )
        assert result["best"] == expected[0].alternative and repr(result["best"]) in finished[1].splitlines()[0]


def test_eval_slides_a_window(run, checkpoint, model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    options = ["--seqlen", 64, "--stride", 16, "--batch-size", 3]
    finished = run("eval", checkpoint, "--data", tmp_path / "text.txt", *options)
    expected = corpus_perplexity(model, tokenizer.encode(TEXT[:2000]), seqlen=64, stride=16, num_bytes=2000)
    result = result_of(finished)
    assert result["tokens"] == expected.num_tokens
    assert result["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert "batch" in finished[2]


def test_eval_runs_tasks(run, checkpoint, tmp_path, monkeypatch):
    """Offline, with a task of one's own; reading the harness's fourteen thousand takes longer than the rest."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    records = [dict(question="def ", choices=["wrap", "fill"], label=i % 2) for i in range(5)]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    data = dict(data_files=dict(test=str(tmp_path / "records.jsonl")), cache_dir=str(tmp_path / "cache"))
    task = dict(task="own_choice", dataset_path="json", dataset_kwargs=data, test_split="test", fewshot_split="test")
    task |= dict(output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}")
    task |= dict(doc_to_target="label", metric_list=[dict(metric="acc")])
    (tmp_path / "own_choice.yaml").write_text(json.dumps(task))  # JSON is YAML
    options = ["--tasks", "own_choice", "--task-path", tmp_path, "--num-fewshot", 0, "--limit", 4]
    finished = run("eval", checkpoint, *options)
    assert result_of(finished)["tasks"]["own_choice"]["acc,none"] == 0.5  # the same question every time
    assert "own_choice" in finished[1].splitlines()[2]
    status, _, error = run("eval", checkpoint, "--tasks", "unheard_of")
    assert status == 2 and "eval: tasks must be known to the harness" in error


@pytest.mark.parametrize("verb", [score_verb, eval_verb])
def test_examples_work_as_printed(verb, run, checkpoint, tmp_path, monkeypatch):
    """Those that need no download, on this model in the place of theirs."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/default").symlink_to(checkpoint)
    (tmp_path / "notes.txt").write_text(TEXT[:3000])
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^  arfast (.*)$", verb.__doc__, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        if "--tasks" not in example and "/data" not in example:
            assert result_of(run(*shlex.split(example)))


def test_a_model_that_knows_fewer_tokens_than_its_tokenizer(run, tokenizer, tmp_path):
    small = CausalLM(CausalLMConfig.preset("tiny", vocab_size=280, num_hidden_layers=1))
    small.save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small")
    status, _, error = run("score", tmp_path / "small", "--text", TEXT[:100])
    assert status == 2 and "score: input_ids must be in [0, vocab_size=280), got 2" in error
    (tmp_path / "text.txt").write_text(TEXT[:900])
    for options in (["--stride", 32], []):
        status, _, error = run("eval", tmp_path / "small", "--data", tmp_path / "text.txt", "--seqlen", 64, *options)
        assert status == 2 and "input_ids must be in [0, vocab_size=280), got 2" in error.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["score"], "one of the arguments --text --file --alternatives is required"),
        (["score", "--text", "a", "--file", "b"], "argument --file: not allowed with argument --text"),
        (["score", "--text", ""], "score: text must hold a token that another one precedes, got ''"),
        (["score", "--file", "empty.txt"], "score: file must hold text, got an empty file 'empty.txt'"),
        (["score", "--file", "binary.bin"], "score: file must be UTF-8 text, got invalid start byte near byte 128"),
        (["score", "--file", "nowhere.txt"], "nowhere.txt"),
        (["score", "--file", "long.txt"], "score: file must have at most max_position_embeddings=256 tokens"),
        (
            ["score", "--text", "a", "--prompt", TEXT[:3000]],
            "score: text must have at most max_position",
        ),
        (["score", "--text", "a", "--normalize", "bytes"], "score: normalize must be left out without alternatives"),
        (["score", "--alternatives", "a", "--tokens"], "score: tokens must be left out with alternatives"),
        (["score", "--alternatives", "a", ""], "rank: alternatives must add at least one token to the prompt, got ''"),
        (["eval"], "one of the arguments --data --tasks is required"),
        (["eval", "--data", "long.txt", "--stride", "0"], "stride must be an integer in [1, 64], got 0"),
        (["eval", "--data", "long.txt", "--stride", "65"], "stride must be an integer in [1, 64], got 65"),
        (["eval", "--data", "empty.txt", "--stride", "9"], "eval: data must hold text, got an empty file 'empty.txt'"),
        (["eval", "--data", ".", "--stride", "9"], "eval: data must be a text file with stride, got '.'"),
        (["eval", "--data", "long.txt", "--limit", "3"], "eval: limit must be left out without tasks, got 3"),
        (["eval", "--tasks", "x", "--stride", "3"], "eval: stride must be left out without data, got 3"),
        (["eval", "--data", "long.txt", "--stride", "9", "--max-tokens", "5"], "eval: max_tokens must be left out"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, run, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "long.txt").write_text(TEXT[:3000])
    monkeypatch.chdir(tmp_path)
    verb, *rest = arguments
    status, out, error = run(verb, checkpoint, *rest, *(["--seqlen", "64"] if verb == "eval" else []))
    assert status == 2 and out == ""
    assert len(error.splitlines()) == 1 and message in error and f"arfast {verb}: error: " in error


def test_the_context_is_named_when_a_window_is_longer(run, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:900])
    status, _, error = run("eval", checkpoint, "--data", tmp_path / "text.txt", "--stride", 64)
    assert status == 2 and "seqlen must be in [2, max_position_embeddings=256], got 512" in error
