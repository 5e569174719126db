"""Layers whose weights are split over ranks: heads, feed-forward channels and vocabulary.

Shoeybi et al. 2019, arXiv 1909.08053, section 3: of two products in a row the first weight is split by rows of
[out, in], the second by columns, so that a block of the network needs one sum over the ranks. With sequence_parallel
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2) the sum leaves every rank the rows of its own tokens, and the
norms between the blocks work on those alone: the same traffic, and 1 / ranks of the activations.

The layers hold plain tensors and call collectives themselves. DTensor's parallel styles would need a sharding rule for
every op of arfast; this is shorter, and what is sent when can be read off.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from arfast import ops
from arfast.nn import Embedding, RMSNorm, SwiGLU
from arfast.nn.embedding import in_compute_dtype

from .collectives import Group, copy_to, gather_rows, gather_rows_whole, reduce_from, scatter_rows
from .vocab_parallel import vocab_parallel_embedding


class TensorRegion:
    """How hidden states enter and leave the parts of the model whose weights are split.

    Args:
        group: the ranks that share the weights.
        sequence_parallel: whether between the parts every rank has the rows [N / ranks, d] of its own tokens, instead
            of all.
    """

    def __init__(self, group: Group, sequence_parallel: bool = False):
        self.group, self.sequence_parallel = group, sequence_parallel and group.size > 1

    def __deepcopy__(self, memo: dict) -> TensorRegion:
        return self

    def enter(self, hidden: Tensor) -> Tensor:
        """All tokens [N, d], for work that is split over the ranks."""
        return gather_rows(hidden, self.group) if self.sequence_parallel else copy_to(hidden, self.group)

    def enter_whole(self, hidden: Tensor) -> Tensor:
        """All tokens [N, d], for work that every rank does alike."""
        return gather_rows_whole(hidden, self.group) if self.sequence_parallel else hidden

    def leave(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' [N, d]; or this rank's rows of it."""
        return scatter_rows(partial, self.group) if self.sequence_parallel else reduce_from(partial, self.group)


class RowParallelLinear(nn.Linear):
    """x [N, in / R] of this rank -> the sum over the ranks, or this rank's rows of it; the bias is added once."""

    region: TensorRegion

    def forward(self, x: Tensor) -> Tensor:
        out = self.region.leave(F.linear(x, self.weight))
        if self.bias is None:
            return out
        # With its own tokens only, a rank has a part of the bias's gradient.
        return out + (copy_to(self.bias, self.region.group) if self.region.sequence_parallel else self.bias)


class ParallelSwiGLU(SwiGLU):
    """SwiGLU with its channels split; down_proj is a RowParallelLinear."""

    region: TensorRegion

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(self.region.enter(hidden))


class SharedRMSNorm(RMSNorm):
    """RMSNorm with the same weight on every rank, of rows or heads that are split over the ranks."""

    region: TensorRegion

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.rms_norm(x, copy_to(self.weight, self.region.group), self.eps, residual=residual)


class VocabParallelEmbedding(Embedding):
    """ids [N] -> hidden [N, d], or this rank's rows of it, with the words split over the ranks."""

    region: TensorRegion

    def forward(self, ids: Tensor) -> Tensor:
        return in_compute_dtype(self.region.leave(vocab_parallel_embedding(ids, self.weight, self.region.group)))


def become(module: nn.Module, kind: type[nn.Module], **attributes) -> None:
    """Turn a module into one of a subclass of its class, in place: parameters and their names stay as they are."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def split_mlp(mlp: SwiGLU, region: TensorRegion) -> None:
    """Make a SwiGLU work on this rank's channels."""
    become(mlp, ParallelSwiGLU, region=region)
    become(mlp.down_proj, RowParallelLinear, region=region)
