"""Linear language models beside a small transformer, trained on the same tokens: how much of the prediction of the next
token needs no layer at all. The mean of all embeddings so far, the mean of the last 8, an n-gram model with an
embedding per place, and what counting tokens gives; perplexity, and the nearest words in the learned embeddings.

Runs are kept in --output-dir: a study that was interrupted goes on, and one that is finished is only printed again.

Without --data: the sources of Python's standard library.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from arfast.data import DatasetManifest, PackedDataset, Tokenizer
from arfast.data.checks import check_at_least
from arfast.generate.perplexity import CorpusScores, corpus_scores
from arfast.models import CausalLM, CausalLMConfig, LinearLM
from arfast.models.causal_lm import IGNORE_INDEX, shift_labels

from .result import save_result
from .training import prepared_data, train, training_config

_SEQLEN, _BATCH_SIZE, _CURVE_POINTS = 256, 8, 40
# Of 0.01, 0.03 and 0.1 the best for means and for n-grams on the validation split after 400,000 tokens; that of `arfast
# train` for the transformer.
_MEAN_RATE, _NGRAM_RATE, _TRANSFORMER_RATE = 0.1, 0.03, 0.003
_SHOWN_WORDS, _SHOWN_NEIGHBOURS = 6, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="builtin:python", help="text or a data set (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2_000_000, metavar="N", help="per model (default: 2000000)")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=8, metavar="N", help="of the windowed mean (default: 8)")
    parser.add_argument("--order", type=int, default=4, metavar="N", help="of the n-gram model (default: 4)")


def run(arguments: argparse.Namespace) -> dict:
    check_at_least("lab linear-lm", arguments, max_tokens=1, window=1, order=2)
    models, directory = _models(arguments), prepared_data(arguments)
    counts = _token_counts(directory)
    found = {"counts": {"parameters": len(counts), "seconds": 0.0, "curve": [], **_scores(_count(directory, counts))}}
    trained = {}
    for name, make in models.items():
        trained[name], found[name] = _train(name, make, directory, arguments)
    print(describe(found), flush=True)
    words = frequent_words(Tokenizer.load(directory), counts, _SHOWN_WORDS)
    nearest = {name: nearest_words(trained[name], directory, words) for name in (f"last {arguments.window}",)}
    for name, neighbours in nearest.items():
        print(f"nearest in the embedding of {name!r}:")
        for word, near in neighbours.items():
            print(f"  {word:>10}: {', '.join(near)}")
    figure = save_result(arguments, lambda figure: draw(figure, found), (9, 4.5))
    shown = {name: {key: value for key, value in one.items() if key != "curve"} for name, one in found.items()}
    return {"models": shown, "nearest": nearest, "figure": figure}


def _models(arguments: argparse.Namespace) -> dict[str, Callable[[dict], torch.nn.Module]]:
    """By name, functions of a vocabulary's size and special tokens; sizes are checked here."""
    d = arguments.hidden_size
    sizes = dict(hidden_size=d, intermediate_size=3 * d, num_hidden_layers=4, max_position_embeddings=_SEQLEN)
    kinds = {
        "mean": {},
        f"last {arguments.window}": {"window": arguments.window},
        f"{arguments.order}-gram": {"window": arguments.order - 1, "ngram": True},
    }
    for settings in kinds.values():
        LinearLM(1, d, **settings, device="meta")
    transformer = CausalLMConfig.preset("tiny", vocab_size=1, **sizes)
    linear = {name: lambda v, s=settings: LinearLM(hidden_size=d, **s, **v) for name, settings in kinds.items()}
    return linear | {"transformer": lambda vocabulary: CausalLM(transformer.replace(**vocabulary))}


def _train(
    name: str, make: Callable[[dict], torch.nn.Module], directory: str, arguments: argparse.Namespace
) -> tuple[torch.nn.Module, dict]:
    """The trained model, and its figures: parameters, seconds of training, scores, curve of (tokens, loss)."""
    model = make(DatasetManifest.load(directory).vocabulary)
    path = Path(arguments.output_dir) / name.replace(" ", "-")
    settings = dict(learning_rate=_learning_rate(model), weight_decay=0.0)
    result = train(model, training_config(path, arguments.max_tokens, _SEQLEN, _BATCH_SIZE, **settings), directory)
    figures = {"parameters": model.num_parameters(), "seconds": result.seconds, **_scores(result.evaluation)}
    trained = [row for row in result.rows if "tokens_per_second" in row]
    size = -(-len(trained) // _CURVE_POINTS)
    parts = [trained[start : start + size] for start in range(0, len(trained), size)]
    return model, figures | {"curve": [(p[-1]["tokens"], sum(r["loss"] for r in p) / len(p)) for p in parts]}


def _learning_rate(model: torch.nn.Module) -> float:
    if not isinstance(model, LinearLM):
        return _TRANSFORMER_RATE
    return _NGRAM_RATE if model.config.ngram else _MEAN_RATE


def _scores(scores: CorpusScores) -> dict[str, float]:
    return {"perplexity": scores.perplexity, "bits_per_byte": scores.bits_per_byte}


def _token_counts(directory: str) -> np.ndarray:
    """How often each token occurs in the training split, [V]."""
    manifest = DatasetManifest.load(directory)
    size = manifest.tokenizer["vocab_size"]
    return sum(np.bincount(shard.tokens, minlength=size) for shard in manifest.open_split("train"))


def _count(directory: str, counts: np.ndarray) -> CorpusScores:
    """The loss on the validation split of the training split's frequencies, each count one more than it was."""
    data = PackedDataset(directory, "validation", _SEQLEN)
    nats = -torch.log(torch.from_numpy((counts + 1) / (counts + 1).sum()))
    total, num_tokens = 0.0, 0
    for batch in data.evaluation_batches(_BATCH_SIZE):
        targets = shift_labels(batch.labels, batch.cu_seqlens)
        targets = targets[targets != IGNORE_INDEX]
        total, num_tokens = total + float(nats[targets].sum()), num_tokens + len(targets)
    return corpus_scores(total / num_tokens, num_tokens, data.num_bytes / data.num_targets)


def describe(found: dict[str, dict]) -> str:
    """A table of all models."""
    lines = [f"{'model':>12} {'perplexity':>11} {'bits/byte':>10} {'parameters':>11} {'seconds':>8}"]
    for name, one in found.items():
        scores = f"{one['perplexity']:>11.2f} {one['bits_per_byte']:>10.4f}"
        lines.append(f"{name:>12} {scores} {one['parameters']:>11,} {one['seconds']:>8.1f}")
    return "\n".join(lines)


def frequent_words(tokenizer: Tokenizer, counts: np.ndarray, count: int) -> list[int]:
    """The most frequent tokens that are a space and a word of at least three letters."""
    words = []
    for token in np.argsort(-counts, kind="stable").tolist():
        text = tokenizer.decode([token])
        if text.startswith(" ") and text[1:].isalpha() and len(text) > 3:
            words.append(token)
    return words[:count]


def nearest_words(model: LinearLM, directory: str, words: list[int]) -> dict[str, list[str]]:
    """For each token, the texts of those whose embeddings are nearest."""
    tokenizer = Tokenizer.load(directory)
    text = lambda token: tokenizer.decode([token], skip_special_tokens=False).strip() or repr(tokenizer.decode([token]))
    return {text(word): [text(near) for near, _ in model.nearest_tokens(word, _SHOWN_NEIGHBOURS)] for word in words}


def draw(figure, found: dict[str, dict]) -> None:
    left, right = figure.subplots(1, 2)
    for name, one in found.items():
        if one["curve"]:
            left.plot(*zip(*one["curve"]), label=name)
    left.set_xlabel("tokens")
    left.set_ylabel("training loss (nats per token)")
    left.legend(fontsize="small")
    right.bar(list(found), [one["bits_per_byte"] for one in found.values()], color="tab:blue")
    right.set_ylabel("bits per byte")
    right.tick_params(axis="x", rotation=20)
