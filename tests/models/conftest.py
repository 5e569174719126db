"""Tiny randomly initialised models of transformers, saved as directories: the independent truth for the tests here."""

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BASE = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attn_implementation="eager",
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=100.0,
)
MOE = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48)

# name: (model class of transformers, what its configuration adds to BASE)
CASES = {
    "llama": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500_000.0))),
    "llama-mha-tied-linear-rope": (
        "Llama",
        dict(
            num_key_value_heads=4,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10_000.0),
        ),
    ),
    "llama-bias-llama3-rope": ("Llama", dict(attention_bias=True, rope_parameters=LLAMA3_ROPE)),
    "mistral-window": ("Mistral", dict(sliding_window=7, head_dim=32)),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window-upper-layers": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32, num_key_value_heads=1)),
    "qwen3-window-bias": (
        "Qwen3",
        dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "mixtral-window": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=7)),
    "qwen3-moe": ("Qwen3Moe", dict(MOE, norm_topk_prob=True)),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        dict(MOE, mlp_only_layers=[2], decoder_sparse_step=1, head_dim=32, use_sliding_window=True, sliding_window=6),
    ),
    "qwen3-moe-sparse-step": ("Qwen3Moe", dict(MOE, decoder_sparse_step=2, tie_word_embeddings=True)),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


@contextlib.contextmanager
def quiet():
    """Without the notices that transformers prints about image processors and generation settings."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield transformers


@dataclass
class Case:
    """A model of transformers and the directory that it saved."""

    name: str
    reference: torch.nn.Module
    path: Path


@pytest.fixture(scope="session", params=CASES)
def case(request, tmp_path_factory) -> Case:
    pytest.importorskip("transformers")
    architecture, options = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    with quiet() as transformers:
        config = getattr(transformers, f"{architecture}Config")(**{**BASE, **options})
        reference = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in reference.named_parameters():
            # weights large enough that attention and routing are far from uniform, norms and biases not trivial
            parameter.data.normal_(float("norm" in name), 0.2, generator=generator)
        reference.save_pretrained(path)
    return Case(request.param, reference, path)


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(2))
