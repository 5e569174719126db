"""Exposure bias: how much worse a model goes on after text of its own than after real text of the same length.

Ranzato et al. (arXiv:1511.06732) named it; Schmidt (arXiv:1910.00292) and He et al. (arXiv:1905.10617, section 4)
measure it as here, by what a model generates after prefixes of both kinds. Both times the passages that are compared
are the model's own, of the same length; a judge sees nothing of what stands before them, so that it does not reward or
punish the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arfast.models import CausalLM

from .ngram import NGramModel

_REPEATED = 4  # tokens in a row


@dataclass(frozen=True)
class Exposure:
    """Of N passages behind each of P prefix lengths, in nats per token by which the judge finds a passage less likely
    than the real one there, [N, P]:

    own: after the prompt and so many tokens of the model's own.
    real: after the prompt and so many real tokens, as in teacher forcing.
    repeated: [N], share of 4-grams of the whole continuation that stand somewhere before them.
    """

    lengths: Sequence[int]
    own: np.ndarray
    real: np.ndarray
    repeated: np.ndarray

    def rows(self) -> list[dict[str, float]]:
        """Means by prefix length; bias = own - real, with its standard error over the passages."""
        bias = self.own - self.real
        columns = {
            "length": list(self.lengths),
            "own": self.own.mean(0).tolist(),
            "real": self.real.mean(0).tolist(),
            "bias": bias.mean(0).tolist(),
            "bias_error": (bias.std(0, ddof=1) / len(bias) ** 0.5).tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()
def measure_exposure(
    model: CausalLM,
    judge: NGramModel,
    windows: torch.Tensor,
    prompt_length: int,
    lengths: Sequence[int],
    passage: int,
    allowed: torch.Tensor,
    seed: int,
) -> Exposure:
    """Let a model continue real text, at temperature 1.

    Args:
        windows: int64 [N, T], real text: prompt_length + the last of lengths + passage tokens at least.
        prompt_length: tokens that are always given.
        lengths: tokens between the prompt and a passage.
        passage: tokens that are compared.
        allowed: bool [V], what may be drawn: no special tokens.
        seed: of the draws.
    """
    options = dict(do_sample=True, top_k=0, allowed_tokens=allowed, eos_token_id=[])
    prompts, new = windows[:, :prompt_length], lengths[-1] + passage
    whole = model.generate(prompts, max_new_tokens=new, seed=seed, **options).numpy()
    own, real = [], []
    for number, length in enumerate(lengths, 1):
        start = prompt_length + length
        truth = judge.log_prob(windows[:, start : start + passage].numpy()).mean(1)
        draws = seed + number * len(windows)  # prompt i draws with its seed + i
        after_real = model.generate(windows[:, :start], max_new_tokens=passage, seed=draws, **options)[:, start:]
        own.append(truth - judge.log_prob(whole[:, start : start + passage]).mean(1))
        real.append(truth - judge.log_prob(after_real.numpy()).mean(1))
    repeated = np.array([repetition(row, prompt_length) for row in whole])
    return Exposure(lengths, np.stack(own, 1), np.stack(real, 1), repeated)


def repetition(tokens: np.ndarray, prompt_length: int) -> float:
    """Share of the 4-grams after the prompt that stand somewhere before in the row.

    >>> repetition(np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 9]), prompt_length=5)
    0.5
    """
    seen, repeated = set(), 0
    starts = len(tokens) - _REPEATED + 1
    for start in range(starts):
        gram = tuple(tokens[start : start + _REPEATED].tolist())
        repeated += start >= prompt_length and gram in seen
        seen.add(gram)
    return repeated / (starts - prompt_length)
