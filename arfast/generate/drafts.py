"""Where the drafts of speculative decoding come from: a smaller model, or the text so far."""

from typing import Any

import torch
from torch import Tensor

from arfast import ops
from arfast.generate.decode import DecodeStep
from arfast.generate.sampling import generator_state_of
from arfast.nn import KVCache


class ModelDrafts:
    """Drafts of a smaller model, drawn as the model's own tokens are, from random numbers of their own.

    Args:
        model, cache: the draft model, and the prompts.
        sequences: the prompts' tokens.
        streams: (seed, sample) of every row.
        filters: those of the model's own tokens.
        dtype: of the logits that tokens are drawn from, and that are returned: the model's.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        sequences: list[list[int]],
        streams: list[tuple[int, int]],
        filters: dict[str, float],
        dtype: torch.dtype,
    ):
        self.cache, self.filters, self.dtype = cache, filters, dtype
        # Samples are counted from 0: these streams are nobody else's.
        self.generator_state = generator_state_of([(s, -1 - i) for s, i in streams], cache.k.device)
        self.step = DecodeStep(model, cache)
        self.prompt_lengths = [len(sequence) for sequence in sequences]
        self.stored = list(self.prompt_lengths)  # tokens that the cache holds

    def follow(self, sequences: list[list[int]]) -> None:
        """What was stored behind the new token of a row was a draft that was rejected."""
        self.stored = [min(stored, len(sequence) - 1) for stored, sequence in zip(self.stored, sequences)]

    def draft(self, sequences: list[list[int]], num_drafts: int, steps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, G] and the logits [B, G, V] that they were drawn from, None if they are the best tokens, with
        probability 1; `steps`: tokens drawn so far, int64 [B]."""
        self.generator_state[:, 2] = steps
        logits, tokens, all_logits = self._catch_up(sequences), [], None
        if self.filters["temperature"] > 0:
            all_logits = logits.new_empty(len(logits), num_drafts, logits.shape[-1], dtype=self.dtype)
        for i in range(num_drafts):
            if i > 0:
                logits = self.step(tokens[-1])
            if all_logits is not None:
                all_logits[:, i] = logits  # the next step may overwrite them
                logits = all_logits[:, i]
            tokens.append(ops.sample(logits, **self.filters, generator_state=self.generator_state)[0])
        self.stored = [len(sequence) - 1 + num_drafts for sequence in sequences]
        return torch.stack(tokens, dim=1), all_logits

    def _catch_up(self, sequences: list[list[int]]) -> Tensor:
        """Store what the cache lacks: the last token, one before it if the last drafts were all accepted, more after
        rounds without drafts. A row that lacks less stores some again. The logits [B, V] that follow."""
        num_tokens = max(len(sequence) - stored for sequence, stored in zip(sequences, self.stored))
        # Only a row that has ended can have fewer new tokens than others lack. What it stores then is not read, but its
        # prompt is: other rows may share it.
        first = [max(len(s) - num_tokens, length) for s, length in zip(sequences, self.prompt_lengths, strict=True)]
        rewind(self.cache, first)
        rows = [(s[start:] + s[-1:] * num_tokens)[:num_tokens] for s, start in zip(sequences, first, strict=True)]
        tokens = torch.tensor(rows, device=self.cache.k.device)
        if tokens.is_cuda or num_tokens == 1:  # replays of a graph take less time than a forward pass without one
            for column in tokens.unbind(1):
                logits = self.step(column)
            return logits
        return self.step.extend(tokens)[:, -1]


class LookupDrafts:
    """Drafts that continue a row as its own text went on where its last tokens occurred before, most recently.

    Args:
        sequences: the prompts' tokens.
        max_ngram_size: so many last tokens are looked for, then fewer.
    """

    def __init__(self, sequences: list[list[int]], max_ngram_size: int, device: torch.device):
        self.max_ngram_size, self.device = max_ngram_size, device
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in sequences]  # what follows an n-gram, by its index
        self.known = [0 for _ in sequences]
        self.follow(sequences)

    def follow(self, sequences: list[list[int]]) -> None:
        """Index what follows the n-grams of new tokens."""
        for row, sequence in enumerate(sequences):
            for end in range(max(self.known[row], 1), len(sequence)):
                for size in range(1, min(self.max_ngram_size, end) + 1):
                    self.places[row][tuple(sequence[end - size : end])] = end
            self.known[row] = len(sequence)

    def draft(self, sequences: list[list[int]], num_drafts: int, steps: Tensor) -> tuple[Tensor, None]:
        """Drafts [B, G], -1 where a row has none; G is 0 when no row has any."""
        rows = [self._continuation(row, sequence, num_drafts) for row, sequence in enumerate(sequences)]
        longest = max(map(len, rows))
        rows = [row + [-1] * (longest - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.int64, device=self.device), None

    def _continuation(self, row: int, sequence: list[int], num_drafts: int) -> list[int]:
        for size in range(min(self.max_ngram_size, len(sequence)), 0, -1):
            place = self.places[row].get(tuple(sequence[-size:]))
            if place is not None:
                period = len(sequence) - place  # a text that repeats goes on repeating
                return [sequence[place + i % period] for i in range(num_drafts)]
        return []


def rewind(cache: KVCache, lengths: list[int]) -> None:
    """Forget the tokens past `lengths`."""
    cache.set_lengths(torch.tensor(lengths, dtype=torch.int32, device=cache.k.device), longest=max(lengths))
