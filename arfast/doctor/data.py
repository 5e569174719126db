"""A data set on disk: every hash that its manifest names, and whether its tokenizer is the model's."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from arfast.adapter import is_adapter
from arfast.data import DatasetManifest, Tokenizer
from arfast.hub import _read_json

from .finding import Check, Outcome


def data_checks(model: str | None = None, data: str | None = None) -> Iterator[Check]:
    if data is not None:
        yield "shards have the hashes of their manifest", lambda: _shards(data)
        yield "tokenizer is the one of the shards", lambda: _tokenizer(data)
        if model is not None:
            yield "data and model have the same tokenizer", lambda: _same_tokenizer(model, data)
            if not is_adapter(model):
                yield "token ids are below the model's vocabulary", lambda: _vocabulary(model, data)


def _shards(data: str) -> Outcome:
    manifest = DatasetManifest.load(data)
    shards = [shard for split in manifest.splits for shard in manifest.open_split(split)]
    tokens = sum(len(shard.tokens) for shard in shards)
    return True, f"{len(shards)} shards, {tokens:,} tokens, SHA-256 equal"


def _tokenizer(data: str) -> Outcome:
    manifest = DatasetManifest.load(data)
    manifest.verify_tokenizer()
    found, expected = Tokenizer.load(data).fingerprint, manifest.tokenizer["fingerprint"]
    return found == expected, f"fingerprint {found[:12]}, {expected[:12]} in the manifest"


def _same_tokenizer(model: str, data: str) -> Outcome:
    found, expected = Tokenizer.load(model).fingerprint, DatasetManifest.load(data).tokenizer["fingerprint"]
    return found == expected, f"fingerprint {found[:12]} of the model, {expected[:12]} of the data"


def _vocabulary(model: str, data: str) -> Outcome:
    manifest = DatasetManifest.load(data)
    shards = [shard for split in manifest.splits for shard in manifest.open_split(split)]
    largest = max(int(np.max(shard.tokens, initial=0)) for shard in shards)
    vocab_size = _read_json(Path(model), "config.json", 1 << 20)["vocab_size"]
    return largest < vocab_size, f"largest id {largest}, {vocab_size} rows"
