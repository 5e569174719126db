"""An n-gram model with interpolated Kneser-Ney smoothing, of token ids: a judge of text that no network has a part in.

Kneser and Ney, "Improved backing-off for m-gram language modeling" (ICASSP 1995); Chen and Goodman, "An empirical study
of smoothing techniques for language modeling" (1999), section 4.1.6:
p(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) * p(w | h without its first token), where N(h) is how many
different tokens follow h, and c counts, but for the longest n-grams, in how many different contexts an n-gram occurs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """n-grams as integers in base V, rising, with their counts [G]; contexts likewise [C], with the sum of the counts
    of what follows them, and the number of different tokens; what is taken off every count."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    followers: np.ndarray
    discount: float


class NGramModel:
    """Counted once; scores any tokens.

    Args:
        documents: integers [N] each, in [0, vocab_size); no n-gram crosses from one into the next.
        order: n, at least 1.
        vocab_size: V, with V^n below 2^63.

    Raises:
        ValueError: `NGramModel: <argument> must <rule>, got <actual>`.

    Example:
        >>> model = NGramModel([np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])], order=2, vocab_size=4)
        >>> bool(model.log_prob(np.array([[0, 1]]))[0, 1] > np.log(0.5))
        True
    """

    def __init__(self, documents: Sequence[np.ndarray], order: int, vocab_size: int) -> None:
        if order < 1 or vocab_size**order >= 2**63:
            raise ValueError(f"NGramModel: order must be at least 1, with vocab_size**order < 2**63, got {order}")
        if not any(len(tokens) >= order for tokens in documents):
            raise ValueError(f"NGramModel: documents must hold an n-gram of {order} tokens, got none")
        self.vocab_size = vocab_size
        grams, counts = np.unique(np.concatenate([self._grams(d, order) for d in documents]), return_counts=True)
        orders = [self._order(grams, counts)]
        for size in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % vocab_size**size, return_counts=True)
            orders.append(self._order(grams, counts))
        self._orders = orders[::-1]

    def log_prob(self, tokens: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
        """Natural log-probability of each target after the tokens before its place.

        Args:
            tokens: integers [B, T].
            targets: integers [B, T]; None: the tokens themselves.

        Returns:
            float64 [B, T]; the first tokens of a row have less before them.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        targets = tokens if targets is None else np.asarray(targets, dtype=np.int64)
        probability = np.full(tokens.shape, 1 / self.vocab_size)
        context = np.zeros_like(tokens)
        for place, order in enumerate(self._orders):
            if place > 0:
                context[:, place:] += tokens[:, :-place] * self.vocab_size ** (place - 1)
            refined = self._refine(order, context, targets, probability)
            probability[:, place:] = refined[:, place:]
        return np.log(probability)

    def _grams(self, document: np.ndarray, order: int) -> np.ndarray:
        count = max(0, len(document) - order + 1)
        grams = np.zeros(count, dtype=np.int64)
        for place in range(order):
            grams = grams * self.vocab_size + document[place : place + count]
        return grams

    def _order(self, grams: np.ndarray, counts: np.ndarray) -> _Order:
        contexts, starts = np.unique(grams // self.vocab_size, return_index=True)
        once, twice = (np.count_nonzero(counts == times) for times in (1, 2))
        followers = np.diff(starts, append=len(grams))
        # Ney, Essen and Kneser 1994; without n-grams that occur once, half a count.
        discount = once / (once + 2 * twice) if once else 0.5
        return _Order(grams, counts, contexts, np.add.reduceat(counts, starts), followers, discount)

    def _refine(self, order: _Order, context: np.ndarray, targets: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p of one order from that of the one below; as it was where the context is unknown."""
        gram, known_gram = _find(order.grams, context * self.vocab_size + targets)
        place, known = _find(order.contexts, context)
        taken = np.where(known_gram, np.maximum(order.counts[gram] - order.discount, 0), 0)
        rest = order.discount * order.followers[place]
        return np.where(known, (taken + rest * shorter) / order.totals[place], shorter)


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of values in a rising table, and whether they are there."""
    places = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return places, table[places] == values
