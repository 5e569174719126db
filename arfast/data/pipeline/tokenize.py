"""Token shards of the documents that stay, one data set per source; a killed run goes on after its last whole shard."""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from arfast.data.manifest import DatasetManifest, SplitInfo, describe_tokenizer
from arfast.data.pipeline.parts import Parts
from arfast.data.pipeline.recipe import Recipe
from arfast.data.pipeline.record import text_bytes
from arfast.data.shards import Shard, ShardHeader, ShardWriter
from arfast.data.split import SPLITS, assign_splits, splits_by_digest
from arfast.data.tokenizer import Tokenizer

DROPPED = len(SPLITS)
_DIGEST_BYTES = 16
# A shard is what a killed run has to encode again.
_MAX_SHARD_TOKENS = 1 << 26
_BATCH_CHARACTERS = 1 << 20


def assign_documents(parts: Parts, status: np.ndarray, source: int, recipe: Recipe) -> np.ndarray:
    """The split of each document of a source, uint8 [N], DROPPED for what is not kept or of another source.

    The rule of ``assign_splits``, whose exception for small corpora alone needs all digests at once.
    """
    fractions = recipe.split.validation_fraction, recipe.split.test_fraction
    splits = np.full(parts.num_documents, DROPPED, np.uint8)
    for part, start in zip(parts.parts, parts.starts.tolist()):
        if part.source == source:
            kept = np.flatnonzero(status[start : start + part.num_documents] == 0)
            splits[start + kept] = splits_by_digest(parts.index(part)["high"][kept], *fractions)
    wanted = [0, *(split for split, fraction in enumerate(fractions, 1) if fraction > 0)]
    if all((splits == split).any() for split in wanted):
        return splits
    kept = np.flatnonzero(splits != DROPPED)
    digests = b"".join(_digests(parts, splits))
    try:
        whole = [digests[place : place + _DIGEST_BYTES] for place in range(0, len(digests), _DIGEST_BYTES)]
        splits[kept] = assign_splits(whole, *fractions)
    except ValueError as error:
        raise ValueError(f"prepare: source {recipe.sources[source].name!r}: {error}") from None
    return splits


def _digests(parts: Parts, splits: np.ndarray) -> Iterator[bytes]:
    """The digests of the documents that are in a split, part by part, in their order."""
    for part, start in zip(parts.parts, parts.starts.tolist()):
        kept = splits[start : start + part.num_documents] != DROPPED
        if kept.any():
            index = parts.index(part)[kept]
            yield np.stack([index["high"], index["low"]], axis=1).astype(">u8").tobytes()


def documents_of(parts: Parts, splits: np.ndarray, wanted: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(split, text) of the documents in the wanted splits, in their order; parts without any are not read."""
    wanted = set(wanted)
    for part, start in zip(parts.parts, parts.starts.tolist()):
        here = splits[start : start + part.num_documents].tolist()
        if wanted.isdisjoint(here):
            continue
        for split, record in zip(here, parts.records(part), strict=True):
            if split in wanted:
                yield split, record.text


class _SplitShards:
    """The shards of one split in a directory: those that are whole already, and those that are added."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self._directory, self._split, self._tokenizer = directory, split, tokenizer
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

    def add(self, tokens: list[int], num_bytes: int) -> None:
        if self._writer and self._writer.num_tokens + len(tokens) > _MAX_SHARD_TOKENS:
            self._finish()
        self._writer = self._writer or self._start()
        self._writer.add(tokens, num_bytes)

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
        totals = [
            sum(getattr(header, key) for header in headers) for key in ("num_documents", "num_tokens", "num_bytes")
        ]
        return SplitInfo(*totals, {name: header.content_sha256 for name, header in self._headers.items()})

    def __enter__(self) -> "_SplitShards":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.__exit__(*exception)


def write_data_set(
    directory: Path, texts: Iterable[tuple[int, str]], tokenizer: Tokenizer, progress
) -> dict[str, SplitInfo]:
    """Encodes (split, text) into shards, each document between start and end token; ``progress(bytes)`` is called."""
    end = tokenizer.eos_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with ExitStack() as stack:
        shards = [stack.enter_context(_SplitShards(directory, split, tokenizer)) for split in SPLITS]
        skip = [split.num_skipped for split in shards]

        def flush(batch: list[tuple[int, str]]) -> None:
            encoded = tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False)
            for (split, text), ids in zip(batch, encoded, strict=True):
                shards[split].add([start, *ids, end], text_bytes(text))
            progress(sum(text_bytes(text) for _, text in batch))

        batch, size = [], 0
        for split, text in texts:
            if skip[split]:
                skip[split] -= 1
                continue
            batch.append((split, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                flush(batch)
                batch, size = [], 0
        flush(batch)
        return {split: writer.close() for split, writer in zip(SPLITS, shards, strict=True)}


def describe_data_set(
    directory: Path, parts: Parts, splits: np.ndarray, tokenizer: Tokenizer, recipe: Recipe, source: dict, infos: dict
) -> None:
    """Writes ``dataset.json``, as ``prepare_dataset`` does, of the documents with a split in ``splits`` uint8 [N]."""
    corpus = hashlib.sha256()
    for digests in _digests(parts, splits):
        corpus.update(digests)
    settings = {
        "corpus_sha256": corpus.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "seed": recipe.split.seed,
        "validation_fraction": float(recipe.split.validation_fraction),
        "test_fraction": float(recipe.split.test_fraction),
    }
    source = {"python": platform.python_version()} | source
    DatasetManifest(directory, settings, source, describe_tokenizer(tokenizer, directory), infos).write(directory)
