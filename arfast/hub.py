"""Reading and writing Hugging Face model directories: config.json and safetensors, never pickle, never code.

A directory may come from anybody: its sizes are checked against the files before anything is allocated, its file names
cannot leave it, and its keys are data.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .models.causal_lm import CausalLM
from .models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .models.families import ARCHITECTURES, choose_family, config_from_json, config_to_json, stored_tensors
from .models.linear_lm import LinearLM, LinearLMConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_OWN_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_OWN_TEMPORARY = re.compile(r"\.(config\.json|model.*)\.\d+\.tmp")
_OLD_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A header of 36,000 tensors (128 experts in 94 layers) has 4 MB; the library itself would read 100.
_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES, _MAX_HEADER_BYTES = 1 << 20, 1 << 26, 1 << 24
_MIN_TENSORS_PER_LAYER = 9  # two norms, q, k, v, o, and three of the feed-forward part
_OWN_MODELS = {LinearLMConfig: LinearLM.from_config, EncoderDecoderConfig: EncoderDecoder}
_MAX_EXPANSION, _FREE_EXPANSION_BYTES = 2, 64 << 20
_MAX_LISTED = 5


def from_pretrained(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> CausalLM:
    """Read a Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE directory, or one that `save_pretrained` wrote.

    Args:
        path: a directory with config.json and model.safetensors, or shards with model.safetensors.index.json.
        dtype: of the parameters; None: as stored.
        device: None: torch's default.

    Raises:
        FileNotFoundError, ValueError: `from_pretrained: <what> must <rule>, got <actual>`, before it allocates any.

    Example:
        >>> with tempfile.TemporaryDirectory() as path:
        ...     CausalLM(CausalLMConfig.preset("tiny")).save_pretrained(path)
        ...     from_pretrained(path, dtype=torch.bfloat16).num_parameters()
        5475584
    """
    with ExitStack() as stack:
        opened = open_pretrained(path, stack)
        model, stored = opened.model, opened.stored
        _, embedding, _ = opened.layout[0]
        model.to(dtype or _DTYPES[stored[embedding].get_slice(embedding).get_dtype()])
        if dtype is None:
            _check_allocation(model, [stored[name].get_slice(name) for _, name, _ in opened.layout])
        model.to_empty(device=torch.get_default_device() if device is None else device)
        parameters = dict(model.named_parameters())
        for name, stored_name, index in opened.layout:
            parameters[name].data[index].copy_(stored[stored_name].get_tensor(stored_name))
    return model


@dataclass(frozen=True)
class OpenedModel:
    """A directory whose tensors have been found to be those of ``model``, which is on the meta device.

    layout: (parameter, name of a stored tensor, its place inside the parameter); stored: its open file, by name.
    """

    model: CausalLM
    layout: list[tuple[str, str, tuple]]
    stored: dict[str, safe_open]


def open_pretrained(path: str | os.PathLike, stack: ExitStack) -> OpenedModel:
    """Open and check a directory as `from_pretrained` does, without reading weights; ``stack`` closes the files."""
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"from_pretrained: path must be an existing directory, got {str(path)!r}")
    raw = _read_json(directory, "config.json", _MAX_CONFIG_BYTES)
    config = config_from_json(raw)
    stored = _open_shards(directory, stack)
    _check_layers(config, len(stored))
    model = _OWN_MODELS.get(type(config), CausalLM)(config, device="meta")
    model.family = raw["model_type"]
    return OpenedModel(model, _match(raw["model_type"], model, stored), stored)


def _check_layers(config: Any, num_stored: int) -> None:
    """Before modules are made for them."""
    name, layers = "num_hidden_layers", config.num_hidden_layers
    if isinstance(config, EncoderDecoderConfig):
        name, layers = "encoder_layers + decoder_layers", config.encoder_layers + config.decoder_layers
    if (1 if isinstance(config, LinearLMConfig) else _MIN_TENSORS_PER_LAYER) * layers > num_stored:
        raise ValueError(f"from_pretrained: config.json: {name} must fit the {num_stored} stored tensors, got {layers}")


def _resolve(directory: Path, name: str) -> Path:
    """The file behind a name in a directory: a regular file in it, or in the blobs of a Hugging Face cache."""
    base = directory.resolve()
    file = (base / name).resolve()
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else base
    if file.parent not in (base, blobs):
        raise ValueError(f"from_pretrained: {name} must lie in its directory, got a link to {str(file)!r}")
    if not file.is_file():
        raise FileNotFoundError(f"from_pretrained: path must contain {name}, got {str(directory)!r} without it")
    return file


def _read_json(directory: Path, name: str, max_bytes: int) -> dict[str, Any]:
    file = _resolve(directory, name)
    size = file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"from_pretrained: {name} must have at most {max_bytes} bytes, got {size}")
    try:
        value = json.loads(file.read_bytes().decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_pretrained: {name} must be valid JSON, got {error!s:.100}") from None
    if not isinstance(value, dict):
        raise ValueError(f"from_pretrained: {name} must hold a JSON object, got {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key that occurs twice")
    return result


def _open_shards(directory: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Every stored tensor's name, with the open file that holds it."""
    weight_map = None
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        files = [SINGLE]
    else:
        weight_map = _read_json(directory, INDEX, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"from_pretrained: {INDEX} must map tensor names to file names in weight_map, got others")
        files = sorted(set(weight_map.values()))
    for name in files:
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"from_pretrained: {INDEX} must name plain *.safetensors files, got {name!r:.100}")
    stored: dict[str, safe_open] = {}
    for name in files:
        file = _resolve(directory, name)
        _check_header_length(file)
        try:
            shard = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            message = f"from_pretrained: {name} must be a complete safetensors file, got {error!s:.200}"
            raise ValueError(message) from None
        for key in shard.keys():
            if key in stored or (weight_map is not None and weight_map.get(key) != name):
                raise ValueError(f"from_pretrained: {INDEX} must list {key!r:.100} in one file, got it in {name} too")
            stored[key] = shard
    return stored


def _check_header_length(file: Path) -> None:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if not length <= min(_MAX_HEADER_BYTES, file.stat().st_size):
        raise ValueError(
            f"from_pretrained: {file.name} must be a complete safetensors file with a header of at most "
            f"{_MAX_HEADER_BYTES} bytes, got {length}"
        )


def _check_allocation(model: CausalLM, stored: list[Any]) -> None:
    """The dtype of the embedding is that of the model: a file could have it wide, and all else narrow."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    available = sum(math.prod(tensor.get_shape()) * _DTYPES[tensor.get_dtype()].itemsize for tensor in stored)
    if needed > _MAX_EXPANSION * available + _FREE_EXPANSION_BYTES:
        raise ValueError(
            f"from_pretrained: dtype must be given for tensors of {available} bytes that would become {needed} bytes "
            f"of {model.head_weight.dtype}, got None"
        )


def _match(family: str, model: CausalLM, stored: dict[str, safe_open]) -> list[tuple[str, str, tuple]]:
    """The model's layout in these files, after every name, shape and dtype in them has been found right."""
    parameters = dict(model.named_parameters())
    layout, missing, wrong = [], [], []
    # transformers can also store the experts as it holds them: stacked, like our own format
    stacked = any(name.endswith(".experts.gate_up_proj") for name in stored)
    for name, stored_name, index in stored_tensors("arfast" if stacked else family, parameters.items()):
        layout.append((name, stored_name, index))
        expected = list(parameters[name][index].shape)
        if stored_name not in stored:
            missing.append(stored_name)
        else:
            found = stored[stored_name].get_slice(stored_name)
            if found.get_shape() != expected:
                wrong.append(f"{stored_name} {found.get_shape()} instead of {expected}")
            elif found.get_dtype() not in _DTYPES:
                wrong.append(f"{stored_name} of dtype {found.get_dtype()}")
        if len(missing) > len(stored):  # sizes that have nothing to do with the files: do not enumerate them
            break
    unexpected = sorted(set(stored) - {stored_name for _, stored_name, _ in layout})
    unexpected = [name for name in unexpected if not _OLD_BUFFER.fullmatch(name)]
    if model.config.tie_word_embeddings and "lm_head.weight" in unexpected and not (missing or wrong):
        _check_tied(stored)
        unexpected.remove("lm_head.weight")
    problems = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("wrong shape or dtype", wrong)]
    if any(problems):
        listed = "; ".join(problem for problem in problems if problem)
        raise ValueError(f"from_pretrained: the stored tensors must be those of {ARCHITECTURES[family]}, got {listed}")
    return layout


def _check_tied(stored: dict[str, safe_open]) -> None:
    head, embedding = (stored[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ValueError("from_pretrained: lm_head.weight must equal model.embed_tokens.weight when tied, got another")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{what}: {', '.join(f'{name:.120}' for name in names[:_MAX_LISTED])}{more}" if names else ""


def save_pretrained(model: CausalLM, path: str | os.PathLike, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and model.safetensors (or shards and an index), as the Hugging Face family that the model was
    read as, or else one that has its features: transformers, vLLM and lm-eval load it without remote code. A tied head
    is written once.

    All files are written and synced under temporary names and then renamed: a full disk leaves what was there before.

    Args:
        model: on any device.
        path: a directory, made if absent. Other files in it stay.
        max_shard_bytes: a new shard starts when the next tensor would exceed this.

    Raises:
        ValueError: a target exists and is not a regular file. OSError: from the file system.

    Example:
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save_pretrained(CausalLM(CausalLMConfig.preset("tiny")), path)
        ...     sorted(os.listdir(path))
        ['config.json', 'model.safetensors']
    """
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"save_pretrained: max_shard_bytes must be a positive integer, got {max_shard_bytes!r}")
    if model.head_weight.is_meta:
        raise ValueError("save_pretrained: model must hold weights, got one on the meta device")
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_pretrained: path must be a directory, got the file {str(path)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    family = model.family or choose_family(model.config)
    layout = stored_tensors(family, parameters.items())
    tensors = [(stored, parameters[name].data[index]) for name, stored, index in layout]
    shards = list(_shards(tensors, max_shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    texts = {"config.json": config_to_json(model.config, dtype, family)}
    if len(shards) > 1:
        total = sum(tensor.nbytes for _, tensor in tensors)
        weight_map = {stored: name for name, shard in zip(names, shards, strict=True) for stored in shard}
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _commit(directory, dict(zip(names, shards, strict=True)), texts)


def _shards(tensors: list[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _commit(directory: Path, shards: dict[str, dict[str, Tensor]], texts: dict[str, dict[str, Any]]) -> None:
    new = {*shards, *texts}
    stale = [file for file in directory.iterdir() if _OWN_FILE.fullmatch(file.name) and file.name not in new]
    stale += [file for file in directory.iterdir() if _OWN_TEMPORARY.fullmatch(file.name)]  # of a killed save
    for file in (*(directory / name for name in (*shards, *texts)), *stale):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ValueError(f"save_pretrained: {file.name} must be a regular file or absent, got something else")
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in (*shards, *texts)}
    try:
        for name, value in texts.items():
            temporary[name].write_text(json.dumps(value, indent=2) + "\n")
        for name, shard in shards.items():
            save_file(shard, temporary[name], metadata={"format": "pt"})
            temporary[name].chmod(temporary["config.json"].stat().st_mode)  # save_file gives 0600 whatever the umask
        for file in temporary.values():
            _sync(file)
        for name, file in temporary.items():
            file.replace(directory / name)
        # a leftover of another layout would win over, or be mistaken for a part of, the new files
        for file in stale:
            file.unlink()
        _sync(directory)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
