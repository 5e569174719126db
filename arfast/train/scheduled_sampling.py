"""Scheduled sampling: some of the tokens that a model reads in training are its own predictions, as in generation.

Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks" (NeurIPS 2015,
arXiv:1506.03099), in the two passes of Mihaylova and Martins, "Scheduled Sampling for Transformers" (ACL 2019
workshop, arXiv:1906.07651): the first reads the true tokens, without gradients, and gives every position's prediction;
the second reads the mixture of the two, and is trained on the true targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arfast import ops
from arfast.data import Batch
from arfast.models import CausalLM

from .config import TrainConfig
from .evaluation import evaluation_mode
from .inputs import model_inputs

_MAX_LOGITS = 1 << 26  # held at a time: 256 MiB in float32
_STEEPNESS = 10.0  # of the sigmoid, over the tokens in which the probability rises
_COINS, _TOKENS = 0, 1  # streams of random numbers


def replacement_probability(tokens: int, shape: str = "linear", *, peak: float, rise_tokens: int) -> float:
    """With what probability an input token is replaced after ``tokens`` tokens of training.

    From 0 to the peak over the first ``rise_tokens`` tokens: in a straight line, or as "sigmoid", the inverse sigmoid
    decay of the true tokens' share (Bengio et al., section 2.4), cut off and stretched to begin and end there.

    >>> [replacement_probability(tokens, peak=0.4, rise_tokens=100) for tokens in (0, 50, 100, 200)]
    [0.0, 0.2, 0.4, 0.4]
    >>> round(replacement_probability(20, "sigmoid", peak=0.4, rise_tokens=100), 4)
    0.0165
    """
    progress = min(1.0, tokens / rise_tokens) if rise_tokens else 1.0
    if shape == "sigmoid":
        low, at, high = (1 / (1 + math.exp(-_STEEPNESS * (x - 0.5))) for x in (0.0, progress, 1.0))
        progress = (at - low) / (high - low)
    return peak * progress


class ScheduledSampling:
    """Replaces input tokens of micro-batches by what a model predicts in their place.

    A token may be replaced if it is a target, for others are given in generation too, and not a special token, which
    mark where documents begin and end. What takes its place is drawn from the model's distribution over the other
    tokens. Which tokens are replaced, and by what, is a pure function of weights, seed, step and position in the step.

    Args:
        model: predicts; with ``config.eos_token_id`` and its like.
        config: of the run.
    """

    def __init__(self, model: CausalLM, config: TrainConfig) -> None:
        if not isinstance(model, CausalLM) or model.splits_documents:
            raise ValueError(
                f"Trainer: scheduled_sampling must be 0 for a {type(model).__name__}, got {config.scheduled_sampling}"
            )
        self._model, self._config = model, config
        ends = model.config.eos_token_id
        special = {
            model.config.bos_token_id,
            model.config.pad_token_id,
            *(ends if isinstance(ends, tuple) else (ends,)),
        }
        self._special = torch.tensor(sorted(special - {None}), dtype=torch.int64)

    def __call__(self, batches: Sequence[Any], step: int, tokens: int) -> Sequence[Any]:
        """The micro-batches of the step after ``step`` steps and ``tokens`` tokens, with some inputs replaced."""
        config = self._config
        probability = replacement_probability(
            tokens,
            config.scheduled_sampling_shape,
            peak=config.scheduled_sampling,
            rise_tokens=config.num_scheduled_sampling_tokens,
        )
        if probability == 0.0:
            return batches
        mixed, position = [], 0
        with evaluation_mode(self._model):
            for batch in batches:
                mixed.append(self._mix(batch, probability, step, position))
                position += batch.input_ids.numel()
        return mixed

    def _mix(self, batch: Any, probability: float, step: int, position: int) -> Batch:
        """A micro-batch that begins at a position of the step."""
        # On the host, where a batch comes from: the number of places is a shape, which a device would be waited for.
        places = self._replaceable(batch)
        fair = torch.tensor([1 - probability, probability]).log().expand(len(places), 2)
        heads, _ = ops.sample(fair, generator_state=self._streams(_COINS, step, position + places))
        places = places[heads == 1]
        input_ids = batch.input_ids
        if len(places):
            drawn = self._draw(batch, places, self._streams(_TOKENS, step, position + places))
            input_ids = input_ids.flatten().to(drawn.device).index_copy(0, places.to(drawn.device), drawn)
            input_ids = input_ids.view(batch.input_ids.shape)
        return Batch(input_ids, batch.labels, batch.cu_seqlens, batch.num_tokens)

    def _replaceable(self, batch: Any) -> Tensor:
        """Places [N] in the flattened micro-batch of the tokens that may be replaced."""
        allowed = (batch.labels >= 0) & ~torch.isin(batch.input_ids, self._special)
        allowed[:, 0] = False  # nothing predicts these
        if batch.cu_seqlens is not None:
            allowed[0, batch.cu_seqlens[:-1][batch.cu_seqlens.diff() > 0].long()] = False
        return allowed.flatten().nonzero().flatten()

    def _draw(self, batch: Any, places: Tensor, streams: Tensor) -> Tensor:
        """What the model predicts at places [N], of the tokens before each."""
        device = self._model.head_weight.device
        inputs = {name: t for name, t in model_inputs(batch, device).items() if name != "labels"}
        drawn = []
        for some, stream in zip(
            *(t.split(max(1, _MAX_LOGITS // self._model.config.vocab_size)) for t in (places, streams))
        ):
            logits = self._model(**inputs, logits_to_keep=(some - 1).to(device)).logits[0]
            logits = logits.index_fill(1, self._special.to(device), -math.inf)
            drawn.append(ops.sample(logits, generator_state=stream.to(device))[0])
        return torch.cat(drawn)

    def _streams(self, kind: int, step: int, positions: Tensor) -> Tensor:
        """int64 [N, 3], one per position [N] of the step."""
        key = torch.tensor([self._config.seed, 0, step]).expand(len(positions), 3).clone()
        key[:, 1] = 2 * positions + kind
        return key
