"""Expected calibration error against float64 in NumPy and against cases by hand, at once and in parts."""

import doctest

import numpy as np
import pytest
import torch

from arfast.data import Batch
from arfast.generate import ReliabilityDiagram, calibration, reliability
from arfast.models import CausalLM, CausalLMConfig

MODEL = CausalLM(CausalLMConfig.preset("tiny", vocab_size=61, num_hidden_layers=1, initializer_range=0.5))


def reference(logits, targets, num_bins):
    """(ECE, accuracy, mean confidence, predictions per bin), one prediction at a time."""
    logits, targets = logits.double().numpy(), targets.numpy()
    bins = [[] for _ in range(num_bins)]
    for row, target in zip(logits, targets):
        if target != -100:
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            confidence = probabilities.max()
            place = next(m for m in range(num_bins) if confidence <= (m + 1) / num_bins + 1e-12)
            bins[place].append((confidence, int(row.argmax()) == target))
    count = sum(map(len, bins))
    error = sum(len(b) / count * abs(np.mean([h for _, h in b]) - np.mean([c for c, _ in b])) for b in bins if b)
    everything = np.array([pair for b in bins for pair in b])
    return error, everything[:, 1].mean(), everything[:, 0].mean(), [len(b) for b in bins]


def predictions(rows, vocab_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    targets = logits.softmax(-1).multinomial(1, generator=generator).flatten()
    targets[::7] = -100
    return logits.to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_bins, vocab_size", [(15, 33), (1, 5), (10, 2), (100, 257)])
def test_equals_the_definition(num_bins, vocab_size, dtype):
    logits, targets = predictions(500, vocab_size, dtype)
    diagram = ReliabilityDiagram(num_bins)
    diagram.add(logits, targets)
    error, accuracy, confidence, counts = reference(logits, targets, num_bins)
    assert diagram.counts.tolist() == counts and diagram.num_tokens == sum(counts)
    found = (diagram.expected_calibration_error, diagram.accuracy, diagram.confidence)
    assert found == pytest.approx((error, accuracy, confidence), rel=1e-5)


def test_in_parts():
    logits, targets = predictions(257, 31)
    whole, parts = ReliabilityDiagram(), ReliabilityDiagram()
    whole.add(logits, targets)
    for some in torch.arange(257).split([0, 1, 31, 32, 33, 160]):
        parts.add(logits[some], targets[some])
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.bin_accuracy.nan_to_num(-1), parts.bin_accuracy.nan_to_num(-1))
    assert parts.expected_calibration_error == pytest.approx(whole.expected_calibration_error, rel=1e-9)


def test_by_hand():
    """Of four predictions at 0.85 three are right, of two at 0.65 both."""
    probabilities = torch.tensor([[0.85, 0.15]] * 4 + [[0.35, 0.65]] * 2, dtype=torch.float64)
    diagram = ReliabilityDiagram(10)
    diagram.add(probabilities.log(), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert diagram.expected_calibration_error == pytest.approx((4 * 0.1 + 2 * 0.35) / 6, abs=1e-6)
    assert diagram.accuracy == 5 / 6 and diagram.confidence == pytest.approx((4 * 0.85 + 2 * 0.65) / 6)
    assert diagram.bin_accuracy[8] == 0.75 and diagram.bin_confidence[8].item() == pytest.approx(0.85)
    assert diagram.bin_accuracy.isnan().sum() == 8


def test_ends_of_the_scale():
    """Certain and right, certain and wrong, no idea; ties go to the lowest token."""
    diagram = ReliabilityDiagram(4)
    diagram.add(torch.tensor([[90.0, 0, 0, 0], [0, 90.0, 0, 0], [0, 0, 0, 0]]), torch.tensor([0, 0, 0]))
    assert diagram.counts.tolist() == [1, 0, 0, 2]  # 1 / 4 belongs to (0, 1 / 4]
    assert diagram.accuracy == pytest.approx(2 / 3)
    assert diagram.expected_calibration_error == pytest.approx((2 * 0.5 + 0.75) / 3)


def test_calibrated_by_construction():
    """Targets drawn from the model's own distribution: the error is that of counting, and grows when it is too sure."""
    logits, targets = predictions(20_000, 12)
    found = []
    for temperature in (1.0, 0.5, 2.0):
        diagram = ReliabilityDiagram()
        diagram.add(logits / temperature, targets)
        found.append(diagram)
    exact, sure, unsure = found
    assert exact.expected_calibration_error < 0.02
    assert sure.expected_calibration_error > 0.1 and sure.confidence > sure.accuracy + 0.1
    assert unsure.expected_calibration_error > 0.1 and unsure.confidence < unsure.accuracy - 0.1
    assert exact.accuracy == sure.accuracy == unsure.accuracy


@pytest.mark.parametrize("most", [1 << 26, 61 * 7])
def test_of_a_model(most, monkeypatch):
    """Over batches, packed and not, with as many logits at a time as there may be."""
    monkeypatch.setattr(calibration, "_MAX_LOGITS", most)
    generator, batches, rows = torch.Generator().manual_seed(1), [], []
    for shape, offsets in (((3, 20), None), ((1, 41), torch.tensor([0, 1, 30, 41], dtype=torch.int32))):
        ids = torch.randint(0, 61, shape, generator=generator)
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
        batches.append(Batch(ids, labels, offsets, 0))
        documents = list(zip(ids, labels))
        if offsets is not None:
            documents = list(zip(ids[0].split([1, 29, 11]), labels[0].split([1, 29, 11])))
        with torch.no_grad():
            rows += [(MODEL(x[None]).logits[0, :-1], y[1:]) for x, y in documents]
    logits, targets = (torch.cat(column) for column in zip(*rows))
    diagram = reliability(MODEL, batches, num_bins=12)
    error, accuracy, _, counts = reference(logits, targets, 12)
    assert diagram.counts.tolist() == counts
    found = (diagram.expected_calibration_error, diagram.accuracy)
    assert found == pytest.approx((error, accuracy), rel=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="ReliabilityDiagram: num_bins must be .*, got 0"):
        ReliabilityDiagram(0)
    with pytest.raises(ValueError, match=r"logits \[N, V\] must come with int64 targets \[N\], got"):
        ReliabilityDiagram().add(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must not be NaN"):
        ReliabilityDiagram().add(torch.full((1, 4), torch.nan), torch.tensor([0]))
    nothing = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -100), None, 0)
    with pytest.raises(ValueError, match="reliability: batches must hold at least one target, got none"):
        reliability(MODEL, [nothing])


def test_examples():
    assert doctest.testmod(calibration).failed == 0
