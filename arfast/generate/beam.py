"""Beam search with the semantics of transformers: score = sum of log-probabilities / length^length_penalty; with groups
of beams that shun each other's tokens (Vijayakumar et al. 2016, arXiv 1610.02424)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arfast import ops
from arfast.generate.decode import STEPS_AT_ONCE, DecodeStep, looks_up
from arfast.generate.options import GenerationOptions
from arfast.generate.processors import Processor, make_processors
from arfast.generate.prompts import stored_prompts
from arfast.generate.sampling import generator_state_of
from arfast.nn import BranchedKVCache
from arfast.ops.beam_step import CAN_CHANGE, GO_ON, NOT_FINITE

GOES_ON = CAN_CHANGE | GO_ON


class BeamSearch:
    """B searches with K beams each, in G groups of K / G: row (g * B + b) * K / G + k is beam k of item b and group g.

    `step` takes the logits of all rows and sets `tokens`, which come next; it does not wait for a GPU. `is_done` says
    whether to go on, and at the end `hypotheses` gives the result.

    Args:
        batch: B.
        options: beams, penalties, end tokens.
        device: of the logits.
        prompts: int64 [B, P], needed by processors.
        processors: what changes log-probabilities before beams are chosen.
        cache: where beams share their past, branched into these rows.
        generator_state: int64 [B, 3], see `ops.sample`: draws continuations without replacement.

    Attributes:
        tokens: int64 [B * K].
    """

    def __init__(
        self,
        batch: int,
        options: GenerationOptions,
        device: torch.device,
        prompts: Tensor | None = None,
        processors: Sequence[Processor] = (),
        cache: BranchedKVCache | None = None,
        generator_state: Tensor | None = None,
    ):
        self.options, self.processors, self.generator_state = options, processors, generator_state
        self.num_groups = options.num_beam_groups
        self.tokens = torch.zeros(batch * options.num_beams, dtype=torch.int64, device=device)
        self.states = [self._state(batch, group, cache, device) for group in range(self.num_groups)]
        self.status = torch.stack([state.status for state in self.states])  # [G, B], in one place to be read at once
        for state, status in zip(self.states, self.status, strict=True):
            state.status = status
        self.history = [prompts] * self.num_groups if processors else None
        allowed = options.allowed_tokens
        self._banned = None if allowed is None or options.do_sample else ~allowed.to(device)[None]

    def _state(self, batch: int, group: int, cache: BranchedKVCache | None, device: torch.device) -> ops.BeamState:
        options = self.options
        state = ops.BeamState.start(
            batch,
            options.num_beams // self.num_groups,
            options.max_new_tokens,
            ends=tuple(options.eos_token_id),
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            min_length=0 if options.do_sample else options.min_new_tokens,
            device=device,
        )
        rows = len(state.next_tokens)
        mine = slice(group * rows, (group + 1) * rows)
        state.next_tokens = self.tokens[mine]
        if cache is not None:
            state.slots, state.own_slots = cache.slots[mine], cache.own_slots[mine]
            state.prompt_lengths = cache.prompts.lengths
        return state

    @property
    def is_plain(self) -> bool:
        """Whether beams are chosen by the model's log-probabilities alone."""
        plain = self.num_groups == 1 and not self.processors and self._banned is None and self.generator_state is None
        return plain and self.options.min_new_tokens == 0

    def step(self, logits: Tensor) -> None:
        """Logits [B * K, V], or [B, V] after the prompts, where an item has no beams yet."""
        if self.num_groups > 1 or self.processors:
            return self._step_in_turn(logits)
        ops.beam_step(logits, self.states[0], banned=self._banned, generator_state=self.generator_state)

    def _step_in_turn(self, logits: Tensor) -> None:
        """Group after group, after what changes their scores."""
        diverse = self.num_groups > 1 and self.options.diversity_penalty > 0
        by_score = diverse or bool(self.processors)
        scores = logits.float().log_softmax(-1) if by_score else logits
        batch, first = len(self.states[0].lengths), len(logits) < len(self.tokens)
        # [B, V], how often the groups before chose a token in this step
        counts = torch.zeros(batch, logits.shape[1], device=logits.device) if diverse else None
        for group, state in enumerate(self.states):
            mine = scores.clone() if first and by_score else scores if first else scores.chunk(self.num_groups)[group]
            if diverse and group > 0:
                mine -= self.options.diversity_penalty * counts.repeat_interleave(len(mine) // batch, 0)
            for processor in self.processors:
                mine = processor(self.history[group], mine)
            options = dict(log_probs=by_score, generator_state=self.generator_state)
            ops.beam_step(mine, state, banned=self._banned, **options)
            if diverse:
                chosen, goes_on = state.next_tokens.view(batch, -1), (state.status & GOES_ON) == GOES_ON
                counts.scatter_add_(1, chosen, goes_on[:, None].expand(chosen.shape).float())
            if self.processors:
                self.history[group] = torch.cat([self.history[group][state.rows], state.next_tokens[:, None]], dim=1)

    def is_done(self) -> bool:
        """Whether no item can change any more, or none has a beam that goes on; waits for the device.

        Raises:
            ValueError: logits of an item were not finite.
        """
        status = self.status.tolist()
        flags = set().union(*status)
        if any(item & NOT_FINITE for item in flags):
            broken = sorted({i for group in status for i, item in enumerate(group) if item & NOT_FINITE})
            step = int(self.states[0].lengths.max())
            raise ValueError(f"generate: logits must be finite, got others for prompts {broken} by step {step}")
        return not any(item & GOES_ON == GOES_ON for item in flags)

    def hypotheses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens int64 [B * n, T], their log-probabilities [B * n, T], scores [B * n]) of the n = num_return_sequences
        best per item, padded at the end.

        An item has fewer only if its vocabulary or the constraints leave no more; then the rest is padding with the
        score -1e9.

        Raises:
            ValueError: an item has none.
        """
        options, (batch, beams) = self.options, self.states[0].running.shape
        found = [ops.beam_hypotheses(state, pad_token_id=options.pad_token_id) for state in self.states]
        tokens, log_probs, lengths, scores = (
            torch.cat([x.unflatten(0, (batch, beams)) for x in parts], dim=1) for parts in zip(*found, strict=True)
        )
        nothing = (lengths == 0).all(-1).nonzero().flatten().tolist()
        if nothing:
            raise ValueError(f"generate: constraints must leave a token to every prompt, got none for {nothing}")
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : options.num_return_sequences]
        longest, items = int(lengths.gather(1, best).max()), torch.arange(batch, device=best.device)[:, None]
        tokens, log_probs, scores = (x[items, best].flatten(0, 1) for x in (tokens, log_probs, scores))
        return tokens[:, :longest], log_probs[:, :longest], scores


def _prompt_of(batch: int, options: GenerationOptions, device: torch.device) -> Tensor:
    """int64 [B * K]: the item of every row."""
    groups = options.num_beam_groups
    return torch.arange(batch, device=device).repeat_interleave(options.num_beams // groups).repeat(groups)


def beam_search(
    model: Any, input_ids: Tensor, mask: Tensor, options: GenerationOptions, seeds: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Beams that continue the prompts [B, P]: see `BeamSearch.hypotheses`. seeds: one per prompt, with do_sample."""
    batch = len(input_ids)
    prompt_of = _prompt_of(batch, options, input_ids.device)
    logits, cache = stored_prompts(model, input_ids, mask, options.max_new_tokens, prompt_of)
    processors = make_processors(options, (~mask).sum(-1), input_ids.shape[1], batch)
    state = generator_state_of([(seed, 0) for seed in seeds], logits.device) if options.do_sample else None
    search = BeamSearch(batch, options, logits.device, input_ids, processors, cache, state)
    search.step(logits)
    decode = DecodeStep(model, cache, None if processors else search.step)
    dense, step = decode.dense if search.is_plain else None, 0
    while not (looks_up(step, options.max_new_tokens, logits) and search.is_done()):
        if dense is not None:
            step += dense.search(search.states[0], min(STEPS_AT_ONCE, options.max_new_tokens - 1 - step))
            continue
        logits = decode(search.tokens)
        if processors:
            search.step(logits)
        step += 1
    return search.hypotheses()
