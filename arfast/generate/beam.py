"""Beam search with the semantics of transformers: score = sum of log-probabilities / length^length_penalty.

A step costs O(K) memory writes: beams are append-only back-pointers (parent, token), and a finished hypothesis is the
place in them where it ended, so that no sequence is copied while the search runs.
"""

import torch
from torch import Tensor

from arfast import ops
from arfast.generate.options import GenerationOptions

_NONE = -1e9  # the score of a hypothesis that does not exist, as in transformers


class BeamSearch:
    """The state of B searches with K beams each.

    `advance` takes the logits of all beams and says how to go on; when `done`, `hypotheses` gives the result. In the
    first step there is one beam per item. A candidate is one of the M = max(2, 1 + number of end tokens) * K best
    continuations, which always leaves K that do not end.

    Args:
        batch: B.
        options: beams, penalties, end tokens.
        device: of the logits.
    """

    def __init__(self, batch: int, options: GenerationOptions, device: torch.device):
        self.options = options
        self.num_candidates = max(2, 1 + len(options.eos_token_id)) * options.num_beams
        self.eos = torch.tensor(options.eos_token_id, dtype=torch.int64, device=device)
        self.first_row = torch.arange(batch, device=device)[:, None] * options.num_beams
        self.length = 0  # tokens generated
        self.running = torch.zeros(batch, 1, device=device)  # [B, K] scores of the beams, [B, 1] before the first step
        self.parents: list[Tensor] = []  # per step [B, K]: the beam that a beam continues
        self.tokens: list[Tensor] = []  # per step [B, K]
        beams = (batch, options.num_beams)
        self.scores = torch.full(beams, _NONE, device=device)  # [B, K] finished hypotheses, best first
        self.endings = torch.tensor([-1, 0, 0], device=device).repeat(*beams, 1)  # (last step or -1, parent, token)
        self.improvable = torch.ones(batch, dtype=torch.bool, device=device)  # once False, an item accepts no more
        self.all_end = False

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B * K, V] ([B, V] at first) -> (tokens int64 [B * K] to feed, rows int64 [B * K] they continue)."""
        scores, parents, tokens, lse = ops.beam_prune(logits, self.running, num_candidates=self.num_candidates)
        if not bool(lse.isfinite().all()):
            raise ValueError(f"generate: logits must be finite, got log-sum-exp {lse.tolist()} in step {self.length}")
        parents, tokens = parents.long(), tokens.long()
        exists = scores > -torch.inf
        ends = torch.isin(tokens, self.eos) & exists
        self.length += 1
        if self.length == self.options.max_new_tokens:
            ends = exists
        self._finish(scores, parents, tokens, ends)
        # the candidates are in order of their scores: the first K that go on are the best
        order = ends.sort(dim=-1, stable=True).indices[:, : self.options.num_beams]
        self.running = scores.gather(1, order)
        self.parents.append(parents.gather(1, order))
        self.tokens.append(tokens.gather(1, order))
        self._update_improvable()
        self.all_end = bool((ends == exists).all())
        return self.tokens[-1].flatten(), (self.first_row + self.parents[-1]).flatten()

    @property
    def full(self) -> Tensor:
        """bool [B]: K hypotheses have finished."""
        return (self.endings[:, :, 0] >= 0).all(-1)

    @property
    def done(self) -> bool:
        """No item can change any more, or none has a beam that goes on."""
        stopped = ~self.improvable | self.full if self.options.early_stopping is True else ~self.improvable
        return self.all_end or bool(stopped.all())

    def _finish(self, scores: Tensor, parents: Tensor, tokens: Tensor, ends: Tensor) -> None:
        """Merge the ending candidates among the K best into the hypotheses; before equals, older ones stay."""
        num_beams = self.options.num_beams
        accepted = ends & self.improvable[:, None]
        if self.options.early_stopping is True:
            accepted &= ~self.full[:, None]
        new = (scores / float(self.length) ** self.options.length_penalty).masked_fill(~accepted, -torch.inf)
        merged = torch.cat([self.scores, new[:, :num_beams]], dim=1)
        self.scores, order = (x[:, :num_beams] for x in merged.sort(dim=1, descending=True, stable=True))
        endings = torch.stack([torch.full_like(parents, self.length - 1), parents, tokens], dim=-1)
        endings = torch.cat([self.endings, endings[:, :num_beams]], dim=1)
        self.endings = endings.gather(1, order[:, :, None].expand(-1, -1, 3))

    def _update_improvable(self) -> None:
        """An item gives up for good when its best beam, at its present length, would not beat the worst hypothesis.

        With early_stopping="never" and a positive penalty the length that suits it best counts: the largest.
        """
        options = self.options
        hopeful = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if hopeful else self.length
        best = self.running[:, 0] / float(length) ** options.length_penalty
        self.improvable &= ~self.full | (best > self.scores[:, -1])

    def hypotheses(self) -> tuple[Tensor, Tensor]:
        """(tokens int64 [B * n, T], scores [B * n]) of the n = num_return_sequences best per item, padded at the end.

        An item has fewer only if its vocabulary is too small; then the rest is padding with the score -1e9.
        """
        last, beams, tokens = self.endings[:, : self.options.num_return_sequences].unbind(-1)
        steps = range(int(last.max()) + 1)
        columns = []
        for step in reversed(steps):
            before = step < last
            column = torch.where(before, self.tokens[step].gather(1, beams), self.options.pad_token_id)
            columns.append(torch.where(step == last, tokens, column))
            beams = torch.where(before, self.parents[step].gather(1, beams), beams)
        scores = self.scores[:, : self.options.num_return_sequences]
        return torch.stack(columns[::-1], dim=-1).flatten(0, 1), scores.flatten()
