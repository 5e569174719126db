"""Rotary embeddings: the definition by complex numbers, scaling against transformers, tables under casts and moves."""

import pytest
import torch

from arfast import ops
from arfast.nn import RotaryEmbedding, inverse_frequencies

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@pytest.mark.parametrize(
    "scaling", [None, dict(rope_type="linear", factor=4.0), LLAMA3], ids=["plain", "linear", "llama3"]
)
@pytest.mark.parametrize("head_dim", [2, 64, 128])
def test_frequencies_equal_transformers(head_dim, scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = dict(scaling or dict(rope_type="default"), rope_theta=500_000.0)
    config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(inverse_frequencies(head_dim, 500_000.0, scaling), expected)


def test_rotation_is_a_complex_product():
    rotary = RotaryEmbedding(head_dim=16, theta=100.0, max_positions=32)
    x = torch.randn(2, 20, 3, 16, dtype=torch.float64)
    angles = (torch.arange(20)[:, None].float() * inverse_frequencies(16, 100.0)).double()
    rotated = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    torch.testing.assert_close(ops.rotary(x, *rotary(None, 20)), expected, rtol=0, atol=1e-6)  # tables are float32


def test_scores_depend_on_distance_only():
    rotary = RotaryEmbedding(head_dim=32, theta=10_000.0, max_positions=64)
    q, k = torch.randn(2, 1, 1, 32).double().expand(2, 64, 1, 32).unbind(0)
    q, k = (ops.rotary(x, *rotary(None, 64)).squeeze(1) for x in (q, k))
    scores = q @ k.T
    for distance in (-30, 0, 17):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_tables_grow_and_agree_with_direct_computation():
    rotary = RotaryEmbedding(head_dim=8, theta=10.0, max_positions=4)
    assert rotary.cos.shape == (4, 4)
    positions = torch.tensor([[0, 5, 299], [3, 3, 1]])
    looked_up = rotary(positions, 300)
    for table, computed, function in zip(looked_up, rotary(positions, None), (torch.cos, torch.sin)):
        assert table.shape == (6, 4)
        torch.testing.assert_close(table, computed, rtol=0, atol=1e-6)
        torch.testing.assert_close(table[2], function(299 * rotary.inverse_frequencies))


def test_tables_grown_in_inference_mode_can_be_trained_with():
    rotary = RotaryEmbedding(head_dim=8, theta=10.0, max_positions=4)
    with torch.inference_mode():
        rotary(None, 9)
    x = torch.randn(9, 2, 8, requires_grad=True)
    ops.rotary(x, *rotary(None, 9)).sum().backward()
    assert x.grad.isfinite().all()


def test_casts_and_moves_keep_float32_tables():
    rotary = RotaryEmbedding(head_dim=8, theta=10.0, max_positions=16)
    expected = rotary.cos.clone()
    for changed in (rotary.to(torch.bfloat16), rotary.half(), rotary.to("meta").to_empty(device="cpu")):
        assert torch.equal(changed.cos, expected)
    assert rotary.state_dict() == {}
