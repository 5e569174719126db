"""Layers of CausalLM, on top of arfast.ops. Hidden states are [N, d]: all tokens of a batch in one dimension."""

from .attention import Attention
from .cross_attention import CrossAttention, PackedSource, PaddedSource, Source
from .embedding import Embedding
from .initialization import normal_
from .kv_cache import BranchedKVCache, KVCache, StaticKVCache
from .layout import TokenLayout
from .lora import LoraConfig, apply_lora, merge_lora
from .mlp import SwiGLU
from .moe import MoE
from .norm import RMSNorm
from .rotary import RotaryEmbedding, inverse_frequencies

__all__ = [
    "Attention",
    "BranchedKVCache",
    "CrossAttention",
    "Embedding",
    "KVCache",
    "LoraConfig",
    "MoE",
    "PackedSource",
    "PaddedSource",
    "RMSNorm",
    "RotaryEmbedding",
    "Source",
    "StaticKVCache",
    "SwiGLU",
    "TokenLayout",
    "apply_lora",
    "inverse_frequencies",
    "merge_lora",
    "normal_",
]
