"""Data sets from files of token ids that others made: nanoGPT's raw uint16 and llm.c's .bin with a header.

nanoGPT (data/openwebtext/prepare.py): uint16 ids, nothing else. llm.c (dev/data/data_common.py): 256 int32, of which
the first are a magic number, a version and the number of ids, then the ids as uint16 (GPT-2) or uint32 (Llama 3).
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arfast.data.checks import MAX_SEED, check_integer
from arfast.data.files import new_directory, open_regular
from arfast.data.manifest import DatasetManifest, SplitInfo, describe_tokenizer
from arfast.data.prepare import make_or_reuse
from arfast.data.shards import SHARD_MAGIC
from arfast.data.split import SPLITS, assign_splits, check_fractions
from arfast.data.split_writer import SplitWriter, frame_tokens, in_batches
from arfast.data.tokenizer import Tokenizer

_HEADER_INTEGERS = 256
# (magic, version): bytes per token.
_LLMC_HEADERS = {(20240520, 1): 2, (20240801, 7): 4}
_LLMC_MAGICS = {magic for magic, _ in _LLMC_HEADERS}
_CHUNK_TOKENS = 1 << 22
_BATCH_TOKENS = 1 << 20
_MAX_DOCUMENT_TOKENS = 1 << 28


@dataclass(frozen=True, slots=True)
class _TokenFile:
    """A checked file of token ids: those behind ``offset`` bytes."""

    path: Path
    offset: int
    dtype: np.dtype
    num_tokens: int

    @classmethod
    def open(cls, path: Path) -> "_TokenFile":
        """Raises ValueError, with file, rule and what was found, when header or length are wrong."""
        rule = f"import_tokens: {str(path)!r} must"
        with open(open_regular(path), "rb") as file:
            header = np.frombuffer(file.read(4 * _HEADER_INTEGERS), "u1")
            size = os.fstat(file.fileno()).st_size
        if header.tobytes().startswith(SHARD_MAGIC):
            raise ValueError(f"{rule} be a file of nanoGPT or llm.c, got a shard of a prepared data set")
        if size == 0 or size % 2:
            raise ValueError(f"{rule} hold token ids of 2 or 4 bytes, got {size} bytes")
        magic, version, count = header[:12].view("<i4").tolist() if len(header) >= 12 else (0, 0, 0)
        if magic not in _LLMC_MAGICS:
            return cls(path, 0, np.dtype("<u2"), size // 2)
        if (magic, version) not in _LLMC_HEADERS:
            known = " or ".join(f"{v} with magic {m}" for m, v in _LLMC_HEADERS)
            raise ValueError(f"{rule} have version {known}, got version {version} with magic {magic}")
        token_bytes, offset = _LLMC_HEADERS[magic, version], 4 * _HEADER_INTEGERS
        if len(header) < offset or count < 0 or size != offset + count * token_bytes:
            expected = f"{offset} bytes of header and {token_bytes} for each of the {count} tokens that it names"
            raise ValueError(f"{rule} have {expected}, got {size} bytes")
        return cls(path, offset, np.dtype(f"<u{token_bytes}"), count)

    def chunks(self, vocab_size: int) -> Iterator[np.ndarray]:
        """The ids in pieces, int64 [N], each below ``vocab_size``, or a ValueError."""
        with open(open_regular(self.path), "rb") as file:
            file.seek(self.offset)
            first = 0
            while first < self.num_tokens:
                count = min(_CHUNK_TOKENS, self.num_tokens - first)
                chunk = np.frombuffer(file.read(count * self.dtype.itemsize), self.dtype).astype(np.int64)
                if len(chunk) < count:
                    raise ValueError(f"import_tokens: {str(self.path)!r} must not shrink while it is read, got its end")
                if (beyond := np.flatnonzero(chunk >= vocab_size)).size:
                    actual = f"{chunk[beyond[0]]} at token {first + beyond[0]}"
                    rule = f"hold ids below the tokenizer's vocab_size={vocab_size}"
                    raise ValueError(f"import_tokens: {str(self.path)!r} must {rule}, got {actual}")
                yield chunk
                first += count


def _find_files(path: Path) -> dict[str, list[Path]]:
    """The .bin files by the split that their names tell; under "" where no name tells one but "train"."""
    if not path.exists():
        raise FileNotFoundError(f"import_tokens: path must exist, got {str(path)!r}")
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"import_tokens: path must hold .bin files, got none in {str(path)!r}")
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in files:
        found["validation" if "val" in file.stem else "test" if "test" in file.stem else "train"].append(file)
    if not path.is_dir() or not (found["validation"] or found["test"]):
        return {"": files}
    if not found["train"]:
        raise ValueError(f"import_tokens: path must hold a file to train on, got {', '.join(f.name for f in files)}")
    return found


@dataclass(frozen=True, slots=True)
class _Source:
    """Token files by split ("" where names tell none), and the token between documents; None: each split is one."""

    files: dict[str, list[_TokenFile]]
    tokenizer: Tokenizer
    separator: int | None

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """(split, the tokens between separators, int64 [N >= 1]) of each document."""
        for split, files in self.files.items():
            for tokens in self._pieces(files):
                if len(body := self._strip(tokens)):
                    yield split, body

    def _pieces(self, files: list[_TokenFile]) -> Iterator[np.ndarray]:
        """Files that follow one another, cut before each separator; a document may go on in the next file."""
        rest: list[np.ndarray] = []
        found = self.separator is None
        for chunk in (chunk for file in files for chunk in file.chunks(self.tokenizer.vocab_size)):
            cuts = [] if self.separator is None else np.flatnonzero(chunk == self.separator)
            *ended, last = np.split(chunk, cuts)
            for piece in ended:
                found = True
                yield np.concatenate([*rest, piece])
                rest = []
            rest.append(last)
            if sum(map(len, rest)) > _MAX_DOCUMENT_TOKENS:
                break
        name = repr(str(files[0].path))
        if not found or sum(map(len, rest)) > _MAX_DOCUMENT_TOKENS:
            rule = f"hold the end token {self.separator} at least once in {_MAX_DOCUMENT_TOKENS} tokens"
            raise ValueError(f"import_tokens: {name} must {rule}, got none")
        yield np.concatenate(rest or [np.empty(0, np.int64)])

    def _strip(self, tokens: np.ndarray) -> np.ndarray:
        """Without the separator and the tokens that will open and close the document."""
        start, end = frame_tokens(self.tokenizer)
        for opening in (self.separator, start):
            tokens = tokens[1:] if len(tokens) and tokens[0] == opening else tokens
        return tokens[:-1] if len(tokens) and tokens[-1] == end else tokens


class _Digests:
    """Of documents, one by one and of all together."""

    def __init__(self, seed: int):
        self._key, self._all = str(seed).encode(), hashlib.sha256()

    def add(self, split: str, tokens: np.ndarray) -> bytes:
        content = tokens.astype("<u4").tobytes()
        digest = hashlib.blake2b(content, digest_size=16, key=self._key, person=b"arfast.tokens").digest()
        self._all.update(split.encode() + digest)
        return digest

    def hexdigest(self) -> str:
        return self._all.hexdigest()


def _make_plan(source: _Source, seed: int, fractions: tuple[float, float]) -> tuple[str, np.ndarray]:
    """Hash of all documents, and the split of each, an index into SPLITS."""
    digests, each, splits = _Digests(seed), [], []
    for split, tokens in source.documents():
        each.append(digests.add(split, tokens))
        splits.append(SPLITS.index(split) if split else 0)
    if "" in source.files:
        return digests.hexdigest(), assign_splits(each, *fractions)
    return digests.hexdigest(), np.array(splits, dtype=np.uint8)


def _write(source: _Source, splits: np.ndarray, recipe: dict, directory: Path) -> dict[str, SplitInfo]:
    """The shards of all splits; ends with an error if the files are not those planned for."""
    start, end = frame_tokens(source.tokenizer)
    digests = _Digests(recipe["seed"])
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(directory, split, source.tokenizer)) for split in SPLITS]

        def planned() -> Iterator[tuple[tuple[int, np.ndarray], int]]:
            for split, (name, tokens) in zip(splits.tolist(), source.documents(), strict=False):
                digests.add(name, tokens)
                yield (split, tokens), len(tokens)

        for batch in in_batches(planned(), _BATCH_TOKENS):
            texts = source.tokenizer.decode_batch([tokens.tolist() for _, tokens in batch])
            for (split, tokens), text in zip(batch, texts, strict=True):
                writers[split].add(np.concatenate([[start], tokens, [end]]), len(text.encode()))
        if digests.hexdigest() != recipe["corpus_sha256"]:
            raise ValueError("import_tokens: path must not change while it is read, got other tokens")
        return {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)}


def import_tokens(
    path: str | os.PathLike,
    out_dir: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    end_token_id: int | None = None,
    undivided: bool = False,
    seed: int = 0,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
) -> DatasetManifest:
    """Makes a data set directory, as ``prepare_dataset`` does, from token ids in files of nanoGPT or llm.c.

    The ids are cut into documents at the end token, which may stand before each document (llm.c) or behind it
    (nanoGPT), and each is written as ``prepare_dataset`` would have: start token, tokens, end token. Files whose names
    hold "train", "val" and "test" give those splits, and several for one split follow one another; without a "val" or
    "test" the documents are split by their content. nanoGPT's ``meta.pkl`` is not read: it is a pickle.

    Args:
        path: a .bin file, or a directory of them.
        out_dir: directory to make; absent, empty, or the same data set.
        tokenizer: the one that made the ids, in its Hugging Face form (``Tokenizer.load``).
        end_token_id: the token between documents; None: the tokenizer's end token.
        undivided: the files hold one document per split, without end tokens.
        seed, validation_fraction, test_fraction: of the split by content, see ``assign_splits``.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: a header, a length or an id is wrong, no end token is found, or as ``prepare_dataset``.

    >>> import tempfile
    >>> tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=260)
    >>> ids = [token for i in range(60) for token in [*tokenizer.encode(f"be {i}")[1:], tokenizer.eos_token_id]]
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = Path(path, "ids.bin").write_bytes(np.array(ids, dtype=np.uint16).tobytes())
    ...     manifest = import_tokens(Path(path, "ids.bin"), Path(path, "data"), tokenizer)
    >>> sum(info.num_documents for info in manifest.splits.values())
    60
    """
    path, out_dir = Path(path), Path(out_dir).resolve()
    if not isinstance(tokenizer, Tokenizer) or tokenizer.eos_token_id is None:
        actual = "none" if isinstance(tokenizer, Tokenizer) else type(tokenizer).__name__
        raise ValueError(f"import_tokens: tokenizer must be a Tokenizer with an end-of-text token, got {actual}")
    check_fractions(validation_fraction, test_fraction)
    seed = check_integer("import_tokens: seed", seed, 0, MAX_SEED)
    separator = tokenizer.eos_token_id if end_token_id is None else end_token_id
    separator = check_integer("import_tokens: end_token_id", separator, 0, tokenizer.vocab_size - 1)
    if undivided and end_token_id is not None:
        raise ValueError(f"import_tokens: end_token_id must be left out of undivided files, got {end_token_id}")
    files = {split: [_TokenFile.open(file) for file in paths] for split, paths in _find_files(path).items() if paths}
    source = _Source(files, tokenizer, None if undivided else separator)
    corpus_sha256, splits = _make_plan(source, seed, (validation_fraction, test_fraction))
    recipe = {
        "corpus_sha256": corpus_sha256,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed,
        "validation_fraction": float(validation_fraction),
        "test_fraction": float(test_fraction),
    }

    def build() -> DatasetManifest:
        with new_directory(out_dir) as directory:
            tokenizer.save(directory)
            infos = _write(source, splits, recipe, directory)
            origin = {"name": str(path), "num_documents": len(splits), "num_copies": 0}
            manifest = DatasetManifest(out_dir, recipe, origin, describe_tokenizer(tokenizer, directory), infos)
            manifest.write(directory)
        return manifest

    return make_or_reuse("import_tokens", out_dir, recipe, build)
