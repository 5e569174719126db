"""The decode loop: prompts go through the model once, then every step feeds one token per sequence."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.generate.beam import BeamSearch
from arfast.generate.decode import DecodeStep, decode_one_token
from arfast.generate.options import GenerationOptions, describe, is_integer, require, special_tokens
from arfast.generate.sampling import Sampler
from arfast.generate.speculative import DraftStatistics, Speculation, speculate
from arfast.nn import StaticKVCache


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
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
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
) -> Tensor:
    """Continue prompts: greedily, by sampling or by beam search, with transformers' names and meanings.

    On a GPU, greedy decoding and sampling replay a CUDA graph of the model where `DecodeStep` can capture one.

    Args:
        model: a CausalLM.
        input_ids: int64 [B, P], padded on the left.
        max_new_tokens: the most tokens to add, >= 1.
        num_beams: 1: one token at a time; K > 1: beam search, with num_return_sequences <= K results.
        num_return_sequences: results per prompt, best first (beams) or independent (do_sample).
        length_penalty: a hypothesis of n tokens scores log-probability / n^length_penalty; above 0 favours long ones.
        early_stopping: True: stop at K hypotheses; False: when the best beam, at its present length, would not beat the
            worst hypothesis; "never": when it would not at any length.
        do_sample: draw from the distribution instead of taking the best token.
        temperature, top_k, top_p, min_p: applied in this order, see `arfast.ops.sample`; top_k=0 is off.
        eos_token_id: one or several tokens that end a sequence; None: the configuration's; []: none.
        pad_token_id: fills finished sequences; None: the configuration's, else the first end token, else 0.
        attention_mask: [B, P], 0 for padding, which must be on the left. None: leading tokens equal to pad_token_id,
            unless that also is an end token, are padding.
        seed: an integer s: prompt i draws with seed s + i; or B integers, one per prompt. What a prompt draws depends
            on its own seed and logits alone. None: taken from torch's global generator.
        streamer: put() gets the prompts, then the new tokens [B] of every step; end() comes last, also after an error.
            Not with beams.
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
        max_new_tokens, and less if all sequences ended.

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
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else eos[0] if eos else 0,
    )
    speculation = Speculation(draft_model, num_draft_tokens, prompt_lookup_num_tokens, max_matching_ngram_size)
    speculation.check(model, options)
    mask = _prompt_mask(input_ids, attention_mask, None if pad in eos else pad)
    seeds = _seeds_of(seed, len(input_ids))
    prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
    if not speculation.is_on:
        cache = _new_cache(model, len(input_ids), int(mask.sum(-1).max()) + max_new_tokens)
    if num_beams > 1:
        require(streamer is None, "streamer", "be None with num_beams > 1", type(streamer).__name__)
        new, _ = beam_search(model, prefill(model, input_ids, mask, cache), cache, options)
    else:
        streamer = streamer or _Silent()
        try:
            streamer.put(prompts.cpu())
            if speculation.is_on:
                new = _speculate(model, input_ids, mask, options, seeds, streamer, speculation, draft_statistics)
            else:
                new = _extend(model, prefill(model, input_ids, mask, cache), cache, options, seeds, streamer)
        finally:
            streamer.end()
    return torch.cat([prompts, new], dim=1)


def prefill(model: Any, input_ids: Tensor, mask: Tensor, cache: StaticKVCache) -> Tensor:
    """Store the prompts [B, P] where `mask` is true; the logits [B, V] that follow them."""
    if bool(mask.all()):
        return model(input_ids, cache=cache, logits_to_keep=1).logits[:, -1]
    offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
    packed = input_ids[mask][None]
    return model(packed, cu_seqlens=offsets.int(), cache=cache, logits_to_keep=offsets[1:] - 1).logits[0]


def _extend(
    model: Any,
    logits: Tensor,
    cache: StaticKVCache,
    options: GenerationOptions,
    seeds: list[int],
    streamer: Streamer,
) -> Tensor:
    """New tokens [B * n, T] of greedy decoding or sampling."""
    copies = options.num_return_sequences
    if copies > 1:
        logits = logits.repeat_interleave(copies, dim=0)
        cache.select(torch.arange(len(seeds), device=logits.device).repeat_interleave(copies))
    choose = _chooser(options, [(seed, sample) for seed in seeds for sample in range(copies)], logits.device)
    eos = torch.tensor(options.eos_token_id, dtype=torch.int64, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    decode = DecodeStep(model, cache)
    steps: list[Tensor] = []
    for step in range(options.max_new_tokens):
        if step > 0:
            logits = decode(steps[-1])
        _check_finite(logits, step)
        tokens = choose(logits).masked_fill(finished, options.pad_token_id)
        finished |= torch.isin(tokens, eos)
        steps.append(tokens)
        streamer.put(tokens.cpu())
        if len(eos) > 0 and bool(finished.all()):
            break
    return torch.stack(steps, dim=1)


def _speculate(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    options: GenerationOptions,
    seeds: list[int],
    streamer: Streamer,
    speculation: Speculation,
    statistics: DraftStatistics | None,
) -> Tensor:
    """New tokens [B * n, T], as of `_extend`."""
    copies, batch = options.num_return_sequences, len(input_ids)
    capacity = int(mask.sum(-1).max()) + options.max_new_tokens + speculation.max_drafts
    parents = torch.arange(batch, device=input_ids.device).repeat_interleave(copies)

    def start(model: Any) -> tuple[Tensor, StaticKVCache]:
        cache = _new_cache(model, batch, capacity)
        logits = prefill(model, input_ids, mask, cache)
        if copies > 1:
            cache.select(parents)
        return logits[parents], cache

    sequences = [row[kept].tolist() for row, kept in zip(input_ids, mask) for _ in range(copies)]
    streams = [(seed, sample) for seed in seeds for sample in range(copies)]
    return speculate(model, start, sequences, options, speculation, streams, streamer, statistics or DraftStatistics())


def beam_search(model: Any, logits: Tensor, cache: StaticKVCache, options: GenerationOptions) -> tuple[Tensor, Tensor]:
    """Continue stored prompts, given the logits [B, V] that follow them: see `BeamSearch.hypotheses`."""
    search = BeamSearch(len(logits), options, logits.device)
    tokens, rows = search.advance(logits)
    while not search.done:
        cache.select(rows)
        tokens, rows = search.advance(decode_one_token(model, tokens, cache))
    return search.hypotheses()


def _chooser(
    options: GenerationOptions, streams: list[tuple[int, int]], device: torch.device
) -> Callable[[Tensor], Tensor]:
    if not options.do_sample:
        return lambda logits: logits.argmax(-1)
    names = ("temperature", "top_k", "top_p", "min_p")
    return Sampler(streams, device, **{name: getattr(options, name) for name in names})


class _Silent:
    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def _new_cache(model: Any, batch: int, length: int) -> StaticKVCache:
    weight = model.head_weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return StaticKVCache(model.config, batch, length, dtype, weight.device)


def _check_finite(logits: Tensor, step: int) -> None:
    best = logits.amax(-1)
    if not bool(best.isfinite().all()):
        raise ValueError(f"generate: logits must be finite, got a maximum of {best.tolist()} in step {step}")


def _prompt_mask(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """bool [B, P]: which tokens belong to the prompts."""
    if attention_mask is None:
        if pad is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        mask = (input_ids != pad).cumsum(-1) > 0
        require(bool(mask[:, -1].all()), "input_ids", "hold at least one token per prompt", "only padding")
        return mask
    name, shape = "attention_mask", list(input_ids.shape)
    is_mask = isinstance(attention_mask, Tensor) and list(attention_mask.shape) == shape
    require(is_mask, name, f"have the shape of input_ids, {shape}", describe(attention_mask))
    mask = attention_mask.to(input_ids.device) != 0
    require(bool(mask[:, -1].all()), name, "end with a token in every row", mask[:, -1].int().tolist())
    wrong = (mask[:, :-1] & ~mask[:, 1:]).any(-1).nonzero().flatten().tolist()
    require(not wrong, name, "have its zeros on the left", f"a zero after a one in rows {wrong}")
    return mask


def _seeds_of(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per prompt."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if is_integer(seed):
        return [seed + i for i in range(batch)]
    valid = isinstance(seed, Sequence) and len(seed) == batch and all(is_integer(s) for s in seed)
    require(valid, "seed", f"be an integer or one per prompt ({batch})", repr(seed))
    return list(seed)
