"""The FLOPs that utilisation is measured with, against torch's counter over transformers' model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arfast.models import CausalLMConfig
from arfast.models.families import config_to_json

DENSE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIGS = {
    "dense": CausalLMConfig(**DENSE),
    "tied": CausalLMConfig(**DENSE, tie_word_embeddings=True),
    "wide heads": CausalLMConfig(**DENSE, head_dim=24),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_per_token(name):
    """Eager attention multiplies every query with every key; only the half that is visible counts."""
    transformers = pytest.importorskip("transformers")
    config, batch, seqlen = CONFIGS[name], 2, 16
    raw = transformers.AutoConfig.for_model(**config_to_json(config, "float32"))
    model = transformers.AutoModelForCausalLM.from_config(raw, attn_implementation="eager")
    ids = torch.randint(0, 60, (batch, seqlen))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    hidden_keys = (seqlen - 1) / 2
    hidden = 12 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * hidden_keys
    assert counter.get_total_flops() == batch * seqlen * (config.flops_per_token(seqlen) + hidden)
