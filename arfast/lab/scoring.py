"""How likely a trained model finds given text: real lines against the same lines with words in another order, and lines
after what comes before them in their file, after another file's text, and alone.

P(y | x) of lines y after a context x is the product of the model's probabilities of y's tokens; perplexity is its
inverse per token. A model that has learned anything finds the real lines likelier, and picks the ones that follow x
among others. Dividing by P(y), which is large for lines that are likely anywhere, helps it (Holtzman et al. 2021,
arXiv:2104.08315, "surface form competition").

Example:
  arfast train && arfast lab scoring
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arfast.data import Tokenizer
from arfast.data.split_writer import frame_tokens
from arfast.generate import score_continuations
from arfast.models import CausalLM

from .held_out import add_model_arguments, open_run
from .result import save_result

_GARBLED = (0.0, 0.1, 0.25, 0.5, 1.0)
_CONTEXT_TOKENS, _LINES_CHARACTERS = 96, 160


@dataclass(frozen=True)
class Passage:
    """x: text of a file up to the end of a line; y: the lines that follow it there."""

    x: str
    y: str


@dataclass(frozen=True)
class Scores:
    """Of each text y: log_prob [N] in nats, num_tokens [N], num_bytes [N]."""

    log_prob: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_prob.sum() / self.num_tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        return -self.log_prob.sum() / self.num_bytes.sum() / math.log(2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--passages", type=int, default=150, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--choices", type=int, default=8, metavar="K", help="to pick from (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    model, tokenizer, documents = open_run(arguments, "scoring")
    generator = np.random.default_rng(arguments.seed)
    texts = [tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens in documents]
    passages = draw_passages(texts, arguments.passages, generator)
    if len(passages) <= arguments.choices:
        rule = f"data must hold files of more than {arguments.choices} passages of some lines"
        raise ValueError(f"lab scoring: {rule}, got {len(passages)}")
    garbled = {
        share: score_pairs(model, tokenizer, [(p.x, shuffle_words(p.y, share, generator)) for p in passages])
        for share in _GARBLED
    }
    real, contexts = garbled[0.0], compare_contexts(model, tokenizer, passages)
    rows = [
        {
            "garbled": share,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "real_is_likelier": float((real.log_prob > scores.log_prob).mean()) if share else None,
        }
        for share, scores in garbled.items()
    ]
    choice = choose(model, tokenizer, passages, arguments.choices)
    print(describe(rows, contexts, choice, len(passages)), flush=True)
    figure = save_result(arguments, lambda figure: draw(figure, garbled, choice), (10, 4))
    return {"passages": len(passages), "garbled": rows, "contexts": contexts, "choice": choice, "figure": figure}


def draw_passages(texts: Sequence[str], count: int, generator: np.random.Generator) -> list[Passage]:
    """At most `count` passages, at most one from each stretch of a file, in an order drawn at random."""
    passages = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        ends = np.cumsum([len(line) for line in lines])
        for number, end in enumerate(ends[:-1]):
            lines_of_y = ends[number + 1 :] - end
            enough = int(np.searchsorted(lines_of_y, _LINES_CHARACTERS))
            # Each stretch once: at every tenth line that has a context before it and lines after it.
            if number % 10 == 9 and end >= 4 * _CONTEXT_TOKENS and enough < len(lines_of_y):
                y = "".join(lines[number + 1 : number + 2 + enough])
                if len(y.split()) >= 8 and len(y) <= 4 * _LINES_CHARACTERS:
                    passages.append(Passage(text[:end], y))
    return [passages[i] for i in generator.permutation(len(passages))[:count]]


def shuffle_words(text: str, share: float, generator: np.random.Generator) -> str:
    """A share of the words of a text, at least two, take each other's places; what stands between words stays.

    >>> shuffle_words("a b  c", 1.0, np.random.default_rng(0)) in ("b c  a", "c a  b")
    True
    """
    words = text.split()
    moved = generator.permutation(len(words))[: max(2, round(share * len(words))) if share else 0]
    replaced = dict(zip(moved.tolist(), (words[i] for i in np.roll(moved, 1)), strict=True))
    pieces, rest = [], text
    for number, word in enumerate(words):
        place = rest.index(word)
        pieces += [rest[:place], replaced.get(number, word)]
        rest = rest[place + len(word) :]
    return "".join([*pieces, rest])


def score_pairs(model: CausalLM, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Scores:
    """log P(y | x) of each (x, y), encoded apart; of x the last tokens, behind a start token."""
    start, _ = frame_tokens(tokenizer)
    xs, ys = (tokenizer.encode_batch(list(texts), add_special_tokens=False) for texts in zip(*pairs, strict=True))
    rows = [([start, *x[-_CONTEXT_TOKENS:]], y) for x, y in zip(xs, ys, strict=True)]
    groups = [list(same) for _, same in itertools.groupby(rows, key=lambda row: row[0])]  # a context is read once
    scored = list(itertools.chain.from_iterable(score_continuations(model, groups)))
    log_prob, num_tokens = ([getattr(one, name) for one in scored] for name in ("logprob", "num_tokens"))
    return Scores(np.array(log_prob), np.array(num_tokens), np.array([len(y.encode()) for _, y in pairs]))


def compare_contexts(model: CausalLM, tokenizer: Tokenizer, passages: Sequence[Passage]) -> dict[str, float]:
    """Perplexity of the same lines after their own context, after that of the next passage, after none."""
    others = [*passages[1:], passages[0]]
    pairs = {
        "own": [(p.x, p.y) for p in passages],
        "another": [(other.x, p.y) for p, other in zip(passages, others, strict=True)],
        "none": [("", p.y) for p in passages],
    }
    return {name: score_pairs(model, tokenizer, some).perplexity for name, some in pairs.items()}


def choose(model: CausalLM, tokenizer: Tokenizer, passages: Sequence[Passage], choices: int) -> dict[str, float]:
    """How often the lines that follow x win among `choices`: by log P(y | x) per byte, and by log P(y | x) / P(y)."""
    count = len(passages)
    candidates = [[passages[(i + k) % count].y for k in range(choices)] for i in range(count)]
    pairs = [(p.x, y) for p, ys in zip(passages, candidates, strict=True) for y in ys]
    given = score_pairs(model, tokenizer, pairs)
    alone = score_pairs(model, tokenizer, [("", p.y) for p in passages]).log_prob
    prior = np.array([[alone[(i + k) % count] for k in range(choices)] for i in range(count)])
    log_prob = given.log_prob.reshape(count, choices)
    per_byte = log_prob / given.num_bytes.reshape(count, choices)
    return {
        "by chance": 1 / choices,
        "log P(y | x) per byte": float((per_byte.argmax(1) == 0).mean()),
        "log P(y | x) / P(y)": float(((log_prob - prior).argmax(1) == 0).mean()),
    }


def describe(rows: Sequence[dict], contexts: dict[str, float], choice: dict[str, float], count: int) -> str:
    lines = [f"{count} passages", "words moved  perplexity  bits per byte  real one is likelier"]
    for row in rows:
        likelier = "" if row["real_is_likelier"] is None else f"{row['real_is_likelier']:.0%}"
        lines.append(
            f"{row['garbled']:>11.0%}  {row['perplexity']:>10.1f}  {row['bits_per_byte']:>13.3f}  {likelier:>20}"
        )
    after = ", ".join(f"{name} {value:.1f}" for name, value in contexts.items())
    picked = ", ".join(f"{name} {value:.0%}" for name, value in choice.items())
    return "\n".join([*lines, f"perplexity after context: {after}", f"right continuation picked: {picked}"])


def draw(figure, garbled: dict[float, Scores], choice: dict[str, float]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for share in (0.0, 0.25, 1.0):
        scores = garbled[share]
        bits = -scores.log_prob / scores.num_bytes / math.log(2)
        label = "real" if share == 0 else f"{share:.0%} of the words moved"
        left.hist(bits, bins=np.linspace(0, 8, 41), histtype="step", linewidth=1.5, label=label)
    left.set_xlabel("bits per byte of some lines, after what comes before them")
    left.set_ylabel("passages")
    left.legend()
    right.barh(list(choice), [100 * value for value in choice.values()], color=["tab:gray", "tab:blue", "tab:blue"])
    right.set_xlabel("right continuation picked (%)")
    right.set_xlim(0, 100)
