"""Beam search with the semantics of transformers: score = sum of log-probabilities / length^length_penalty."""

import torch
from torch import Tensor

from arfast import ops
from arfast.generate.options import GenerationOptions
from arfast.ops.beam_step import CAN_CHANGE, GO_ON, NOT_FINITE


class BeamSearch:
    """B searches with K beams each.

    `advance` takes the logits of all beams and says how to go on; when `done`, `hypotheses` gives the result. In the
    first step there is one beam per item.

    Args:
        batch: B.
        options: beams, penalties, end tokens.
        device: of the logits.
    """

    def __init__(self, batch: int, options: GenerationOptions, device: torch.device):
        self.options = options
        self.state = ops.BeamState.start(
            batch,
            options.num_beams,
            options.max_new_tokens,
            ends=tuple(options.eos_token_id),
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            device=device,
        )
        self.length = 0  # tokens generated
        self.done = False  # no item can change any more, or none has a beam that goes on

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B * K, V] ([B, V] at first) -> (tokens int64 [B * K] to feed, the rows int64 [B * K] they continue).

        Both are views of the state, which the next call changes.
        """
        ops.beam_step(logits, self.state)
        status = self.state.status.tolist()
        broken = [item for item, flags in enumerate(status) if flags & NOT_FINITE]
        if broken:
            raise ValueError(f"generate: logits must be finite, got others for prompts {broken} in step {self.length}")
        self.length += 1
        self.done = not any(flags & CAN_CHANGE for flags in status) or not any(flags & GO_ON for flags in status)
        return self.state.next_tokens, self.state.rows

    def hypotheses(self) -> tuple[Tensor, Tensor]:
        """(tokens int64 [B * n, T], scores [B * n]) of the n = num_return_sequences best per item, padded at the end.

        An item has fewer only if its vocabulary is too small; then the rest is padding with the score -1e9.
        """
        state, count = self.state, self.options.num_return_sequences
        last, beams, tokens = state.endings[:, :count].long().unbind(-1)
        columns = []
        for step in reversed(range(int(last.max()) + 1)):
            before = step < last
            column = torch.where(before, state.tokens[step].long().gather(1, beams), self.options.pad_token_id)
            columns.append(torch.where(step == last, tokens, column))
            beams = torch.where(before, state.parents[step].long().gather(1, beams), beams)
        return torch.stack(columns[::-1], dim=-1).flatten(0, 1), state.scores[:, :count].flatten()
