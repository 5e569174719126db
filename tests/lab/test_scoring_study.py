"""`arfast lab scoring`: passages are what the files hold, scores are sums of the model's own log-probabilities."""

import re

import numpy as np
import pytest
import torch

from arfast import CausalLM
from arfast.data import Tokenizer
from arfast.lab.scoring import Passage, choose, compare_contexts, draw_passages, score_pairs, shuffle_words

STUDY = "scoring"


def test_study(counting_run, tmp_path, lab):
    pytest.importorskip("matplotlib")
    _, found = lab("--model", counting_run, "--output-dir", tmp_path, "--passages", 20, "--choices", 4)
    real, *garbled = found["garbled"]
    assert real["garbled"] == 0 and real["real_is_likelier"] is None
    assert all(row["real_is_likelier"] > 0.9 and row["perplexity"] > real["perplexity"] for row in garbled)
    assert found["contexts"]["own"] < min(found["contexts"]["another"], found["contexts"]["none"])
    assert (tmp_path / "scoring.png").read_bytes().startswith(b"\x89PNG")


def test_passages_follow_one_another_in_the_files():
    generator = np.random.default_rng(0)
    texts = ["".join(f"{n} {k} some words of a line here\n" for k in range(100)) for n in range(5)]
    passages = draw_passages(texts, 1000, generator)
    assert len(passages) > 20 and len(set(passages)) == len(passages)
    for passage in passages:
        text = texts[int(passage.x[0])]
        assert text.startswith(passage.x + passage.y) and passage.x.endswith("\n") and passage.y.endswith("\n")
    assert len(draw_passages(texts, 7, generator)) == 7
    assert draw_passages(["too short\n" * 3, ""], 7, generator) == []


@pytest.mark.parametrize("share, moved", [(0.0, 0), (0.01, 2), (0.5, 15), (1.0, 30)])
def test_words_take_each_others_places(share, moved):
    text = "".join(f"word{n}{' ' * (1 + n % 3)}" + "\n" * (n % 4 == 0) for n in range(30))
    shuffled = shuffle_words(text, share, np.random.default_rng(1))
    before, after = text.split(), shuffled.split()
    assert sorted(before) == sorted(after)
    assert sum(a != b for a, b in zip(before, after)) == moved
    assert re.findall(r"\s+", text) == re.findall(r"\s+", shuffled)


def test_scores_are_sums_of_log_probabilities(counting_run):
    model, tokenizer = CausalLM.from_pretrained(counting_run).eval(), Tokenizer.load(counting_run)
    pairs = [("list 3\nfour five ", "six seven\n"), ("", "three"), ("x" * 300, "four five")]
    scores = score_pairs(model, tokenizer, pairs)
    for number, (x, y) in enumerate(pairs):
        x, ids = tokenizer.encode(x, add_special_tokens=False)[-96:], tokenizer.encode(y, add_special_tokens=False)
        row = torch.tensor([[tokenizer.bos_token_id, *x, *ids]])
        log_probs = model(row).logits[0].double().log_softmax(-1)
        expected = sum(log_probs[len(x) + i, token].item() for i, token in enumerate(ids))
        assert scores.log_prob[number] == pytest.approx(expected, rel=1e-5)
        assert scores.num_tokens[number] == len(ids) and scores.num_bytes[number] == len(y)
    assert scores.perplexity == pytest.approx(np.exp(-scores.log_prob.sum() / scores.num_tokens.sum()))


def test_right_continuation_is_picked(counting_run):
    """A model that counts knows which number follows."""
    model, tokenizer = CausalLM.from_pretrained(counting_run).eval(), Tokenizer.load(counting_run)
    numbers = "one two three four five six seven eight nine ten eleven twelve".split()
    lines = [" ".join(numbers[(k + i) % 12] for i in range(4)) + "\n" for k in range(12)]
    passages = [Passage(lines[k - 8] + lines[k - 4], lines[k]) for k in range(12)]
    found = choose(model, tokenizer, passages, 4)
    assert found["by chance"] == 0.25 and min(found.values()) == 0.25
    assert found["log P(y | x) / P(y)"] > 0.8
    contexts = compare_contexts(model, tokenizer, passages)
    assert contexts["own"] < contexts["another"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "nowhere"], "model must be an existing directory, got 'nowhere'; `arfast train` makes one"),
        (["--data", "nowhere"], "data must be an existing directory, got 'nowhere'"),
        (["--choices", "5000"], "data must hold files of more than 5000 passages"),
    ],
)
def test_errors(counting_run, tmp_path, lab, options, message):
    assert message in lab("--model", counting_run, "--output-dir", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()
