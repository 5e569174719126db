"""From a corpus to a directory of token shards: read, drop copies, split, learn a tokenizer, encode once."""

import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from arfast.data.builtin import builtin
from arfast.data.checks import MAX_SEED, check_integer, check_text
from arfast.data.documents import Document, read_documents
from arfast.data.files import locked_directory, new_directory
from arfast.data.manifest import MANIFEST_NAME, DatasetManifest, describe_tokenizer
from arfast.data.split import SPLITS, assign_splits, check_fractions, document_digest
from arfast.data.split_writer import write_splits
from arfast.data.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZES, Tokenizer

BUILTIN_PREFIX = "builtin:"
DEFAULT_VOCAB_SIZE = 4096
# The memory of BPE training grows with its text (tokenizers issues 994 and 1681).
_MAX_TRAINING_BYTES = 1 << 30
_BATCH_CHARACTERS = 4 << 20
_COPY = len(SPLITS)


@dataclass(frozen=True, slots=True)
class _Corpus:
    """A corpus that can be read several times: a path, or documents in memory."""

    name: str
    content: Path | list[Document]
    column: str | None = None

    @classmethod
    def open(cls, source: str | os.PathLike | Iterable[Document], column: str | None) -> "_Corpus":
        if isinstance(source, str) and source.startswith(BUILTIN_PREFIX):
            return cls(source, builtin(source.removeprefix(BUILTIN_PREFIX)))
        if isinstance(source, (str, os.PathLike)):
            return cls(str(source), Path(source), column)
        documents = list(source)
        for document in documents:
            if not isinstance(document, Document):
                actual = type(document).__name__
                raise TypeError(f"prepare_dataset: source must be a path or hold Documents, got a {actual}")
            check_text("prepare_dataset: the text of a document", document.text)
            if document.key is not None:
                check_text("prepare_dataset: the key of a document", document.key)
        return cls("documents", documents)

    def __iter__(self) -> Iterator[Document]:
        return read_documents(self.content, self.column) if isinstance(self.content, Path) else iter(self.content)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the first pass over the corpus decides.

    corpus_sha256: hash of all documents in their order.
    splits: uint8 [num_documents], an index into SPLITS, or _COPY for a text that came before.
    num_bytes: int64 [num_documents], UTF-8 bytes.
    """

    corpus_sha256: str
    splits: np.ndarray
    num_bytes: np.ndarray


def _digest(document: Document, seed: int) -> bytes:
    return document_digest(document.text if document.key is None else document.key, seed)


def _add_document(corpus_hash: "hashlib._Hash", digest: bytes, document: Document) -> None:
    corpus_hash.update(digest)
    if document.key is not None:
        corpus_hash.update(document_digest(document.text))
    if document.targets is not None:
        corpus_hash.update(repr(document.targets).encode())


def _make_plan(corpus: _Corpus, seed: int, validation_fraction: float, test_fraction: float) -> _Plan:
    corpus_hash = hashlib.sha256()
    different: dict[bytes, None] = {}
    index, num_bytes = [], []
    for document in corpus:
        digest = _digest(document, seed)
        _add_document(corpus_hash, digest, document)
        num_bytes.append(len(document.text.encode()))
        index.append(-1 if digest in different else len(different))
        different[digest] = None
    splits = assign_splits(list(different), validation_fraction, test_fraction)
    # Index -1, a copy, picks the entry appended here.
    return _Plan(corpus_hash.hexdigest(), np.append(splits, np.uint8(_COPY))[index], np.array(num_bytes))


def _planned_documents(corpus: _Corpus, plan: _Plan, seed: int) -> Iterator[tuple[int, Document]]:
    """(split, document) of each that is no copy; ends with an error if the corpus is not the one planned for."""
    corpus_hash = hashlib.sha256()
    for number, document in enumerate(corpus):
        _add_document(corpus_hash, _digest(document, seed), document)
        if number == len(plan.splits):
            break
        if plan.splits[number] != _COPY:
            yield int(plan.splits[number]), document
    if corpus_hash.hexdigest() != plan.corpus_sha256:
        raise ValueError(f"prepare_dataset: source must not change while it is read, got other text in {corpus.name!r}")


def _train_tokenizer(corpus: _Corpus, plan: _Plan, seed: int, settings: dict, progress: bool) -> Tokenizer:
    """Learns a tokenizer from the training split, thinned out evenly to about _MAX_TRAINING_BYTES."""
    total = int(plan.num_bytes[plan.splits == 0].sum())
    share = min(1.0, _MAX_TRAINING_BYTES / total)

    def texts() -> Iterator[str]:
        credit = 0.0
        for split, document in _planned_documents(corpus, plan, seed):
            if split == 0:
                bar.update(len(document.text.encode()))
                credit += share
                if credit >= 1.0:
                    credit -= 1.0
                    yield document.text

    with _progress_bar("learn tokenizer", total, progress) as bar:
        return Tokenizer.train(texts(), **settings)


def _progress_bar(title: str, num_bytes: int, progress: bool) -> tqdm:
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=title, disable=not progress)


def _build(
    corpus: _Corpus, plan: _Plan, recipe: dict, tokenizer: Tokenizer | None, out_dir: Path, progress: bool
) -> DatasetManifest:
    """Writes the data set into a temporary directory that then takes the name ``out_dir``."""
    seed = recipe["seed"]
    with new_directory(out_dir) as directory:
        if tokenizer is None:
            tokenizer = _train_tokenizer(corpus, plan, seed, recipe["tokenizer"], progress)
        tokenizer.save(directory)
        is_copy = plan.splits == _COPY
        with _progress_bar("tokenize", int(plan.num_bytes[~is_copy].sum()), progress) as bar:
            documents = _planned_documents(corpus, plan, seed)
            splits = write_splits(directory, documents, tokenizer, bar.update, batch_characters=_BATCH_CHARACTERS)
        source = {
            "name": corpus.name,
            "python": platform.python_version(),
            "num_documents": len(is_copy),
            "num_copies": int(is_copy.sum()),
        }
        manifest = DatasetManifest(out_dir, recipe, source, describe_tokenizer(tokenizer, directory), splits)
        manifest.write(directory)
    return manifest


def _reuse(owner: str, out_dir: Path, recipe: dict) -> DatasetManifest:
    """The data set that stands in a directory, if it is what the recipe would make."""
    if not (out_dir / MANIFEST_NAME).exists():
        raise ValueError(f"{owner}: out_dir must be empty or a data set, got other files in {str(out_dir)!r}")
    manifest = DatasetManifest.load(out_dir)
    if different := [key for key in recipe if manifest.recipe.get(key) != recipe[key]]:
        actual = f"another {', '.join(different)} in {str(out_dir)!r}"
        raise ValueError(f"{owner}: out_dir must be empty or hold the same data set, got {actual}")
    manifest.verify()
    return manifest


def make_or_reuse(owner: str, out_dir: Path, recipe: dict, build: Callable[[], DatasetManifest]) -> DatasetManifest:
    """The data set of a recipe in ``out_dir``: the one that stands there, or what ``build`` makes, one at a time.

    Errors begin with ``owner``; a full disk becomes an OSError that tells how much is free.
    """
    try:
        with locked_directory(out_dir):
            return _reuse(owner, out_dir, recipe) if any(out_dir.iterdir()) else build()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(out_dir.parent).free
        actual = f"{os.strerror(error.errno)!r} with {free} bytes free"
        message = f"{owner}: out_dir must have room for the data set, got {actual}"
        raise OSError(error.errno, message, str(out_dir)) from error


def _check_arguments(source: object, out_dir: Path, tokenizer: Tokenizer | None) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"prepare_dataset: out_dir must be a directory, got the file {str(out_dir)!r}")
    if isinstance(source, (str, os.PathLike)) and out_dir.is_relative_to(Path(source).resolve()):
        raise ValueError(f"prepare_dataset: out_dir must lie outside of source, got {str(out_dir)!r}")
    if not isinstance(tokenizer, (Tokenizer, type(None))):
        raise TypeError(f"prepare_dataset: tokenizer must be a Tokenizer or None, got {type(tokenizer).__name__}")
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ValueError("prepare_dataset: tokenizer must have an end-of-text token, got none")


def prepare_dataset(
    source: str | os.PathLike | Iterable[Document],
    out_dir: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    *,
    tokenizer_kind: str = "bpe",
    column: str | None = None,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    progress: bool = False,
) -> DatasetManifest:
    """Makes a data set directory, or reuses the one that stands there when it is complete, intact and the same.

    Each document becomes start token, tokens, end token. Where it says which parts of its text are targets
    (``Document.targets``), those and the end token that follows each of them are, and the rest is not.

    The directory appears under its name only when all of it is on the disk; a process that is killed leaves at most a
    hidden temporary directory, which the next one removes. Of processes that prepare one directory at once, one works
    and the others wait for it.

    Args:
        source: path of a file or a directory of text or records (see ``read_documents``), ``"builtin:python"``, or
            Documents.
        out_dir: directory to make; absent, empty, or the same data set.
        tokenizer: to encode with; None learns one from the training split.
        vocab_size: of the tokenizer to learn.
        tokenizer_kind: of the tokenizer to learn, see ``Tokenizer.train``.
        seed: of the split (see ``assign_splits``), in [0, 2**64).
        column: of records, see ``read_documents``.
        validation_fraction, test_fraction: expected shares of the documents.
        progress: shows progress on stderr.

    Raises:
        ValueError: bad argument, bad text, too few documents, another data set or other files in ``out_dir``, damage.
        OSError: the disk is full, or a file cannot be read.

    >>> import tempfile
    >>> documents = [Document(f"text number {i}", source="") for i in range(40)]
    >>> with tempfile.TemporaryDirectory() as path:
    ...     manifest = prepare_dataset(documents, path, vocab_size=270)
    >>> sum(info.num_documents for info in manifest.splits.values())
    40
    """
    out_dir = Path(out_dir).resolve()
    _check_arguments(source, out_dir, tokenizer)
    check_fractions(validation_fraction, test_fraction)
    if tokenizer_kind not in MIN_VOCAB_SIZES:
        kinds = ", ".join(MIN_VOCAB_SIZES)
        raise ValueError(f"prepare_dataset: tokenizer_kind must be one of {kinds}, got {tokenizer_kind!r}")
    low = MIN_VOCAB_SIZES[tokenizer_kind]
    settings = {"vocab_size": check_integer("prepare_dataset: vocab_size", vocab_size, low, MAX_VOCAB_SIZE)}
    if tokenizer_kind != "bpe":
        settings["kind"] = tokenizer_kind
    seed = check_integer("prepare_dataset: seed", seed, 0, MAX_SEED)
    corpus = _Corpus.open(source, column)
    plan = _make_plan(corpus, seed, validation_fraction, test_fraction)
    recipe = {
        "corpus_sha256": plan.corpus_sha256,
        "tokenizer": tokenizer.fingerprint if tokenizer else settings,
        "seed": seed,
        "validation_fraction": float(validation_fraction),
        "test_fraction": float(test_fraction),
    }
    return make_or_reuse(
        "prepare_dataset", out_dir, recipe, lambda: _build(corpus, plan, recipe, tokenizer, out_dir, progress)
    )
