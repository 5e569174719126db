"""How likely a model finds a text, after a prompt or as a new document; or which of several alternatives it prefers.

Log-probabilities are natural. White space at the end of the prompt counts as the beginning of what follows it.

Examples:
  arfast score runs/default --text "import os" --tokens
  arfast score runs/default --prompt "import " --alternatives os sys numpy
"""

import argparse

from arfast.cli.common import add_checkpoint_arguments, load_checkpoint, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text to score")
    what.add_argument("--file", metavar="PATH", help="file with the text to score")
    what.add_argument("--alternatives", nargs="+", metavar="TEXT", help="texts to rank, the likeliest first")
    parser.add_argument("--prompt", default="", help="what stands before it, given and not scored (default: nothing)")
    parser.add_argument("--tokens", action="store_true", help="show each token of the text with its log-probability")
    parser.add_argument(
        "--normalize",
        choices=("none", "tokens", "bytes"),
        help="rank by log-probability, or by that per token or per byte (default: none)",
    )


def run(arguments: argparse.Namespace) -> dict:
    if arguments.alternatives is None and arguments.normalize is not None:
        raise ValueError(f"score: normalize must be left out without alternatives, got {arguments.normalize!r}")
    if arguments.alternatives is not None and arguments.tokens:
        raise ValueError("score: tokens must be left out with alternatives, got --tokens")
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.dtype)
    if arguments.alternatives is not None:
        return _rank(model, tokenizer, arguments)
    name = "text" if arguments.file is None else "file"
    text = arguments.text if arguments.file is None else read_text("score: file", arguments.file)
    return _score(model, tokenizer, arguments.prompt, name, text, arguments.tokens)


def _score(model, tokenizer, prompt: str, name: str, text: str, show_tokens: bool) -> dict:
    import math

    import torch

    from arfast.generate import encode_pair

    context, continuation = encode_pair(tokenizer, prompt, text)
    row, limit = context + continuation, model.config.max_position_embeddings
    if len(row) > limit:
        hint = "`arfast eval --stride` slides a window over a long text"
        rule = f"have at most max_position_embeddings={limit} tokens with its prompt ({hint})"
        raise ValueError(f"score: {name} must {rule}, got {len(row)}")
    if len(row) <= max(len(context), 1):
        raise ValueError(f"score: {name} must hold a token that another one precedes, got {text!r}")
    input_ids = torch.tensor([row], device=model.head_weight.device)
    scores = model.score(input_ids, [len(context)])
    total, count = float(scores.sums), int(scores.num_tokens)
    result = dict(
        logprob=total,
        tokens=count,
        perplexity=float(scores.perplexity),
        bits_per_byte=-total / math.log(2) / len(text.encode()),
    )
    if show_tokens:
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in row[-count:]]
        result["token_logprobs"] = list(zip(texts, scores.token_logprobs[0, -count:].tolist(), strict=True))
        for token, logprob in result["token_logprobs"]:
            print(f"{logprob:10.4f}  {token!r}")
    print(
        f"{total:.4f} nats, {count:,} tokens, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    return result


def _rank(model, tokenizer, arguments: argparse.Namespace) -> dict:
    import dataclasses

    from arfast.generate import rank

    normalize = arguments.normalize or "none"
    ranked = rank(model, tokenizer, arguments.prompt, arguments.alternatives, normalize=normalize)
    for item in ranked:
        print(f"{item.score:10.4f}  {item.alternative!r}")
    return dict(best=ranked[0].alternative, ranking=[dataclasses.asdict(item) for item in ranked])
