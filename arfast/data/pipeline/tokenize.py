"""Token shards of the documents that stay, one data set per source; a killed run goes on after its last whole shard."""

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from arfast.data.documents import Document
from arfast.data.manifest import DatasetManifest, SplitInfo, describe_tokenizer
from arfast.data.pipeline.parts import Parts
from arfast.data.pipeline.recipe import Recipe
from arfast.data.split import SPLITS, assign_splits, splits_by_digest
from arfast.data.split_writer import write_splits
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


def write_data_set(
    directory: Path, texts: Iterable[tuple[int, str]], tokenizer: Tokenizer, progress: Callable[[int], object]
) -> dict[str, SplitInfo]:
    """Encodes (split, text) into shards: see ``write_splits``."""
    documents = ((split, Document(text, source="")) for split, text in texts)
    limits = dict(batch_characters=_BATCH_CHARACTERS, max_shard_tokens=_MAX_SHARD_TOKENS)
    return write_splits(directory, documents, tokenizer, progress, **limits)


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
