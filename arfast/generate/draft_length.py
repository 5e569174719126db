"""How many tokens to draft: measured acceptance and times, and the length that is worth most by them."""

import time
from collections import deque

import torch

MAX_DRAFTS = 12
# Drafting that promises less is left out.
_LEAST_SPEEDUP = 1.05
# One round in so many does the opposite: one without drafts measures a plain step, one with them whether they pay by
# now. After they turned out not to pay, which may have been bad luck, the first such rounds come soon.
_LONGEST_WAIT, _SHORTEST_WAIT = 32, 4
_FIRST = (0, 4, 0, 4)  # Twice, as the first times include what happens once.
_DECAY = 0.95  # of a round's weight in the acceptance, with each round
_PRIOR_ACCEPTED, _PRIOR_DECISIONS = 3.0, 4.0


def expected_speedup(num_drafts: int, acceptance: float, cost: float) -> float:
    """Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8: (1 - a^(g + 1)) / ((1 - a) (g c + 1))."""
    return sum(acceptance**i for i in range(num_drafts + 1)) / (num_drafts * cost + 1)


class Clock:
    """Moments of a round by name; on a GPU they are events, which cost the host no wait."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.moments: dict = {}

    def mark(self, name: str) -> None:
        if self.on_gpu:
            self.moments[name] = torch.cuda.Event(enable_timing=True)
            self.moments[name].record()
        else:
            self.moments[name] = time.perf_counter()

    def between(self, first: str, last: str) -> float | None:
        """Seconds; the host must have waited for `last` before. None where a moment has not come yet."""
        if first not in self.moments:
            return None
        first, last = self.moments[first], self.moments[last]
        return first.elapsed_time(last) / 1e3 if self.on_gpu else last - first


class DraftLength:
    """The number of tokens to draft next: `fixed`, or the one that makes most of what was measured so far.

    The acceptance a is that of single tokens, averaged over all rows with a weight that decays. The cost c of a drafted
    token, in plain steps of the model, is the time to draft it and the time by which it makes verification longer.
    """

    def __init__(self, fixed: int | None = None):
        self.fixed = fixed
        self.accepted, self.decisions = _PRIOR_ACCEPTED, _PRIOR_DECISIONS
        self.round = 0
        self.pays: bool | None = None
        self.wait = self.rounds_left = 0  # rounds until the next that does the opposite
        # Of the latest rounds: seconds of plain steps, to draft a token, to verify so many.
        self.plain: deque[float] = deque(maxlen=9)
        self.drafting: deque[float] = deque(maxlen=9)
        self.verifying: deque[tuple[int, float]] = deque(maxlen=9)

    def learn(self, drafted: list[int], accepted: list[int], num_drafts: int, clock: Clock) -> None:
        """From a round with `num_drafts` positions; drafted and accepted tokens of every row."""
        # A rejection decides, too; drafts behind it do not.
        decisions = [right + (right < all_) for all_, right in zip(drafted, accepted)]
        if any(decisions):
            self.accepted = _DECAY * self.accepted + sum(accepted)
            self.decisions = _DECAY * self.decisions + sum(decisions)
        seconds = clock.between("drafted", "verified")
        if seconds is None:
            return
        if num_drafts == 0:
            self.plain.append(seconds)
        else:
            self.drafting.append(clock.between("begun", "drafted") / num_drafts)
            self.verifying.append((num_drafts, seconds))

    def choose(self) -> int:
        if self.fixed is not None:
            return self.fixed
        self.round += 1
        if self.round <= len(_FIRST):
            return _FIRST[self.round - 1]
        acceptance, cost = self.accepted / self.decisions, self.cost
        best = max(range(1, MAX_DRAFTS + 1), key=lambda n: expected_speedup(n, acceptance, cost))
        pays = expected_speedup(best, acceptance, cost) >= _LEAST_SPEEDUP
        return best if pays != self._is_probe(pays) else 0

    def _is_probe(self, pays: bool) -> bool:
        if pays != self.pays:
            self.pays, self.wait = pays, _LONGEST_WAIT if pays else _SHORTEST_WAIT
            self.rounds_left = self.wait
        self.rounds_left -= 1
        if self.rounds_left > 0:
            return False
        self.wait = min(2 * self.wait, _LONGEST_WAIT)
        self.rounds_left = self.wait
        return True

    @property
    def cost(self) -> float:
        """From the shortest times: other processes only make them longer."""
        plain = min(self.plain)
        longer = [max(seconds - plain, 0) / num_drafts for num_drafts, seconds in self.verifying]
        return (min(self.drafting) + min(longer)) / plain
