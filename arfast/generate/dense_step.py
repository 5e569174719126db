"""A decode step of a dense CausalLM on the CPU as one op."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arfast import ops
from arfast.models import CausalLM
from arfast.models.decoder import Decoder, DecoderLayer
from arfast.nn import Attention, Embedding, KVCache, RMSNorm, RotaryEmbedding, SwiGLU

# What `ops.decode_step` computes; a model with any other module in it goes through its own forward pass.
_DENSE = {CausalLM, Decoder, DecoderLayer, Attention, SwiGLU, RMSNorm, RotaryEmbedding}
_DENSE |= {Embedding, nn.Linear, nn.ModuleList}


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class DenseStep:
    """`ops.decode_step` with the weights and the cache of a model."""

    def __init__(self, model: CausalLM, cache: KVCache):
        self.model, self.cache, config = model, cache, model.config
        self.rotary = model.model.rotary(None, cache.max_length)
        self.options = {
            "num_heads": config.num_attention_heads,
            "eps": config.rms_norm_eps,
            "windows": [config.window(layer) for layer in range(config.num_hidden_layers)],
            "qkv_bias": config.qkv_bias,
            "o_bias": config.o_bias,
            "qk_norm": config.qk_norm,
        }
        # Where the parameters are found again in every step: looking for them by name takes longer than a small layer.
        self.places = [(module._parameters, name) for module, name in self._parameters()]

    @staticmethod
    def serves(model: Any, cache: KVCache) -> bool:
        if cache.k.device.type != "cpu" or type(model) is not CausalLM or has_hooks(model):
            return False
        if any(type(module) not in _DENSE for module in model.modules()):
            return False
        dtype = model.head_weight.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16) or cache.k.dtype != dtype:
            return False
        return all(p.dtype == dtype and p.is_cpu and p.is_contiguous() for p in model.parameters())

    def _parameters(self) -> list[tuple[nn.Module, str]]:
        """Every weight's module and name, in the order of `ops.decode_step`."""
        model, config = self.model, self.model.config
        modules = [model.model.embed_tokens, model.model.norm, model.lm_head or model.model.embed_tokens]
        places = [(module, "weight") for module in modules]
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            modules = [layer.input_layernorm, *qkv, attention.o_proj, layer.post_attention_layernorm]
            places += [(module, "weight") for module in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            if config.qkv_bias:
                places += [(module, "bias") for module in qkv]
            if config.o_bias:
                places.append((attention.o_proj, "bias"))
            if config.qk_norm:
                places += [(attention.q_norm, "weight"), (attention.k_norm, "weight")]
        return places

    def __call__(self, tokens: Tensor) -> Tensor:
        """Store tokens, int64 [B] or [B, T]; the logits [B, V] or [B, T, V] that follow."""
        num_tokens = tokens.shape[1] if tokens.dim() > 1 else 1
        step = functools.partial(ops.decode_step, tokens, beam_slots=self.cache.slots, advance=True)
        return self._call(step, num_tokens)

    def search(self, state: ops.BeamState, steps: int) -> int:
        """Up to `steps` steps of a beam search in this cache, whose slots are the state's; how many there were."""
        return self._take_steps(functools.partial(ops.decode_beams, state, steps=steps), steps)

    def draw(self, state: ops.SampleState, steps: int) -> int:
        """Up to `steps` tokens more for the sequences in this cache; how many there were."""
        op = functools.partial(ops.decode_samples, state, steps=steps, beam_slots=self.cache.slots)
        return self._take_steps(op, steps)

    def _take_steps(self, op: Callable, steps: int) -> int:
        """An op that stores up to as many tokens, and says how many."""
        done = self._call(op, steps)
        if done < steps:
            self.cache.set_lengths(self.cache.lengths)
        return done

    def _call(self, op: Callable, num_tokens: int) -> Any:
        """An op that stores as many tokens, which the host counts before."""
        cache = self.cache
        cache.advance(num_tokens)
        weights = [parameters[name] for parameters, name in self.places]
        try:
            return op(weights, *self.rotary, cache.k, cache.v, cache.lengths, **self.options)
        except Exception:
            cache.set_lengths(cache.lengths)  # the host has counted tokens that are not stored
            raise
