"""Log-probabilities of continuations, log p(continuation | context); a context that several share is read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from arfast import ops
from arfast.data import Tokenizer
from arfast.data.checks import check_integer
from arfast.generate.prompts import cache_kind
from arfast.nn import StaticKVCache

# Logits held at a time, unless one continuation alone has more: 256 MiB in float32.
_MAX_LOGITS = 1 << 26

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation, at least one each


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """logprob: natural, the sum over its tokens in float64; num_tokens: their number;
    is_greedy: whether each of them is the likeliest (of equals, the lowest) after those before it."""

    logprob: float
    num_tokens: int
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of the text that continues it, as they are in the text as a whole.

    White space at the end of the context goes to the continuation, to which tokenizers attach it; then both are encoded
    together, and cut after as many tokens as the context has alone (lm-evaluation-harness does the same). So a token
    may end beyond the context, and the continuation may have none.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    length = len(tokenizer.encode(stripped))
    return whole[:length], whole[length:]


@torch.no_grad()
def score_continuations(
    model: Any, groups: Sequence[Sequence[Pair]], *, batch_size: int = 16, progress: bool = False
) -> list[list[ContinuationScore]]:
    """How likely a model finds continuations of contexts.

    What the rows of a group have in common is computed once, into a key-value cache, from which each row goes on; no
    logits are computed but those that predict a continuation.

    Args:
        model: a CausalLM.
        groups: pairs (context, continuation) of token ids, in groups whose contexts begin alike.
        batch_size: rows at a time.
        progress: show a bar on stderr.

    Returns:
        One ContinuationScore per pair, in the same order and grouping.

    Raises:
        ValueError: `score_continuations: <argument> must <rule>, got <actual>`; also when a log-probability is NaN.

    Example:
        >>> model = CausalLM(CausalLMConfig.preset("tiny"))
        >>> [scores] = score_continuations(model, [[([1, 2, 3], [4]), ([1, 2, 3], [5, 6])]])
        >>> [score.num_tokens for score in scores]
        [1, 2]
    """
    check_integer("score_continuations: batch_size", batch_size, 1)
    for group in groups:
        for context, continuation in group:
            _check(context, continuation, model.config)
    # A part of a source is nothing that an encoder could read ahead.
    shares = not getattr(model, "splits_documents", False)
    families = [_Family.of(group, place, shares) for place, group in enumerate(groups) if group]
    results: list[list[ContinuationScore]] = [[] for _ in groups]
    max_targets = max(1, _MAX_LOGITS // model.config.vocab_size)
    with tqdm(total=sum(map(len, groups)), disable=not progress, unit="row") as bar:
        for batch in _batches(families, batch_size, max_targets):
            for family, scored in _score_batch(model, batch, batch_size, max_targets):
                results[family.place].append(scored)
                bar.update()
    return results


@dataclass(frozen=True, slots=True)
class _Family:
    """Rows that share a beginning: `prefix` is read once; of each row the rest is fed, and its targets are predicted
    by the last of what is fed."""

    prefix: list[int]
    rows: list[tuple[list[int], list[int]]]  # (fed, targets), aligned at their ends
    place: int

    @classmethod
    def of(cls, group: Sequence[Pair], place: int, shares: bool) -> "_Family":
        rows = [[*context, *continuation] for context, continuation in group]
        # the last token of a context predicts, so it is fed; a row alone is read in one pass
        most = min(len(context) for context, _ in group) - 1 if shares and len(group) > 1 else 0
        first, last = min(rows), max(rows)  # what these share, all between them do
        shared = next((i for i in range(most) if first[i] != last[i]), most)
        fed = [(row[shared:-1], [*continuation]) for row, (_, continuation) in zip(rows, group, strict=True)]
        return cls(rows[0][:shared], fed, place)

    @property
    def size(self) -> tuple[bool, int]:
        return len(self.prefix) == 0, len(self.prefix) + max(len(fed) for fed, _ in self.rows)


def _batches(families: list[_Family], batch_size: int, max_targets: int) -> Iterator[list[_Family]]:
    """Families of about the same length, the longest first, as many as their rows allow, at least one. Those without
    a common prefix are apart, for their rows are long."""
    batch: list[_Family] = []
    rows = targets = 0
    for family in sorted(families, key=lambda family: family.size, reverse=True):
        more = sum(len(target) for _, target in family.rows)
        fits = rows + len(family.rows) <= batch_size and targets + more <= max_targets
        if batch and not (fits and bool(batch[0].prefix) == bool(family.prefix)):
            yield batch
            batch, rows, targets = [], 0, 0
        batch.append(family)
        rows, targets = rows + len(family.rows), targets + more
    if batch:
        yield batch


def _score_batch(
    model: Any, batch: list[_Family], batch_size: int, max_targets: int
) -> Iterator[tuple[_Family, ContinuationScore]]:
    """The rows of a batch in order; more than fit at once are of one family."""
    rows = [(parent, *row) for parent, family in enumerate(batch) for row in family.rows]
    cache = _read_prefixes(model, batch) if batch[0].prefix else None
    begin = 0
    while begin < len(rows):
        end, targets = begin + 1, len(rows[begin][2])
        while end < min(len(rows), begin + batch_size) and targets + len(rows[end][2]) <= max_targets:
            targets += len(rows[end][2])
            end += 1
        parents, fed, wanted = zip(*rows[begin:end])
        if cache is not None:
            if begin > 0:
                cache.set_lengths(torch.full_like(cache.lengths, len(batch[0].prefix)))
            cache.select(torch.tensor(parents, device=cache.lengths.device))
        yield from zip((batch[parent] for parent in parents), _score_rows(model, fed, wanted, cache), strict=True)
        begin = end


def _read_prefixes(model: Any, batch: list[_Family]) -> StaticKVCache:
    """A cache that holds the prefixes and has room for any row of the batch."""
    device = model.head_weight.device
    length = max(len(family.prefix) for family in batch) + max(len(fed) for family in batch for fed, _ in family.rows)
    cache = StaticKVCache(model.config, len(batch), length, *cache_kind(model))
    lengths = torch.tensor([0, *(len(family.prefix) for family in batch)], device=device)
    tokens = torch.tensor([[token for family in batch for token in family.prefix]], device=device)
    model(tokens, cu_seqlens=lengths.cumsum(0).int(), cache=cache, logits_to_keep=1)
    return cache


def _score_rows(
    model: Any, fed: Sequence[list[int]], targets: Sequence[list[int]], cache: StaticKVCache | None
) -> Iterator[ContinuationScore]:
    device = model.head_weight.device
    width = max(map(len, fed))
    # padding is on the right, where nothing that counts sees it
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=device)
    keep = [
        row * width + len(fed[row]) - len(wanted) + i for row, wanted in enumerate(targets) for i in range(len(wanted))
    ]
    logits = model(input_ids, cache=cache, logits_to_keep=torch.tensor(keep, device=device)).logits[0]
    wanted = torch.tensor([token for row in targets for token in row], device=device)
    greedy = (logits.argmax(-1) == wanted).tolist()
    logprobs = (-ops.cross_entropy(logits, wanted, reduction="none").double()).cpu()
    if bool(logprobs.isnan().any()):
        raise ValueError("score_continuations: logits must not be NaN, got NaN")
    begin = 0
    for row in targets:
        end = begin + len(row)
        yield ContinuationScore(float(logprobs[begin:end].sum()), len(row), all(greedy[begin:end]))
        begin = end


def _check(context: Sequence[int], continuation: Sequence[int], config: Any) -> None:
    for name, tokens in (("context", context), ("continuation", continuation)):
        if len(tokens) == 0:
            raise ValueError(f"score_continuations: {name} must have at least one token, got none")
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise ValueError(f"score_continuations: {name} must be in [0, vocab_size={config.vocab_size}), got {wrong}")
    # the last token is predicted, and not fed
    length, limit = len(context) + len(continuation) - 1, config.max_position_embeddings
    if length > limit:
        rule = f"have at most max_position_embeddings={limit} tokens but the last"
        raise ValueError(f"score_continuations: context and continuation must {rule}, got {length}")
