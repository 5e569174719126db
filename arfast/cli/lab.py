"""Studies of autoregressive models: each runs on real data in a few minutes, prints what it found, and draws it.

Examples:
  arfast lab least-squares
  arfast train && arfast lab scoring
  arfast lab linear-lm
  arfast lab objectives --label-smoothing 0.2 --scheduled-sampling 0.5
  arfast lab in-context
  arfast lab tokens --vocab-sizes 1024 4096
  arfast lab translation --language fr
  arfast lab least-squares --data temperatures.csv --column celsius --order 24
"""

import argparse
import importlib

STUDIES = {
    "least-squares": "forecast a series from its last values, by least squares",
    "scoring": "real and garbled text, right and wrong continuations, judged by a trained model",
    "sequence-length": "what a longer context gives and costs",
    "linear-lm": "language models without layers, beside a small transformer",
    "objectives": "label smoothing and scheduled sampling: calibration, and quality by the length of generated text",
    "in-context": "a model that learns a task from the examples in its prompt",
    "images": "pictures as tokens: digits drawn after a caption by a language model",
    "translation": "an encoder-decoder and a decoder-only model translate, by beam search",
    "tokens": "words, characters and byte pairs as tokens of the same text",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    for name, summary in STUDIES.items():
        module = _module(name)
        study = studies.add_parser(name, help=summary, description=module.__doc__)
        study.add_argument("--output-dir", default=f"lab/{name}", metavar="DIR", help="(default: %(default)s)")
        module.add_arguments(study)


def run(arguments: argparse.Namespace) -> dict:
    return {"study": arguments.study, **_module(arguments.study).run(arguments)}


def _module(name: str):
    return importlib.import_module(f"arfast.lab.{name.replace('-', '_')}")
