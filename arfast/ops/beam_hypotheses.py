"""The sequences that a beam search found, out of its back-pointers, in one launch."""

import torch
from torch import Tensor

from arfast.ops._library import register_fake
from arfast.ops.beam_step import BeamState

_ops = torch.ops.arfast


def beam_hypotheses(
    state: BeamState, num_return_sequences: int | None = None, *, pad_token_id: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best hypotheses of every item, with the log-probability of each of their tokens.

    Args:
        state: B searches with K <= 256 beams after any number of steps.
        num_return_sequences: n in [1, K]; all K by default.
        pad_token_id: what stands after the last token of a hypothesis.

    Returns:
        tokens [B*n, L] int64, padded at the end; log_probs [B*n, L] float32, natural, of the tokens, 0 after the last;
        lengths [B*n] int32, the numbers of tokens, 0 where there is no hypothesis; scores [B*n] float32, descending
        per item, -1e9 for none. L is the largest length of the state.

    Raises:
        RuntimeError: an argument does not fit: `beam_hypotheses: <argument> must <rule>, got <actual>`.

    Example:
        >>> state = BeamState.start(2, 4, max_length=2)
        >>> for rows in (2, 8):
        ...     beam_step(torch.randn(rows, 1000), state)
        >>> tokens, log_probs, lengths, scores = beam_hypotheses(state, 3)
        >>> tokens.shape, lengths.tolist()
        (torch.Size([6, 2]), [2, 2, 2, 2, 2, 2])
    """
    count = state.running.shape[1] if num_return_sequences is None else num_return_sequences
    tokens, log_probs, lengths = _ops.beam_hypotheses(
        state.parents, state.tokens, state.log_probs, state.endings, state.ending_log_probs, count, pad_token_id
    )
    return tokens, log_probs, lengths, state.scores[:, :count].flatten()


def beam_hypotheses_reference(state, num_return_sequences=None, *, pad_token_id=0):
    """The specification of `beam_hypotheses` in plain torch."""
    count = state.running.shape[1] if num_return_sequences is None else num_return_sequences
    last, beams, token = state.endings[:, :count].long().unbind(-1)
    columns = []
    for step in reversed(range(len(state.parents))):
        before, at = step < last, step == last
        column = torch.where(before, state.tokens[step].long().gather(1, beams), pad_token_id)
        log_prob = torch.where(before, state.log_probs[step].gather(1, beams), 0)
        log_prob = torch.where(at, state.ending_log_probs[:, :count], log_prob)
        columns.append((torch.where(at, token, column), log_prob))
        beams = torch.where(before, state.parents[step].long().gather(1, beams), beams)
    tokens, log_probs = (torch.stack(x[::-1], dim=-1).flatten(0, 1) for x in zip(*columns, strict=True))
    return tokens, log_probs, (last + 1).flatten().int(), state.scores[:, :count].flatten()


@register_fake("beam_hypotheses")
def _(parents, tokens, log_probs, endings, ending_log_probs, num_return_sequences, pad_token_id):
    length, rows = parents.shape[0], parents.shape[1] * num_return_sequences
    return (
        parents.new_empty((rows, length), dtype=torch.int64),
        log_probs.new_empty((rows, length)),
        parents.new_empty((rows,)),
    )
