"""Documents to the token shards of their splits, in batches; shards that a killed run has left whole are kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np

from arfast.data.documents import Document
from arfast.data.manifest import SplitInfo
from arfast.data.shards import Shard, ShardHeader, ShardWriter
from arfast.data.split import SPLITS
from arfast.data.tokenizer import Tokenizer

MAX_SHARD_TOKENS = 1 << 28
T = TypeVar("T")


def frame_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that open and close a document. Some models (Qwen) have no start token: there the end token opens a
    document, as in their training."""
    end = tokenizer.eos_token_id
    return end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end


def in_batches(items: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Lists of the items of (item, size), each list as soon as its sizes reach ``limit``."""
    batch, total = [], 0
    for item, size in items:
        batch.append(item)
        total += size
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class SplitWriter:
    """The shards of one split in a directory: those that are whole already, and those that are added, a new one
    whenever the last is full.

    num_skipped: documents in the shards that were whole already.
    """

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, max_shard_tokens: int | None = None):
        self._directory, self._split, self._tokenizer = directory, split, tokenizer
        self._max_tokens = max_shard_tokens or MAX_SHARD_TOKENS
        self._headers: dict[str, ShardHeader] = {}
        self._writer: ShardWriter | None = None
        while self._resume():
            pass
        self.num_skipped = sum(header.num_documents for header in self._headers.values())

    def _name(self) -> str:
        return f"{self._split}-{len(self._headers):05d}.bin"

    def _resume(self) -> bool:
        """Takes the next shard if it is whole, else removes it."""
        path = self._directory / self._name()
        try:
            shard = Shard(path)
            shard.verify()
        except FileNotFoundError:
            return False
        except ValueError:
            path.unlink()
            return False
        self._headers[path.name] = shard.header
        return True

    def _start(self) -> ShardWriter:
        path = self._directory / self._name()
        return ShardWriter(path, self._tokenizer.vocab_size, self._tokenizer.fingerprint)

    def add(self, tokens: Sequence[int] | np.ndarray, num_bytes: int, targets: np.ndarray | None = None) -> None:
        """As ``ShardWriter.add``."""
        if self._writer and self._writer.num_tokens + len(tokens) > self._max_tokens:
            self._finish()
        self._writer = self._writer or self._start()
        self._writer.add(tokens, num_bytes, targets)

    def _finish(self) -> None:
        name = self._name()
        self._headers[name] = self._writer.close()
        self._writer = None

    def close(self) -> SplitInfo:
        if self._writer is None and not self._headers:
            self._writer = self._start()
        if self._writer:
            self._finish()
        headers = self._headers.values()
        totals = (
            sum(getattr(header, key) for header in headers) for key in ("num_documents", "num_tokens", "num_bytes")
        )
        return SplitInfo(*totals, {name: header.content_sha256 for name, header in self._headers.items()})

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.__exit__(*exception)


def write_splits(
    directory: Path,
    documents: Iterable[tuple[int, Document]],
    tokenizer: Tokenizer,
    progress: Callable[[int], object],
    *,
    batch_characters: int,
    max_shard_tokens: int | None = None,
) -> dict[str, SplitInfo]:
    """Encodes (split, document) into shards; those in shards that are whole already are passed over.

    Args:
        progress: called with the bytes of each document that was encoded.
        batch_characters: encoded at once, about.
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(directory, split, tokenizer, max_shard_tokens)) for split in SPLITS]
        for batch in in_batches(_not_yet_written(documents, writers), batch_characters):
            encoded = _encode([document for _, document in batch], tokenizer)
            for (split, document), arguments in zip(batch, encoded, strict=True):
                writers[split].add(*arguments)
                progress(len(document.text.encode()))
        return {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)}


def _not_yet_written(
    documents: Iterable[tuple[int, Document]], writers: Sequence[SplitWriter]
) -> Iterator[tuple[tuple[int, Document], int]]:
    skip = [writer.num_skipped for writer in writers]
    for split, document in documents:
        if skip[split]:
            skip[split] -= 1
        else:
            yield (split, document), len(document.text)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int, np.ndarray | None]]:
    """(tokens, bytes of target text, targets) of each document, as ``ShardWriter.add`` wants them.

    Each part of the text that is a target is closed by an end token, which is a target too.
    """
    start, end = frame_tokens(tokenizer)
    pieces = [[(d.text, True)] if d.targets is None else d.pieces() for d in documents]
    encoded = iter(tokenizer.encode_batch([text for some in pieces for text, _ in some], add_special_tokens=False))
    for document, some in zip(documents, pieces, strict=True):
        tokens, targets = [start], [False]
        for _, is_target in some:
            tokens += next(encoded) + [end] * is_target
            targets += [is_target] * (len(tokens) - len(targets))
        if not (some and some[-1][1]):
            tokens.append(end)
            targets.append(False)
        num_bytes = sum(len(text.encode()) for text, is_target in some if is_target)
        yield tokens, num_bytes, None if document.targets is None else np.array(targets)
