"""How much of each source training takes: shares of the tokens, as in Llama 3 (arXiv 2407.21783), section 3.1.2."""

import math

from arfast.data.pipeline.recipe import Recipe

MIXTURE_NAME = "mixture.json"


def plan_mixture(recipe: Recipe, num_tokens: dict[str, int]) -> dict:
    """What the report says of the mixture: for each source its data set, share, tokens and how often it is seen.

    Without fractions, sources count by their tokens. Without ``num_tokens``, the run is as long as ``max_epochs`` of
    the source that runs out first allow.

    Args:
        recipe: with its sources and mixture.
        num_tokens: of each source's training split.

    Raises:
        ValueError: a source would have to be seen more than ``max_epochs`` times.
    """
    total = sum(num_tokens.values())
    shares = {
        source.name: num_tokens[source.name] / total if source.fraction is None else source.fraction
        for source in recipe.sources
    }
    epochs = recipe.mixture.max_epochs
    scarcest = min(shares, key=lambda name: num_tokens[name] * epochs / shares[name])
    available = int(num_tokens[scarcest] * epochs / shares[scarcest])
    wanted = available if recipe.mixture.num_tokens is None else recipe.mixture.num_tokens
    if wanted > available:
        detail = f"{scarcest!r} has {num_tokens[scarcest]} tokens, {epochs:g} epochs, fraction {shares[scarcest]:g}"
        raise ValueError(f"prepare: mixture.num_tokens must be at most {available}, got {wanted}: {detail}")
    alone = len(recipe.sources) == 1
    return {
        "num_tokens": wanted,
        "sources": [
            {
                "name": source.name,
                "data": "." if alone else source.name,
                "fraction": shares[source.name],
                "num_tokens": num_tokens[source.name],
                "epochs": round(wanted * shares[source.name] / num_tokens[source.name], 6),
            }
            for source in recipe.sources
        ],
    }


def training_mixture(plan: dict) -> dict:
    """The content of ``mixture.json``, which training reads: see ``arfast.data.read_mixture``."""
    return {
        "sources": [
            {"data": source["data"], "fraction": source["fraction"], "max_epochs": max(1, math.ceil(source["epochs"]))}
            for source in plan["sources"]
        ]
    }
