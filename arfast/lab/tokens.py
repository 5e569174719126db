"""Words, characters and byte pairs as tokens of the same text: how many bytes a token stands for, how much of unseen
text is not in the vocabulary, and how much of the vocabulary unseen text uses.

Every tenth document is held out, and each tokenizer learned from the others, at several sizes of the vocabulary.

Without --data: the sources of Python's standard library.
"""

import argparse

from arfast.data import Tokenizer, builtin, read_documents
from arfast.data.prepare import BUILTIN_PREFIX
from arfast.data.tokenizer import MIN_VOCAB_SIZES

from .result import save_result

_HELD_OUT = 10
_EXAMPLE = "    return self.namespace[name]  # naïveté\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="builtin:python", help="text or records (default: %(default)s)")
    sizes = [512, 2048, 8192]
    parser.add_argument(
        "--vocab-sizes", type=int, nargs="+", default=sizes, metavar="N", help="(default: 512 2048 8192)"
    )
    parser.add_argument("--max-bytes", type=int, default=4_000_000, metavar="N", help="of text (default: 4000000)")


def run(arguments: argparse.Namespace) -> dict:
    for size in arguments.vocab_sizes:
        if size < max(MIN_VOCAB_SIZES.values()):
            raise ValueError(f"lab tokens: vocab_sizes must be at least {max(MIN_VOCAB_SIZES.values())}, got {size}")
    known, unseen = _texts(arguments.data, arguments.max_bytes)
    found = []
    print(f"{'kind':>9} {'vocabulary':>10} {'bytes/token':>11} {'unknown':>8} {'of bytes':>8} {'used':>6}")
    for kind in MIN_VOCAB_SIZES:
        for size in sorted(set(arguments.vocab_sizes)):
            tokenizer = Tokenizer.train(known, size, kind)
            if found and found[-1]["kind"] == kind and found[-1]["vocab_size"] == tokenizer.vocab_size:
                break  # there are no more words or characters
            found.append({"kind": kind, "vocab_size": tokenizer.vocab_size, **measure(tokenizer, unseen)})
            print(describe(found[-1]), flush=True)
        print(f"{'':>9} {' '.join(_shown(tokenizer, _EXAMPLE))}")
    figure = save_result(arguments, lambda figure: draw(figure, found), (9, 4))
    return {"tokenizers": found, "figure": figure}


def _texts(data: str, max_bytes: int) -> tuple[list[str], list[str]]:
    """Documents evenly from the whole corpus, about max_bytes of them: to learn from, and held out."""
    is_builtin = data.startswith(BUILTIN_PREFIX)
    documents = builtin(data.removeprefix(BUILTIN_PREFIX)) if is_builtin else read_documents(data)
    texts = [document.text for document in documents]
    share = min(1.0, max_bytes / sum(len(text.encode()) for text in texts))
    texts = [text for number, text in enumerate(texts) if int((number + 1) * share) > int(number * share)]
    if len(texts) < _HELD_OUT:
        raise ValueError(f"lab tokens: data must hold at least {_HELD_OUT} documents, got {len(texts)}")
    held_out = texts[_HELD_OUT - 1 :: _HELD_OUT]
    return [text for number, text in enumerate(texts, 1) if number % _HELD_OUT], held_out


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """On text that the tokenizer was not learned from.

    bytes_per_token: bytes over tokens. unknown: share of the tokens that are the unknown one. lost: share of the bytes
    that decoding does not give back. used: share of the vocabulary that occurs.
    """
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    num_tokens, num_bytes = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
    decoded = sum(len(text.encode()) for text in tokenizer.decode_batch(encoded))
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded)
    special = set(tokenizer.special_token_ids.values())
    used = set().union(*encoded) - special
    return {
        "bytes_per_token": num_bytes / num_tokens,
        "unknown": unknown / num_tokens,
        "lost": 1 - decoded / num_bytes,
        "used": len(used) / (tokenizer.vocab_size - len(special)),
    }


def describe(one: dict) -> str:
    shares = f"{one['unknown']:>8.2%} {one['lost']:>8.2%} {one['used']:>6.0%}"
    return f"{one['kind']:>9} {one['vocab_size']:>10,} {one['bytes_per_token']:>11.3f} {shares}"


def _shown(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1].replace(" ", "·") for token in ids]


def draw(figure, found: list[dict]) -> None:
    axes = figure.subplots(1, 3)
    titles = {"bytes_per_token": "bytes per token", "unknown": "unknown tokens", "used": "vocabulary used"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for kind in MIN_VOCAB_SIZES:
            points = [(one["vocab_size"], one[key]) for one in found if one["kind"] == kind]
            ax.plot(*zip(*points), marker="o", label=kind)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("vocabulary")
        ax.set_title(f"{title}, unseen text", fontsize="medium")
    axes[0].legend()
