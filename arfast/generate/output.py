"""What `generate` returns when asked for more than tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """sequences: int64 [R, P + T], prompts and what was added to them.
    sequences_scores: float32 [R]: with beams the scores that order them, the sum of the log-probabilities /
        length^length_penalty; else the sum.
    token_logprobs: float32 [R, T], natural, of each new token when it was chosen, 0 after a sequence's end: under the
        distribution of the model, after penalties and constraints, if there are any, before temperature and filters.
        With beams all of these, when beams are drawn temperature and filters too, change log-probabilities, which are
        not normalised again.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    token_logprobs: Tensor | None = None
