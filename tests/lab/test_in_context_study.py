"""`arfast lab in-context`: what is asked for was never read; answers are those of greedy decoding; the whole road."""

import collections
import dataclasses
import doctest

import numpy as np
import pytest
import torch

from arfast.data import PackedDataset, prepare_dataset
from arfast.lab import in_context
from arfast.lab.in_context import (
    SHOTS,
    answered,
    draw_documents,
    draw_questions,
    evaluate,
    line_tokenizer,
    render,
    wilson_interval,
)
from arfast.lab.string_tasks import OPERATIONS, family_inputs, split_inputs, split_tasks
from arfast.models import CausalLM, CausalLMConfig

STUDY = "in-context"

WORDS = [a + b + c for a in "bcdfghjk" for b in "aeiou" for c in "lmnprst"]


def material_tasks():
    generator = np.random.default_rng(0)
    split_inputs(family_inputs(WORDS), 0.1, generator)
    return split_tasks(generator)[0]


def material(seed=0):
    generator = np.random.default_rng(seed)
    known, unseen = split_inputs(family_inputs(WORDS), 0.1, generator)
    tasks, new = split_tasks(generator)
    documents = draw_documents(tasks, known, 60_000, generator)
    questions = [list(draw_questions(some, known, unseen, 40, generator)) for some in (tasks, new)]
    return documents, questions, new


def examples(document):
    """(input, output) of each line."""
    pieces = iter(document.pieces())
    return [(question.removesuffix(" -> "), answer) for (question, _), (answer, _) in zip(pieces, pieces)]


def test_documents_are_examples_of_one_task():
    documents, _, _ = material()
    assert len(documents) > 100
    by_name = collections.defaultdict(set)
    for document in documents:
        by_name[document.source].update(examples(document))
        lines = "".join(f"{text} -> {answer}\n" for text, answer in examples(document))
        assert in_context._SEQLEN - 50 < 1 + len(lines) <= in_context._SEQLEN
    assert len(by_name) > 60
    families = {family: set(some) for family, some in family_inputs(WORDS).items()}
    for name, pairs in by_name.items():
        known = [task for task in material_tasks() if str(task) == name]
        assert len(known) == 1 and all(known[0](text) == answer for text, answer in pairs)
        assert {text for text, _ in pairs} <= families[known[0].family]


def test_tokens_are_lines_and_the_targets_are_answers(tmp_path):
    documents, _, _ = material()
    tokenizer = line_tokenizer([document.text for document in documents])
    prepare_dataset(documents[:40], tmp_path / "data", tokenizer, validation_fraction=0.0, test_fraction=0.0)
    dataset = PackedDataset(tmp_path / "data", "train", in_context._SEQLEN, "documents")
    batch = dataset.batch(0, dataset.num_samples)
    ends = batch.cu_seqlens.tolist()
    rows = [(batch.input_ids[0, a:b], batch.labels[0, a:b]) for a, b in zip(ends, ends[1:])]
    rows = [(ids, labels) for ids, labels in rows if (labels != -100).any()]
    found = {(tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])) for ids, labels in rows}
    expected = set()
    for document in documents[:40]:
        pairs = examples(document)
        text = "".join(f"{text} -> {answer}\n" for text, answer in pairs)
        expected.add((text, "".join(f"{answer}\n" for _, answer in pairs)))
    assert found == expected


def test_nothing_that_is_asked_for_was_read():
    documents, questions, new = material()
    read = {text for document in documents for text, _ in examples(document)}
    for question in [*questions[0], *questions[1]]:
        assert question.text not in read
        assert question.text not in dict(question.examples) and len(dict(question.examples)) == max(SHOTS)
    assert {question.task for question in questions[1]} == set(new)
    assert {question.task for question in questions[0]}.isdisjoint(new)
    assert {document.source for document in documents}.isdisjoint(map(str, new))


def test_material_depends_on_the_seed_alone():
    assert material(1) == material(1) and material(1)[0] != material(2)[0]


def test_longest_prompts_fit():
    """With the longest outputs of each family as examples and as the answer."""
    inputs = family_inputs(["abcde"])
    for task in split_tasks(np.random.default_rng(0))[0]:
        lines = sorted((render([], text) + task(text) + "\n" for text in inputs[task.family]), key=len)[-1:] * 9
        assert len("".join(lines)) <= in_context._SEQLEN


def test_prompts():
    (question, *_), _ = material()[1]
    task, ((x0, y0), (x1, y1), *_) = question.task, question.examples
    assert question.prompt(0) == f"{question.text} -> "
    assert question.prompt(2) == f"{x0} -> {y0}\n{x1} -> {y1}\n{question.text} -> "
    assert y0 == task(x0) and y1 == task(x1)


@pytest.mark.usefixtures("one_thread")
def test_an_answer_is_right_where_greedy_decoding_gives_it(monkeypatch):
    """Of answers that are what the model generates, but for the last character of every third one."""
    documents, (questions, _), _ = material()
    tokenizer = line_tokenizer([document.text for document in documents])
    monkeypatch.setattr(in_context, "_END", "")
    config = CausalLMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, num_hidden_layers=1, initializer_range=0.3)
    model, asked, expected = CausalLM(config).eval(), [], []
    for number, question in enumerate(questions):
        ids = torch.tensor([tokenizer.encode(question.prompt(0))])
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=4, eos_token_id=[])[0, ids.shape[1] :])
        if len(answer) == 4:  # no special tokens
            answer = answer if number % 3 else answer[:3] + chr(97 + (answer[3] == "a"))
            expected.append(number % 3 > 0)
            asked.append(dataclasses.replace(question, task=lambda text, answer=answer: answer))
    assert len(asked) > 50
    assert answered(model, tokenizer, asked, 0).tolist() == expected


def test_shares_and_intervals(monkeypatch):
    _, (questions, _), _ = material()
    monkeypatch.setattr(
        in_context, "answered", lambda model, tokenizer, some, shots: np.arange(len(some)) % 8 < min(shots, 6)
    )
    found = evaluate(None, None, questions)
    assert list(found) == list(OPERATIONS)
    assert found["dates"]["accuracy"] == [0, 1 / 8, 2 / 8, 4 / 8, 6 / 8]
    low, high = found["dates"]["interval"][3]
    assert low == pytest.approx(0.352, abs=1e-3) and high == pytest.approx(0.648, abs=1e-3)  # of 20 in 40
    assert wilson_interval(0, 40)[0] == 0 and wilson_interval(0, 40)[1] == pytest.approx(0.0876, abs=1e-4)
    assert set(found["letters"]["by_operation"]) == set(OPERATIONS["letters"])


@pytest.mark.usefixtures("one_thread")
def test_study(tmp_path, lab, monkeypatch):
    data = tmp_path / "words.txt"
    data.write_text(" ".join(WORDS * 3))
    options = ["--data", data, "--max-tokens", 40_000, "--hidden-size", 32, "--questions", 32]
    options += ["--output-dir", tmp_path / "out"]
    text, found = lab(*options)
    assert "numbers, known tasks" in text and "letters, new frames" in text
    assert all(len(one["accuracy"]) == len(SHOTS) for some in found["accuracy"].values() for one in some.values())
    if found["figure"]:
        assert (tmp_path / "out" / "in-context.png").read_bytes().startswith(b"\x89PNG")
    metrics = (tmp_path / "out" / "model" / "metrics.jsonl").read_bytes()
    assert lab(*options)[1]["accuracy"] == found["accuracy"]
    assert (tmp_path / "out" / "model" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-tokens", "0"], "lab in-context: max_tokens must be at least 1, got 0"),
        (["--questions", "0"], "lab in-context: questions must be at least 1, got 0"),
        (["--hidden-size", "33"], "CausalLMConfig: "),
        (["--data", "nowhere"], "source must exist, got 'nowhere'"),
    ],
)
def test_errors(tmp_path, lab, options, message):
    assert message in lab("--output-dir", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()


def test_too_few_words(tmp_path, lab):
    data = tmp_path / "words.txt"
    data.write_text("to be or not to be " * 5)
    error = lab("--data", data, "--output-dir", tmp_path / "out", status=2)
    assert "lab in-context: data must hold 100 frequent words of 3 to 5 letters, got 1" in error


def test_examples():
    assert doctest.testmod(in_context).failed == 0
