"""Stages of a run: where, counted in tokens, the batch size, the sequence length and the rotary frequencies change.

Grattafiori et al., "The Llama 3 Herd of Models" (arXiv:2407.21783, section 3.4): small batches and short sequences
first, for stability and speed; the base of the rotary frequencies grows with the length (Xiong et al.,
arXiv:2309.16039).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stretch of a run in which all steps have the same shape.

    first_step, from_tokens: steps and tokens before it.
    batch_size: rows of the longest sequence length per optimizer step.
    seqlen: of its sequences; `pieces` of them make a row, so that a step has the same tokens whatever its length.
    rope_theta: base of the rotary frequencies; None: the model's own.
    """

    first_step: int
    from_tokens: int
    batch_size: int
    seqlen: int
    pieces: int
    rope_theta: float | None

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.pieces * self.seqlen


class Stages:
    """The stages of a run in order, and its length in steps and in tokens.

    Args:
        batch_ramp: (from_tokens, batch_size) of every stage, the first from 0; empty: one stage.
        seqlen_ramp: (from_tokens, seqlen) or (from_tokens, seqlen, rope_theta), likewise.
        batch_size, seqlen: the last and, for seqlen, the longest of them.
        max_tokens, max_steps: the first limit reached ends the run; its last step is a whole one.

    Raises:
        ValueError: naming the ramp, the rule and the entry.
    """

    def __init__(
        self,
        batch_ramp: Sequence[Sequence[int]],
        seqlen_ramp: Sequence[Sequence[Any]],
        batch_size: int,
        seqlen: int,
        max_tokens: int | None,
        max_steps: int | None,
    ) -> None:
        self._batch_sizes = _checked_ramp("batch_ramp", batch_ramp, "batch_size", batch_size)
        self._seqlens = _checked_ramp("seqlen_ramp", seqlen_ramp, "seqlen", seqlen)
        for _, length, *_ in self._seqlens:
            _require(seqlen % length == 0 and length >= 2, "seqlen_ramp", f"divide seqlen={seqlen}", length)
        self._stages = self._make_stages(seqlen)
        by_tokens = math.inf if max_tokens is None else self._steps_for(max_tokens)
        self.num_steps = int(min(by_tokens, math.inf if max_steps is None else max_steps))
        self.total_tokens = self.tokens_after(self.num_steps)
        for name, ramp in (("batch_ramp", self._batch_sizes), ("seqlen_ramp", self._seqlens)):
            rule = f"begin its last stage before the run ends after {self.total_tokens} tokens"
            _require(ramp[-1][0] < self.total_tokens, name, rule, ramp[-1][0])

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def at(self, tokens: int) -> Stage:
        """The stage of the step that begins after ``tokens`` tokens."""
        return next(stage for stage in reversed(self._stages) if stage.from_tokens <= tokens)

    def tokens_after(self, steps: int) -> int:
        stage = next(stage for stage in reversed(self._stages) if stage.first_step <= steps)
        return stage.from_tokens + (steps - stage.first_step) * stage.tokens_per_step

    def _make_stages(self, longest: int) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        for edge in sorted({entry[0] for entry in (*self._batch_sizes, *self._seqlens)}):
            first_step = 0
            if stages:
                before = stages[-1]
                steps, rest = divmod(edge - before.from_tokens, before.tokens_per_step)
                name = "batch_ramp" if edge in [entry[0] for entry in self._batch_sizes] else "seqlen_ramp"
                rule = f"begin a stage at a step: {before.from_tokens} + a multiple of {before.tokens_per_step} tokens"
                _require(rest == 0, name, rule, edge)
                first_step = before.first_step + steps
            (batch_size,), (seqlen, theta) = _in_force(self._batch_sizes, edge), _in_force(self._seqlens, edge)
            stages.append(Stage(first_step, edge, batch_size, seqlen, longest // seqlen, theta))
        return tuple(stages)

    def _steps_for(self, tokens: int) -> int:
        stage = next(stage for stage in reversed(self._stages) if stage.from_tokens < tokens)
        return stage.first_step - (stage.from_tokens - tokens) // stage.tokens_per_step


def _in_force(ramp: list[tuple], tokens: int) -> tuple:
    return next(values for start, *values in reversed(ramp) if start <= tokens)


def _checked_ramp(name: str, ramp: Sequence[Sequence[Any]], field: str, last: int) -> list[tuple]:
    """Entries of full length, in order; an empty ramp is one stage."""
    has_theta = name == "seqlen_ramp"
    entries = [tuple(entry) for entry in ramp] or [(0, last)]
    for entry in entries:
        theta = entry[2:]
        ok = len(entry) == 2 or (has_theta and len(entry) == 3)
        ok = ok and all(type(value) is int and (0, 1)[i] <= value < 2**63 for i, value in enumerate(entry[:2]))
        ok = ok and all(type(value) in (int, float) and 0 < value <= sys.float_info.max for value in theta)
        shape = f"[from_tokens, {field}]" + (" or [from_tokens, seqlen, rope_theta]" if has_theta else "")
        _require(ok, name, f"hold {shape}", list(entry))
    starts = [entry[0] for entry in entries]
    _require(starts[0] == 0, name, "begin at 0 tokens", starts[0])
    _require(all(a < b for a, b in zip(starts, starts[1:])), name, "increase in tokens", starts)
    _require(entries[-1][1] == last, name, f"end with {field}={last}", entries[-1][1])
    if not has_theta:
        return entries
    theta, filled = None, []
    for start, seqlen, *given in entries:
        theta = float(given[0]) if given else theta
        filled.append((start, seqlen, theta))
    return filled


def _require(ok: bool, name: str, rule: str, actual: Any) -> None:
    if not ok:
        raise ValueError(f"TrainConfig: {name} must {rule}, got {actual!s:.200}")
