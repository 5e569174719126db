"""Prompts of different lengths, padded on the left, on their way into a cache."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.generate.options import describe, require
from arfast.nn import BranchedKVCache, KVCache, StaticKVCache


def prompt_mask(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
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


def prefill(model: Any, input_ids: Tensor, mask: Tensor, cache: StaticKVCache) -> Tensor:
    """Store the prompts [B, P] where `mask` is true; the logits [B, V] that follow them."""
    if bool(mask.all()):
        return model(input_ids, cache=cache, logits_to_keep=1).logits[:, -1]
    offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
    packed = input_ids[mask][None]
    return model(packed, cu_seqlens=offsets.int(), cache=cache, logits_to_keep=offsets[1:] - 1).logits[0]


def stored_prompts(
    model: Any, input_ids: Tensor, mask: Tensor, rows_per_prompt: int, max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """The logits [B, V] that follow the prompts, and a cache for B * rows_per_prompt sequences that continue them.

    With one row per prompt the cache is ready, else it is still to be branched.
    """
    batch, (shortest, longest) = len(input_ids), (int(length) for length in mask.sum(-1).aminmax())
    _check_context(model.config.max_position_embeddings, longest, max_new_tokens)
    if rows_per_prompt == 1:
        cache = StaticKVCache(model.config, batch, longest + max_new_tokens, *cache_kind(model))
        return prefill(model, input_ids, mask, cache), cache
    rows = batch * rows_per_prompt
    cache = BranchedKVCache(model.config, batch, longest, rows, max_new_tokens, shortest, *cache_kind(model))
    return prefill(model, input_ids, mask, cache.prompts), cache


def _check_context(context: int, prompt_length: int, max_new_tokens: int) -> None:
    rule = f"fit the context, max_position_embeddings={context}"
    require(prompt_length <= context, "input_ids", rule, f"a prompt of {prompt_length} tokens")
    if prompt_length + max_new_tokens > context:
        sizes = f"max_position_embeddings={context}, got prompts of {prompt_length} and max_new_tokens={max_new_tokens}"
        warnings.warn(f"generate: tokens past the context are a guess: {sizes}", stacklevel=5)


def cache_kind(model: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of a cache for the model."""
    weight = model.head_weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return dtype, weight.device
