"""Drawing the next tokens: temperature, then top-k, top-p and min-p, with the semantics of transformers.

Fan et al. 2018, arXiv 1805.04833; Holtzman et al. 2020, arXiv 1904.09751; Nguyen et al. 2024, arXiv 2407.01082.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.ops._library import needs_grad, register_fake

_ops = torch.ops.arfast

# 2^-f on [0, 1): minimax, in units of 2^-31
_POLYNOMIAL = (234126, 2737501, 20571132, 119165493, 515877902, 1488521986, 1 << 31)
_MASK = (1 << 64) - 1


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    The score of token v is s_v = logits[v] / temperature in float32, its weight 2^40 exp(s_v - max s), an integer with
    a relative error of 2e-8 at most. Sums of weights are exact, so a row draws the same token alone, in any batch, with
    any number of threads and on every device. NaN counts as -inf. Such tokens have no weight, nor have scores 28 below
    the largest; if that is +inf, nothing below it has. Larger scores go first, then the smaller token. In this order:

    top_k keeps the k best and what ties with the last of them; top_p keeps a token when the weights before it sum up to
    less than top_p of what top_k left, so the one that crosses stays; min_p keeps what has at least min_p times the
    weight of the best token, which always stays. Of what is kept, the drawn token is the first, in ascending order, at
    which the running sum of weights exceeds the random number, uniform below their sum.

    Args:
        logits: [R, V], float32, bfloat16 or float16, or float64 on the CPU, which is rounded to float32; V < 2^24.
        temperature: >= 0; 0 takes the best token.
        top_k: >= 0; 0 is off.
        top_p: in [0, 1]; 1 is off, 0 takes the best token.
        min_p: in [0, 1]; 0 is off.
        generator_state: [R, 3] int64, a row's (seed, sample, step), of which the random number is a pure function. The
            call adds 1 to the step, on the device: a captured CUDA graph draws anew whenever it is replayed.

    Returns:
        tokens [R] int64; logprobs [R] float32, their natural log-probabilities under the model's own distribution:
        log_softmax of the logits, without temperature and filters. A row with nothing but -inf and NaN gives token 0
        and log-probability NaN. No gradient.

    Raises:
        RuntimeError: an argument does not fit: `sample: <argument> must <rule>, got <actual>`.

    Example:
        >>> state = torch.tensor([[seed, 0, 0] for seed in (7, 8)])
        >>> tokens, logprobs = sample(torch.randn(2, 1000), temperature=0.8, top_k=50, generator_state=state)
        >>> tokens.shape, state[:, 2].tolist()
        (torch.Size([2]), [1, 1])
    """
    if needs_grad(logits):
        logits = logits.detach()
    return _ops.sample(logits, temperature, top_k, top_p, min_p, generator_state)


def sample_reference(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator_state):
    """The specification of `sample` in plain torch, for V < 2^23; it leaves `generator_state` alone."""
    weights = kept_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mass = weights.cumsum(-1)
    numbers = [random_bits(*row) * m >> 48 for row, m in zip(generator_state.tolist(), mass[:, -1].tolist())]
    tokens = (mass > mass.new_tensor(numbers)[:, None]).byte().argmax(-1)
    tokens = tokens.masked_fill(weights.sum(-1) == 0, 0)
    wide = logits.float().to(torch.promote_types(logits.dtype, torch.float32))
    return tokens, torch.log_softmax(wide, -1).gather(-1, tokens[:, None]).squeeze(-1)


def kept_weights(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """int64 [R, V]: the weights of `sample`, 0 for tokens that it removes."""
    scores = (
        logits.float() if temperature == 0 else logits.float() / logits.new_tensor(temperature, dtype=torch.float32)
    )
    scores, tokens = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True)
    distance = torch.where(scores == scores[:, :1], 0, scores[:, :1] - scores)
    exponent = (distance.clamp(max=28) * 2**26).long() * round(2**30 / math.log(2))
    fraction, power = exponent >> 24 & 0xFFFFFFFF, 0
    for coefficient in _POLYNOMIAL:
        power = coefficient - (power * fraction >> 32)
    weights = torch.where((distance < 28) & (scores > -torch.inf), (power << 9) >> (exponent >> 56), 0)
    if temperature == 0:
        weights[:, 1:] = 0
    elif 0 < top_k < scores.shape[-1]:
        weights *= scores >= scores[:, top_k - 1 : top_k]
    if top_p < 1:
        mass = weights.cumsum(-1)
        weights *= F.pad(mass[:, :-1], (1, 0)) < (top_p * mass[:, -1:].double()).ceil().long().clamp(min=1)
    weights *= weights >= math.ceil(min_p * 2**40)
    return torch.empty_like(weights).scatter_(-1, tokens, weights)


def random_bits(*counters: int) -> int:
    """48 random bits, a pure function of (seed, sample, step) and what else is given: SplitMix64 (Steele, Lea, Flood,
    OOPSLA 2014) applied once for each."""
    state = 0
    for number in counters:
        state = state + number + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 16


@register_fake("sample")
def _(logits, temperature, top_k, top_p, min_p, generator_state):
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
