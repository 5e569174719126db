"""One optimizer step over micro-batches: gradients, their norm, the check for NaN, clipping, AdamW, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .graph import GraphedBackward, with_empty_documents
from .inputs import model_inputs
from .optimizer import WorkingCopy, build_optimizer, scale_gradients
from .schedule import warmup_cosine
from .strategy import OneProcess

_MAX_CONSECUTIVE_SKIPS = 3


class NonFiniteError(RuntimeError):
    """Loss or gradients were NaN or Inf; weights and optimizer are as they were before the step."""


@dataclass
class TrainState:
    """Where a run stands. With weights, optimizer tensors and random state, all that a step depends on.

    step: optimizer steps done, skipped ones included.
    tokens: input positions consumed.
    position: index of the next sample in the data set's endless order.
    consecutive_skips: steps in a row that were not applied.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    consecutive_skips: int = 0


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step.

    loss: nats per target token, smoothing and z-loss included; aux_loss: of the experts, None for a dense model;
    grad_norm: before clipping; tokens: input positions; applied: False when the step was skipped.
    """

    loss: float
    aux_loss: float | None
    grad_norm: float
    lr: float
    tokens: int
    applied: bool


class Engine:
    """A model with its optimizer and its counters; knows tensors and devices, and nothing of files.

    Args:
        model: float32 parameters, the ones that are optimized. With dtype="bfloat16" forward and backward run in a
            `WorkingCopy` of it.
        strategy: how the step is spread over ranks; None: one process.

    Raises:
        ValueError: the settings ask for CUDA graphs, and the model is not on a GPU.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, strategy: OneProcess | None = None) -> None:
        self.model, self.config = model, config
        self.strategy = strategy or OneProcess()
        self.state = TrainState()
        self.device = next(model.parameters()).device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(model, config)
        in_place = config.dtype == "float32" or self.strategy.casts_weights
        self._working_copy = None if in_place else WorkingCopy(model, getattr(torch, config.dtype))
        self._graphed_backward = None
        if config.cuda_graph:
            if self.device.type != "cuda":
                raise ValueError(f"Trainer: cuda_graph must be False for a model on {self.device.type}, got True")
            self._graphed_backward = GraphedBackward(self._backward, self.compute_model, self.parameters)

    @property
    def compute_model(self) -> nn.Module:
        """What runs forward: the model, or its working copy."""
        return self._working_copy.module if self._working_copy else self.model

    def weights_changed(self) -> None:
        """To be called when somebody else has written to the model's parameters."""
        if self._working_copy:
            self._working_copy.refresh()

    def learning_rate(self, tokens: int) -> float:
        """Learning rate of the step that ends after ``tokens`` tokens."""
        return warmup_cosine(
            tokens,
            peak=self.config.learning_rate,
            floor=self.config.learning_rate * self.config.final_lr_ratio,
            warmup_tokens=self.config.num_warmup_tokens,
            total_tokens=self.config.total_tokens,
        )

    def step(self, batches: Sequence[Any]) -> StepResult:
        """One optimizer step over micro-batches, of several ranks those of this one; advances ``state``.

        The sum of the token losses is divided by the number of targets of all of them together, so the step does not
        depend on how its sequences are cut into micro-batches.

        Raises:
            NonFiniteError: loss or gradients are NaN or Inf and the policy is "stop", or it is "skip" and this is the
                third such step in a row. Nothing has changed then.
        """
        if not batches:
            raise ValueError("Trainer: batches must hold at least one micro-batch, got none")
        counts = [sum(batch.input_ids.numel() for batch in batches), sum(batch.num_tokens for batch in batches)]
        tokens, num_items = self.strategy.sum_over_ranks(counts)
        num_samples = tokens // self.config.seqlen
        lr = self.learning_rate(self.state.tokens + tokens)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.strategy.sum_losses(torch.stack(self._accumulate_gradients(batches, max(1, num_items))))
        # The one wait for the device in a step: here the optimizer has not touched anything yet.
        grad_norm, *losses = torch.stack([self.strategy.gradient_norm(self.parameters), *losses]).tolist()
        finite = all(map(math.isfinite, (grad_norm, *losses)))
        if finite:
            self._update(grad_norm, lr)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._refuse(losses, grad_norm, num_samples)
        self.state.step += 1
        self.state.tokens += tokens
        self.state.position += num_samples
        self.state.consecutive_skips = 0 if finite else self.state.consecutive_skips + 1
        return StepResult(losses[0], losses[1] if len(losses) > 1 else None, grad_norm, lr, tokens, finite)

    def _accumulate_gradients(self, batches: Sequence[Any], num_items: int) -> list[Tensor]:
        """Backward over all micro-batches; the loss of the step and, with experts, their auxiliary loss."""
        self.compute_model.train()
        if self._graphed_backward is not None:
            losses = self._graphed_backward([_graph_arguments(batch, num_items) for batch in batches])
        else:
            losses = [
                self._backward(
                    **model_inputs(batch, self.device), num_items=num_items, share=batch.num_tokens / num_items
                )
                for batch in batches
            ]
        return [sum(parts) for parts in zip(*losses)]

    def _backward(self, *, num_items: int | Tensor, share: float | Tensor, **inputs: Tensor | None) -> list[Tensor]:
        """Backward over a micro-batch that has ``share`` of the ``num_items`` targets; its part of the losses."""
        options = dict(label_smoothing=self.config.label_smoothing, z_loss=self.config.z_loss)
        output = self.compute_model(**inputs, **options, num_items=num_items)
        losses = [output.loss]
        if output.aux_loss is not None:
            # A mean over this micro-batch, which weighs as much as it has targets.
            losses.append(output.aux_loss * share)
        sum(losses).backward()
        return [loss.detach().float() for loss in losses]

    def _update(self, grad_norm: float, lr: float) -> None:
        limit = self.config.max_grad_norm
        if limit is not None and grad_norm > limit:
            scale_gradients(self.parameters, limit / grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.weights_changed()

    def _refuse(self, losses: list[float], grad_norm: float, num_samples: int) -> None:
        """Raise when the policy says so."""
        bad = [("loss", loss) for loss in losses if not math.isfinite(loss)] or [("gradient norm", grad_norm)]
        first = self.state.position
        got = f"got {bad[0][1]} at step {self.state.step + 1}, samples {first} to {first + num_samples - 1}"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"Trainer: {bad[0][0]} must be finite, {got}; the step was not applied")
        if self.state.consecutive_skips + 1 >= _MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteError(
                f"Trainer: {bad[0][0]} must be finite in one of {_MAX_CONSECUTIVE_SKIPS} steps in a row, {got}"
            )


def _graph_arguments(batch: Any, num_items: int) -> dict[str, Tensor | None]:
    """The arguments of `Engine._backward` as tensors, in one of few shapes."""
    documents = None if batch.cu_seqlens is None else with_empty_documents(batch.cu_seqlens)
    numbers = {"num_items": torch.tensor(float(num_items)), "share": torch.tensor(batch.num_tokens / num_items)}
    return {"input_ids": batch.input_ids, "labels": batch.labels, "cu_seqlens": documents, **numbers}
