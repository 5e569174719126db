"""Configuration of CausalLM: fields with their checks, presets, counts of parameters and floating-point operations."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .checks import ConfigChecks, is_integer, is_number
from .presets import PRESETS

FULL, SLIDING = "full_attention", "sliding_attention"

# The upper bounds keep every product of sizes inside int64 and refuse absurd files before anything is allocated.
_INTEGERS = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (2, 2**12),
    "max_position_embeddings": (1, 2**31 - 1),
    "num_experts": (0, 2**14),
    "num_experts_per_tok": (1, 2**14),
    "num_shared_experts": (0, 2**10),
    "moe_intermediate_size": (1, 2**20),
    "decoder_sparse_step": (1, 4096),
}
_NUMBERS = {
    "rope_theta": ("(", 0.0, math.inf, ")"),
    "rms_norm_eps": ("[", 0.0, 1.0, ")"),
    "initializer_range": ("[", 0.0, math.inf, ")"),
    "routed_scaling_factor": ("(", 0.0, math.inf, ")"),
    "router_aux_loss_coef": ("[", 0.0, math.inf, ")"),
    "router_z_loss_coef": ("[", 0.0, math.inf, ")"),
}
_BOOLEANS = ("tie_word_embeddings", "qkv_bias", "o_bias", "qk_norm", "norm_topk_prob", "router_bias")
_ROPE_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(ConfigChecks):
    """Sizes and options of a CausalLM, under the names of Hugging Face.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: V, d, I, L, H.
        num_key_value_heads: Hkv, a divisor of H; None: H.
        head_dim: D, even; None: d / H.
        max_position_embeddings: context length in tokens that the model is meant for.
        rope_theta, rope_scaling: see `arfast.nn.inverse_frequencies`.
        rms_norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of the initial weights; o_proj and down_proj, which add to the residual
            stream, start at initializer_range / sqrt(2 L) (Radford et al. 2019, section 2.3).
        tie_word_embeddings: the output head is the embedding.
        qkv_bias, o_bias: biases in attention. qk_norm: RMSNorm of each head's query and key.
        sliding_window: a token sees itself and sliding_window - 1 tokens before it, in "sliding_attention" layers.
        layer_types: per layer "full_attention" or "sliding_attention"; None: all the latter with a window, all the
            former without.
        num_experts: routed experts E; 0: a dense model. A token takes num_experts_per_tok of them, K;
            num_shared_experts see all tokens; moe_intermediate_size is I of one expert (None: intermediate_size).
        router_score: "softmax" or "sigmoid". router_bias: experts have a bias for the choice alone, which balances them
            while training (see `arfast.nn.moe`).
        norm_topk_prob: the K weights sum to 1; routed_scaling_factor multiplies them.
        decoder_sparse_step, mlp_only_layers: layer i has experts when (i + 1) % decoder_sparse_step == 0 and i is not
            in mlp_only_layers; otherwise a dense MLP of intermediate_size.
        router_aux_loss_coef, router_z_loss_coef: factors of the load-balancing loss and the router z-loss in aux_loss.
        bos_token_id, eos_token_id, pad_token_id: special tokens (eos may be several), for generation and for the files.

    Raises:
        ValueError: naming the field, the rule and the value.

    Example:
        >>> CausalLMConfig.preset("llama3-8b").num_parameters()
        8030261248
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 500_000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    router_score: str = "softmax"
    router_bias: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        self._check_integers({name: _INTEGERS[name] for name in sizes})
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            size, heads = self.hidden_size, self.num_attention_heads
            self._require(size % heads == 0, "hidden_size", f"be a multiple of num_attention_heads={heads}")
            self._set("head_dim", size // heads)
        if self.moe_intermediate_size is None:
            self._set("moe_intermediate_size", self.intermediate_size)
        self._check_integers(_INTEGERS)
        self._check_numbers(_NUMBERS)
        self._check_booleans(*_BOOLEANS)
        self._check_attention()
        self._check_experts()
        self._check_special_tokens()

    def _check_attention(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(heads % kv_heads == 0, "num_key_value_heads", f"divide num_attention_heads={heads}")
        self._require(self.head_dim % 2 == 0, "head_dim", "be even")
        self._check_integers({"sliding_window": (1, 2**31 - 1)}, optional=("sliding_window",))
        if self.layer_types is not None:
            self._check_layer_types()
        self._check_rope_scaling()

    def _check_layer_types(self) -> None:
        types = self.layer_types
        valid = isinstance(types, (tuple, list)) and all(kind in (FULL, SLIDING) for kind in types)
        rule = f"hold {FULL!r} or {SLIDING!r} for each of num_hidden_layers={self.num_hidden_layers}"
        self._require(valid and len(types) == self.num_hidden_layers, "layer_types", rule)
        valid = self.sliding_window is not None or SLIDING not in types
        self._require(valid, "layer_types", f"be {FULL!r} without a sliding_window")
        self._set("layer_types", tuple(types))

    def _check_rope_scaling(self) -> None:
        scaling, require = self.rope_scaling, self._require
        if scaling is None:
            return
        require(isinstance(scaling, dict), "rope_scaling", "be None or a dict")
        kind = scaling.get("rope_type")
        require(isinstance(kind, str) and kind in _ROPE_KEYS, "rope_scaling", "have rope_type linear or llama3", kind)
        keys = _ROPE_KEYS[kind]
        require(set(scaling) - {"rope_type"} == keys, "rope_scaling", f"have the keys {sorted(keys)}", sorted(scaling))
        for key in keys:
            value = scaling[key]
            require(is_number(value) and 0 < value < 2**31, f"rope_scaling[{key!r}]", "be a positive number", value)
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            require(high > low, "rope_scaling['high_freq_factor']", f"be above low_freq_factor={low}", high)

    def _check_experts(self) -> None:
        dense, last = self.mlp_only_layers, self.num_hidden_layers - 1
        valid = isinstance(dense, (tuple, list)) and all(is_integer(i) and 0 <= i <= last for i in dense)
        self._require(valid, "mlp_only_layers", f"hold layer numbers in [0, {last}]")
        self._set("mlp_only_layers", tuple(dense))
        self._require(self.router_score in ("softmax", "sigmoid"), "router_score", "be softmax or sigmoid")
        experts, top_k = self.num_experts, self.num_experts_per_tok
        self._require(not experts or top_k <= experts, "num_experts_per_tok", f"be at most num_experts={experts}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "CausalLMConfig":
        """A named configuration: one of `presets()`, with any field overridden.

        The feed-forward sizes of Llama 3 are those of the released models, 14336 / 28672 / 53248. A widely copied table
        gives 6144 / 12288 / 20480, with which the models would not have 8B / 70B / 405B parameters.

        Example:
            >>> CausalLMConfig.preset("tiny", vocab_size=8192).hidden_size
            256
        """
        if name not in PRESETS:
            raise ValueError(f"CausalLMConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names that `preset` takes."""
        return tuple(PRESETS)

    def replace(self, **changes: Any) -> "CausalLMConfig":
        """A copy with some fields changed; fields that had the value that follows from others follow them again."""
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "moe_intermediate_size": self.intermediate_size,
        }
        following = {name: None for name, value in derived.items() if getattr(self, name) == value}
        return replace(self, **{**following, **changes})

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    def window(self, layer: int) -> int | None:
        """How many tokens before itself a token sees in a layer; None: all."""
        full = self.sliding_window is None or (self.layer_types is not None and self.layer_types[layer] == FULL)
        return None if full else self.sliding_window - 1

    def num_parameters(self, active: bool = False) -> int:
        """Number of parameters, a tied head once; with `active`, of the routed experts only those a token takes."""
        d, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * d * (heads + kv_heads) * self.head_dim + 2 * self.head_dim * self.qk_norm
        attention += (heads + 2 * kv_heads) * self.head_dim * self.qkv_bias + d * self.o_bias
        norms = (2 * self.num_hidden_layers + 1) * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        feed_forward = sum(self._feed_forward_parameters(i, active) for i in range(self.num_hidden_layers))
        biases = self.num_experts * self.router_bias * sum(map(self.has_experts, range(self.num_hidden_layers)))
        return embeddings + self.num_hidden_layers * attention + feed_forward + norms + biases

    def _feed_forward_parameters(self, layer: int, active: bool) -> int:
        if not self.has_experts(layer):
            return 3 * self.hidden_size * self.intermediate_size
        experts = (self.num_experts_per_tok if active else self.num_experts) + self.num_shared_experts
        return self.hidden_size * (self.num_experts + 3 * self.moe_intermediate_size * experts)

    def flops_per_token(self, seqlen: int) -> float:
        """Floating-point operations of training (forward and backward) per token, in sequences of `seqlen` tokens.

        Convention: 6 per weight of every matrix that multiplies the token (a multiply and an add forward, twice that
        backward): projections, router, the experts the token takes, and the output head, also a tied one, but not the
        embedding lookup. Attention adds 12 H D per visible key, masked keys not counted, so half of what the formula of
        PaLM (Chowdhery et al., arXiv 2204.02311, appendix B) gives for causal attention. Recomputation is not counted.
        """
        d, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        weights = self.vocab_size * d + self.num_hidden_layers * 2 * d * (heads + kv_heads) * self.head_dim
        weights += sum(self._feed_forward_parameters(i, active=True) for i in range(self.num_hidden_layers))
        keys = 0.0
        for layer in range(self.num_hidden_layers):
            window = self.window(layer)
            visible = seqlen if window is None else min(window + 1, seqlen)
            keys += visible - visible * (visible - 1) / (2 * seqlen)
        return 6.0 * weights + 12.0 * heads * self.head_dim * keys
