"""Write a checkpoint as a Hugging Face directory, which transformers, vLLM and lm-eval load; read it back to be sure.

CHECKPOINT is a run directory of `arfast train`, one of its steps, or another model directory; with --merge a directory
of adapters, which are added to their base model. Nothing is overwritten.

Examples:
  arfast export runs/default exported --dtype bfloat16
  arfast export runs/notes exported-notes --merge --max-shard-size 2GB
"""

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run, step, model directory, or adapters")
    parser.add_argument("directory", metavar="DIR", help="what to write; absent or empty")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per file of weights, as 500MB (default: 5GB)")
    parser.add_argument("--merge", action="store_true", help="add adapters to their base model")
    parser.add_argument("--base", metavar="DIR", help="the base model of adapters (default: where it was)")


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from arfast.export import export

    if arguments.base is not None and not arguments.merge:
        raise ValueError(f"export: base must be left out without merge, got {arguments.base!r}")
    result = export(
        arguments.checkpoint,
        arguments.directory,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        max_shard_bytes=_parse_size(arguments.max_shard_size),
        merge=arguments.merge,
        base=arguments.base,
    )
    for name, size in result.files.items():
        print(f"{size:>16,}  {name}")
    note = "" if result.tokenizer else ", without a tokenizer: the checkpoint has none"
    print(f"{result.architecture}, {result.num_parameters:,} parameters{note}")
    return dict(directory=arguments.directory, architecture=result.architecture, files=result.files)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"export: max_shard_size must be a positive number of bytes, KB, MB or GB, got {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]
