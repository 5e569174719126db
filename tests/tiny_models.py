"""Configurations small enough that a test can run a model many times."""

from arfast.models import CausalLMConfig

TINY = CausalLMConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
TINY_EXPERTS = TINY.replace(num_experts=4, num_shared_experts=1, moe_intermediate_size=16)
