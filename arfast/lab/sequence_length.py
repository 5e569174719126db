"""What a longer context gives and costs: accuracy and loss of a trained model's next token by the number of tokens that
it sees before it, and time and memory of attention by sequence length, with the scores materialised and fused.

Windows of test documents begin anywhere in them, so that position and context length are the same thing.

Example:
  arfast train && arfast lab sequence-length
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from arfast.doctor import measure_sequence_lengths, table
from arfast.models import CausalLM

from .held_out import add_model_arguments, draw_windows, open_run
from .result import save_result

_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--windows", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seqlen", type=int, metavar="T", help="of a window (default: the model's, at most 512)")
    lengths = (512, 1024, 2048, 4096)
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths, metavar="T", help="(default: 512 ... 4096)")


def run(arguments: argparse.Namespace) -> dict:
    model, _, documents = open_run(arguments, "sequence-length")
    longest = model.config.max_position_embeddings
    seqlen = min(512, longest) if arguments.seqlen is None else arguments.seqlen
    if not 2 <= seqlen <= longest:
        raise ValueError(f"lab sequence-length: seqlen must be in [2, {longest}], got {seqlen}")
    windows = draw_windows(documents, arguments.windows, seqlen, np.random.default_rng(arguments.seed))
    rows = by_context(model, windows)
    print(f"{len(windows)} windows of {seqlen} tokens\ntokens seen  accuracy  loss")
    for row in rows:
        print(f"{row['first']:>4} - {row['last']:<4}  {row['accuracy']:>8.1%}  {row['loss']:.3f}")
    costs = list(measure_sequence_lengths(arguments.lengths)) if arguments.lengths else []
    if costs:
        print(table(costs), flush=True)
    figure = save_result(arguments, lambda figure: draw(figure, rows, costs), (12, 4))
    return {"seqlen": seqlen, "windows": len(windows), "by_context": rows, "costs": costs, "figure": figure}


@torch.no_grad()
def by_context(model: CausalLM, windows: torch.Tensor) -> list[dict]:
    """Accuracy and mean loss in nats of the tokens that follow 1, 2 to 3, 4 to 7, ... tokens of their window."""
    hits, losses = [], []
    for batch in windows.split(_BATCH):
        logits, targets = model(batch).logits[:, :-1].float(), batch[:, 1:]
        hits.append(logits.argmax(-1) == targets)
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    hit, loss = torch.cat(hits).double().mean(0), torch.cat(losses).double().mean(0)  # of position 1, 2, ...
    rows, first = [], 1
    while first <= len(hit):
        last = min(2 * first - 1, len(hit))
        some = slice(first - 1, last)
        rows.append(
            {"first": first, "last": last, "accuracy": hit[some].mean().item(), "loss": loss[some].mean().item()}
        )
        first *= 2
    return rows


def draw(figure, rows: Sequence[dict], costs: Sequence[dict]) -> None:
    panels = figure.subplots(1, 3 if costs else 1, squeeze=False)[0]
    seen = [(row["first"] * row["last"]) ** 0.5 for row in rows]
    panels[0].plot(seen, [100 * row["accuracy"] for row in rows], marker="o", color="tab:blue")
    panels[0].set_xlabel("tokens seen")
    panels[0].set_ylabel("next token right (%)", color="tab:blue")
    beside = panels[0].twinx()
    beside.plot(seen, [row["loss"] for row in rows], marker=".", color="tab:orange")
    beside.set_ylabel("loss (nats)", color="tab:orange")
    panels[0].set_xscale("log", base=2)
    for panel, key, factor, name in zip(panels[1:], ("seconds", "bytes"), (1e3, 2**-20), ("ms", "MiB"), strict=False):
        for path, label in (("eager", "scores materialised"), ("fused", "fused")):
            known = [(row["seqlen"], row[path][key] * factor) for row in costs if "error" not in row[path]]
            if known:
                panel.plot(*zip(*known, strict=True), marker="o", label=label)
        panel.set_xlabel("sequence length")
        panel.set_ylabel(f"attention, forward and backward ({name})")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.legend()
