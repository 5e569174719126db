"""A trained model with the text that its run has not seen: what studies of it begin with."""

import argparse
from pathlib import Path

import numpy as np

from arfast.adapter import load_model
from arfast.data import DatasetManifest, Tokenizer
from arfast.models import CausalLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="runs/default", metavar="DIR", help="a run (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="its data set (default: DIR/data)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn from the text (default: 0)")


def open_run(arguments: argparse.Namespace, study: str) -> tuple[CausalLM, Tokenizer, list[np.ndarray]]:
    """(model, tokenizer, test documents as token ids with their start and end tokens)."""
    path, data = Path(arguments.model), Path(arguments.data or Path(arguments.model) / "data")
    for name, folder in (("model", path), ("data", data)):
        if not folder.is_dir():
            hint = "; `arfast train` makes one" if name == "model" else ""
            raise FileNotFoundError(f"lab {study}: {name} must be an existing directory, got {str(folder)!r}{hint}")
    manifest, tokenizer = DatasetManifest.load(data), Tokenizer.load(path)
    if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
        raise ValueError(f"lab {study}: data must be tokenized as the model was trained, got another tokenizer")
    documents = [tokens.astype(np.int64) for shard in manifest.open_split("test") for tokens in shard.documents()]
    if not documents:
        raise ValueError(f"lab {study}: data must hold test documents, got none in {str(data)!r}")
    return load_model(path).eval(), tokenizer, documents
