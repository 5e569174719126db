"""What changes the scores of the next tokens before one is chosen: penalties, bans and filters, in transformers' order.

A processor takes the tokens of every row so far and the scores of what may follow, which it may change in place, and
returns the scores: a processor of transformers is one too. Scores are logits, or in beam search log-probabilities,
which are not normalised again.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arfast.generate.options import GenerationOptions, require

Processor = Callable[[Tensor, Tensor], Tensor]  # input_ids [R, T], scores [R, V] -> scores [R, V]


def make_processors(
    options: GenerationOptions, padding: Tensor, prompt_length: int, num_prompts: int
) -> list[Processor]:
    """The processors that `options` ask for, in the order in which they apply.

    Args:
        padding: int64 [num_prompts], tokens of padding before each prompt.
        prompt_length: of the prompts with their padding.
        num_prompts: B. The rows are a multiple of them, those of a prompt neighbours.
    """
    processors: list[Processor] = []
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenalty(options.repetition_penalty, padding))
    # What the search itself bans needs no processor, unless another one is to see it.
    by_search = options.num_beams > 1 and not options.do_sample and not options.logits_processor
    if options.min_new_tokens > 0 and options.eos_token_id and not by_search:
        processors.append(MinNewTokens(options.min_new_tokens, options.eos_token_id, prompt_length))
    if options.prefix_allowed_tokens_fn is not None:
        function = options.prefix_allowed_tokens_fn
        processors.append(PrefixConstraint(function, options, num_prompts, prompt_length))
    if options.allowed_tokens is not None and not by_search:
        processors.append(AllowedTokens(options.allowed_tokens.to(padding.device)))
    processors += options.logits_processor
    if options.do_sample and options.num_beams > 1:  # elsewhere ops.sample filters
        processors += _filters(options)
    return processors


def _filters(options: GenerationOptions) -> list[Processor]:
    """Temperature, then the filters, which leave as many tokens as could all end a hypothesis, and one more."""
    fewest = 1 + len(options.eos_token_id)
    filters: list[Processor] = []
    if options.temperature != 1:
        filters.append(lambda input_ids, scores: scores.div_(options.temperature))
    if options.top_k > 0:
        filters.append(lambda input_ids, scores: keep_top_k(scores, max(options.top_k, fewest)))
    if options.top_p < 1:
        filters.append(lambda input_ids, scores: keep_top_p(scores, options.top_p, fewest))
    if options.min_p > 0:
        filters.append(lambda input_ids, scores: keep_min_p(scores, options.min_p, fewest))
    return filters


class RepetitionPenalty:
    """Divides positive scores of tokens that a row has, its prompt included, by the penalty, and multiplies others.

    Keskar et al. 2019, arXiv 1909.05858, section 4.1. Unlike in transformers padding is no part of the prompt.
    """

    def __init__(self, penalty: float, padding: Tensor):
        self.penalty, self.padding = penalty, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        padding = self.padding.repeat_interleave(len(input_ids) // len(self.padding))
        own = torch.where(columns < padding[:, None], input_ids[:, -1:], input_ids)
        old = scores.gather(1, own)
        return scores.scatter_(1, own, torch.where(old < 0, old * self.penalty, old / self.penalty))


class MinNewTokens:
    """No end before so many new tokens."""

    def __init__(self, min_new_tokens: int, ends: Sequence[int], prompt_length: int):
        self.first_end = prompt_length + min_new_tokens
        self.ends = list(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.first_end:
            for end in self.ends:
                scores[:, end] = -math.inf
        return scores


class AllowedTokens:
    """Nothing but the tokens of a mask, bool [V]."""

    def __init__(self, allowed: Tensor):
        self.allowed = allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill_(~self.allowed, -math.inf)


class PrefixConstraint:
    """Nothing but what a function of (the prompt's index, the tokens so far) gives (De Cao et al. 2021, arXiv
    2010.00904, section 3.2).

    Args:
        allowed_tokens: the function.
        options: the tokens that end a row, about which nothing more is asked. A beam for which the function gives
            nothing goes nowhere; without beams that is an error.
        num_prompts, prompt_length: the prompts', padding included.
    """

    def __init__(
        self,
        allowed_tokens: Callable[[int, Tensor], Sequence[int]],
        options: GenerationOptions,
        num_prompts: int,
        prompt_length: int,
    ):
        self.allowed_tokens, self.has_beams = allowed_tokens, options.num_beams > 1
        self.ends = set(options.eos_token_id)
        self.num_prompts, self.prompt_length = num_prompts, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows_per_prompt = len(input_ids) // self.num_prompts
        banned = torch.ones(scores.shape, dtype=torch.bool)
        for row, tokens in enumerate(input_ids):
            if self.ends.isdisjoint(tokens[self.prompt_length :].tolist()):
                banned[row, self._allowed(row // rows_per_prompt, tokens, scores.shape[1])] = False
            else:
                banned[row] = False
        return scores.masked_fill_(banned.to(scores.device), -math.inf)

    def _allowed(self, prompt: int, tokens: Tensor, vocab_size: int) -> Tensor:
        name, allowed = "prefix_allowed_tokens_fn", self.allowed_tokens(prompt, tokens)
        allowed = torch.as_tensor(allowed, dtype=torch.int64, device="cpu").flatten()
        some = self.has_beams or len(allowed) > 0
        require(some, name, "allow at least one token", f"none for prompt {prompt}")
        inside = bool(((allowed >= 0) & (allowed < vocab_size)).all())
        require(inside, name, f"give tokens in [0, vocab_size={vocab_size})", allowed.tolist())
        return allowed


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Bans all but the k best tokens of each row and what ties with the last of them (Fan et al. 2018, 1805.04833)."""
    worst = scores.topk(min(top_k, scores.shape[1]), dim=-1).values[:, -1:]
    return scores.masked_fill_(scores < worst, -math.inf)


def keep_top_p(scores: Tensor, top_p: float, fewest: int = 1) -> Tensor:
    """Bans a token when the probability of those before it is at least p (Holtzman et al. 2020, arXiv 1904.09751)."""
    best_first, tokens = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = best_first.softmax(-1)
    banned = probabilities.cumsum(-1) - probabilities >= top_p
    banned[:, :fewest] = False
    return scores.masked_fill_(torch.empty_like(banned).scatter_(1, tokens, banned), -math.inf)


def keep_min_p(scores: Tensor, min_p: float, fewest: int = 1) -> Tensor:
    """Bans a token less probable than min_p times the best one (Nguyen et al. 2024, arXiv 2407.01082)."""
    best = scores.topk(min(fewest, scores.shape[1]), dim=-1).values
    banned = scores < torch.minimum(best[:, :1] + math.log(min_p), best[:, -1:])
    return scores.masked_fill_(banned, -math.inf)
