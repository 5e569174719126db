"""Checks of the fields of configurations, with the uniform error."""

import math
from collections.abc import Mapping
from typing import Any

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**1023 if isinstance(value, int) else math.isfinite(value)  # JSON has integers beyond floats


class ConfigChecks:
    """Base of frozen dataclasses that check their fields: each method raises ValueError, naming the class, the field,
    the rule and the value."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require(self, valid: bool, name: str, rule: str, *actual: Any) -> None:
        """actual: what was given, when it is not the value of the field `name`."""
        if not valid:
            (given,) = actual or (getattr(self, name),)
            raise ValueError(f"{type(self).__name__}: {name} must {rule}, got {given!r:.100}")

    def _check_integers(self, bounds: Mapping[str, tuple[int, int]], optional: tuple[str, ...] = ()) -> None:
        """bounds: least and largest value of each field; the optional ones may be None."""
        for name, (low, high) in bounds.items():
            value, or_none = getattr(self, name), name in optional
            valid = (or_none and value is None) or (is_integer(value) and low <= value <= high)
            self._require(valid, name, f"be {'None or ' * or_none}an integer in [{low}, {high}]")

    def _check_numbers(self, intervals: Mapping[str, tuple[str, float, float, str]]) -> None:
        """intervals: of each field, as ("[", 0.0, 1.0, ")"). The fields become floats."""
        for name, (left, low, high, right) in intervals.items():
            value = getattr(self, name)
            valid = is_number(value) and low <= value <= high
            valid = valid and (left == "[" or value > low) and (right == "]" or value < high)
            self._require(valid, name, f"be a number in {left}{low}, {high}{right}")
            self._set(name, float(value))  # torch takes no integers beyond int64

    def _check_booleans(self, *names: str) -> None:
        for name in names:
            self._require(isinstance(getattr(self, name), bool), name, "be true or false")

    def _check_special_tokens(self) -> None:
        """None or a token each, of which eos_token_id may be several."""
        if isinstance(self.eos_token_id, list):
            self._set("eos_token_id", tuple(self.eos_token_id))
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            tokens = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            valid = all(token is None or (is_integer(token) and 0 <= token < self.vocab_size) for token in tokens)
            self._require(valid, name, f"be None or in [0, vocab_size={self.vocab_size})")
