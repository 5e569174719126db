"""What several verbs share: the model they read, and texts from files."""

import argparse
from pathlib import Path


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")


def load_checkpoint(path: str, dtype: str):
    """(model, tokenizer) of a directory with a model or with adapters, on the GPU where there is one."""
    import torch

    from arfast.adapter import load_model
    from arfast.data import Tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, dtype=getattr(torch, dtype), device=device)
    return model, Tokenizer.load(path)


def read_text(name: str, path: str) -> str:
    """A whole file of UTF-8 text, line ends as they are. `name` reads "verb: argument"."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got {error.reason} near byte {error.start} of {path!r}") from None
    if not text:
        raise ValueError(f"{name} must hold text, got an empty file {path!r}")
    return text
