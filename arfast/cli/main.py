"""`arfast <verb>`: finds the verb, turns what goes wrong into one sentence, prints the result as the last line in JSON.

Exit status: 0 done, 2 wrong input, 130 interrupted; the verb's own where it says so. Progress goes to stderr, results
to stdout.
"""

import argparse
import importlib
import json
import os
import sys

VERBS = {
    "train": "train a language model, or continue a run",
    "generate": "continue a prompt with a trained model",
    "score": "log-probabilities of a text after a prompt, or a ranking of alternatives",
    "eval": "measure loss, perplexity and bits per byte on text, or run tasks of lm-evaluation-harness",
    "tokenize": "turn text into a data set of token shards",
    "prepare": "clean, filter and deduplicate raw documents, and turn them into data sets",
    "scale": "scaling laws: plan a sweep, run it, fit, predict",
    "export": "write a checkpoint as a Hugging Face directory",
    "lab": "studies of autoregressive models, on real data",
    "info": "versions, what the library was built for, devices, threads",
    "doctor": "check the installation: ops, leaks, accumulation, checkpoints",
}


class _Parser(argparse.ArgumentParser):
    """One line per error, and a help page that keeps its examples as they are written."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; only `verb`'s own arguments are filled in, so that the others are not imported."""
    parser = _Parser(prog="arfast", description="Fast autoregressive language models.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, summary in VERBS.items():
        module = importlib.import_module(f"arfast.cli.{name}") if name == verb else None
        description = module.__doc__ if module else None
        sub = verbs.add_parser(name, help=summary, description=description)
        if module:
            module.add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    verb = next((word for word in argv if word in VERBS), None)
    arguments = build_parser(verb).parse_args(argv)
    try:
        result = importlib.import_module(f"arfast.cli.{arguments.verb}").run(arguments)
        if result is None:  # of several ranks one prints
            return 0
        status = result.pop("exit_status", 0)
        print(json.dumps(result), flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`arfast generate | head`); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, IndexError, RuntimeError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"arfast {arguments.verb}: error: {text}", file=sys.stderr)
        return 2
