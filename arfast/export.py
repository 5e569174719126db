"""A checkpoint as a Hugging Face directory of its own: weights, configuration, tokenizer, generation settings."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .adapter import is_adapter, load_model
from .data.files import locked_directory, new_directory, write_file
from .finetune import PretrainedTokenizer, check_tokenizer
from .hub import from_pretrained, save_pretrained
from .models.causal_lm import CausalLM
from .models.families import ARCHITECTURES, OWN, choose_family
from .train.manifest import MANIFEST, verify

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the class of transformers, bytes of all files, and whether a tokenizer is among them."""

    architecture: str
    num_parameters: int
    files: dict[str, int]
    tokenizer: bool


def export(
    checkpoint: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    merge: bool = False,
    base: str | os.PathLike | None = None,
) -> Exported:
    """Write a directory that transformers, vLLM and lm-eval load.

    The directory appears under its name when all of it is on the disk and was read back: the configuration and every
    bit of every weight. Needs the memory of two models.

    Args:
        checkpoint: a run of `arfast train`, one of its steps, a model directory, or adapters.
        directory: absent or empty; nothing is overwritten.
        dtype: of the weights; None: as stored.
        max_shard_bytes: see `save_pretrained`.
        merge: for adapters, and then required: they are added to the weights of their base model.
        base: directory of that, when it is not where it was.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: an argument is wrong or the checkpoint damaged; nothing was
            written.

    Example:
        >>> with tempfile.TemporaryDirectory() as path:
        ...     CausalLM(CausalLMConfig.preset("tiny")).save_pretrained(f"{path}/model")
        ...     export(f"{path}/model", f"{path}/out", dtype=torch.bfloat16).architecture
        'LlamaForCausalLM'
    """
    source, target = Path(checkpoint), Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"export: directory must be absent or empty, got {str(directory)!r}")
    if not source.is_dir():
        raise FileNotFoundError(f"export: checkpoint must be an existing directory, got {str(checkpoint)!r}")
    if merge != is_adapter(source):
        rule = "left out for a whole model" if merge else "given for adapters"
        raise ValueError(f"export: merge must be {rule}, got {merge}")
    if (source / MANIFEST).exists():
        verify(source)
    tokenizer = PretrainedTokenizer.load(source) if (source / "tokenizer.json").exists() else None
    model = load_model(source, dtype, "cpu", base=base)
    family = model.family or choose_family(model.config)
    if family in OWN:
        raise ValueError("export: checkpoint must have a configuration that transformers knows, got one of our own")
    if tokenizer is not None:
        check_tokenizer(model.config, tokenizer)
    with locked_directory(target):
        with new_directory(target) as temporary:
            save_pretrained(model, temporary, max_shard_bytes)
            if tokenizer is not None:
                tokenizer.save(temporary)
            if not (temporary / _GENERATION).exists():
                write_file(temporary / _GENERATION, _generation_config(model))
            check_copy(model, temporary)
            files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    return Exported(ARCHITECTURES[family], model.num_parameters(), files, tokenizer is not None)


def check_copy(model: CausalLM, directory: Path) -> None:
    """Raises ValueError unless our own loader makes the same model of a directory, to the last bit."""
    again = from_pretrained(directory, device="cpu")
    if again.config != model.config:
        raise ValueError("export: directory must read back with the configuration that was written, got another")
    for (name, written), read in zip(model.named_parameters(), again.parameters(), strict=True):
        same = written.dtype == read.dtype and written.shape == read.shape
        # Bits, so that a NaN equals itself.
        if not same or not torch.equal(_bits(written), _bits(read)):
            raise ValueError(f"export: directory must read back bit by bit, got another {name}")


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().contiguous().view(torch.uint8)


def _generation_config(model: CausalLM) -> bytes:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = {name: getattr(model.config, name) for name in names if getattr(model.config, name) is not None}
    return json.dumps(values | {"_from_model_config": True}, indent=2).encode()
