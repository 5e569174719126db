"""CausalLMConfig: presets with the published parameter counts, derived fields, operation counts, and every error."""

import pytest
import torch

from arfast.models import CausalLM, CausalLMConfig

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 5_475_584),
        ("tiny-moe", 15_219_968),
        ("gpt2-small", 123_551_232),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_preset_parameters(name, count):
    config = CausalLMConfig.preset(name)
    assert config.num_parameters() == count
    assert CausalLM(config, device="meta").num_parameters() == count


def test_presets_are_all_tested():
    assert set(CausalLMConfig.presets()) == {
        mark.args[1][i][0] for mark in test_preset_parameters.pytestmark for i in range(7)
    }


def test_active_parameters():
    assert CausalLMConfig.preset("mixtral-8x7b").num_parameters(active=True) == 12_879_925_248
    assert CausalLMConfig.preset("llama3-8b").num_parameters(active=True) == 8_030_261_248


def test_parameters_of_every_option():
    options = dict(qkv_bias=True, o_bias=True, qk_norm=True, head_dim=16, num_key_value_heads=2)
    experts = dict(num_experts=5, num_shared_experts=2, moe_intermediate_size=24, mlp_only_layers=(1,))
    for extra in (options, experts, options | experts | {"tie_word_embeddings": True, "decoder_sparse_step": 2}):
        config = CausalLMConfig(**SMALL, **extra)
        assert CausalLM(config, device="meta").num_parameters() == config.num_parameters()


def test_preset_overrides():
    config = CausalLMConfig.preset("tiny", vocab_size=99, num_hidden_layers=2)
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (99, 2, 256)
    assert config.replace(vocab_size=100).vocab_size == 100


def test_replace_follows_derived_fields():
    config = CausalLMConfig(**SMALL, sliding_window=4, num_key_value_heads=2).replace(
        hidden_size=64, num_hidden_layers=5
    )
    assert (config.head_dim, config.num_key_value_heads, config.window(4)) == (16, 2, 3)
    assert CausalLMConfig(**SMALL, head_dim=32).replace(hidden_size=64).head_dim == 32


def test_defaults():
    config = CausalLMConfig(**SMALL)
    assert (config.num_key_value_heads, config.head_dim, config.moe_intermediate_size) == (4, 8, 48)
    assert config.window(0) is None
    assert CausalLMConfig(**SMALL, sliding_window=5).window(2) == 4
    types = ["full_attention", "sliding_attention", "full_attention"]
    mixed = CausalLMConfig(**SMALL, sliding_window=5, layer_types=types)
    assert [mixed.window(layer) for layer in range(3)] == [None, 4, None]


@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
def test_flops_count_visible_keys(window):
    seqlen = 64
    config = CausalLMConfig(**SMALL, sliding_window=window, num_experts=4, moe_intermediate_size=24)
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    visible = (j <= i) & (j >= i - (seqlen if window is None else window - 1))
    attention = 3 * 12 * 32 * visible.sum().item() / seqlen
    per_layer = 4 * 32 * 32 + 32 * 4 + 2 * 3 * 32 * 24
    assert config.flops_per_token(seqlen) == pytest.approx(6 * (3 * per_layer + 50 * 32) + attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer in [1, 2147483647], got 0"),
        ({"vocab_size": 10**18}, "vocab_size must be an integer in"),
        ({"hidden_size": "64"}, "hidden_size must be an integer in [1, 1048576], got '64'"),
        ({"hidden_size": True}, "hidden_size must be an integer in [1, 1048576], got True"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads=4, got 33"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers must be an integer in [1, 4096], got 5000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=4, got 3"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number in [0.0, 1.0), got nan"),
        ({"rope_theta": 0}, "rope_theta must be a number in (0.0, inf), got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"sliding_window": 0}, "sliding_window must be None or an integer in [1, 2147483647], got 0"),
        (
            {"layer_types": ("full_attention",)},
            "layer_types must hold 'full_attention' or 'sliding_attention' for each",
        ),
        ({"layer_types": ("sliding_attention",) * 3}, "layer_types must be 'full_attention' without a sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling must have rope_type linear or llama3, got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling must have the keys ['factor'], got ['rope_type']"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling['factor'] must be a positive number"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts=4, got 5"),
        ({"mlp_only_layers": (3,)}, "mlp_only_layers must hold layer numbers in [0, 2], got (3,)"),
        ({"router_score": "tanh"}, "router_score must be softmax or sigmoid, got 'tanh'"),
        ({"eos_token_id": (1, 50)}, "eos_token_id must be None or in [0, vocab_size=50), got (1, 50)"),
        ({"pad_token_id": -1}, "pad_token_id must be None or in [0, vocab_size=50), got -1"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError) as error:
        CausalLMConfig(**{**SMALL, **options})
    assert str(error.value).startswith(f"CausalLMConfig: {message}")


def test_llama3_scaling_needs_ordered_factors():
    scaling = dict(
        rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4, original_max_position_embeddings=9
    )
    with pytest.raises(ValueError, match=r"rope_scaling\['high_freq_factor'\] must be above low_freq_factor=4, got 4"):
        CausalLMConfig(**SMALL, rope_scaling=scaling)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of tiny, .*, got 'llama4'"):
        CausalLMConfig.preset("llama4")
