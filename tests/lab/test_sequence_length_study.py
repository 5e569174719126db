"""`arfast lab sequence-length`: what is counted by context is what one forward pass per prefix would say."""

import numpy as np
import pytest
import torch

from arfast import CausalLM
from arfast.lab import sequence_length
from arfast.lab.sequence_length import by_context, draw_windows

STUDY = "sequence-length"


def test_study(counting_run, tmp_path, lab, monkeypatch):
    pytest.importorskip("matplotlib")
    costs = {"seqlen": 64, "eager": {"error": "no room"}, "fused": {"seconds": 0.1, "bytes": 1 << 20}}
    monkeypatch.setattr(sequence_length, "measure_sequence_lengths", lambda lengths: [costs | {"seqlen": lengths[0]}])
    arguments = ["--model", counting_run, "--output-dir", tmp_path, "--seqlen", 96, "--windows", 12]
    _, found = lab(*arguments, "--lengths", 64)
    rows = found["by_context"]
    assert [(row["first"], row["last"]) for row in rows] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 63),
        (64, 95),
    ]
    assert rows[0]["accuracy"] < rows[-1]["accuracy"] and rows[0]["loss"] > rows[-1]["loss"]
    assert found["costs"] == [costs]
    assert (tmp_path / "sequence-length.png").read_bytes().startswith(b"\x89PNG")


def test_every_prefix_by_itself(counting_run):
    """One forward pass predicts all positions as as many passes over the prefixes do."""
    model = CausalLM.from_pretrained(counting_run).eval()
    windows = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    hits, losses = np.zeros((3, 11)), np.zeros((3, 11))
    for row in range(3):
        for seen in range(1, 12):
            with torch.no_grad():
                log_probs = model(windows[row : row + 1, :seen]).logits[0, -1].double().log_softmax(-1)
            target = windows[row, seen]
            hits[row, seen - 1], losses[row, seen - 1] = log_probs.argmax() == target, -log_probs[target]
    for row in by_context(model, windows):
        some = slice(row["first"] - 1, row["last"])
        assert row["accuracy"] == pytest.approx(hits[:, some].mean())
        assert row["loss"] == pytest.approx(losses[:, some].mean(), rel=1e-5)


def test_windows_lie_within_documents():
    documents = [np.arange(100 * n, 100 * n + 20 + n) for n in range(1, 9)]
    windows = draw_windows(documents, 200, 24, np.random.default_rng(0))
    assert windows.shape == (200, 24) and (windows.diff(dim=1) == 1).all()
    starts = windows[:, 0] % 100
    assert windows[:, 0].div(100, rounding_mode="floor").unique().tolist() == [6, 7, 8]  # the longer ones
    assert starts.min() == 1 and ((windows[:, -1] % 100) < 19 + windows[:, 0] // 100).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seqlen", "1"], "seqlen must be in [2, 512], got 1"),
        (["--seqlen", "513"], "seqlen must be in [2, 512], got 513"),
        (["--windows", "0"], "data must hold a test document"),
    ],
)
def test_errors(counting_run, tmp_path, lab, options, message):
    arguments = ["--model", counting_run, "--output-dir", tmp_path / "out", "--lengths", *options]
    assert message in lab(*arguments, status=2)
    assert not (tmp_path / "out").exists()
