"""A whole step of sampling or greedy decoding: `sample` and the update of the sequences, in one launch on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arfast.ops._library import needs_grad, register_fake
from arfast.ops.sample import sample_reference

_ops = torch.ops.arfast

GOES_ON, NOT_FINITE = 1, 2  # the bits of SampleState.status


@dataclass
class SampleState:
    """R sequences that grow by a token in every step, all in the memory of the device: no step waits for the host.

    Attributes:
        generator_state: int64 [R, 3], a row's (seed, sample, step): see `sample`.
        ends: int64 [E], the tokens that end a sequence.
        pad_token: what a sequence that has ended is fed with.
        lengths: int32 [R], tokens drawn so far, the one that ends a sequence included. At L it has ended.
        tokens: int64 [R, L], what was drawn; a step writes one place of a sequence that goes on and no other. Its rows
            may be part of a larger tensor's.
        log_probs: float32 [R, L], of the tokens.
        status: int32 [R]: 1: the sequence goes on. 2: it has ended, because its logits had no finite log-sum-exp: NaN,
            infinity or nothing but -inf.
        next_tokens: int64 [R], to be fed to the model.
        temperature, top_k, top_p, min_p: of `sample`.
    """

    generator_state: Tensor
    ends: Tensor
    pad_token: int
    lengths: Tensor
    tokens: Tensor
    log_probs: Tensor
    status: Tensor
    next_tokens: Tensor
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def start(
        cls,
        generator_state: Tensor,
        max_length: int,
        *,
        ends: Sequence[int] = (),
        pad_token: int = 0,
        tokens: Tensor | None = None,
        **filters: float,
    ) -> "SampleState":
        """The state before the first step. tokens: None: new ones, filled with padding."""
        rows, device = len(generator_state), generator_state.device
        if tokens is None:
            tokens = torch.full((rows, max_length), pad_token, dtype=torch.int64, device=device)
        return cls(
            generator_state=generator_state,
            ends=torch.tensor(ends, dtype=torch.int64, device=device),
            pad_token=pad_token,
            lengths=torch.zeros(rows, dtype=torch.int32, device=device),
            tokens=tokens,
            log_probs=torch.zeros(rows, max_length, device=device),
            status=torch.full((rows,), GOES_ON, dtype=torch.int32, device=device),
            next_tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            **filters,
        )

    @property
    def filters(self) -> dict[str, float]:
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def arguments(self) -> tuple:
        """Of an op, in its order."""
        filters = (self.temperature, self.top_k, self.top_p, self.min_p)
        state = (self.lengths, self.tokens, self.log_probs, self.status, self.next_tokens)
        return (*filters, self.generator_state, self.ends, self.pad_token, *state)


def sample_step(logits: Tensor, state: SampleState, *, tile_sums: Tensor | None = None) -> None:
    """Append to every sequence that goes on the token that `sample` draws, in place.

    Args:
        logits: [R, V], float32, bfloat16 or float16, or float64 on the CPU; those of sequences that have ended are not
            read, and their generators stay.
        state: see SampleState; tensors contiguous, but generator_state and tokens, whose rows must be dense.
        tile_sums: float32 [2, tiles, R], those of `decode_step` for these logits, of which then, for a top_k of up to
            1024 or greedily, only the few tiles are read that can hold a kept token. On the CPU.

    Raises:
        RuntimeError: an argument does not fit: `sample_step: <argument> must <rule>, got <actual>`.

    Tokens are those of `sample`, with and without tile_sums, log-probabilities as accurate. What a sequence draws
    depends neither on the others nor on the number of threads.

    Example:
        >>> seeds = torch.tensor([[seed, 0, 0] for seed in (7, 8)])
        >>> state = SampleState.start(seeds, max_length=5, temperature=0.8, top_k=50)
        >>> for _ in range(5):
        ...     sample_step(torch.randn(2, 1000), state)
        >>> state.tokens.shape, state.lengths.tolist(), state.status.tolist()
        (torch.Size([2, 5]), [5, 5], [0, 0])
    """
    if needs_grad(logits):
        logits = logits.detach()
    _ops.sample_step(logits, *state.arguments(), tile_sums)


def sample_step_reference(logits, state, *, tile_sums=None):
    """The specification of `sample_step` in plain torch."""
    going = ((state.status & GOES_ON != 0) & (state.lengths < state.tokens.shape[1])).nonzero().flatten()
    state.next_tokens.fill_(state.pad_token)
    if len(going) == 0:
        return
    generators, places = state.generator_state[going], state.lengths[going].long()
    tokens, log_probs = sample_reference(logits[going], **state.filters, generator_state=generators)
    broken = log_probs.isnan()
    ended = broken | (places + 1 == state.tokens.shape[1]) | (tokens[:, None] == state.ends).any(-1)
    state.tokens[going, places], state.log_probs[going, places] = tokens, log_probs.to(state.log_probs.dtype)
    state.lengths[going] += 1
    state.status[going] = torch.where(ended, 0, GOES_ON).int() + torch.where(broken, NOT_FINITE, 0).int()
    state.next_tokens[going] = tokens
    state.generator_state[going] = generators + generators.new_tensor([0, 0, 1])


@register_fake("sample_step")
def _(logits, *arguments):
    pass
