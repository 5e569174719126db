"""`arfast lab objectives`: the whole road on a small corpus, again without training, and what it refuses."""

import random

import pytest

from arfast.lab import objectives
from arfast.lab.conditional import compare_masks

STUDY = "objectives"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(60):
        places = [number % 11]
        while len(places) < 400:
            places.append((7 * places[-1] + 3) % 11 if generator.random() < 0.8 else generator.randrange(11))
        (folder / f"{number}.txt").write_text("".join("abcdefghijk"[place] for place in places))
    return folder


@pytest.mark.usefixtures("one_thread")
def test_study(corpus, tmp_path, lab, monkeypatch):
    for name, value in (
        ("_PROMPT", 8),
        ("_LENGTHS", (4, 16)),
        ("_PASSAGE", 8),
        ("_SEQLEN", 32),
        ("_LEARNING_RATE", 1e-2),
    ):
        monkeypatch.setattr(objectives, name, value)
    options = ["--data", corpus, "--output-dir", tmp_path, "--max-tokens", 5000, "--vocab-size", 261]
    options += ["--hidden-size", 32, "--prompts", 20, "--label-smoothing", 0.3, "--scheduled-sampling", 0.5]
    text, found = lab(*options)
    plain, smooth, sampled = found["objectives"].values()
    assert list(found["objectives"]) == ["plain", "label smoothing 0.3", "scheduled sampling 0.5"]
    assert smooth["confidence"] < plain["confidence"]
    assert plain["perplexity"] < 60 and plain["perplexity"] != sampled["perplexity"]
    assert [row["length"] for row in plain["by_length"]] == [4, 16]
    assert 1 < found["real_text"]["judge_perplexity"] < 8 and 0 < found["real_text"]["repeated"] < 1
    assert f"{plain['perplexity']:.1f}" in text and f"{sampled['by_length'][1]['bias']:.3f}" in text
    if found["figure"]:
        assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")
    metrics = [path.read_bytes() for path in sorted(tmp_path.rglob("metrics.jsonl"))]
    assert len(metrics) == 5
    assert lab(*options)[1] == found
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("metrics.jsonl"))] == metrics


@pytest.mark.usefixtures("one_thread")
def test_both_losses_see_the_same_documents(tmp_path):
    found = compare_masks(tmp_path, 12_000, 0)
    assert list(found) == ["all tokens", "answers"]
    assert found["answers"]["nats_per_token"] < found["all tokens"]["nats_per_token"] < 5
    tokens = [(tmp_path / name / "data" / "train-00000.bin").read_bytes() for name in ("all-tokens", "answers")]
    assert tokens[0] != tokens[1] and abs(len(tokens[0]) - len(tokens[1])) < len(tokens[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-tokens", 0], "lab objectives: max_tokens must be at least 1, got 0"),
        (["--prompts", 1], "lab objectives: prompts must be at least 2, got 1"),
        (["--label-smoothing", 1], "TrainConfig: label_smoothing must be in [0, 1), got 1.0"),
        (["--scheduled-sampling", 1.5], "TrainConfig: scheduled_sampling must be in [0, 1], got 1.5"),
        (["--data", "nowhere"], "source must exist, got 'nowhere'"),
    ],
)
def test_errors(corpus, tmp_path, lab, options, message):
    path = tmp_path / "out"
    assert message in lab("--data", corpus, "--output-dir", path, *options, status=2)
    assert not path.exists() or not list(path.iterdir())
