"""Make data sets of raw documents: extract text from HTML, normalise, tag languages, filter by quality and safety, mask
personal data, drop copies and near-copies and evaluation text, learn a tokenizer, write token shards and a report of
what was dropped and why. A run that was killed continues where it was.

Examples:
  arfast prepare builtin:python --output-dir data/python
  arfast prepare web=pages code=builtin:python --output-dir data/mine --languages en de --workers 2
  arfast prepare --config recipe.json --output-dir data/mine
"""

import argparse
import os
import sys

_METAVAR = "[NAME=]SOURCE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="*", metavar=_METAVAR, help="text, JSON-lines file, directory, builtin:python")
    parser.add_argument("--output-dir", required=True, help="where the data is to be; absent or empty")
    parser.add_argument("--config", help="JSON file with the recipe; without it the flags below apply")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="of the prose that stays (default: all)")
    parser.add_argument("--word-list", help="file of words and phrases whose documents go")
    parser.add_argument("--url-list", help="file of hosts and addresses whose documents go")
    parser.add_argument("--evaluation", nargs="+", metavar="SOURCE", help="texts that must not be learned from")
    parser.add_argument("--jaccard", type=float, help="similarity from which documents are near-copies (default: 0.8)")
    parser.add_argument("--tokenizer", help="directory with a tokenizer.json to use instead of learning one")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer that is learned (default: 4096)")
    parser.add_argument("--seed", type=int, help="of the split (default: 0)")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe as JSON and do nothing")


def _source(text: str, number: int) -> dict:
    name, separator, path = text.partition("=")
    return {"name": name, "path": path} if separator else {"name": f"source{number}", "path": text}


def _recipe(arguments: argparse.Namespace) -> dict:
    """The flags as the JSON of a recipe; what was not given is left out."""
    flags = {
        "language": {"keep": arguments.languages},
        "safety": {"word_list": arguments.word_list, "url_list": arguments.url_list},
        "decontamination": {"evaluation": arguments.evaluation},
        "deduplication": {"threshold": arguments.jaccard},
        "tokenizer": {"path": arguments.tokenizer, "vocab_size": arguments.vocab_size},
        "split": {"seed": arguments.seed},
    }
    given = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in flags.items()
    }
    return {name: section for name, section in given.items() if section}


def _load_recipe(arguments: argparse.Namespace):
    from arfast.data.pipeline import Recipe

    flags = _recipe(arguments)
    if arguments.config is None:
        if not arguments.sources:
            raise ValueError("prepare: SOURCE must be given without --config, got none")
        sources = [_source(text, number) for number, text in enumerate(arguments.sources, 1)]
        return Recipe.from_json({"sources": sources} | flags)
    if arguments.sources or flags:
        names = [*arguments.sources, *flags]
        raise ValueError(f"prepare: config must come without sources and other parts of a recipe, got {names} too")
    return Recipe.load(arguments.config)


def run(arguments: argparse.Namespace) -> dict:
    # The threads of the tokenizer; read when it is first used.
    if arguments.workers >= 1:
        os.environ.setdefault("RAYON_NUM_THREADS", str(arguments.workers))
    from arfast.data.pipeline import prepare_corpus

    recipe = _load_recipe(arguments)
    if arguments.print_config:
        return recipe.to_json()
    corpus = prepare_corpus(recipe, arguments.output_dir, workers=arguments.workers, progress=True)
    print(corpus.table)
    for note in corpus.report["notes"]:
        print(f"arfast prepare: {note}", file=sys.stderr)
    return {
        "output_dir": arguments.output_dir,
        "content_sha256": corpus.report["content_sha256"],
        "sources": {source["name"]: source["splits"] for source in corpus.report["sources"]},
        "seconds": {stage: round(seconds, 3) for stage, seconds in corpus.seconds.items()},
    }
