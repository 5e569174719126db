"""Drawing tokens: temperature, then top-k, top-p and min-p, with the semantics of transformers.

Fan et al. 2018, arXiv 1805.04833; Holtzman et al. 2020, arXiv 1904.09751; Nguyen et al. 2024, arXiv 2407.01082.

The randomness is a pure function of (seed, sample, step), so a sequence is the same alone and in any batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = (1 << 64) - 1


def _mix(state: int) -> int:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): one step of the generator from `state`."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
    return state ^ state >> 31


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1): multiples of 2^-48, so that its product with a float64 sum stays below the sum."""
    return (_mix(_mix(_mix(seed) + sample) + step) >> 16) * 2.0**-48


def kept_candidates(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, and how likely each is.

    top_k keeps all that tie with the k-th. top_p keeps a token when the mass before it is below p, in descending order
    and of equal ones the smaller token first; so the one that crosses p stays. min_p keeps what has at least min_p
    times the probability of the best token, which always stays.

    Args:
        logits: [B, V] with a finite maximum in every row. temperature > 0; top_k = 0, top_p = 1, min_p = 0: no filter.

    Returns:
        weights float64 [B, n], proportional to the probabilities, 0 for removed tokens; tokens int64 [B, n].
    """
    scores = logits.float() / temperature
    tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if 0 < top_k < scores.shape[-1]:
        scores, tokens = _top_k(scores, top_k)
    if top_p < 1:
        scores, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        tokens = tokens.gather(-1, order)
    weights = (scores - scores.amax(-1, keepdim=True)).double().exp()
    if top_p < 1:
        mass = weights.cumsum(-1)
        before = F.pad(mass[:, :-1], (1, 0), value=-1.0)
        weights = weights * (before < top_p * mass[:, -1:])
    if min_p > 0:
        weights = weights * (weights >= min_p)
    return weights, tokens


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and what ties with the last of them, as (scores, tokens) in ascending order of tokens.

    A row with fewer ties than another is filled up with -inf.
    """
    best, tokens = scores.topk(k)
    smallest = best[:, -1:]
    count = int((scores >= smallest).sum(-1).max())
    if count > k:
        best, tokens = scores.topk(count)
    tokens, order = tokens.sort(-1)
    best = best.gather(-1, order)
    return best.masked_fill(best < smallest, -torch.inf), tokens


def draw(weights: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row [B] at which the cumulated weights pass `uniforms` (float64 [B], in [0, 1))."""
    mass = weights.cumsum(-1)
    index = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    return tokens.gather(-1, index).squeeze(-1)


class Sampler:
    """Draws the next tokens of sequences that each have their own stream of random numbers.

    Args:
        streams: (seed, sample) of every row: another sample of the same prompt and seed is independent of the first.
        filters: keyword arguments of `kept_candidates`.

    Example:
        >>> sampler = Sampler([(7, 0), (8, 0)], temperature=0.8, top_k=50)
        >>> sampler(torch.randn(2, 100), step=0).shape
        torch.Size([2])
    """

    def __init__(self, streams: list[tuple[int, int]], **filters: float):
        self.streams, self.filters = streams, filters

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """Logits [B, V] -> int64 [B]."""
        numbers = [uniform(seed, sample, step) for seed, sample in self.streams]
        return draw(
            *kept_candidates(logits, **self.filters),
            torch.tensor(numbers, dtype=torch.float64, device=logits.device),
        )
