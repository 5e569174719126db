"""Whether a model's probabilities mean what they say: of tokens predicted with confidence p, a share of p is right.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017, arXiv:1706.04599): with the
predictions in M bins of equal width by their confidence, ECE = sum over m of |B_m| / N * |acc(B_m) - conf(B_m)|
(equations 3 and 2).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from arfast import ops
from arfast.data.checks import check_integer
from arfast.generate.options import describe
from arfast.models.causal_lm import IGNORE_INDEX, shift_labels

_MAX_LOGITS = 1 << 26  # held at a time: 256 MiB in float32


class ReliabilityDiagram:
    """Accuracy by confidence of the likeliest token, of predictions that are added a few at a time.

    Bin m of M holds those with a confidence in ((m - 1) / M, m / M].

    Args:
        num_bins: M.

    Attributes:
        counts: int64 [M], predictions per bin.

    Example:
        >>> diagram = ReliabilityDiagram(num_bins=10)
        >>> diagram.add(torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log(), torch.tensor([0, 1]))
        >>> diagram.accuracy, round(diagram.expected_calibration_error, 6)
        (0.5, 0.4)
    """

    def __init__(self, num_bins: int = 15) -> None:
        check_integer("ReliabilityDiagram: num_bins", num_bins, 1)
        self.counts = torch.zeros(num_bins, dtype=torch.int64)
        self._hits = torch.zeros(num_bins, dtype=torch.int64)
        self._confidence = torch.zeros(num_bins, dtype=torch.float64)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add predictions: logits [N, V], targets int64 [N], those of -100 left out.

        The likeliest token is, of equals, the lowest. Probabilities are taken in float32 and added up in float64.

        Raises:
            ValueError: `ReliabilityDiagram: <argument> must <rule>, got <actual>`; also for logits that are NaN.
        """
        if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
            got = f"{describe(logits)} and {describe(targets)}"
            raise ValueError(f"ReliabilityDiagram: logits [N, V] must come with int64 targets [N], got {got}")
        kept = targets != IGNORE_INDEX
        logits, targets = logits[kept], targets[kept]
        likeliest = logits.argmax(-1)
        confidence = (-ops.cross_entropy(logits, likeliest, reduction="none").double()).exp().cpu()
        if bool(confidence.isnan().any()):
            raise ValueError("ReliabilityDiagram: logits must not be NaN, got NaN")
        hits, size = (likeliest == targets).cpu(), len(self.counts)
        bins = (confidence * size).ceil().long().clamp(1, size) - 1
        self.counts += torch.bincount(bins, minlength=size)
        self._hits += torch.bincount(bins[hits], minlength=size)
        self._confidence += torch.bincount(bins, confidence, minlength=size)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of all predictions that are right; NaN of none."""
        return int(self._hits.sum()) / self.num_tokens if self.num_tokens else math.nan

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token; above the accuracy, a model is too sure of itself."""
        return float(self._confidence.sum() / self.counts.sum())

    @property
    def bin_accuracy(self) -> Tensor:
        """float64 [M], NaN in an empty bin."""
        return self._hits.double() / self.counts

    @property
    def bin_confidence(self) -> Tensor:
        """float64 [M], NaN in an empty bin."""
        return self._confidence / self.counts

    @property
    def expected_calibration_error(self) -> float:
        """In [0, 1]: how far confidence and accuracy of a bin are apart, in the mean over all predictions."""
        return float((self._hits - self._confidence).abs().sum() / self.counts.sum())


@torch.no_grad()
def reliability(model: Any, batches: Iterable[Any], *, num_bins: int = 15) -> ReliabilityDiagram:
    """How well calibrated a model's predictions of the targets of batches are.

    At most 2^26 logits are held at a time; a batch with more goes through the model several times, which smaller
    batches avoid.

    Args:
        model: a CausalLM; in evaluation mode, if it has dropout.
        batches: of input_ids, labels and cu_seqlens, such as `PackedDataset.evaluation_batches` gives.
        num_bins: of the diagram.

    Raises:
        ValueError: the batches hold no target; the errors of `ReliabilityDiagram`.

    Example:
        >>> from arfast import CausalLM, CausalLMConfig
        >>> from arfast.data import Batch
        >>> model, ids = CausalLM(CausalLMConfig.preset("tiny")), torch.randint(0, 4096, (2, 16))
        >>> reliability(model, [Batch(ids, ids, None, 30)]).num_tokens
        30
    """
    diagram, device = ReliabilityDiagram(num_bins), model.head_weight.device
    for batch in batches:
        input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        offsets = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        targets = shift_labels(labels, offsets).flatten()
        places = (targets != IGNORE_INDEX).nonzero().flatten()
        for some in places.split(max(1, _MAX_LOGITS // model.config.vocab_size)):
            if len(some):
                logits = model(input_ids, cu_seqlens=offsets, logits_to_keep=some).logits[0]
                diagram.add(logits, targets[some])
    if diagram.num_tokens == 0:
        raise ValueError("reliability: batches must hold at least one target, got none")
    return diagram
