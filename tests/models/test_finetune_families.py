"""What we save, transformers loads, for every family and option: logits by the bound of the ops, and greedy tokens."""

import itertools
import json
import random

import pytest
import torch
from accuracy import assert_accurate

from arfast.models import CausalLM, CausalLMConfig
from arfast.models.families import ARCHITECTURES, OWN, choose_family

SIZES = dict(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.25,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
UPPER = ("full_attention", "sliding_attention", "sliding_attention")
OPTIONS = {
    "tie_word_embeddings": (False, True),
    "biases": ({}, dict(qkv_bias=True), dict(o_bias=True), dict(qkv_bias=True, o_bias=True)),
    "qk_norm": (False, True),
    "num_key_value_heads": (4, 2),
    "head_dim": (None, 20),
    "window": ({}, dict(sliding_window=5), dict(sliding_window=5, layer_types=UPPER)),
    "rope_scaling": (None, dict(rope_type="linear", factor=2.0), LLAMA3),
    "experts": (
        {},
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        dict(num_experts=3, num_experts_per_tok=1, norm_topk_prob=False, decoder_sparse_step=2),
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=(1,)),
    ),
}


def configurations():
    """Those that a family of transformers has, a sample of them with every value of every option in it."""
    combinations = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]
    random.Random(0).shuffle(combinations)
    counts, chosen = {}, []
    for combination in combinations:
        fields = {**combination.pop("biases"), **combination.pop("window"), **combination.pop("experts"), **combination}
        config = CausalLMConfig(**SIZES, **fields)
        family = choose_family(config)
        if family == "arfast" or counts.get(family, 0) == 7:
            continue
        counts[family] = counts.get(family, 0) + 1
        chosen.append(pytest.param(config, id=f"{family}-{counts[family]}"))
    return chosen


CONFIGURATIONS = configurations()


def test_the_sample_is_of_everything():
    configs = [parameter.values[0] for parameter in CONFIGURATIONS]
    assert {choose_family(config) for config in configs} == ARCHITECTURES.keys() - OWN.keys()
    for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "qk_norm", "num_key_value_heads", "norm_topk_prob"):
        assert {getattr(config, name) for config in configs} == set(OPTIONS.get(name, (False, True))), name
    assert {str(config.rope_scaling) for config in configs} == set(map(str, OPTIONS["rope_scaling"]))
    assert any(config.layer_types for config in configs) and any(config.mlp_only_layers for config in configs)


@pytest.mark.filterwarnings("ignore")  # what transformers says about generation settings
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_transformers_loads_it(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = CausalLM(config, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # not the trivial values that they start with
            parameter.data.add_(torch.randn(parameter.shape) / 4)
    model.save_pretrained(tmp_path)
    family = choose_family(config)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [ARCHITECTURES[family]]
    options = dict(attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    assert not any(report.values()), report
    ids = torch.randint(0, config.vocab_size, (2, 21))
    with torch.no_grad():
        actual, baseline = model(ids).logits, theirs.eval()(ids).logits
        tokens = theirs.generate(ids[:1, :5], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model.generate(ids[:1, :5], max_new_tokens=8), tokens)
        exact = theirs.double()(ids).logits
    # A composition of dozens of ops is granted more units in the last place than one op.
    assert_accurate(actual, exact, baseline, name="logits", ulps=16)
