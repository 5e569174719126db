"""The state of greedy decoding and sampling: the tokens of sequences that grow by one in every step."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.generate.options import GenerationOptions
from arfast.generate.output import GenerationOutput
from arfast.generate.processors import Processor
from arfast.generate.sampling import Sampler


class DecodingState:
    """The new tokens of R sequences, greedy or sampled, all of it on the device: no step waits for the host.

    Args:
        prompts: int64 [R, P].
        options: end tokens, padding, sampling.
        streams: (seed, sample) of every row.
        processors: what changes logits before a token is chosen.
        with_logprobs: whether log-probabilities are kept.

    Attributes:
        tokens: int64 [R], chosen last.
        history: int64 [R, P + max_new_tokens].
        logprobs: float32 [R, max_new_tokens], of the new tokens; 0 after a sequence's end.
    """

    def __init__(
        self,
        prompts: Tensor,
        options: GenerationOptions,
        streams: list[tuple[int, int]],
        processors: Sequence[Processor] = (),
        with_logprobs: bool = False,
    ):
        self.options, self.processors, self.prompt_length = options, processors, prompts.shape[1]
        rows, device = len(prompts), prompts.device
        self.history = F.pad(prompts, (0, options.max_new_tokens), value=options.pad_token_id)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._column = torch.full((1,), self.prompt_length, dtype=torch.int64, device=device)
        self._ends = torch.tensor(options.eos_token_id, dtype=torch.int64, device=device)
        self._going = torch.ones(rows, dtype=torch.bool, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, options.max_new_tokens, device=device) if with_logprobs else None
        self._sum = torch.zeros(rows, device=device)  # of all log-probabilities: a NaN stays in it
        self._sampler = Sampler(streams, device, **options.filters)

    def choose(self, logits: Tensor) -> None:
        """The next tokens, given the logits [R, V]."""
        tokens, logprobs = self._sampler(logits)
        self._sum += logprobs
        if self.logprobs is not None:
            self.logprobs.index_copy_(1, self._column - self.prompt_length, (logprobs * self._going)[:, None])
        if len(self._ends) > 0:
            tokens = torch.where(self._going, tokens, self.options.pad_token_id)
            self._lengths += self._going
            self._going &= (tokens[:, None] != self._ends).all(-1)
        self.history.index_copy_(1, self._column, tokens[:, None])
        self._column += 1
        self.tokens.copy_(tokens)

    def process(self, logits: Tensor, step: int) -> Tensor:
        """The logits as the processors leave them in a step, counted from 0."""
        if self.processors:
            logits = logits.float()
        for processor in self.processors:
            logits = processor(self.history[:, : self.prompt_length + step], logits)
        return logits

    def is_done(self, step: int) -> bool:
        """Whether all sequences have ended, `step` being the last step done; waits for the device."""
        broken = [row for row, total in enumerate(self._sum.tolist()) if math.isnan(total)]
        if broken:
            raise ValueError(f"generate: logits must be finite, got others for sequences {broken} by step {step}")
        return len(self._ends) > 0 and not any(self._going.tolist())

    def result(self) -> GenerationOutput:
        """T is the length of the longest sequence, its end token included."""
        new = self.options.max_new_tokens if len(self._ends) == 0 else int(self._lengths.max())
        sequences = self.history[:, : self.prompt_length + new]
        if self.logprobs is None:
            return GenerationOutput(sequences)
        return GenerationOutput(sequences, self.logprobs.sum(-1), self.logprobs[:, :new])
