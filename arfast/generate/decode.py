"""One decode step of a model: a token per sequence in, the logits that follow out; on a GPU as one CUDA graph, on the
CPU as one op."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from arfast import ops
from arfast.models import CausalLM
from arfast.models.decoder import Decoder, DecoderLayer
from arfast.nn import Attention, RMSNorm, RotaryEmbedding, StaticKVCache, SwiGLU

# What `ops.decode_step` computes; a model with any other module in it goes through its own forward pass.
_DENSE = {CausalLM, Decoder, DecoderLayer, Attention, SwiGLU, RMSNorm, RotaryEmbedding}
_DENSE |= {nn.Embedding, nn.Linear, nn.ModuleList}


def decode_one_token(model: Any, tokens: Tensor, cache: StaticKVCache) -> Tensor:
    """Store one token per sequence [B]; the logits [B, V] that follow."""
    return model(tokens[:, None], cache=cache).logits[:, -1]


class DecodeStep:
    """`decode_one_token`, again and again, launched as a whole.

    A step of a small batch is hundreds of kernels of a few microseconds, and the host cannot launch them that fast. On
    a GPU the first call runs like any forward pass, the second is captured as a CUDA graph, and from then on a call
    replays it. What a replay would not do as the code says is not captured: models other than CausalLM, hooks,
    autocast (its casts of the weights end with it). A capture that fails warns, and every call is a forward pass then.

    On the CPU a call is one `ops.decode_step`, with the parameters that the model has then, for a dense CausalLM in
    float32, bfloat16 or float16; a forward pass for all others, under autocast, and with hooks that are there in the
    first call.

    The graph reads the memory that it was captured with: changes in place of parameters and cache (an optimizer's step,
    `set_lengths`, `reset`, another prompt) are seen, parameters moved elsewhere are not.

    Args:
        model: a CausalLM.
        cache: the sequences to continue, at least one token each.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> cache = StaticKVCache(model.config, batch_size=1, max_length=64)
        >>> with torch.no_grad():
        ...     logits = model(torch.tensor([[1, 2, 3]]), cache=cache).logits[:, -1]
        >>> step = DecodeStep(model, cache)
        >>> for _ in range(10):
        ...     logits = step(logits.argmax(-1))
        >>> cache.lengths.tolist()
        [13]
    """

    def __init__(self, model: Any, cache: StaticKVCache):
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.k.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # the graph's
        self._memory: list[Tensor] = []  # what the graph reads and writes lives as long as the graph
        self._warm = self._refused = False
        self._dense: _DenseStep | bool | None = None  # False: the model is another one

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Store tokens, int64 [B]; the logits [B, V] that follow, which the next call overwrites."""
        if tokens.shape != self.tokens.shape:
            expected = f"one per sequence of the cache, {list(self.tokens.shape)}"
            raise ValueError(f"DecodeStep: tokens must be {expected}, got {list(tokens.shape)}")
        self.tokens.copy_(tokens)
        if self._dense is None:
            self._dense = _DenseStep.serves(self.model, self.cache) and _DenseStep(self.model, self.cache)
        if self._dense and not torch.is_autocast_enabled("cpu"):
            return self._dense(self.tokens)
        if self.graph is None:
            if not self._warm or not self._can_capture() or not self._capture():
                self._warm = True
                return decode_one_token(self.model, self.tokens, self.cache)
        else:
            if self.cache.k is not self._memory[0]:
                raise ValueError("DecodeStep: cache must keep its memory, got another one (select with another number)")
            self.cache.advance()
        self.graph.replay()
        return self._logits

    def _can_capture(self) -> bool:
        if self._refused or not (self.cache.k.is_cuda and isinstance(self.model, CausalLM)):
            return False
        if torch.is_autocast_enabled("cuda"):
            return False
        return not _has_hooks(self.model)

    def _capture(self) -> bool:
        """Records a forward pass, which counts its tokens on the host but does nothing on the GPU."""
        graph, cache = torch.cuda.CUDAGraph(), self.cache
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on with their work
                self._logits = decode_one_token(self.model, self.tokens, cache)
        except RuntimeError as error:
            warnings.warn(f"DecodeStep: decoding goes on without a CUDA graph: {error}", stacklevel=3)
            cache.set_lengths(cache.lengths)  # the host may have counted tokens that the GPU has not seen
            self._refused = True
            return False
        # Detached: the memory of today, also if a parameter moves or the rotary tables grow.
        state = [*self.model.parameters(), *self.model.buffers(), cache.v, cache.lengths, cache.seqlens]
        self._memory = [cache.k, *(tensor.detach() for tensor in state)]
        self.graph = graph
        return True


def _has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class _DenseStep:
    """`ops.decode_step` with the weights and the cache of a model."""

    def __init__(self, model: CausalLM, cache: StaticKVCache):
        self.model, self.cache, self.rotary = model, cache, model.model.rotary
        config = model.config
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
    def serves(model: Any, cache: StaticKVCache) -> bool:
        if cache.k.device.type != "cpu" or type(model) is not CausalLM or _has_hooks(model):
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
        cache, rotary = self.cache, self.rotary
        cache.advance()
        torch.add(cache.lengths, 1, out=cache.seqlens)
        cos, sin = rotary.cos, rotary.sin
        if len(cos) < cache.max_length:
            cos, sin = rotary(None, cache.max_length)
        weights = [parameters[name] for parameters, name in self.places]
        try:
            slots = getattr(cache, "slots", None)  # of beams
            logits = ops.decode_step(
                tokens, weights, cos, sin, cache.k, cache.v, cache.seqlens, beam_slots=slots, **self.options
            )
        except Exception:
            cache.set_lengths(cache.lengths)  # the host has counted tokens that are not stored
            raise
        cache.lengths.copy_(cache.seqlens)
        return logits
