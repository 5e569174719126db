"""Prompts of different lengths, padded on the left, on their way into a cache."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arfast.generate.options import describe, require
from arfast.models import CausalLM
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
    model: Any, input_ids: Tensor, mask: Tensor, max_new_tokens: int, prompt_of: Tensor | None = None
) -> tuple[Tensor, KVCache]:
    """The logits [B, V] that follow the prompts, and a cache for the sequences that continue them: one for each prompt,
    or R that continue the prompts prompt_of [R]."""
    counted = model.cached_tokens(input_ids, mask) if isinstance(model, CausalLM) else mask
    (shortest, longest), kind = (int(length) for length in counted.sum(-1).aminmax()), cache_kind(model)
    if prompt_of is None:
        cache = StaticKVCache(model.config, len(input_ids), longest + max_new_tokens, *kind)
        return prefill(model, input_ids, mask, cache), cache
    sizes = (len(input_ids), longest, len(prompt_of), max_new_tokens, shortest)
    cache = BranchedKVCache(model.config, *sizes, *kind)
    logits = prefill(model, input_ids, mask, cache.prompts)
    cache.branch(prompt_of)
    return logits, cache


def check_context(model: Any, mask: Tensor, max_new_tokens: int) -> None:
    """Refuses prompts that are longer than the model's context, and warns of new tokens beyond it."""
    context, longest = model.config.max_position_embeddings, int(mask.sum(-1).max())
    rule = f"fit the context, max_position_embeddings={context}"
    require(longest <= context, "input_ids", rule, f"a prompt of {longest} tokens")
    if longest + max_new_tokens > context:
        sizes = f"max_position_embeddings={context}, got prompts of {longest} and max_new_tokens={max_new_tokens}"
        warnings.warn(f"generate: tokens past the context are a guess: {sizes}", stacklevel=4)


def cache_kind(model: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of a cache for the model."""
    weight = model.head_weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return dtype, weight.device
