"""Named configurations of CausalLM."""

_LLAMA3 = dict(
    vocab_size=128_256,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    bos_token_id=128_000,
    eos_token_id=128_001,
)

# Sizes of Llama 3: Grattafiori et al., arXiv 2407.21783, table 3; of Mixtral: Jiang et al., arXiv 2401.04088, table 1.
PRESETS = {
    # 5.5 M parameters: trains on two CPU cores in minutes
    "tiny": dict(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
    ),
    # the same with 8 small experts of which a token takes 2
    "tiny-moe": dict(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
    ),
    # the size of GPT-2 (Radford et al. 2019, table 2), 124 M, in this architecture
    "gpt2-small": dict(
        vocab_size=50_257,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
    ),
    "llama3-8b": dict(
        _LLAMA3, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama3-70b": dict(
        _LLAMA3, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
    ),
    "llama3-405b": dict(
        _LLAMA3,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
        max_position_embeddings=131_072,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "mixtral-8x7b": dict(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
