"""Loss, perplexity and bits per byte of a model on text.

A data set directory of `arfast tokenize` is scored by its validation split, unless --split names another; plain text is
scored whole.

Examples:
  arfast eval runs/default --data runs/default/data --split test
  arfast eval runs/default --data notes.txt
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model directory")
    parser.add_argument("--data", required=True, help="data set directory, text, JSON lines, or builtin:python")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="of a data set directory")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default: 8)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many targets")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")


def run(arguments: argparse.Namespace) -> dict:
    import tempfile
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from arfast.data import PackedDataset, Tokenizer, prepare_dataset
    from arfast.models import CausalLM
    from arfast.train import evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = CausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype), device=device)
    tokenizer = Tokenizer.load(arguments.checkpoint)
    for name in ("batch_size", "max_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"eval: {name} must be at least 1, got {value}")
    with tempfile.TemporaryDirectory() as temporary:
        directory, split = arguments.data, arguments.split or "validation"
        if not Path(directory, "dataset.json").is_file():
            if arguments.split is not None:
                raise ValueError(f"eval: split must be left out unless data is a data set directory, got {split!r}")
            directory, split = str(Path(temporary, "data")), "train"
            prepare_dataset(arguments.data, directory, tokenizer, validation_fraction=0.0, test_fraction=0.0)
        data = PackedDataset(directory, split, arguments.seqlen)
        data.check_tokenizer(tokenizer)
        total = -(-data.num_samples // arguments.batch_size)
        batches = tqdm(data.evaluation_batches(arguments.batch_size), total=total, file=sys.stderr, unit="batch")
        bytes_per_token = data.num_bytes / data.statistics.num_targets
        result = evaluate(model, batches, bytes_per_token=bytes_per_token, max_tokens=arguments.max_tokens)
    print(
        f"{result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte, {result.num_tokens:,} tokens"
    )
    return dict(
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        tokens=result.num_tokens,
    )
