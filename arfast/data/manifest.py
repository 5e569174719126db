"""`dataset.json`: what a prepared data set holds and how it was made, with checksums of itself and of every file."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from arfast.data.checks import check_integer, one_line
from arfast.data.files import read_file, write_file
from arfast.data.shards import Shard
from arfast.data.split import SPLITS
from arfast.data.tokenizer import MAX_FILE_BYTES, MAX_VOCAB_SIZE, Tokenizer

MANIFEST_NAME = "dataset.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FORMAT = "arfast-dataset-1"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_BYTES = 64 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"(train|validation|test)-\d{5}\.bin")


def canonical_hash(value: object) -> str:
    """SHA-256 in hex of a JSON value, written with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """SHA-256 in hex of a small file."""
    return hashlib.sha256(read_file(path, max_bytes)).hexdigest()


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """Totals of a split: ``num_bytes`` counts UTF-8 bytes of target text, ``shards`` maps names to content hashes."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("num_documents", "num_tokens", "num_bytes"):
            check_integer(name, getattr(self, name), 0, 2**63 - 1)
        if not (isinstance(self.shards, dict) and all(map(_SHARD_NAME.fullmatch, self.shards))):
            raise TypeError("shards with names unlike train-00000.bin")


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """Description of a prepared data set.

    path: its directory.
    recipe: everything that determines the content: hash of the corpus, tokenizer, seed, fractions.
    source: where the corpus came from: name, numbers of documents and of dropped copies, version of Python.
    tokenizer: fingerprint, vocab_size, ids of the special tokens, hashes of its files.
    splits: ``SplitInfo`` of "train", "validation" and "test".
    """

    path: Path
    recipe: dict
    source: dict
    tokenizer: dict
    splits: dict[str, SplitInfo]

    def write(self, path: Path) -> None:
        """Writes ``dataset.json`` into a directory."""
        record = {"format": _FORMAT} | {key: value for key, value in asdict(self).items() if key != "path"}
        record["checksum"] = canonical_hash(record)
        write_file(path / MANIFEST_NAME, json.dumps(record, indent=2).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DatasetManifest":
        """Reads ``dataset.json`` of a directory.

        Raises:
            FileNotFoundError: the directory holds none.
            ValueError: it is damaged, or of another version.
        """
        path = Path(path)
        if not os.path.exists(path / MANIFEST_NAME):
            raise FileNotFoundError(f"dataset: path must hold a {MANIFEST_NAME}, got {str(path)!r:.500}")
        name = repr(str(path / MANIFEST_NAME))
        try:
            record = json.loads(read_file(path / MANIFEST_NAME, _MAX_BYTES))
            if record.pop("checksum") != canonical_hash(record):
                raise ValueError("content that fails its checksum")
            if record["format"] != _FORMAT:
                raise ValueError(f"format {record['format']!r} instead of {_FORMAT!r}")
            splits = {split: SplitInfo(**record["splits"][split]) for split in SPLITS}
            _check_record(record)
            return cls(path, record["recipe"], record["source"], record["tokenizer"], splits)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"dataset: {name} must be an intact manifest, got: {one_line(error)}") from None

    @property
    def vocabulary(self) -> dict[str, int | None]:
        """vocab_size and special tokens, under the names that configurations of models give them."""
        return {name: self.tokenizer[name] for name in ("vocab_size", *_SPECIAL_TOKENS)}

    def open_split(self, split: str) -> list[Shard]:
        """The verified shards of a split.

        Raises:
            ValueError: a shard is damaged, not the one that was prepared, or made with another tokenizer.
        """
        shards = []
        for name, content_sha256 in self.splits[split].shards.items():
            shard = Shard(self.path / name)
            expected, found = self.tokenizer["fingerprint"], shard.header.tokenizer_fingerprint
            if found != expected:
                raise ValueError(f"dataset: {name} must be made with the tokenizer {expected}, got {found}")
            if shard.header.vocab_size != self.tokenizer["vocab_size"]:
                rule = f"have the tokenizer's vocab_size={self.tokenizer['vocab_size']}"
                raise ValueError(f"dataset: {name} must {rule}, got {shard.header.vocab_size}")
            if shard.header.content_sha256 != content_sha256:
                raise ValueError(f"dataset: {name} must be the shard that was prepared, got another one")
            shard.verify()
            shards.append(shard)
        for name in ("num_documents", "num_tokens", "num_bytes"):
            expected, found = getattr(self.splits[split], name), sum(getattr(shard.header, name) for shard in shards)
            if found != expected:
                raise ValueError(f"dataset: the shards of {split} must have {name}={expected}, got {found}")
        return shards

    def verify_tokenizer(self) -> None:
        """Raises ValueError unless the tokenizer in the directory is, to the bit, the one that made the shards."""
        for name in TOKENIZER_FILES:
            if hash_file(self.path / name) != self.tokenizer["files"][name]:
                raise ValueError(f"dataset: {name} must be the file that made the shards, got another one")

    def verify(self) -> None:
        """Checks every file of the data set; raises ValueError or FileNotFoundError for the first that is wrong."""
        self.verify_tokenizer()
        for split in SPLITS:
            self.open_split(split)


def _check_record(record: dict) -> None:
    """What readers rely on; a checksum does not say that who wrote it meant well."""
    tokenizer = record["tokenizer"]
    vocab_size = check_integer("vocab_size", tokenizer["vocab_size"], 1, MAX_VOCAB_SIZE)
    for name in _SPECIAL_TOKENS:
        if tokenizer[name] is not None or name == "eos_token_id":
            check_integer(name, tokenizer[name], 0, vocab_size - 1)
    texts = [tokenizer["fingerprint"], *(tokenizer["files"][name] for name in TOKENIZER_FILES)]
    if not (isinstance(record["recipe"], dict) and isinstance(record["source"], dict)):
        raise TypeError("a recipe or a source that is no object")
    if not all(isinstance(text, str) and _SHA256.fullmatch(text) for text in texts):
        raise TypeError("hashes of the tokenizer that are none")


def describe_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict:
    """What the manifest records about a tokenizer that is saved in a directory."""
    keys = ("fingerprint", "vocab_size", *_SPECIAL_TOKENS)
    files = {name: hash_file(directory / name) for name in TOKENIZER_FILES}
    return {key: getattr(tokenizer, key) for key in keys} | {"files": files}
