"""The Llamas that training and decoding are measured with, and transformers' model of the same weights."""

from dataclasses import dataclass

import pytest

from arfast.models import CausalLM, CausalLMConfig
from arfast.models.families import config_to_json

LLAMA_11M = CausalLMConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)
LLAMA_50M = LLAMA_11M.replace(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2
)
# The shape of Llama 3.2 1B: 16 layers, 32 heads of 64 that share 8 of keys and values.
LLAMA_1B = CausalLMConfig.preset(
    "llama3-8b",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Size:
    """A model to train, as the case of a benchmark."""

    name: str
    config: CausalLMConfig

    def __str__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        """Of weights and moments, float32."""
        return 12 * CausalLM(self.config, device="meta").num_parameters()


SIZES = (Size("11M", LLAMA_11M), Size("50M", LLAMA_50M))


def transformers_twin(model: CausalLM):
    """LlamaForCausalLM with the weights, the dtype and the device of `model`, and SDPA attention."""
    transformers = pytest.importorskip("transformers")
    weight = model.head_weight
    config = transformers.AutoConfig.for_model(**config_to_json(model.config, "float32"))
    with weight.device:
        twin = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin
