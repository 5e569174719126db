"""What `generate` is asked to do, checked once."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arfast.models.checks import is_integer

# What changes scores before a token is chosen, and the values that leave them as they are.
PROCESSOR_OPTIONS = {
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "allowed_tokens": None,
    "prefix_allowed_tokens_fn": None,
    "logits_processor": (),
}
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}


def require(condition: bool, argument: str, rule: str, got: Any) -> None:
    """The uniform error of `generate`."""
    if not condition:
        raise ValueError(f"generate: {argument} must {rule}, got {got}")


def describe(value: Any) -> str:
    """What a message says of an argument that should have been another kind of tensor."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The arguments of `generate` under the same names; eos_token_id is a tuple, pad_token_id a token.

    vocab_size: the model's, which allowed_tokens must have.
    """

    max_new_tokens: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    vocab_size: int = 0
    allowed_tokens: Tensor | None = None
    prefix_allowed_tokens_fn: Callable | None = None
    logits_processor: Sequence[Callable] = ()

    @property
    def filters(self) -> dict[str, float]:
        """How `arfast.ops.sample` draws, or takes the best token."""
        return {name: getattr(self, name) for name in _SAMPLING_DEFAULTS} if self.do_sample else {"temperature": 0.0}

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 1, name, "be a positive integer", repr(value))
        require(isinstance(self.do_sample, bool), "do_sample", "be a bool", repr(self.do_sample))
        self._check_sampling()
        self._check_beams()
        self._check_constraints()

    def _check_sampling(self) -> None:
        number, value = _is_number, self.temperature
        finite = number(value) and 0 < value <= torch.finfo(torch.float32).max
        require(finite, "temperature", "be a positive float32", repr(value))
        require(is_integer(self.top_k) and self.top_k >= 0, "top_k", "be an integer >= 0", repr(self.top_k))
        require(number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "be in [0, 1]", repr(self.top_p))
        require(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "be in [0, 1]", repr(self.min_p))
        ignored = [name for name, default in _SAMPLING_DEFAULTS.items() if getattr(self, name) != default]
        if ignored and not self.do_sample:
            warnings.warn(f"generate: {', '.join(ignored)} have no effect without do_sample=True", stacklevel=5)

    def _check_beams(self) -> None:
        penalty, stopping, returned = self.length_penalty, self.early_stopping, self.num_return_sequences
        finite = _is_number(penalty) and abs(penalty) < float("inf")
        require(finite, "length_penalty", "be a finite number", repr(penalty))
        known = isinstance(stopping, bool) or stopping == "never"
        require(known, "early_stopping", 'be True, False or "never"', repr(stopping))
        groups, diversity = self.num_beam_groups, self.diversity_penalty
        divides = is_integer(groups) and groups >= 1 and self.num_beams % groups == 0
        require(divides, "num_beam_groups", f"divide num_beams={self.num_beams}", repr(groups))
        finite = _is_number(diversity) and 0 <= diversity < float("inf")
        require(finite, "diversity_penalty", "be a number >= 0", repr(diversity))
        if groups > 1:
            require(not self.do_sample, "do_sample", "be False with num_beam_groups > 1", self.do_sample)
        elif diversity > 0:
            warnings.warn("generate: diversity_penalty has no effect without num_beam_groups > 1", stacklevel=5)
        if self.num_beams > 1:
            rule = f"be at most num_beams={self.num_beams}"
            require(returned <= self.num_beams, "num_return_sequences", rule, returned)
            require(self.num_beams <= 128, "num_beams", "be at most 128", self.num_beams)
            ends = len(self.eos_token_id)
            require(ends <= 8, "eos_token_id", "be at most 8 tokens with num_beams > 1", ends)
        elif not self.do_sample:
            require(returned == 1, "num_return_sequences", "be 1 in greedy decoding", returned)

    def _check_constraints(self) -> None:
        penalty, fewest, allowed = self.repetition_penalty, self.min_new_tokens, self.allowed_tokens
        positive = _is_number(penalty) and 0 < penalty < float("inf")
        require(positive, "repetition_penalty", "be a positive number", repr(penalty))
        rule = f"be an integer in [0, max_new_tokens={self.max_new_tokens}]"
        require(is_integer(fewest) and 0 <= fewest <= self.max_new_tokens, "min_new_tokens", rule, repr(fewest))
        if allowed is not None:
            is_mask = isinstance(allowed, Tensor) and allowed.dtype == torch.bool
            rule = f"be a bool tensor [vocab_size={self.vocab_size}]"
            require(is_mask and allowed.shape == (self.vocab_size,), "allowed_tokens", rule, describe(allowed))
            require(bool(allowed.any()), "allowed_tokens", "allow at least one token", "none")
        function, processors = self.prefix_allowed_tokens_fn, self.logits_processor
        require(function is None or callable(function), "prefix_allowed_tokens_fn", "be a function", repr(function))
        valid = isinstance(processors, (list, tuple)) and all(map(callable, processors))
        require(valid, "logits_processor", "be a list of functions", repr(processors))


def special_tokens(
    config: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[tuple[int, ...], int | None]:
    """The end tokens (None: the configuration's; several are allowed) and the padding token, if one is known."""
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = () if eos is None else (eos,) if is_integer(eos) else tuple(eos)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    for name, tokens in (("eos_token_id", eos), ("pad_token_id", () if pad is None else (pad,))):
        valid = all(is_integer(token) and 0 <= token < config.vocab_size for token in tokens)
        require(valid, name, f"be in [0, vocab_size={config.vocab_size})", list(tokens))
    return tuple(dict.fromkeys(eos)), pad
