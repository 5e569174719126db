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
from arfast.generate.drafts import LookupDrafts, ModelDrafts, rewind
from arfast.generate.options import PROCESSOR_OPTIONS, GenerationOptions, require
from arfast.generate.output import GenerationOutput
from arfast.generate.prompts import stored_prompts
from arfast.generate.sampling import generator_state_of
from arfast.models.checks import is_integer
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
            ours, theirs = model.head_weight.device, self.draft_model.head_weight.device
            require(theirs == ours, "draft_model", f"be on the model's device {ours}", theirs)
        if self.is_on:
            splits = [type(m).__name__ for m in (model, self.draft_model) if getattr(m, "splits_documents", False)]
            require(not splits, "model", "be decoder-only with drafts", ", ".join(splits))
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


class GrowingRows:
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

    def extend(self, rows: list[list[int]], logprobs: list[list[float]]) -> list[int]:
        """Append tokens up to the first end token and the greatest length; how many."""
        before = [len(new) for new in self.new]
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
        return [len(new) - count for new, count in zip(self.new, before, strict=True)]

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
    copies, longest = options.num_return_sequences, options.max_new_tokens
    capacity = longest + min(speculation.max_drafts, longest)
    prompt_of = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(copies)

    def start(model: Any) -> tuple[Tensor, KVCache]:
        return stored_prompts(model, input_ids, mask, capacity, prompt_of if copies > 1 else None)

    logits, cache = start(model)
    logits, sequences = logits[prompt_of], [input_ids[i][mask[i]].tolist() for i in prompt_of.tolist()]
    streams = [(seed, sample) for seed in seeds for sample in range(copies)]
    if speculation.draft_model is not None:
        _, draft_cache = start(speculation.draft_model)
        drafter = ModelDrafts(speculation.draft_model, draft_cache, sequences, streams, options.filters, logits.dtype)
        length = DraftLength(speculation.num_draft_tokens)
    else:
        drafter = LookupDrafts(sequences, speculation.max_matching_ngram_size, logits.device)
        length = DraftLength(speculation.prompt_lookup_num_tokens)
    state = generator_state_of(streams, logits.device)
    rows, decode, clock = GrowingRows(sequences, options, streamer), DecodeStep(model, cache), Clock(logits.device)
    drafts, draft_logits = torch.empty(len(sequences), 0, dtype=torch.int64, device=logits.device), None
    logits = logits[:, None]
    while True:
        verified = ops.speculative_verify(logits, drafts, draft_logits, **options.filters, generator_state=state)
        clock.mark("verified")
        drafted, accepted, kept = _append(rows, verified, drafts)
        statistics.drafted += sum(drafted)
        statistics.accepted += sum(kept)
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


def _propose(drafter: Any, rows: GrowingRows, num_drafts: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drafts [B, G] for the rows that go on. The last token that a row may get is never drafted: so it depends on the
    row alone where its drafts end."""
    limits = [max(left - 1, 0) for left in rows.remaining]
    num_drafts = min(num_drafts, max(limits))
    if num_drafts == 0:
        return torch.empty(len(limits), 0, dtype=torch.int64, device=state.device), None
    drafts, logits = drafter.draft(rows.sequences, num_drafts, state[:, 2])
    if drafts.shape[1] <= min(limits):
        return drafts, logits
    places = torch.arange(drafts.shape[1], device=drafts.device)
    limit = torch.tensor(limits, device=drafts.device)[:, None]
    return drafts.masked_fill(places >= limit, -1), logits


def _on_host(tokens: Tensor, num_accepted: Tensor, logprobs: Tensor, drafts: Tensor) -> tuple[list, list, list, list]:
    """All of it as lists; the only wait for the device in a round."""
    if tokens.is_cuda:
        parts = (tokens, num_accepted[:, None], logprobs, drafts)
        table = torch.cat([part.double() for part in parts], dim=1).cpu()  # float64 holds all of it exactly
        tokens, num_accepted, logprobs, drafts = table.split([part.shape[1] for part in parts], dim=1)
        tokens, num_accepted, drafts = tokens.long(), num_accepted[:, 0].long(), drafts.long()
    return tokens.tolist(), num_accepted.tolist(), logprobs.tolist(), drafts.tolist()


def _append(
    rows: GrowingRows, verified: tuple[Tensor, Tensor, Tensor], drafts: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """Append what `speculative_verify` gave; how many tokens of each row were drafted, accepted, and kept, as an end
    token may have been among them."""
    tokens, accepted, logprobs, proposed = _on_host(*verified, drafts)
    wrong = [i for i, left in enumerate(rows.remaining) if left > 0 and any(x != x for x in logprobs[i])]
    if wrong:
        step = max(map(len, rows.new))
        raise ValueError(f"generate: logits must be finite, got others for sequences {wrong} by step {step}")
    drafted = [sum(token >= 0 for token in row) for row in proposed]
    added = rows.extend([row[: n + 1] for row, n in zip(tokens, accepted, strict=True)], logprobs)
    return drafted, accepted, [min(pair) for pair in zip(accepted, added, strict=True)]
