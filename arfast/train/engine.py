"""One optimizer step over micro-batches: gradients, their norm, the checks for NaN and spikes, clipping, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arfast.nn import MoE, RotaryEmbedding
from arfast.nn.moe import balance_experts

from .compiled import CompiledModel
from .config import TrainConfig
from .graph import GraphedBackward, with_empty_documents
from .inputs import model_inputs
from .optimizer import WorkingCopy, build_optimizer, clipped_step
from .recheck import repeated
from .schedule import learning_rate
from .scheduled_sampling import ScheduledSampling
from .spikes import describe_spike, remember
from .stages import Stage
from .strategy import OneProcess

_MAX_CONSECUTIVE_SKIPS = 3


class NonFiniteError(RuntimeError):
    """Loss or gradients were NaN or Inf; weights and optimizer are as they were before the step."""


@dataclass
class TrainState:
    """Where a run stands. With weights, optimizer tensors and random state, all that a step depends on.

    step: optimizer steps done, skipped ones included.
    tokens: input positions that steps were made of: what the schedules are measured in.
    position: in the data set's endless order of rows, in tokens; beyond ``tokens`` by what was left out.
    consecutive_skips: steps in a row that were not applied.
    left_out: ranges [first, end) of positions that are never read, in the order in which they were found bad.
    recent_losses, recent_grad_norms: of the last steps that were in line, for the detection of spikes.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    consecutive_skips: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)

    def next_position(self) -> int:
        """Where the next step reads: ``position``, or behind what is left out there."""
        position = self.position
        while ends := [end for first, end in self.left_out if first <= position < end]:
            position = max(ends)
        return position


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step.

    loss: nats per target token, smoothing and z-loss included; aux_loss: of the experts, None for a dense model;
    grad_norm: before clipping; tokens: input positions; applied: False when the step was skipped.
    spike: what is out of line, or None; expert_load: per layer with experts, the most choices that an expert got over
    the mean, or None.
    """

    loss: float
    aux_loss: float | None
    grad_norm: float
    lr: float
    tokens: int
    applied: bool
    spike: str | None = None
    expert_load: tuple[float, ...] | None = None


class Engine:
    """A model with its optimizer and its counters; knows tensors and devices, and nothing of files.

    Args:
        model: float32 parameters, the ones that are optimized. With dtype="bfloat16" forward and backward run in a
            `WorkingCopy` of it.
        strategy: how the step is spread over ranks; None: one process.

    Raises:
        ValueError: the settings ask for CUDA graphs, and the model is not on a GPU; or for activation checkpointing,
            and the model has none; or for scheduled sampling, and the model is no `CausalLM`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, strategy: OneProcess | None = None) -> None:
        self.model, self.config = model, config
        self.strategy = strategy or OneProcess()
        self.device = next(model.parameters()).device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(model, config)
        in_place = config.dtype == "float32" or self.strategy.casts_weights
        self._working_copy = None if in_place else WorkingCopy(model, getattr(torch, config.dtype))
        _checkpoint_activations(self.compute_model, config.activation_checkpointing)
        self._forward = CompiledModel(self.compute_model) if config.compile else self.compute_model
        self._graphed_backward = None
        if config.cuda_graph:
            if self.device.type != "cuda":
                raise ValueError(f"Trainer: cuda_graph must be False for a model on {self.device.type}, got True")
            self._graphed_backward = GraphedBackward(self._backward, self.compute_model, self.parameters)
        self._sampling = ScheduledSampling(self.compute_model, config) if config.scheduled_sampling else None
        self._expert_counts: Tensor | None = None  # [layers, E] of the step under way
        self._own_theta = getattr(model.config, "rope_theta", None)
        self.state = TrainState()

    @property
    def compute_model(self) -> nn.Module:
        """What runs forward: the model, or its working copy."""
        return self._working_copy.module if self._working_copy else self.model

    @property
    def state(self) -> TrainState:
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state
        self._enter_stage()

    @property
    def stage(self) -> Stage:
        """Of the step to come."""
        return self.config.stages.at(self.state.tokens)

    def weights_changed(self) -> None:
        """To be called when somebody else has written to the model's parameters."""
        if self._working_copy:
            self._working_copy.refresh()

    def learning_rate(self, tokens: int) -> float:
        """Learning rate of the step that ends after ``tokens`` tokens."""
        config = self.config
        return learning_rate(
            tokens,
            config.schedule,
            peak=config.learning_rate,
            floor=config.learning_rate * config.final_lr_ratio,
            warmup_tokens=config.num_warmup_tokens,
            decay_tokens=config.num_decay_tokens,
            total_tokens=config.total_tokens,
        )

    def step(self, batches: Sequence[Any]) -> StepResult:
        """One optimizer step over micro-batches, of several ranks those of this one; advances ``state``.

        The sum of the token losses is divided by the number of targets of all of them together, so the step does not
        depend on how its sequences are cut into micro-batches.

        Raises:
            NonFiniteError: loss or gradients are NaN or Inf and the policy is "stop", or it is "skip" and this is the
                third such step in a row. Nothing has changed then.
            UnrepeatableError: see `arfast.train.recheck`.
        """
        if not batches:
            raise ValueError("Trainer: batches must hold at least one micro-batch, got none")
        counts = [sum(batch.input_ids.numel() for batch in batches), sum(batch.num_tokens for batch in batches)]
        tokens, num_items = self.strategy.sum_over_ranks(counts)
        lr = self.learning_rate(self.state.tokens + tokens)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(batches, max(1, num_items))
        # The one wait for the device in a step: here the optimizer has not touched anything yet.
        grad_norm, losses, load = self._read(self.strategy.gradient_norm(self.model), losses)
        finite = all(map(math.isfinite, (grad_norm, *losses)))
        if finite:
            self._update(grad_norm, lr)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._refuse(losses, grad_norm, tokens)
        spike = self._check_spike(losses[0], grad_norm) if finite else None
        self.state.step += 1
        self.state.tokens += tokens
        self.state.position = self.state.next_position() + tokens
        self.state.consecutive_skips = 0 if finite else self.state.consecutive_skips + 1
        self._enter_stage()
        aux_loss = losses[1] if len(losses) > 1 else None
        return StepResult(losses[0], aux_loss, grad_norm, lr, tokens, finite, spike, load)

    def warm_up(self, batches: Sequence[Any]) -> None:
        """Compile or capture forward and backward for batches of these shapes, and change nothing."""
        try:
            self._accumulate_gradients(batches, max(1, sum(batch.num_tokens for batch in batches)))
        except torch._dynamo.exc.TorchDynamoException as error:
            self._forward.give_up(error)
        self.optimizer.zero_grad(set_to_none=True)

    def _losses(self, batches: Sequence[Any], num_items: int) -> list[Tensor]:
        """Those of the step on all ranks; gradients are left in the parameters, counts of experts in the engine."""
        if self.config.recheck_every and (self.state.step + 1) % self.config.recheck_every == 0:
            compute = lambda: self._accumulate_gradients(batches, num_items)
            losses = repeated(compute, self.parameters, self.state.step + 1, self.strategy)
        else:
            losses = self._accumulate_gradients(batches, num_items)
        if self._expert_counts is not None:
            self._expert_counts = self.strategy.sum_losses(self._expert_counts)
        return list(self.strategy.sum_losses(torch.stack(losses)))

    def _accumulate_gradients(self, batches: Sequence[Any], num_items: int) -> list[Tensor]:
        """Backward over all micro-batches; the loss of the step and, with experts, their auxiliary loss."""
        self.compute_model.train()
        if self._sampling is not None:
            batches = self._sampling(batches, self.state.step, self.state.tokens)
        if self._graphed_backward is not None:
            losses = self._graphed_backward([_graph_arguments(batch, num_items) for batch in batches])
        elif self.config.compile:
            losses = [self._backward(**self._on_device(_graph_arguments(batch, num_items))) for batch in batches]
        else:
            losses = [
                self._backward(
                    **model_inputs(batch, self.device), num_items=num_items, share=batch.num_tokens / num_items
                )
                for batch in batches
            ]
        sums = [sum(parts) for parts in zip(*losses)]
        self._expert_counts = sums.pop() if sums[-1].dim() else None
        return sums

    def _backward(self, *, num_items: int | Tensor, share: float | Tensor, **inputs: Tensor | None) -> list[Tensor]:
        """Backward over a micro-batch that has ``share`` of the ``num_items`` targets; its part of the losses, and
        with experts how often each was chosen, [layers, E]."""
        options = dict(label_smoothing=self.config.label_smoothing, z_loss=self.config.z_loss)
        output = self._forward(**inputs, **options, num_items=num_items)
        losses = [output.loss]
        if output.aux_loss is not None:
            # A mean over this micro-batch, which weighs as much as it has targets.
            losses.append(output.aux_loss * share)
        sum(losses).backward()
        counts = getattr(output, "tokens_per_expert", None)
        return [loss.detach().float() for loss in losses] + ([] if counts is None else [counts])

    def _on_device(self, arguments: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: None if t is None else t.to(self.device, non_blocking=True) for name, t in arguments.items()}

    def _read(self, grad_norm: Tensor, losses: list[Tensor]) -> tuple[float, list[float], tuple[float, ...] | None]:
        """Gradient norm, losses and load of the experts, from the device in one transfer."""
        if self._expert_counts is None:
            norm, *values = torch.stack([grad_norm, *losses]).tolist()
            return norm, values, None
        counts = self._expert_counts.double()
        load = counts.amax(1) / counts.mean(1)
        norm, *values = torch.cat([torch.stack([grad_norm, *losses]).double(), load]).tolist()
        return norm, values[: len(losses)], tuple(values[len(losses) :])

    def _check_spike(self, loss: float, grad_norm: float) -> str | None:
        """What is out of line in a step; a step that is in line joins those that the next ones are compared with."""
        state, window = self.state, self.config.spike_window
        if self.config.on_spike == "ignore":
            return None
        spike = describe_spike(loss, grad_norm, state.recent_losses, state.recent_grad_norms, window)
        if spike is None or self.config.on_spike == "report":
            remember(state.recent_losses, loss, window)
            remember(state.recent_grad_norms, grad_norm, window)
        return spike

    def _enter_stage(self) -> None:
        """The rotary frequencies of the step to come, in what computes and in the configuration that is saved."""
        theta = self.stage.rope_theta or self._own_theta
        if theta is None or theta == self.model.config.rope_theta:
            return
        for model in {self.model, self.compute_model}:
            model.config = model.config.replace(rope_theta=theta)
            for module in model.modules():
                if isinstance(module, RotaryEmbedding):
                    module.set_theta(theta)
        if self._graphed_backward is not None:
            self._graphed_backward = GraphedBackward(self._backward, self.compute_model, self.parameters)

    def _update(self, grad_norm: float, lr: float) -> None:
        limit = self.config.max_grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clipped_step(self.optimizer, self.parameters, min(1.0, limit / grad_norm) if limit and grad_norm else 1.0)
        if self._expert_counts is not None:
            experts = [module for module in self.model.modules() if isinstance(module, MoE)]
            balance_experts(experts, self._expert_counts, self.config.router_bias_rate)
        self.weights_changed()

    def _refuse(self, losses: list[float], grad_norm: float, tokens: int) -> None:
        """Raise when the policy says so."""
        bad = [("loss", loss) for loss in losses if not math.isfinite(loss)] or [("gradient norm", grad_norm)]
        first, seqlen = self.state.next_position(), self.config.seqlen
        samples = f"samples {first // seqlen} to {(first + tokens - 1) // seqlen}"
        got = f"got {bad[0][1]} at step {self.state.step + 1}, {samples}"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"Trainer: {bad[0][0]} must be finite, {got}; the step was not applied")
        if self.config.on_nonfinite == "skip" and self.state.consecutive_skips + 1 >= _MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteError(
                f"Trainer: {bad[0][0]} must be finite in one of {_MAX_CONSECUTIVE_SKIPS} steps in a row, {got}"
            )


def _checkpoint_activations(model: nn.Module, on: bool) -> None:
    decoders = [module for module in model.modules() if hasattr(module, "activation_checkpointing")]
    if on and not decoders:
        raise ValueError(
            f"Trainer: activation_checkpointing must be False for {type(model).__name__}, which has none, got True"
        )
    for decoder in decoders:
        decoder.activation_checkpointing = on


def _graph_arguments(batch: Any, num_items: int) -> dict[str, Tensor | None]:
    """The arguments of `Engine._backward` as tensors, in one of few shapes."""
    documents = None if batch.cu_seqlens is None else with_empty_documents(batch.cu_seqlens)
    numbers = {"num_items": torch.tensor(float(num_items)), "share": torch.tensor(batch.num_tokens / num_items)}
    return {"input_ids": batch.input_ids, "labels": batch.labels, "cu_seqlens": documents, **numbers}
