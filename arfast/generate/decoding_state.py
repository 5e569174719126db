"""The state of greedy decoding and sampling: the tokens of sequences that grow by one in every step."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from arfast import ops
from arfast.generate.options import GenerationOptions
from arfast.generate.output import GenerationOutput
from arfast.generate.processors import Processor
from arfast.generate.sampling import generator_state_of
from arfast.ops.sample_step import GOES_ON, NOT_FINITE


class DecodingState:
    """The new tokens of R sequences, greedy or sampled, all of it on the device: no step waits for the host.

    Args:
        prompts: int64 [R, P].
        options: end tokens, padding, sampling.
        streams: (seed, sample) of every row.
        processors: what changes logits before a token is chosen.

    Attributes:
        history: int64 [R, P + max_new_tokens].
        state: what a step changes; its tokens are those of the history.
    """

    def __init__(
        self,
        prompts: Tensor,
        options: GenerationOptions,
        streams: list[tuple[int, int]],
        processors: Sequence[Processor] = (),
    ):
        self.processors, self.prompt_length = processors, prompts.shape[1]
        self.history = F.pad(prompts, (0, options.max_new_tokens), value=options.pad_token_id)
        self.state = ops.SampleState.start(
            generator_state_of(streams, prompts.device),
            options.max_new_tokens,
            ends=options.eos_token_id,
            pad_token=options.pad_token_id,
            tokens=self.history[:, self.prompt_length :],
            **options.filters,
        )

    @property
    def tokens(self) -> Tensor:
        """int64 [R], chosen last."""
        return self.state.next_tokens

    def choose(self, logits: Tensor) -> None:
        """The next tokens, given the logits [R, V]."""
        ops.sample_step(logits, self.state)

    def process(self, logits: Tensor, step: int) -> Tensor:
        """The logits as the processors leave them in a step, counted from 0."""
        if self.processors:
            logits = logits.float()
        for processor in self.processors:
            logits = processor(self.history[:, : self.prompt_length + step], logits)
        return logits

    def is_done(self, step: int) -> bool:
        """Whether all sequences have ended, `step` being the last step done; waits for the device."""
        flags = self.state.status.tolist()
        broken = [row for row, status in enumerate(flags) if status & NOT_FINITE]
        if broken:
            raise ValueError(f"generate: logits must be finite, got others for sequences {broken} by step {step}")
        return not any(status & GOES_ON for status in flags)

    def result(self) -> GenerationOutput:
        """T is the length of the longest sequence, its end token included."""
        new = int(self.state.lengths.max())
        log_probs = self.state.log_probs
        return GenerationOutput(self.history[:, : self.prompt_length + new], log_probs.sum(-1), log_probs[:, :new])
