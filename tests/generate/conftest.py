"""A random tiny Llama of transformers and ours with the same weights: the independent truth for the tests here."""

import os

import pytest
import torch

from arfast.models import CausalLM, CausalLMConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PAD = 1


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


class BiasedModel:
    """Ours with a constant added to the logits, so that end tokens come up."""

    def __init__(self, model, bias):
        self.model, self.bias = model, bias
        self.config, self.head_weight = model.config, model.head_weight
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        out = self.model(*args, **kwargs)
        if out.logits is not None:
            out.logits = out.logits + self.bias
        return out


@pytest.fixture
def tiny_pair():
    """(vocab_size, seed, scale, bias) -> (transformers' model, ours): the same function, in float32.

    scale is the standard deviation of the output head: how far from uniform the distributions are.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )

    def make(vocab_size, seed, scale=0.4, bias=None):
        torch.manual_seed(seed)
        rope = dict(rope_type="default", rope_theta=500_000.0)
        special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
        config = transformers.LlamaConfig(vocab_size=vocab_size, rope_parameters=rope, **sizes, **special)
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.lm_head.weight.data.normal_(0, scale)
        theirs.model.embed_tokens.weight.data.normal_(0, 1.0)
        bias = torch.zeros(vocab_size) if bias is None else bias
        theirs.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
        ours = CausalLM(CausalLMConfig(vocab_size=vocab_size, **sizes))
        ours.load_state_dict(theirs.state_dict())
        return theirs, BiasedModel(ours, bias)

    return make


@pytest.fixture
def padded_prompts():
    """(batch, length, vocab_size) -> (input_ids, attention_mask): every second prompt is padded on the left."""

    def make(batch, length, vocab_size):
        input_ids = torch.randint(PAD + 2, vocab_size, (batch, length))
        mask = torch.ones_like(input_ids)
        for row in range(1, batch, 2):
            mask[row, : 1 + row % (length - 1)] = 0
        return input_ids.masked_fill(mask == 0, PAD), mask

    return make
