"""Speculative decoding: tokens are drafted cheaply, and one forward pass of the model verifies several of them.

Leviathan, Kalman and Matias 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. Drafts that are looked up in
the text so far are those of transformers' `prompt_lookup_num_tokens`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arfast import ops
from arfast.generate.decode import DecodeStep
from arfast.generate.draft_length import MAX_DRAFTS, Clock, DraftLength
from arfast.generate.options import PROCESSOR_OPTIONS, GenerationOptions, is_integer, require
from arfast.generate.output import GenerationOutput
from arfast.generate.prompts import stored_prompts
from arfast.generate.sampling import generator_state_of
from arfast.nn import KVCache


@dataclass
class DraftStatistics:
    """What became of drafts: `generate` adds to the one that it is given.

    rounds: forward passes of the model after the prompts.
    drafted, accepted: tokens.
    new_tokens: tokens that `generate` returned, those that no draft proposed included.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    new_tokens: int = 0

    @property
    def acceptance(self) -> float:
        """The share of the drafted tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)


@dataclass(frozen=True)
class Speculation:
    """The arguments of `generate` that say how tokens are drafted, under the same names."""

    draft_model: Any | None = None
    num_draft_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2

    def check(self, model: Any, options: GenerationOptions) -> None:
        for name in ("num_draft_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"):
            value = getattr(self, name)
            is_off = value is None and name != "max_matching_ngram_size"
            valid = is_off or (is_integer(value) and value >= 1)
            require(valid, name, "be a positive integer", repr(value))
        if self.draft_model is None:
            rule = "be None without a draft_model"
            require(self.num_draft_tokens is None, "num_draft_tokens", rule, self.num_draft_tokens)
        else:
            rule, lookup = "be None with a draft_model", self.prompt_lookup_num_tokens
            require(lookup is None, "prompt_lookup_num_tokens", rule, lookup)
            ours, theirs = model.config.vocab_size, self.draft_model.config.vocab_size
            rule = f"have the model's vocabulary, vocab_size={ours}"
            require(theirs == ours, "draft_model", rule, f"vocab_size={theirs}")
        if self.is_on:
            require(options.num_beams == 1, "num_beams", "be 1 with drafts", options.num_beams)
            for name in PROCESSOR_OPTIONS:
                value = getattr(options, name)
                off = value is None or (not isinstance(value, Tensor) and value == PROCESSOR_OPTIONS[name])
                require(off, name, "be left out with drafts", type(value).__name__)

    @property
    def is_on(self) -> bool:
        return self.draft_model is not None or self.prompt_lookup_num_tokens is not None

    @property
    def max_drafts(self) -> int:
        """The most tokens that are drafted at a time: a cache needs so many slots more."""
        if self.draft_model is not None:
            return self.num_draft_tokens or MAX_DRAFTS
        return self.prompt_lookup_num_tokens or 0


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
        self.stored = [len(sequence) for sequence in sequences]  # tokens that the cache holds

    def follow(self, sequences: list[list[int]]) -> None:
        """What was stored behind the new token of a row was a draft that was rejected."""
        self.stored = [min(stored, len(sequence) - 1) for stored, sequence in zip(self.stored, sequences)]

    def draft(self, sequences: list[list[int]], num_drafts: int, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts [B, G] and the logits [B, G, V] that they were drawn from; `steps`: tokens drawn so far, int64 [B]."""
        self.generator_state[:, 2] = steps
        logits, tokens = self._catch_up(sequences), []
        all_logits = logits.new_empty(len(logits), num_drafts, logits.shape[-1], dtype=self.dtype)
        for i in range(num_drafts):
            if i > 0:
                logits = self.step(tokens[-1])
            all_logits[:, i] = logits  # the next step may overwrite them
            tokens.append(ops.sample(all_logits[:, i], **self.filters, generator_state=self.generator_state)[0])
        self.stored = [len(sequence) - 1 + num_drafts for sequence in sequences]
        return torch.stack(tokens, dim=1), all_logits

    def _catch_up(self, sequences: list[list[int]]) -> Tensor:
        """Store what the cache lacks: the last token, one before it if the last drafts were all accepted, more after
        rounds without drafts. A row that lacks less stores some again. The logits [B, V] that follow."""
        num_tokens = max(len(sequence) - stored for sequence, stored in zip(sequences, self.stored))
        first = [max(len(sequence) - num_tokens, 0) for sequence in sequences]
        rewind(self.cache, first)
        # Only a row that has ended can be shorter than what others lack.
        rows = [(sequence * num_tokens)[start : start + num_tokens] for sequence, start in zip(sequences, first)]
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


class Continuations:
    """The tokens of all rows on the host: which are new, and which rows have ended.

    Args:
        sequences: the prompts' tokens, which are appended to.
        streamer: gets the tokens [B] of a step as soon as all rows have them, or None.
    """

    def __init__(self, sequences: list[list[int]], options: GenerationOptions, streamer: Any):
        self.sequences, self.options, self.streamer = sequences, options, streamer
        self.new: list[list[int]] = [[] for _ in sequences]
        self.logprobs: list[list[float]] = [[] for _ in sequences]
        self.ended = [False for _ in sequences]
        self.num_streamed = 0

    @property
    def remaining(self) -> list[int]:
        """How many tokens each row may still get."""
        limit = self.options.max_new_tokens
        return [0 if ended else limit - len(new) for ended, new in zip(self.ended, self.new)]

    def extend(self, rows: list[list[int]], logprobs: list[list[float]]) -> None:
        """Append tokens up to the first end token and the greatest length."""
        for row, (tokens, left) in enumerate(zip(rows, self.remaining, strict=True)):
            for token, logprob in zip(tokens[:left], logprobs[row], strict=False):
                self.new[row].append(token)
                self.logprobs[row].append(logprob)
                self.sequences[row].append(token)
                if token in self.options.eos_token_id:
                    self.ended[row] = True
                    break
        if self.streamer is not None:
            self._stream()

    def _stream(self) -> None:
        width = max(map(len, self.new))
        pending = [len(new) for new, left in zip(self.new, self.remaining) if left > 0]
        for step in range(self.num_streamed, min(pending, default=width)):
            pad = self.options.pad_token_id
            self.streamer.put(torch.tensor([new[step] if step < len(new) else pad for new in self.new]))
            self.num_streamed = step + 1

    def padded(self) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, T] and their log-probabilities float32 [B, T]."""
        width, pad = max(map(len, self.new)), self.options.pad_token_id
        tokens = torch.tensor([new + [pad] * (width - len(new)) for new in self.new])
        return tokens, torch.tensor([row + [0.0] * (width - len(row)) for row in self.logprobs])


def speculate(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    options: GenerationOptions,
    speculation: Speculation,
    seeds: list[int],
    streamer: Any,
    statistics: DraftStatistics,
) -> GenerationOutput:
    """The prompts [B, P], each num_return_sequences times, with what greedy decoding or sampling adds."""
    copies, capacity = options.num_return_sequences, options.max_new_tokens + speculation.max_drafts
    prompt_of = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(copies)

    def start(model: Any) -> tuple[Tensor, KVCache]:
        return stored_prompts(model, input_ids, mask, capacity, prompt_of if copies > 1 else None)

    logits, cache = start(model)
    logits, sequences = logits[prompt_of], [input_ids[i][mask[i]].tolist() for i in prompt_of.tolist()]
    streams = [(seed, sample) for seed in seeds for sample in range(copies)]
    names = ("temperature", "top_k", "top_p", "min_p")
    filters = {name: getattr(options, name) for name in names} if options.do_sample else {"temperature": 0.0}
    if speculation.draft_model is not None:
        _, draft_cache = start(speculation.draft_model)
        drafter = ModelDrafts(speculation.draft_model, draft_cache, sequences, streams, filters, logits.dtype)
        length = DraftLength(speculation.num_draft_tokens)
    else:
        drafter = LookupDrafts(sequences, speculation.max_matching_ngram_size, logits.device)
        length = DraftLength(speculation.prompt_lookup_num_tokens)
    state = generator_state_of(streams, logits.device)
    rows, decode, clock = Continuations(sequences, options, streamer), DecodeStep(model, cache), Clock(logits.device)
    drafts, draft_logits = torch.empty(len(sequences), 0, dtype=torch.int64, device=logits.device), None
    logits = logits[:, None]
    while True:
        verified = ops.speculative_verify(logits, drafts, draft_logits, **filters, generator_state=state)
        clock.mark("verified")
        drafted, accepted = _append(rows, verified, drafts)
        statistics.drafted += sum(drafted)
        statistics.accepted += sum(accepted)
        length.learn(drafted, accepted, drafts.shape[1], clock)
        if not any(rows.remaining):
            break
        drafter.follow(sequences)
        clock.mark("begun")
        drafts, draft_logits = _propose(drafter, rows, length.choose(), state)
        clock.mark("drafted")
        rewind(cache, [len(sequence) - 1 for sequence in sequences])
        last = torch.tensor([sequence[-1] for sequence in sequences], device=drafts.device)
        if drafts.shape[1] == 0:
            logits = decode(last)[:, None]
        else:
            logits = decode.extend(torch.cat([last[:, None], drafts.clamp(min=0)], dim=1))
        statistics.rounds += 1
    statistics.new_tokens += sum(map(len, rows.new))
    tokens, logprobs = (x.to(logits.device) for x in rows.padded())
    return GenerationOutput(torch.cat([input_ids[prompt_of], tokens], dim=1), logprobs.sum(-1), logprobs)


def _propose(drafter: Any, rows: Continuations, num_drafts: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drafts [B, G] for the rows that go on. The last token that a row may get is never drafted: so it depends on the
    row alone where its drafts end."""
    limits = [max(left - 1, 0) for left in rows.remaining]
    num_drafts = min(num_drafts, max(limits))
    if num_drafts == 0:
        return torch.empty(len(limits), 0, dtype=torch.int64, device=state.device), None
    drafts, logits = drafter.draft(rows.sequences, num_drafts, state[:, 2])
    places = torch.arange(drafts.shape[1], device=drafts.device)
    limit = torch.tensor(limits, device=drafts.device)[:, None]
    return drafts.masked_fill(places >= limit, -1), logits


def _append(
    rows: Continuations, verified: tuple[Tensor, Tensor, Tensor], drafts: Tensor
) -> tuple[list[int], list[int]]:
    """Append what `speculative_verify` gave; how many tokens of each row were drafted, and how many accepted."""
    tokens, num_accepted, logprobs = verified
    counts = torch.stack([(drafts >= 0).sum(-1), num_accepted], dim=1)
    # The only wait for the device in a round; float64 holds all of it exactly.
    table = torch.cat([part.double() for part in (counts, tokens, logprobs)], dim=1).tolist()
    logprobs = [row[2 + tokens.shape[1] :] for row in table]
    wrong = [i for i, left in enumerate(rows.remaining) if left > 0 and any(x != x for x in logprobs[i])]
    if wrong:
        step = max(map(len, rows.new))
        raise ValueError(f"generate: logits must be finite, got others for sequences {wrong} by step {step}")
    drafted, accepted = [int(row[0]) for row in table], [int(row[1]) for row in table]
    rows.extend([[int(t) for t in row[2 : 3 + n]] for row, n in zip(table, accepted, strict=True)], logprobs)
    return drafted, accepted
