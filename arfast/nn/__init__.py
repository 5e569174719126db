"""Layers of CausalLM, on top of arfast.ops. Hidden states are [N, d]: all tokens of a batch in one dimension."""

from .attention import Attention
from .initialization import normal_
from .kv_cache import BranchedKVCache, KVCache, StaticKVCache
from .layout import TokenLayout
from .mlp import SwiGLU
from .moe import MoE
from .norm import RMSNorm
from .rotary import RotaryEmbedding, inverse_frequencies

__all__ = [
    "Attention",
    "BranchedKVCache",
    "KVCache",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "StaticKVCache",
    "SwiGLU",
    "TokenLayout",
    "inverse_frequencies",
    "normal_",
]
