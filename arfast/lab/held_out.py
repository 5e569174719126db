"""A trained model with the text that its run has not seen: what studies of it begin with."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

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


def draw_windows(
    documents: Sequence[np.ndarray], count: int, seqlen: int, generator: np.random.Generator
) -> torch.Tensor:
    """int64 [N, seqlen] from documents that are long enough, start and end tokens left out; every place as likely."""
    inner = [tokens[1:-1] for tokens in documents]
    inner = [tokens for tokens in inner if len(tokens) >= seqlen]
    if not inner or count < 1:
        raise ValueError(f"lab: data must hold a test document of {seqlen} tokens, got none")
    places = np.array([len(tokens) - seqlen + 1 for tokens in inner])
    chosen = generator.choice(len(inner), size=count, p=places / places.sum())
    starts = [int(generator.integers(places[document])) for document in chosen]
    return torch.from_numpy(np.stack([inner[d][s : s + seqlen] for d, s in zip(chosen, starts, strict=True)]))
