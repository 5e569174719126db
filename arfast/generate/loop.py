"""The decode loop: prompts go through the model once, then every step feeds one token per sequence."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arfast.generate.beam import beam_search
from arfast.generate.decode import STEPS_AT_ONCE, DecodeStep, looks_up
from arfast.generate.decoding_state import DecodingState
from arfast.generate.options import GenerationOptions, describe, require, special_tokens
from arfast.generate.output import GenerationOutput
from arfast.generate.processors import make_processors
from arfast.generate.prompts import check_context, prompt_mask, stored_prompts
from arfast.generate.speculative import DraftStatistics, Speculation, speculate
from arfast.models.checks import is_integer


class Streamer(Protocol):
    """Receives tokens while they are generated, as transformers' TextStreamer and TextIteratorStreamer do."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    *,
    num_beams: int = 1,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    allowed_tokens: Tensor | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    streamer: Streamer | None = None,
    draft_model: Any | None = None,
    num_draft_tokens: int | None = None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int = 2,
    draft_statistics: DraftStatistics | None = None,
    return_dict_in_generate: bool = False,
) -> Tensor | GenerationOutput:
    """Continue prompts: greedily, by sampling or by beam search, with transformers' names and meanings.

    On a GPU every step replays a CUDA graph where `DecodeStep` can capture one: of the model, and of all that a step
    does unless something changes scores before tokens are chosen (penalties, constraints, filters of sampled beams).
    The host looks at the result in every eighth step, with a streamer in each, with drafts once per round.

    Args:
        model: a CausalLM.
        input_ids: int64 [B, P], padded on the left.
        max_new_tokens: the most tokens to add, >= 1.
        num_beams: 1: one token at a time; K > 1: beam search, with num_return_sequences <= K results.
        num_beam_groups, diversity_penalty: G groups of K / G beams search one after the other in every step; a token
            loses diversity_penalty times the beams of the groups before that have just chosen it (Vijayakumar et al.
            2016, arXiv 1610.02424).
        num_return_sequences: results per prompt, best first (beams) or independent (do_sample).
        length_penalty: a hypothesis of n tokens scores log-probability / n^length_penalty; above 0 favours long ones.
        early_stopping: True: stop at K hypotheses; False: when the best beam, at its present length, would not beat the
            worst hypothesis; "never": when it would not at any length.
        do_sample: draw from the distribution instead of taking the best token. With beams: draw their continuations
            without replacement, by their scores so far.
        temperature, top_k, top_p, min_p: applied in this order, see `arfast.ops.sample`; top_k=0 is off.
        repetition_penalty: divides positive scores of tokens that a sequence has, its prompt included, and multiplies
            negative ones (Keskar et al. 2019, arXiv 1909.05858); 1 is off.
        min_new_tokens: no end token before so many new tokens.
        allowed_tokens: bool [V]: the only tokens there are.
        prefix_allowed_tokens_fn: (index of the prompt, its tokens so far) -> the tokens that may follow.
        logits_processor: functions (input_ids [R, T], scores [R, V]) -> scores, called in turn after the above;
            transformers' processors are such. The scores are logits, with beams log-probabilities, which are not
            normalised again.
        eos_token_id: one or several tokens that end a sequence; None: the configuration's; []: none.
        pad_token_id: fills finished sequences; None: the configuration's, else the first end token, else 0.
        attention_mask: [B, P], 0 for padding, which must be on the left. None: leading tokens equal to pad_token_id,
            unless that also is an end token, are padding.
        seed: an integer s: prompt i draws with seed s + i; or B integers, one per prompt. What a prompt draws depends
            on its own seed and logits alone. None: taken from torch's global generator.
        streamer: put() gets the prompts, then the new tokens [B] of every step; end() comes last, also after an error.
            Not with beams.
        return_dict_in_generate: also give the log-probability of every token.
        draft_model: a smaller CausalLM with the same vocabulary: it drafts tokens, the model verifies several of them
            in one forward pass. Greedy decoding gives the same tokens (up to ties that rounding makes), sampling the
            same distribution. Not with beams.
        num_draft_tokens: tokens that draft_model drafts at a time. Then a prompt's result still depends on its own seed
            and logits alone. None: as many as measured times and acceptance make worthwhile, none if they do not pay;
            the result of sampling then depends on them, its distribution does not.
        prompt_lookup_num_tokens: instead of draft_model, the most tokens to draft from the prompt and what was
            generated: what came after the last tokens when they occurred before.
        max_matching_ngram_size: so many last tokens are looked up, then fewer.
        draft_statistics: counts of drafts are added to it.

    Returns:
        int64 [B * num_return_sequences, P + new]: the prompts as they were given, and what was added; new is at most
        max_new_tokens, and less if all sequences ended. With return_dict_in_generate a GenerationOutput.

    Raises:
        ValueError: `generate: <argument> must <rule>, got <actual>`; also when the model's logits are NaN or infinite.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape
        torch.Size([1, 8])
    """
    is_ids = isinstance(input_ids, Tensor) and input_ids.dtype == torch.int64 and input_ids.dim() == 2
    require(is_ids, "input_ids", "be an int64 tensor [B, P]", describe(input_ids))
    require(input_ids.numel() > 0, "input_ids", "hold at least one token per prompt", list(input_ids.shape))
    eos, pad = special_tokens(model.config, eos_token_id, pad_token_id)
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_beam_groups=num_beam_groups,
        diversity_penalty=diversity_penalty,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        vocab_size=model.config.vocab_size,
        allowed_tokens=allowed_tokens,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        logits_processor=() if logits_processor is None else logits_processor,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else eos[0] if eos else 0,
    )
    speculation = Speculation(draft_model, num_draft_tokens, prompt_lookup_num_tokens, max_matching_ngram_size)
    speculation.check(model, options)
    mask = prompt_mask(input_ids, attention_mask, None if pad in eos else pad)
    check_context(model, mask, max_new_tokens)
    if draft_model is not None:
        check_context(draft_model, mask, max_new_tokens)
    seeds = _seeds_of(seed, len(input_ids))
    prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
    if num_beams > 1:
        require(streamer is None, "streamer", "be None with num_beams > 1", type(streamer).__name__)
        new, logprobs, scores = beam_search(model, input_ids, mask, options, seeds)
        output = GenerationOutput(torch.cat([prompts, new], dim=1), scores, logprobs)
    else:
        try:
            if streamer is not None:
                streamer.put(prompts.cpu())
            if speculation.is_on:
                statistics = draft_statistics or DraftStatistics()
                output = speculate(model, input_ids, mask, options, speculation, seeds, streamer, statistics)
            else:
                output = _extend(model, input_ids, mask, options, seeds, streamer)
        finally:
            if streamer is not None:
                streamer.end()
    return output if return_dict_in_generate else output.sequences


def _extend(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    options: GenerationOptions,
    seeds: list[int],
    streamer: Streamer | None,
) -> GenerationOutput:
    """The prompts [B, P], each num_return_sequences times, with what greedy decoding or sampling adds."""
    copies, batch = options.num_return_sequences, len(input_ids)
    prompt_of = torch.arange(batch, device=input_ids.device).repeat_interleave(copies)
    capacity = options.max_new_tokens
    logits, cache = stored_prompts(model, input_ids, mask, capacity, prompt_of if copies > 1 else None)
    logits, input_ids = logits[prompt_of], input_ids[prompt_of]
    processors = make_processors(options, (~mask).sum(-1), input_ids.shape[1], batch)
    streams = [(seed, sample) for seed in seeds for sample in range(copies)]
    state = DecodingState(input_ids, options, streams, processors)
    state.choose(state.process(logits, 0))
    decode = DecodeStep(model, cache, None if processors else state.choose)
    dense, step = None if processors else decode.dense, 0
    while True:
        if streamer is not None:
            streamer.put(state.tokens.to("cpu", copy=True))  # the next step overwrites them
        asks = streamer is not None or looks_up(step, options.max_new_tokens, logits)
        if (asks and state.is_done(step)) or step + 1 == options.max_new_tokens:
            return state.result()
        if dense is not None:
            at_once = 1 if streamer is not None else STEPS_AT_ONCE
            step += dense.draw(state.state, min(at_once, options.max_new_tokens - 1 - step))
            continue
        step += 1
        logits = decode(state.tokens)
        if processors:
            state.choose(state.process(logits, step))


def _seeds_of(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per prompt."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if is_integer(seed):
        return [seed + i for i in range(batch)]
    valid = isinstance(seed, Sequence) and len(seed) == batch and all(is_integer(s) for s in seed)
    require(valid, "seed", f"be an integer or one per prompt ({batch})", repr(seed))
    return list(seed)
