"""Turn text into a data set: a tokenizer, learned here unless given, and token shards split into train,
validation and test. Also from token ids of nanoGPT and llm.c, and to see what packing wastes.

Examples:
  arfast tokenize --data corpus.jsonl --output-dir data/corpus --vocab-size 16000
  arfast tokenize --data corpus.jsonl --output-dir data/words --tokenizer-type word
  arfast tokenize --data more.parquet --column content --output-dir data/more --tokenizer data/corpus
  arfast tokenize --data fineweb10B --output-dir data/fineweb --tokenizer gpt2     # *.bin
  arfast tokenize --statistics data/corpus --seqlen 1024
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        help="file or directory of text, JSON lines (.gz, .zst), Parquet, a Hugging Face dataset on disk, token ids "
        "(.bin of nanoGPT or llm.c), or builtin:python",
    )
    parser.add_argument("--output-dir", help="where the data set is to be; absent or empty")
    parser.add_argument(
        "--column",
        help="field of records that holds the text (default: text, else prompt and completion, else messages)",
    )
    parser.add_argument("--tokenizer", help="directory with a tokenizer.json to use instead of learning one")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer that is learned (default: 4096)")
    parser.add_argument(
        "--tokenizer-type", choices=("bpe", "word", "character"), help="of the tokenizer that is learned (default: bpe)"
    )
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="of the documents (default: 0.05)")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="of the documents (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--end-token-id", type=int, help="between documents of token ids (default: the tokenizer's)")
    parser.add_argument("--undivided", action="store_true", help="files of token ids hold no end tokens")
    parser.add_argument("--statistics", metavar="DATASET", help="print what each packing of a data set wastes")
    parser.add_argument("--seqlen", type=int, help="with statistics: length of a row")
    parser.add_argument("--split", help="with statistics (default: train)")


def run(arguments: argparse.Namespace) -> dict:
    from arfast.data import import_tokens, prepare_dataset

    for name in ("seqlen", "split"):
        if arguments.statistics is None and getattr(arguments, name) is not None:
            raise ValueError(f"tokenize: {name} must be left out without statistics, got {getattr(arguments, name)!r}")
    if arguments.statistics is not None:
        return _print_statistics(arguments)
    for name in ("data", "output_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(f"tokenize: {name} must be given (or statistics), got none")
    common = dict(
        seed=arguments.seed,
        validation_fraction=arguments.validation_fraction,
        test_fraction=arguments.test_fraction,
    )
    is_tokens = _holds_token_ids(arguments.data)
    tokenizer = _tokenizer(arguments, is_tokens)
    if is_tokens:
        options = common | dict(end_token_id=arguments.end_token_id, undivided=arguments.undivided)
        manifest = import_tokens(arguments.data, arguments.output_dir, tokenizer, **options)
    else:
        options = common | ({} if arguments.vocab_size is None else dict(vocab_size=arguments.vocab_size))
        options |= dict(column=arguments.column, tokenizer_kind=arguments.tokenizer_type or "bpe", progress=True)
        manifest = prepare_dataset(arguments.data, arguments.output_dir, tokenizer, **options)
    counts = {}
    for name, split in manifest.splits.items():
        print(
            f"{name:>10}: {split.num_documents:>8,} documents {split.num_tokens:>12,} tokens "
            f"{split.num_bytes:>12,} bytes"
        )
        counts[name] = dict(documents=split.num_documents, tokens=split.num_tokens, bytes=split.num_bytes)
    return dict(output_dir=arguments.output_dir, vocab_size=manifest.tokenizer["vocab_size"], splits=counts)


def _holds_token_ids(data):
    path = Path(data)
    return path.suffix == ".bin" or (path.is_dir() and any(path.glob("*.bin")))


def _tokenizer(arguments, is_tokens):
    """The tokenizer that is to be used, or None: to be learned."""
    from arfast.data import Tokenizer

    if is_tokens and arguments.tokenizer is None:
        raise ValueError("tokenize: tokenizer must be given with token ids, got none")
    for name, ids_alone in (("end_token_id", True), ("undivided", True), ("column", False)):
        if (value := getattr(arguments, name)) and ids_alone != is_tokens:
            kind = "text" if ids_alone else "token ids"
            raise ValueError(f"tokenize: {name} must be left out with {kind}, got {value!r}")
    for name in ("vocab_size", "tokenizer_type"):
        if arguments.tokenizer is not None and (value := getattr(arguments, name)) is not None:
            raise ValueError(f"tokenize: {name} must be left out with a tokenizer, got {value}")
    return None if arguments.tokenizer is None else Tokenizer.load(arguments.tokenizer)


def _print_statistics(arguments):
    from dataclasses import asdict

    from arfast.data import packing_statistics

    if arguments.seqlen is None:
        raise ValueError("tokenize: seqlen must be given with statistics, got none")
    found = packing_statistics(arguments.statistics, arguments.split or "train", arguments.seqlen)
    print(f"{'packing':>10} {'rows':>10} {'targets':>14} {'of places':>9} {'padding':>9} {'truncated':>9}")
    for name, each in found.items():
        shares = f"{each.target_share:>9.2%} {each.padding_share:>9.2%} {each.truncated_share:>9.2%}"
        print(f"{name:>10} {each.num_samples:>10,} {each.num_targets:>14,} {shares}")
    return {name: asdict(each) for name, each in found.items()}
