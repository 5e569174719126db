"""The model families of Hugging Face that CausalLM reads and writes: their config.json and the names of their tensors.

A config.json is data: every key that is used is named here, checked by CausalLMConfig, and never passed on.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, fields
from typing import Any

from torch import Tensor

from .config import FULL, SLIDING, CausalLMConfig
from .encoder_decoder import FAMILY as ENCODER_DECODER
from .encoder_decoder import EncoderDecoderConfig
from .linear_lm import FAMILY as LINEAR
from .linear_lm import LinearLMConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "arfast": "ArfastForCausalLM",  # our own: every field of CausalLMConfig, for what no other family can express
    LINEAR: "ArfastLinearLM",
    ENCODER_DECODER: "ArfastEncoderDecoder",
}
# Their config.json has the fields of the configuration as they are.
OWN = {"arfast": CausalLMConfig, LINEAR: LinearLMConfig, ENCODER_DECODER: EncoderDecoderConfig}
Config = CausalLMConfig | LinearLMConfig | EncoderDecoderConfig

_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_EXPERTS_SAME_NAME = ("num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What would change the result and is not built: present with another value, it is an error.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_READ = frozenset(
    "model_type rope_theta rope_scaling rope_parameters rms_norm_eps attention_bias sliding_window use_sliding_window "
    "max_window_layers layer_types num_local_experts num_experts moe_intermediate_size norm_topk_prob "
    "decoder_sparse_step mlp_only_layers".split()
)
# Known to say nothing about the function that the weights compute.
_IRRELEVANT = frozenset(
    "architectures transformers_version dtype torch_dtype use_cache attention_dropout pretraining_tp "
    "output_router_logits router_jitter_noise use_mrope return_dict output_attentions output_hidden_states "
    "is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type max_length _name_or_path".split()
)


def _require(condition: bool, key: str, rule: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"config.json: {key} must {rule}, got {actual!r:.100}")


def config_from_json(raw: dict[str, Any]) -> Config:
    """The configuration that a config.json describes.

    Raises:
        ValueError: the family is unknown, or a key has a value that CausalLM does not implement.
    """
    family = raw.get("model_type")
    known = isinstance(family, str) and family in ARCHITECTURES
    _require(known, "model_type", f"be one of {', '.join(ARCHITECTURES)}", family)
    own = OWN.get(family)
    for key in (field.name for field in fields(own) if field.default is MISSING) if own else _REQUIRED:
        _require(raw.get(key) is not None, key, "be present", None)
    if own:
        names = {field.name for field in fields(own)}
        _warn_unused(set(raw) - names - {"model_type"} - _IRRELEVANT)
        return own(**{name: raw[name] for name in names if name in raw})
    for key, allowed in _NEUTRAL.items():
        _require(raw.get(key, allowed[0]) in allowed, key, f"be {allowed[0]!r}", raw.get(key))
    moe = family in ("mixtral", "qwen3_moe")
    same = _SAME_NAME + (_EXPERTS_SAME_NAME if moe else ())
    _warn_unused(set(raw) - set(same) - set(_NEUTRAL) - _READ - _IRRELEVANT)

    options = {key: raw[key] for key in same if raw.get(key) is not None}
    if raw.get("pad_token_id") == -1:  # "none" in files of the first Llama
        del options["pad_token_id"]
    if family == "qwen3":
        options.setdefault("head_dim", 128)
    options["rms_norm_eps"] = raw.get("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6)
    options |= _rope_from_json(raw, default_theta=1_000_000.0 if family == "mixtral" else 10_000.0)
    options |= _attention_from_json(family, raw)
    if moe:
        options |= _experts_from_json(family, raw)
    return CausalLMConfig(**options)


def _warn_unused(keys: set[str]) -> None:
    if keys:
        names = ", ".join(sorted(keys))
        warnings.warn(f"config.json: unknown keys are not used: {names:.300}", stacklevel=4)


def _rope_from_json(raw: dict[str, Any], default_theta: float) -> dict[str, Any]:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _require(isinstance(scaling, dict), "rope_parameters", "be an object", scaling)
    theta = scaling.get("rope_theta", raw.get("rope_theta", default_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _require(kind in ("default", "linear", "llama3"), "rope_type", "be default, linear or llama3", kind)
    _require(scaling.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor", "be 1.0", scaling)
    if kind == "default":
        return {"rope_theta": theta}
    options = {"rope_type": kind, "factor": scaling.get("factor")}
    if kind == "llama3":
        options |= {key: scaling.get(key) for key in ("low_freq_factor", "high_freq_factor")}
        original = scaling.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        options["original_max_position_embeddings"] = original
    return {"rope_theta": theta, "rope_scaling": options}


def _attention_from_json(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False) if family in ("llama", "qwen3", "qwen3_moe") else False
    options = {
        "qkv_bias": True if family == "qwen2" else bias,
        "o_bias": bias,
        "qk_norm": family in ("qwen3", "qwen3_moe"),
    }
    window = raw.get("sliding_window", 4096 if family == "mistral" or family.startswith("qwen") else None)
    if family == "llama" or (family.startswith("qwen") and not raw.get("use_sliding_window", False)):
        window = None
    options["sliding_window"] = window
    if family in ("qwen2", "qwen3") and window is not None:
        layers, full = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
        _require(isinstance(layers, int) and layers <= 4096, "num_hidden_layers", "be at most 4096", layers)
        _require(isinstance(full, int), "max_window_layers", "be an integer", full)
        types = raw.get("layer_types") or []
        _require(isinstance(types, list), "layer_types", "be a list", types)
        types = types or [FULL if layer < full else SLIDING for layer in range(layers)]
        options["layer_types"] = types if FULL in types else None
    return options


def _experts_from_json(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    experts, top_k = (8, 2) if family == "mixtral" else (128, 8)
    options = {
        "num_experts": raw.get("num_local_experts", raw.get("num_experts", experts)),
        "num_experts_per_tok": raw.get("num_experts_per_tok", top_k),
    }
    if family == "qwen3_moe":
        options["norm_topk_prob"] = raw.get("norm_topk_prob", False)
        options["moe_intermediate_size"] = raw.get("moe_intermediate_size", 768)
        options["decoder_sparse_step"] = raw.get("decoder_sparse_step", 1)
        options["mlp_only_layers"] = raw.get("mlp_only_layers") or ()
    return options


def choose_family(config: CausalLMConfig) -> str:
    """The most widely supported family that expresses the configuration exactly."""
    windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
    uniform, window = len(windows) == 1, windows != {None}
    no_bias, all_bias = not config.qkv_bias and not config.o_bias, config.qkv_bias and config.o_bias
    standard_heads = config.head_dim * config.num_attention_heads == config.hidden_size
    sparse = [config.has_experts(layer) for layer in range(config.num_hidden_layers)]
    if any(sparse):
        plain = config.router_score == "softmax" and config.routed_scaling_factor == 1.0 and not config.router_bias
        plain = plain and uniform and config.num_shared_experts == 0
        if plain and config.qk_norm and (no_bias or all_bias):
            return "qwen3_moe"
        if plain and not config.qk_norm and no_bias and all(sparse) and config.norm_topk_prob:
            return "mixtral"
        return "arfast"
    if config.qk_norm:
        return "qwen3" if no_bias or all_bias else "arfast"
    if config.qkv_bias and not config.o_bias:
        return "qwen2" if standard_heads else "arfast"
    if not window and (no_bias or all_bias) and config.hidden_size % config.num_attention_heads == 0:
        return "llama"
    return "mistral" if uniform and no_bias else "arfast"


def config_to_json(config: Config, dtype: str, family: str | None = None) -> dict[str, Any]:
    """The config.json of a family, None for the one that `choose_family` names, whose weights have this dtype.

    rope_theta and rope_scaling are written under their older names, which every version of transformers and vLLM reads.
    """
    family = family or choose_family(config)
    header = {"architectures": [ARCHITECTURES[family]], "model_type": family, "torch_dtype": dtype}
    if family in OWN:
        return header | asdict(config)
    raw = {key: getattr(config, key) for key in _SAME_NAME}
    raw |= {"rms_norm_eps": config.rms_norm_eps, "hidden_act": "silu", "use_cache": True, "attention_dropout": 0.0}
    raw |= {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if family == "llama":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": False}
    elif family in ("mistral", "mixtral"):
        raw["sliding_window"] = config.sliding_window if config.window(0) is not None else None
    else:
        raw |= _qwen_to_json(family, config)
    if family in ("mixtral", "qwen3_moe"):
        raw |= {key: getattr(config, key) for key in _EXPERTS_SAME_NAME}
    if family == "mixtral":
        raw |= {"intermediate_size": config.moe_intermediate_size, "num_local_experts": config.num_experts}
    return header | raw


def _qwen_to_json(family: str, config: CausalLMConfig) -> dict[str, Any]:
    types = [FULL if config.window(layer) is None else SLIDING for layer in range(config.num_hidden_layers)]
    window = SLIDING in types
    raw = {"use_sliding_window": window, "sliding_window": config.sliding_window if window else None}
    if family != "qwen2":
        raw["attention_bias"] = config.qkv_bias
    if family == "qwen3_moe":
        return raw | {
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    return raw | {"max_window_layers": types.index(SLIDING) if window else len(types), "layer_types": types}


# Index of a stored tensor inside its parameter: () for all of it, (e,) or (e, rows) inside stacked experts.
Index = tuple[int | slice, ...]


def stored_tensors(family: str, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str, Index]]:
    """(parameter, name of a stored tensor, its place inside the parameter) for everything that a directory holds.

    The stacked experts are stored one by one, Mixtral's as w1 (gate), w3 (up), w2 (down) of a block_sparse_moe; our own
    families store parameters as they are.
    """
    mixtral = family == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in parameters:
        stored = re.sub(r"\.mlp\.(gate\.weight|experts\.)", r".block_sparse_moe.\1", name) if mixtral else name
        prefix, _, stacked = stored.rpartition(".")
        if family in OWN or not prefix.endswith(".experts"):
            yield name, stored, ()
            continue
        half = parameter.shape[1] // 2
        for expert in range(parameter.shape[0]):
            if stacked == "gate_up_proj":
                yield name, f"{prefix}.{expert}.{gate}.weight", (expert, slice(0, half))
                yield name, f"{prefix}.{expert}.{up}.weight", (expert, slice(half, None))
            else:
                yield name, f"{prefix}.{expert}.{down}.weight", (expert,)
