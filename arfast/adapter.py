"""Adapters of a model on disk, in peft's format: adapter_config.json and adapter_model.safetensors, and beside them
base.json, which names the model that they belong to.

peft's names are ours behind "base_model.model."; stacked experts have theirs in peft's shapes, A [E r, in] and
B [out, r E]. A directory may come from anybody: its keys are data, and what would change the result and is not built
is an error.
"""

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .data.files import sha256, write_file
from .hub import _SHARD_NAME, INDEX, SINGLE, _read_json, _resolve, from_pretrained
from .models.causal_lm import CausalLM
from .nn.lora import EXPERT_TARGETS, LoraConfig, LoraExperts, LoraLinear, adapter_parameters, add_adapters, merge_lora
from .nn.moe import Experts

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# What these say is in the names and shapes of the tensors, or says nothing about the function.
_IRRELEVANT = frozenset(
    "peft_type task_type r lora_alpha lora_dropout use_rslora target_modules target_parameters exclude_modules "
    "layers_to_transform layers_pattern base_model_name_or_path revision inference_mode auto_mapping peft_version "
    "megatron_core qalora_group_size init_lora_weights runtime_config ensure_weight_tying".split()
)
# Initial values that leave the base weights as they were.
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters belong to: its directory, None for one made in memory, and what identifies it."""

    path: str | None
    fingerprint: str


def load_base(path: str | os.PathLike, dtype: torch.dtype | None = None, device: Any = None) -> CausalLM:
    """`from_pretrained`, and what adapters on the model need to refer to it."""
    model = from_pretrained(path, dtype=dtype, device=device)
    model.base = BaseModel(str(Path(path).resolve()), fingerprint_directory(path))
    return model


def fingerprint_directory(path: str | os.PathLike) -> str:
    """SHA-256 of the names and contents of config.json and the files of weights."""
    directory, names = Path(path), ["config.json", SINGLE]
    if not (directory / SINGLE).exists():
        weight_map = _read_json(directory, INDEX, 1 << 26).get("weight_map", {})
        names = ["config.json", *sorted(name for name in set(weight_map.values()) if _SHARD_NAME.fullmatch(name))]
    digest = hashlib.sha256()
    for name in names:
        with open(_resolve(directory, name), "rb") as file:
            content = sha256(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            digest.update(f"{name} {content}\n".encode())
    return f"files:{digest.hexdigest()}"


def base_of(model: CausalLM) -> BaseModel:
    """What `load_base` recorded, or for a model made in memory the SHA-256 of its frozen parameters."""
    if getattr(model, "base", None) is None:
        adapters = dict(adapter_parameters(model))
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if name not in adapters:
                content = sha256(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {content}\n".encode())
        model.base = BaseModel(None, f"tensors:{digest.hexdigest()}")
    return model.base


def save_adapter(model: CausalLM, path: str | os.PathLike) -> None:
    """Write the adapters of a model, which peft's ``PeftModel.from_pretrained`` puts on transformers' model.

    Args:
        model: after `apply_lora` or `load_adapter`.
        path: a directory, made if absent. Other files in it stay.

    Raises:
        ValueError: the model has no adapters.
    """
    if getattr(model, "lora", None) is None:
        raise ValueError("save_adapter: model must have adapters, got one without")
    directory, base = Path(path), base_of(model)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: _to_peft(name, value.detach()) for name, value in adapter_parameters(model)}
    tensors = {_peft_name(model, name): value.cpu().contiguous() for name, value in tensors.items()}
    write_file(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_file(directory / BASE, json.dumps({"path": base.path, "fingerprint": base.fingerprint}, indent=1).encode())
    write_file(directory / CONFIG, json.dumps(_config_to_json(model, base), indent=2).encode())


def load_adapter(model: CausalLM, path: str | os.PathLike, *, check_base: bool = True) -> CausalLM:
    """Put the adapters of a directory, ours or one that peft wrote, on a model, in place; they are trainable.

    A model that has adapters of the same layers and sizes takes over the values.

    Args:
        model: the base model.
        path: a directory with adapter_config.json and adapter_model.safetensors.
        check_base: whether a base.json must name this model.

    Raises:
        FileNotFoundError, ValueError: `load_adapter: <what> must <rule>, got <actual>`; the model is unchanged.

    Example:
        >>> model = apply_lora(CausalLM(CausalLMConfig.preset("tiny")))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save_adapter(model, path)
        ...     load_adapter(CausalLM(CausalLMConfig.preset("tiny")), path).lora == model.lora
        True
    """
    directory = Path(path)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"load_adapter: path must hold {CONFIG}, got {str(path)!r} without it")
    raw = _read_json(directory, CONFIG, _MAX_CONFIG_BYTES)
    settings = _settings(raw)
    if check_base and (directory / BASE).exists():
        recorded = _read_json(directory, BASE, _MAX_CONFIG_BYTES).get("fingerprint")
        if (got := base_of(model).fingerprint) != recorded:
            raise ValueError(f"load_adapter: model must be the one of {BASE}, {recorded!s:.100}, got {got}")
    try:
        with safe_open(_resolve(directory, WEIGHTS), framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {WEIGHTS} must be a complete safetensors file, got {error!s:.200}") from None
    values = _from_peft(model, stored, settings["rank"])
    layers = sorted({re.sub(r"\.lora_[AB]\.weight$|_lora_[AB]$", "", name) for name in values})
    last = {name.rpartition(".")[2] for name in layers}
    targets = {target for name in last for target in EXPERT_TARGETS.get(name, (name,))}
    try:
        config = LoraConfig(**settings, targets=tuple(sorted(targets)))
    except ValueError as error:
        raise ValueError(str(error).replace("apply_lora", f"load_adapter: {CONFIG}")) from None
    if getattr(model, "lora", None) is None:
        add_adapters(model, config, layers)
    parameters = dict(adapter_parameters(model))
    if parameters.keys() != values.keys():
        raise ValueError(
            f"load_adapter: {WEIGHTS} must have the adapters that the model has, got {len(values)} tensors instead of "
            f"{len(parameters)}"
        )
    for name, value in values.items():
        parameters[name].data.copy_(value)
    return model


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a directory holds adapters instead of a whole model."""
    return Path(path, CONFIG).is_file() and not Path(path, "config.json").is_file()


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: Any = None,
    *,
    base: str | os.PathLike | None = None,
    merge: bool = True,
) -> CausalLM:
    """A model directory as `from_pretrained` reads it; or the base model that adapters name, with them on it.

    Args:
        base: directory of the base model; None: where it was when the adapters were made.
        merge: add the adapters to the weights, which makes the model as fast as its base.

    Raises:
        FileNotFoundError, ValueError: the base model is not there, or is another one than it was.
    """
    if not is_adapter(path):
        return from_pretrained(path, dtype=dtype, device=device)
    if base is None:
        base = _read_json(Path(path), CONFIG, _MAX_CONFIG_BYTES).get("base_model_name_or_path")
    if not isinstance(base, (str, os.PathLike)) or not Path(base).is_dir():
        raise FileNotFoundError(f"load_model: base must be the directory of the adapters' model, got {base!r:.200}")
    model = load_adapter(load_base(base, dtype, device), path)
    return merge_lora(model) if merge else model


def _config_to_json(model: CausalLM, base: BaseModel) -> dict[str, Any]:
    config = model.lora
    linear, stacked = _wanted(model, LoraLinear, torch.nn.Linear), []
    if any(isinstance(module, Experts) for module in model.modules()):
        # peft takes gate_proj, up_proj and down_proj among the modules of such a model for stacked experts; the dense
        # layers that it may have beside them can be named by their weights.
        dense = [name for name in linear if name.endswith(("gate_proj", "up_proj", "down_proj"))]
        linear = [name for name in linear if name not in dense]
        stacked = [f"{name}.weight" if "." in name else f"mlp.{name}.weight" for name in dense]
    stacked += {f"mlp.experts.{name}" for m in model.modules() if isinstance(m, LoraExperts) for name in m.names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "target_modules": linear,
        "target_parameters": sorted(stacked) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _wanted(model: CausalLM, adapted: type, plain: type) -> list[str]:
    """Names of the adapted modules: the last parts where they say it all, else in full."""
    names = [name for name, module in model.named_modules() if isinstance(module, adapted)]
    last = {name.rpartition(".")[2] for name in names}
    others = (name for name, module in model.named_modules() if type(module) is plain)
    return names if any(name.rpartition(".")[2] in last for name in others) else sorted(last)


def _settings(raw: dict[str, Any]) -> dict[str, Any]:
    """What LoraConfig needs of an adapter_config.json, whose other keys are found to change nothing."""

    def require(condition: bool, key: str, rule: str) -> None:
        if not condition:
            raise ValueError(f"load_adapter: {CONFIG}: {key:.100} must {rule}, got {raw.get(key)!r:.100}")

    require(raw.get("peft_type") == "LORA", "peft_type", "be 'LORA'")
    initial = raw.get("init_lora_weights", True)
    require(isinstance(initial, (bool, str, type(None))) and initial in _INITIAL, "init_lora_weights", "keep the base")
    for key in raw.keys() - _IRRELEVANT:
        require(raw[key] in (None, False, "none") or raw[key] in ([], {}), key, "be absent")
    require(isinstance(raw.get("use_rslora", False), bool), "use_rslora", "be true or false")
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    settings = {ours: raw.get(key, {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}[key]) for ours, key in names.items()}
    require(type(settings["rank"]) is int, "r", "be an integer")
    return settings | {"rank_stabilized": raw.get("use_rslora", False)}


def _peft_name(model: CausalLM, name: str) -> str:
    """peft wraps a module once per parameter, gate_up_proj first: with both adapted, that one is further inside."""
    match = re.fullmatch(r"(.*)\.(gate_up_proj|down_proj)_lora_([AB])", name)
    if match is None:
        return _PREFIX + name
    prefix, stacked, part = match.groups()
    inner = stacked == "gate_up_proj" and "down_proj" in model.get_submodule(prefix).names
    return f"{_PREFIX}{prefix}{'.base_layer' if inner else ''}.lora_{part}.weight"


def _to_peft(name: str, value: Tensor) -> Tensor:
    if name.endswith("_lora_A"):  # [E, r, in]
        return value.reshape(-1, value.shape[-1])
    if name.endswith("_lora_B"):  # [E, out, r]
        return value.permute(1, 2, 0).reshape(value.shape[1], -1)
    return value


def _from_peft(model: CausalLM, stored: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Our names and shapes of what peft stored, after each is found to fit the model."""
    values = {}
    for key, value in stored.items():
        match = re.fullmatch(r"base_model\.model\.(.+?)((?:\.base_layer)*)\.(lora_([AB])\.)?weight", key)
        name, inner, _, part = match.groups() if match else (None, None, None, None)
        module = _submodule(model, name)
        if part is None and name == "lm_head" and isinstance(module, torch.nn.Linear):
            if not torch.equal(value, module.weight.to("cpu", value.dtype)):
                raise ValueError(f"load_adapter: {key} must be the head of the model, got another")
            continue
        fits = value.dtype in _DTYPES and value.dim() == 2
        if part and not inner and isinstance(module, torch.nn.Linear):
            shape = (rank, module.in_features) if part == "A" else (module.out_features, rank)
            ours = f"{name}.lora_{part}.weight"
        elif part and hasattr(module, "gate_up_proj"):
            stacked = _stacked_name(module, name, inner, stored)
            experts, outputs, inputs = getattr(module, stacked).shape
            shape = (experts * rank, inputs) if part == "A" else (outputs, rank * experts)
            ours = f"{name}.{stacked}_lora_{part}"
            if fits and value.shape == shape and part == "A":
                value = value.view(experts, rank, inputs)
            elif fits and value.shape == shape:
                value = value.view(outputs, rank, experts).permute(2, 0, 1)
        else:
            raise ValueError(f"load_adapter: {WEIGHTS} must hold adapters of layers of the model, got {key!r:.120}")
        if not fits or stored[key].shape != shape:
            got = f"{stored[key].dtype} {list(stored[key].shape)}"
            raise ValueError(f"load_adapter: {key} must be floating-point {list(shape)}, got {got}")
        values[ours] = value
    for name in values:
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if other not in values:
            raise ValueError(f"load_adapter: {WEIGHTS} must hold A and B of every layer, got no {other!r}")
    if not values:
        raise ValueError(f"load_adapter: {WEIGHTS} must hold adapters, got none")
    return values


def _submodule(model: CausalLM, name: str | None) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:
        return None


def _stacked_name(module: torch.nn.Module, name: str, inner: str, stored: dict[str, Tensor]) -> str:
    """Which stacked weight a key without its name means: with one wrapper, the one whose sizes fit."""
    if inner or f"{_PREFIX}{name}.base_layer.lora_A.weight" in stored:
        return "gate_up_proj" if inner else "down_proj"
    outputs = stored.get(f"{_PREFIX}{name}.lora_B.weight")
    is_down = outputs is not None and outputs.shape[0] == module.down_proj.shape[1]
    A = stored.get(f"{_PREFIX}{name}.lora_A.weight")
    return "down_proj" if is_down and A is not None and A.shape[-1] == module.down_proj.shape[2] else "gate_up_proj"
