"""Image tokenizers on disk: config.json and model.safetensors, written and read with the care of `arfast.hub`."""

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path

import torch

from .hub import _MAX_CONFIG_BYTES, SINGLE, _commit, _listed, _open_shards, _read_json
from .models.image_tokenizer import ImageTokenizer, ImageTokenizerConfig

MODEL_TYPE = "arfast_image_tokenizer"


def save_image_tokenizer(model: ImageTokenizer, path: str | os.PathLike) -> None:
    """Write config.json and model.safetensors, in float32, with the codebook and its averages.

    Args:
        path: a directory, made if absent. Other files in it stay; a full disk leaves what was there before.

    Raises:
        ValueError: path is a file, or a target no regular file. OSError: from the file system.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_pretrained: path must be a directory, got the file {str(path)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    config = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    _commit(directory, {SINGLE: tensors}, {"config.json": config})


def load_image_tokenizer(path: str | os.PathLike, device: torch.device | str | None = None) -> ImageTokenizer:
    """Read what `save_image_tokenizer` wrote; sizes are compared with the files before anything is allocated.

    Raises:
        FileNotFoundError, ValueError: `from_pretrained: <what> must <rule>, got <actual>`.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"from_pretrained: path must be an existing directory, got {str(path)!r}")
    raw = _read_json(directory, "config.json", _MAX_CONFIG_BYTES)
    model_type = raw.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise ValueError(f"from_pretrained: model_type must be {MODEL_TYPE!r}, got {model_type!r:.100}")
    names = {field.name for field in dataclasses.fields(ImageTokenizerConfig)}
    if other := sorted(names ^ raw.keys()):
        listed = _listed("missing or unknown", other)
        raise ValueError(f"from_pretrained: config.json must have the fields of an ImageTokenizerConfig, got {listed}")
    model = ImageTokenizer(ImageTokenizerConfig(**raw), device="meta")
    with ExitStack() as stack:
        stored = _open_shards(directory, stack)
        expected = {name: ("F32", list(tensor.shape)) for name, tensor in model.state_dict().items()}
        slices = {name: file.get_slice(name) for name, file in stored.items()}
        found = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
        if other := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            listed = _listed("missing, unexpected, or of another shape or dtype", other)
            raise ValueError(f"from_pretrained: the stored tensors must be those of an ImageTokenizer, got {listed}")
        model.to_empty(device=torch.get_default_device() if device is None else device)
        for name, tensor in model.state_dict().items():
            tensor.copy_(stored[name].get_tensor(name))
    return model
