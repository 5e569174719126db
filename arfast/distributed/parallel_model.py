"""A CausalLM turned, in place, into one whose work is split over the ranks of a device mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from arfast import ops
from arfast.models import CausalLM, CausalLMOutput
from arfast.models.causal_lm import IGNORE_INDEX, shift_labels
from arfast.nn import MoE

from .collectives import Group, gather_rows_whole, reduce_from, share_gradient
from .context_parallel import ContextParallelDecoder, ContextPlan, ParallelAttention
from .expert_parallel import ParallelExperts, ParallelMoE
from .mesh import Groups
from .parts import Part, initialize, parts
from .splits import Split, cut_parameters, is_expert, parameter_splits
from .tensor_parallel import (
    RowParallelLinear,
    SharedRMSNorm,
    TensorRegion,
    VocabParallelEmbedding,
    become,
    split_mlp,
)
from .vocab_parallel import vocab_parallel_cross_entropy


def parallelize(
    model: CausalLM, mesh: DeviceMesh, *, sequence_parallel: bool = False, joint_aux_loss: bool = True
) -> CausalLM:
    """Split a model over the "context", "tensor" and expert ranks of a mesh, in place; returns it.

    For a training loop of your own; the Trainer takes `arfast.distributed.Parallel`, which calls this.

    The same call then gives the same result: the ranks of one batch (those that differ in "context" and "tensor") call
    `model(input_ids, labels, cu_seqlens, ...)` with the same whole tensors, and each gets the loss, or the logits, of
    the whole batch. Ranks that differ in "data" have batches of their own; nothing but the experts and their auxiliary
    losses (see `arfast.distributed.expert_parallel`) joins those, and num_items, the number of targets of all of them,
    makes the losses add up.

    After backward, `reduce_gradients(model)` sums the gradients over the ranks that have the same parameter (or FSDP
    does, told to sum and not to average). Parameters keep their names and become this rank's parts:
    `full_state_dict` puts them together.

    Args:
        model: with its parameters the same on every rank; or on the meta device: then `model.to_empty(device=...)` and
            `model.init_parameters(seed)` follow, and no rank ever has the whole.
        mesh: from `init_mesh`, or another DeviceMesh with some of the dimensions "data", "context", "tensor".
        sequence_parallel: split the activations between the layers over "tensor" too; every batch must then have a
            number of tokens that is a multiple of context * tensor.
        joint_aux_loss: the auxiliary losses of the experts are of the tokens of all data ranks together; False: of each
            data rank's own, as of that many micro-batches in one process.

    Raises:
        TypeError, ValueError: `parallelize: <argument> must <rule>, got <actual>`, or of `ParallelConfig` when
            a size of the model is not a multiple of the ranks that share it. Nothing has changed then.

    A key-value cache, and with it `generate`, needs the whole model and is refused.

    Example:
        # parallel.py, run by: torchrun --nproc-per-node 4 parallel.py
        import torch
        import torch.distributed as dist
        from arfast import CausalLM, CausalLMConfig
        from arfast.distributed import ParallelConfig, init_mesh, parallelize, reduce_gradients

        mesh = init_mesh(ParallelConfig(context=2, tensor=2), "cpu")
        model = parallelize(CausalLM(CausalLMConfig.preset("tiny")), mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
        for step in range(10):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            reduce_gradients(model)
            optimizer.step()
            if dist.get_rank() == 0:
                print(step, loss.item())
        dist.destroy_process_group()
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"parallelize: model must be a CausalLM, got {type(model).__name__}")
    if type(model) is not CausalLM:
        raise ValueError(f"parallelize: model must not be split or wrapped yet, got a {type(model).__name__}")
    groups = Groups(mesh)
    groups.config.check_model(model.config)
    splits = parameter_splits(model.config, groups, [name for name, _ in model.named_parameters()])
    region = TensorRegion(groups.tensor, sequence_parallel)
    cut_parameters(model, splits)
    decoder = model.model
    if groups.tensor.size > 1:
        become(decoder.embed_tokens, VocabParallelEmbedding, region=region)
    if region.sequence_parallel:
        become(decoder.norm, SharedRMSNorm, region=region)
    for layer in decoder.layers:
        _split_layer(layer, region, groups, groups.data if joint_aux_loss else Group())
    if groups.context.size > 1:
        become(decoder, ContextParallelDecoder)
    become(model, ParallelCausalLM, groups=groups, region=region, splits=splits)
    return model


def _split_layer(layer: nn.Module, region: TensorRegion, groups: Groups, aux_data: Group) -> None:
    attention = layer.self_attn
    become(attention, ParallelAttention, region=region)
    attention.num_heads //= region.group.size
    attention.num_kv_heads //= region.group.size
    if region.group.size > 1:
        become(attention.o_proj, RowParallelLinear, region=region)
        if attention.q_norm is not None:
            become(attention.q_norm, SharedRMSNorm, region=region)
            become(attention.k_norm, SharedRMSNorm, region=region)
    if region.sequence_parallel:
        become(layer.input_layernorm, SharedRMSNorm, region=region)
        become(layer.post_attention_layernorm, SharedRMSNorm, region=region)
    if not isinstance(layer.mlp, MoE):
        split_mlp(layer.mlp, region)
        return
    become(layer.mlp, ParallelMoE, region=region, context=groups.context, data=aux_data)
    become(layer.mlp.experts, ParallelExperts, group=groups.expert)
    if layer.mlp.shared_experts is not None:
        split_mlp(layer.mlp.shared_experts, region)


class ParallelCausalLM(CausalLM):
    """What `parallelize` makes of a CausalLM.

    Attributes:
        groups: this rank's groups. splits: how each parameter is split, by name.
    """

    groups: Groups
    region: TensorRegion
    splits: Mapping[str, tuple[Split, ...]]

    def init_parameters(self, seed: int = 0) -> None:
        """Set this rank's parts to what they would be, cut from a whole model of this seed."""
        initialize(self, seed)

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(part.shape) for part in parts(self).values())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        num_items: float | Tensor | None = None,
        reduction: str = "mean",
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """As `CausalLM.forward`: whole tensors in, whole results out, the same on every rank of the batch."""
        self._check(input_ids, labels, cu_seqlens, position_ids, None, num_items, logits_to_keep)
        if cache is not None:
            raise ValueError("CausalLM: cache must be None for a model that is split over ranks, got a cache")
        plan, documents, ids = None, cu_seqlens, input_ids
        if self.groups.context.size > 1:
            plan = ContextPlan(*ids.shape, self.groups.context, cu_seqlens, position_ids, ids.device)
            documents, ids, position_ids = plan, plan.own(ids), None
        if self.region.sequence_parallel and ids.numel() % self.region.group.size:
            rule = (
                f"hold a multiple of context * tensor tokens with sequence_parallel, here of {self.region.group.size}"
            )
            raise ValueError(f"CausalLM: input_ids must {rule} per context rank, got {ids.numel()}")
        with_aux_loss = labels is not None and self.config.num_experts > 0
        hidden, aux_losses, counts = self.model(ids, documents, position_ids, None, with_aux_loss)
        if labels is None:
            return CausalLMOutput(logits=self._whole_logits(hidden, plan, input_ids.shape, logits_to_keep))
        targets = shift_labels(labels, cu_seqlens)
        options = dict(label_smoothing=label_smoothing, z_loss=z_loss)
        loss = self._loss(hidden, targets, plan, reduction, num_items, options)
        aux_loss = sum(aux_losses) / len(aux_losses) if aux_losses else None
        return CausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            num_tokens=(targets != IGNORE_INDEX).sum(),
            tokens_per_expert=self.groups.context.sum_(torch.stack(counts)) if counts else None,
        )

    def _loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        plan: ContextPlan | None,
        reduction: str,
        num_items: float | Tensor | None,
        options: dict,
    ) -> Tensor:
        own = targets if plan is None else plan.own(targets)
        # Every context rank divides by the number of all targets. A tensor is never read by the host, and a number
        # would become part of a compiled graph: dividing by it does not.
        divisor = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
        if reduction == "mean" and (isinstance(divisor, Tensor) or torch.compiler.is_compiling()):
            reduction, num_items = "sum", None
        else:
            divisor = None
        arguments = (self.head_weight, own.reshape(-1))
        options |= dict(ignore_index=IGNORE_INDEX, reduction=reduction)
        options |= dict(num_items=None if num_items is None else float(num_items))
        if self.region.group.size > 1:
            loss = vocab_parallel_cross_entropy(self.region.enter(hidden), *arguments, self.region.group, **options)
        else:
            loss = ops.linear_cross_entropy(hidden, *arguments, **options)
        if reduction == "none":
            loss = loss.view(own.shape)
            return (loss if plan is None else plan.gather_whole(loss)).view(targets.shape)
        loss = reduce_from(loss, self.groups.context)
        return loss if divisor is None else loss / divisor

    def _whole_logits(self, hidden: Tensor, plan: ContextPlan | None, shape: torch.Size, keep: int | Tensor) -> Tensor:
        hidden = self.region.enter(hidden)
        if plan is not None:
            hidden = plan.gather(hidden.view(plan.batch_size, -1, hidden.shape[-1])).flatten(0, 1)
        logits = self._logits(hidden, shape, keep)  # [..., V / R]
        logits = gather_rows_whole(logits.movedim(-1, 0), self.region.group).movedim(0, -1)
        return share_gradient(logits, self.groups.context)

    def save_pretrained(self, path, **options) -> None:
        """Put the parameters together and let the first rank write them; every rank calls this.

        Raises:
            What `arfast.hub.save_pretrained` raises; on the other ranks OSError then.
        """
        state, error = full_state_dict(self, first_rank_only=True), None
        if dist.get_rank() == 0:
            try:
                whole = CausalLM(self.config, device="meta")
                whole.load_state_dict(state, assign=True)
                whole.save_pretrained(path, **options)
            except Exception as raised:
                error = raised
        failed = torch.tensor(float(error is not None), device=self.head_weight.device)
        dist.all_reduce(failed)  # nobody waits for a rank that has failed
        if error is not None:
            raise error
        if failed:
            raise OSError(f"save_pretrained: the first rank must be able to write {str(path)!r}, got its error there")


@torch.no_grad()
def reduce_gradients(model: CausalLM) -> None:
    """Sum the gradients of a parallelized model over the ranks that have the same part of a parameter.

    To be called once per optimizer step, after the backward passes of all micro-batches and before clipping. Every rank
    must have gone through the same ones. Parameters that FSDP has sharded are left to it: it must sum (a
    gradient_divide_factor of 1), and experts that are split over ranks only over those that have the same ones.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        for group in model.groups.replicas(is_expert(name)):
            group.sum_(parameter.grad)


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a model, split, sharded, both or neither: float32 scalar, the same on every
    rank. Gradients that FSDP does not sum are summed before: see `reduce_gradients`."""
    alike: dict[tuple, list[Tensor]] = {}
    for part in parts(model).values():
        if part.tensor.grad is not None:
            shared_by = tuple(dict.fromkeys(split.group for split in part.splits))
            spread_over = getattr(part.tensor, "device_mesh", None)
            alike.setdefault((spread_over, shared_by), []).append(part.tensor.grad.float())
    norms = []
    for (_, groups), gradients in alike.items():
        norm = Part(nn.utils.get_total_norm(gradients)).whole()
        for group in groups:
            norm = group.sum_(norm.square()).sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


@torch.no_grad()
def full_state_dict(model: CausalLM, *, first_rank_only: bool = False) -> dict[str, Tensor]:
    """The whole parameters of a parallelized model on the CPU, by their usual names; every rank calls this.

    One parameter at a time is put together on the device. With first_rank_only the other ranks get an empty dict, which
    saves the memory of the model on each.
    """
    state = {}
    for name, part in parts(model).items():
        whole = part.whole()
        if not first_rank_only or dist.get_rank() == 0:
            state[name] = whole.cpu() if whole.device.type != "cpu" else whole.clone()
    return state


@torch.no_grad()
def load_full_state_dict(model: CausalLM, state: Mapping[str, Tensor]) -> None:
    """Set this rank's parts from whole parameters, as `full_state_dict` or a whole CausalLM's state_dict() gives them.

    Raises:
        ValueError: `load_full_state_dict: state must <rule>, got <actual>`. Nothing has changed then.
    """
    own = parts(model)
    if set(state) != set(own):
        different = ", ".join(sorted(set(state) ^ set(own)))
        raise ValueError(
            f"load_full_state_dict: state must hold the model's parameters, got a difference in {different}"
        )
    for name, part in own.items():
        if state[name].shape != part.shape:
            got = f"{list(state[name].shape)} for {name}"
            raise ValueError(f"load_full_state_dict: state must hold shape {list(part.shape)}, got {got}")
    for name, part in own.items():
        for box, memory in part.boxes():
            memory.copy_(state[name][box.slices])
