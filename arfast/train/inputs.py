"""What a trainer is given: opened, checked against each other, and described for the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arfast.adapter import base_of
from arfast.data import DatasetManifest, PackedDataset, Tokenizer, dataset_directories, open_mixture

from .config import TrainConfig
from .manifest import CheckpointError

# A run continues on the same samples in the same order with the same parameters, or not at all.
_IDENTITY_FIELDS = ("seed", "seqlen", "packing")
# Fields that leave the weights of a run as they are.
_OPERATIONAL_FIELDS = frozenset(
    "output_dir resume keep_freed_memory save_every eval_every sample_every log_every keep_last eval_batch_size "
    "eval_tokens sample_prompts sample_tokens sample_temperature peak_flops recheck_every log progress async_save "
    "watchdog_seconds".split()
)


def open_data(
    data: str | os.PathLike[str] | Mapping[str, Any], config: TrainConfig, tokenizer: Any | None
) -> tuple[dict[str, Any], Any | None]:
    """Data sets by split name, and the tokenizer; both read from ``data`` when it is a prepared directory or a mixture.

    A validation split without documents is left out. A mixture has one for all its sources and one for each.
    """
    if isinstance(data, Mapping):
        datasets = dict(data)
    else:
        if not Path(data).exists():
            rule = "data must be a directory made by prepare_dataset or a mixture's JSON file"
            raise ValueError(f"Trainer: {rule}, got {os.fspath(data)!r}")
        options = {"seqlen": config.seqlen, "packing": config.packing, "seed": config.seed}
        if Path(data).is_file():
            datasets = open_mixture(data, num_samples=-(-config.total_tokens // config.seqlen), **options)
        else:
            datasets = {"train": PackedDataset(data, "train", **options)}
            if DatasetManifest.load(data).splits["validation"].num_documents:
                datasets["validation"] = PackedDataset(data, "validation", **options)
        tokenizer = tokenizer or Tokenizer.load(dataset_directories(data)[0])
    if "train" not in datasets:
        raise ValueError(f"Trainer: data must have a 'train' split, got {sorted(datasets)}")
    return datasets, tokenizer


def check_inputs(model: nn.Module, config: TrainConfig, datasets: Mapping[str, Any], tokenizer: Any | None) -> None:
    """Refuse a model, data sets and a tokenizer that do not belong together, naming the one that is wrong."""
    if not dataclasses.is_dataclass(getattr(model, "config", None)):
        raise TypeError(f"Trainer: model must have a dataclass as its config, got {type(model).__name__} without")
    frozen_dtypes = (torch.float32, getattr(torch, config.dtype))
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 and (parameter.requires_grad or parameter.dtype not in frozen_dtypes):
            raise ValueError(f"Trainer: model must have float32 parameters, got {parameter.dtype} for {name}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Trainer: model must have a parameter that requires a gradient, got none")
    limit = getattr(model.config, "max_position_embeddings", config.seqlen)
    if config.seqlen > limit:
        raise ValueError(f"Trainer: seqlen must be at most max_position_embeddings={limit}, got {config.seqlen}")
    for split, dataset in datasets.items():
        if dataset.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"Trainer: model must have a vocab_size of at least {dataset.vocab_size} for the {split} split, "
                f"got {model.config.vocab_size}"
            )
        for field in _IDENTITY_FIELDS:
            wanted, got = getattr(config, field), getattr(dataset, field)
            if got != wanted:
                raise ValueError(f"Trainer: the {split} split must have {field}={wanted!r} as the config, got {got!r}")
        if tokenizer is not None and tokenizer.fingerprint != dataset.tokenizer_fingerprint:
            raise ValueError(
                f"Trainer: tokenizer must be the one of the {split} split, {dataset.tokenizer_fingerprint}, "
                f"got {tokenizer.fingerprint}"
            )
    if getattr(model, "splits_documents", False):
        kind = type(model).__name__
        if config.packing == "contiguous":
            raise ValueError(f"Trainer: packing must be documents or padded for {kind}, got 'contiguous'")
        if config.cuda_graph:
            raise ValueError(f"Trainer: cuda_graph must be False for {kind}, whose shapes hang on its tokens, got True")
    largest = max(stage.batch_size for stage in config.stages)
    if datasets["train"].num_samples < largest:
        raise ValueError(
            f"Trainer: batch_size must be at most the {datasets['train'].num_samples} sequences of the train split, "
            f"got {largest}"
        )
    if any(stage.rope_theta for stage in config.stages) and not hasattr(model.config, "rope_theta"):
        raise ValueError(f"Trainer: seqlen_ramp must have no rope_theta for {type(model).__name__}, got one")
    if config.sample_prompts and tokenizer is None:
        raise ValueError("Trainer: tokenizer must be given for sample_prompts, got None")


def describe(model: nn.Module, config: TrainConfig, train: Any) -> dict[str, Any]:
    """The values, by dotted name and ready for JSON, that must be equal for a run to continue."""
    identity = {f"config.{field}": getattr(config, field) for field in _IDENTITY_FIELDS}
    identity |= {f"model.{field}": value for field, value in dataclasses.asdict(model.config).items()}
    identity["tokenizer.fingerprint"] = train.tokenizer_fingerprint
    identity["dataset.fingerprint"] = train.fingerprint
    if getattr(model, "lora", None) is not None:
        identity |= {f"lora.{field}": value for field, value in dataclasses.asdict(model.lora).items()}
        identity["lora.base"] = base_of(model).fingerprint
    return json.loads(json.dumps(identity))


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise unless a checkpoint's description equals the current one; the message names the first difference."""
    for name in [*current, *(saved.keys() - current.keys())]:
        if name not in saved and not current[name]:
            continue  # a field that is younger than the checkpoint, and off
        if saved.get(name) != current.get(name):
            raise CheckpointError(
                f"Trainer: {name} must be {saved.get(name)!r} to continue {checkpoint}, got {current.get(name)!r} "
                "(change it back, or choose another output_dir)"
            )


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """``name: saved -> current, ...`` for every entry that differs and bears on the result; empty when none does."""
    names = sorted((saved.keys() | current.keys()) - _OPERATIONAL_FIELDS)
    changed = [f"{name}: {saved.get(name)!r} -> {current.get(name)!r}" for name in names]
    return ", ".join(c for name, c in zip(names, changed) if saved.get(name) != current.get(name))


def model_inputs(batch: Any, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The arguments of a model's forward that come from a batch, on its device."""
    tensors = {name: getattr(batch, name) for name in ("input_ids", "labels", "cu_seqlens")}
    return {name: None if t is None else t.to(device, non_blocking=True) for name, t in tensors.items()}
