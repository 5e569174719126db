"""Turn text into a data set: a tokenizer, learned here unless given, and token shards split into train,
validation and test.

Examples:
  arfast tokenize --data corpus.jsonl --output-dir data/corpus --vocab-size 16000
  arfast tokenize --data more.txt --output-dir data/more --tokenizer data/corpus
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="text file, JSON-lines file, directory, or builtin:python")
    parser.add_argument("--output-dir", required=True, help="where the data set is to be; absent or empty")
    parser.add_argument("--tokenizer", help="directory with a tokenizer.json to use instead of learning one")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer that is learned (default: 4096)")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="of the documents (default: 0.05)")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="of the documents (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")


def run(arguments: argparse.Namespace) -> dict:
    from arfast.data import Tokenizer, prepare_dataset

    if arguments.tokenizer is not None and arguments.vocab_size is not None:
        raise ValueError(f"tokenize: vocab_size must be left out with a tokenizer, got {arguments.vocab_size}")
    tokenizer = None if arguments.tokenizer is None else Tokenizer.load(arguments.tokenizer)
    options = {} if arguments.vocab_size is None else dict(vocab_size=arguments.vocab_size)
    manifest = prepare_dataset(
        arguments.data,
        arguments.output_dir,
        tokenizer,
        seed=arguments.seed,
        validation_fraction=arguments.validation_fraction,
        test_fraction=arguments.test_fraction,
        progress=True,
        **options,
    )
    counts = {}
    for name, split in manifest.splits.items():
        print(
            f"{name:>10}: {split.num_documents:>8,} documents {split.num_tokens:>12,} tokens "
            f"{split.num_bytes:>12,} bytes"
        )
        counts[name] = dict(documents=split.num_documents, tokens=split.num_tokens, bytes=split.num_bytes)
    return dict(output_dir=arguments.output_dir, vocab_size=manifest.tokenizer["vocab_size"], splits=counts)
