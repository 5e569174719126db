"""Several prepared data sets as one, mixed by token fractions (Llama 3: 50 / 25 / 17 / 8; arXiv:2407.21783, 3.1.2)."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from arfast.data.checks import check_integer, one_line
from arfast.data.dataset import Batch, PackedDataset, batch_memory, checked_seqlen
from arfast.data.files import read_file
from arfast.data.manifest import MANIFEST_NAME, DatasetManifest, canonical_hash
from arfast.data.tokenizer import Tokenizer
from arfast.data.turns import MAX_PERIOD, Turns, rows_per_period

_SUM_TOLERANCE = 1e-6
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """One of the data sets of a mixture.

    data: directory made by ``prepare_dataset``.
    fraction: of the tokens of the mixture, at least 1e-4.
    max_epochs: how often its training split may be seen; None: as often as it takes.

    Raises:
        ValueError: a value is out of range.
    """

    data: str | os.PathLike
    fraction: float
    max_epochs: int | None = 1

    def __post_init__(self) -> None:
        name, fraction = f"MixtureSource {os.fspath(self.data)!r}", self.fraction
        if isinstance(fraction, bool) or not isinstance(fraction, Real) or not 1 / MAX_PERIOD <= fraction <= 1:
            raise ValueError(f"{name}: fraction must be in [{1 / MAX_PERIOD}, 1], got {fraction!r}")
        if self.max_epochs is not None:
            check_integer(f"{name}: max_epochs", self.max_epochs, 1)


def read_mixture(path: str | os.PathLike) -> list[MixtureSource]:
    """The sources that a JSON file names; paths in it are relative to its directory.

    ``{"sources": [{"data": "web", "fraction": 0.75}, {"data": "code", "fraction": 0.25, "max_epochs": 4}]}``

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this form, or a value is out of range.
    """
    path = Path(path)
    rule = f"read_mixture: {str(path)!r} must be "
    rule += 'of the form {"sources": [{"data": "DIRECTORY", "fraction": 0.5, "max_epochs": 1}, ...]}'
    try:
        record = json.loads(read_file(path.resolve(), _MAX_FILE_BYTES))
        if set(record) != {"sources"} or not isinstance(record["sources"], list):
            raise ValueError("other keys than one list of sources")
        entries = [dict(entry) for entry in record["sources"]]
        for entry in entries:
            if not isinstance(entry.get("data"), str) or b"\0" in os.fsencode(entry["data"]):
                raise ValueError(f"a source with data {entry.get('data')!r}")
            entry["data"] = path.parent / entry["data"]
        return [MixtureSource(**entry) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{rule}, got: {one_line(error)}") from None


def is_prepared(data: str | os.PathLike) -> bool:
    """Whether ``data`` is a prepared data set or a mixture of some, and not text that is still to be prepared."""
    path = Path(data)
    return (path / MANIFEST_NAME).is_file() or (path.suffix == ".json" and path.is_file())


def dataset_directories(data: str | os.PathLike) -> list[Path]:
    """The prepared data sets behind ``data``: itself, or the sources of a mixture when it is a file."""
    path = Path(data)
    return [Path(source.data) for source in read_mixture(path)] if path.is_file() else [path]


class MixtureDataset:
    """One split of several prepared data sets, mixed by token fractions; to a trainer the same as a ``PackedDataset``.

    Row p of the endless order comes from a source that is a pure function of the fractions and p, and is the next row
    of that source in its own order. So the stream is the same on any number of ranks and with any batch size, and a run
    resumes from one integer. Every period of rows (100 for 50 / 25 / 17 / 8) has the exact fractions, and any number of
    first rows deviates by less than one row of each source. A fraction counts positions, of which all rows have the
    same number; what of them is padding is in ``statistics``.

    A source is never repeated unless its ``max_epochs`` allows it.

    Attributes:
        seqlen, packing, split, seed: as given.
        names: of the sources: the names of their directories, or their paths where two have one name.
        components: ``PackedDataset`` of each source.
        fractions: of each source, as they are used: multiples of 1 / period.
        period: rows after which the order of the sources repeats.
        max_samples: rows until a source has been seen ``max_epochs`` times; None: no end.
        num_samples, num_tokens, num_documents, num_bytes, num_targets, statistics: sums over the sources, each once.
        vocab_size, tokenizer_fingerprint, pad_token_id: of the one tokenizer of all sources.
        fingerprint: SHA-256, in hex: equal fingerprints, equal batches.

    >>> import tempfile
    >>> from arfast.data import Document, prepare_dataset
    >>> documents = [Document(f"text number {i}", source="") for i in range(80)]
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = prepare_dataset(documents[:40], path + "/a", vocab_size=270)
    ...     _ = prepare_dataset(documents[40:], path + "/b", Tokenizer.load(path + "/a"))
    ...     sources = [MixtureSource(path + "/a", 0.75), MixtureSource(path + "/b", 0.25, max_epochs=2)]
    ...     mixture = MixtureDataset(sources, "train", seqlen=16)
    >>> mixture.batch(position=4, batch_size=8).input_ids.shape, mixture.period, mixture.epochs(0)
    (torch.Size([8, 16]), 4, {'a': 0.0, 'b': 0.0})
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        split: str,
        seqlen: int,
        packing: str = "contiguous",
        seed: int = 0,
    ):
        """Opens and verifies a split of every source; the other arguments are those of ``PackedDataset``.

        Raises:
            FileNotFoundError, ValueError: as ``PackedDataset``, for each source.
            ValueError: there is no source, one occurs twice, the fractions do not sum to 1, or tokenizers differ.
        """
        sources = list(sources)
        _check_sources(sources)
        self.split, self.seqlen, self.packing, self.seed = split, seqlen, packing, seed
        self.names = _names(sources)
        self.components = [PackedDataset(source.data, split, seqlen, packing, seed) for source in sources]
        _check_components(self.names, self.components)
        self._max_epochs = [source.max_epochs for source in sources]
        counts = rows_per_period([source.fraction for source in sources])
        self._turns = Turns(counts)
        self.period = self._turns.period
        self.fractions = [count / self.period for count in counts]
        first, *rest = self.components
        self.vocab_size, self.tokenizer_fingerprint = first.vocab_size, first.tokenizer_fingerprint
        self.pad_token_id = first.pad_token_id
        self.statistics = sum((component.statistics for component in rest), first.statistics)
        self.num_samples = self.statistics.num_samples
        self.num_tokens = sum(component.num_tokens for component in self.components)
        self.num_documents = sum(component.num_documents for component in self.components)
        self.num_bytes = sum(component.num_bytes for component in self.components)
        self.num_targets = sum(component.num_targets for component in self.components)
        parts = [component.fingerprint for component in self.components]
        self.fingerprint = canonical_hash({"components": parts, "counts": counts})
        ends = [
            self._turns.row_of(number, epochs * component.num_samples)
            for number, (component, epochs) in enumerate(zip(self.components, self._max_epochs, strict=True))
            if epochs is not None
        ]
        self.max_samples = min(ends, default=None)

    @classmethod
    def load(
        cls, path: str | os.PathLike, split: str, seqlen: int, packing: str = "contiguous", seed: int = 0
    ) -> "MixtureDataset":
        """Opens the mixture that a JSON file describes: see ``read_mixture``."""
        return cls(read_mixture(path), split, seqlen, packing, seed)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless ``tokenizer`` is the one that made the shards."""
        self.components[0].check_tokenizer(tokenizer)

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been seen, by name, when the next row is ``position``."""
        position = check_integer("MixtureDataset.epochs: position", position, 0)
        rows = self._turns.rows_before(position).tolist()
        parts = zip(self.names, rows, self.components, strict=True)
        return {name: count / component.num_samples for name, count, component in parts}

    def check_length(self, num_samples: int) -> None:
        """Raises ValueError, with the tokens that each source lacks, unless the mixture has ``num_samples`` rows."""
        num_samples = check_integer("MixtureDataset.check_length: num_samples", num_samples, 0)
        if self.max_samples is None or num_samples <= self.max_samples:
            return
        lacking = []
        rows = self._turns.rows_before(num_samples).tolist()
        for name, wanted, component, epochs in zip(self.names, rows, self.components, self._max_epochs, strict=True):
            if epochs is not None and (missing := wanted - epochs * component.num_samples) > 0:
                lacking.append(
                    f"{name!r} lacks {missing * self.seqlen:,} of {wanted * self.seqlen:,} (max_epochs={epochs})"
                )
        rule = f"sources must hold the {num_samples * self.seqlen:,} tokens of the run in their fractions"
        raise ValueError(f"MixtureDataset: {rule}, got: {'; '.join(lacking)}")

    def batch(self, position: int, batch_size: int, out: Batch | None = None, *, seqlen: int | None = None) -> Batch:
        """Samples ``position`` to ``position + batch_size - 1`` of the mixture: see ``PackedDataset.batch``.

        With a shorter ``seqlen`` sample p is piece ``p % n`` of row ``p // n``, n = self.seqlen / seqlen.

        Raises:
            ValueError: an argument is out of range, or a source would be seen more often than it may be.
        """
        position = check_integer("MixtureDataset.batch: position", position, 0)
        batch_size = check_integer("MixtureDataset.batch: batch_size", batch_size, 1)
        seqlen = checked_seqlen("MixtureDataset.batch", seqlen, self.seqlen)
        pieces = self.seqlen // seqlen
        self.check_length(-(-(position + batch_size) // pieces))
        rows, piece = np.divmod(np.arange(position, position + batch_size), pieces)
        source, number = self._turns.locate(rows)
        isolated = self.packing == "documents"
        parts = []
        for index, component in enumerate(self.components):
            places = np.flatnonzero(source == index)
            limit = component.num_samples * pieces
            # Samples of one source follow one another in its own order.
            for some in np.split(places, range(limit, len(places), limit)):
                if len(some):
                    first = int(number[some[0]] * pieces + piece[some[0]])
                    options = {} if pieces == 1 else {"seqlen": seqlen}
                    parts.append((some, component.batch(first, len(some), **options)))
        return _interleave(parts, batch_size, seqlen, isolated, out)

    def evaluation_batches(self, batch_size: int, *, seqlen: int | None = None) -> Iterator[Batch]:
        """Walks every source once, each in its own order; every target of every source exactly once.

        A batch is of one source; the sources take turns by the fractions until each has ended, so that the first
        batches stand for the mixture. Arguments as of ``PackedDataset.evaluation_batches``.
        """
        batch_size = check_integer("MixtureDataset.evaluation_batches: batch_size", batch_size, 1)
        walks = [component.evaluation_batches(batch_size, seqlen=seqlen) for component in self.components]
        return self._take_turns(walks)

    def _take_turns(self, walks: list[Iterator[Batch]]) -> Iterator[Batch]:
        row, active = 0, set(range(len(walks)))
        while active:
            index = int(self._turns.locate(np.array(row))[0])
            row += 1
            if index in active:
                batch = next(walks[index], None)
                if batch is None:
                    active.remove(index)
                else:
                    yield batch


def open_mixture(
    path: str | os.PathLike, seqlen: int, packing: str = "contiguous", seed: int = 0, *, num_samples: int = 0
) -> dict[str, MixtureDataset | PackedDataset]:
    """What a trainer needs of a mixture, by name: "train", and for validation all sources together and each alone.

    Names: "train"; "validation", and "validation/NAME" of each source, of those sources that hold such documents.

    Args:
        path: JSON file, see ``read_mixture``.
        num_samples: rows that the run will take.

    Raises:
        FileNotFoundError, ValueError: as ``MixtureDataset``; or the mixture runs out before ``num_samples`` rows.
    """
    sources = read_mixture(path)
    train = MixtureDataset(sources, "train", seqlen, packing, seed)
    train.check_length(num_samples)
    for component in train.components:
        component.batch(0, 1)  # a source shorter than a row is refused now, and not when its turn comes
    held_out = [s for s in sources if DatasetManifest.load(s.data).splits["validation"].num_documents]
    if not held_out:
        return {"train": train}
    total = math.fsum(source.fraction for source in held_out)
    shares = [replace(source, fraction=source.fraction / total) for source in held_out]
    validation = MixtureDataset(shares, "validation", seqlen, packing, seed)
    each = {f"validation/{name}": part for name, part in zip(validation.names, validation.components, strict=True)}
    return {"train": train, "validation": validation} | each


def _check_sources(sources: list[MixtureSource]) -> None:
    if not sources:
        raise ValueError("MixtureDataset: sources must hold at least one MixtureSource, got none")
    total = math.fsum(source.fraction for source in sources)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"MixtureDataset: fractions must sum to 1, got {total:.9g}")
    for path, count in Counter(Path(source.data).resolve() for source in sources).items():
        if count > 1:
            raise ValueError(f"MixtureDataset: sources must be different data sets, got {str(path)!r} {count} times")


def _names(sources: list[MixtureSource]) -> list[str]:
    names = [Path(source.data).resolve().name for source in sources]
    return names if len(set(names)) == len(names) else [os.fspath(source.data) for source in sources]


def _check_components(names: list[str], components: list[PackedDataset]) -> None:
    first = components[0]
    seen = {}
    for name, component in zip(names, components, strict=True):
        if component.tokenizer_fingerprint != first.tokenizer_fingerprint:
            expected, found = first.tokenizer_fingerprint, component.tokenizer_fingerprint
            rule = f"sources must share one tokenizer, that of {names[0]!r} is {expected}"
            raise ValueError(f"MixtureDataset: {rule}, got {found} of {name!r}")
        if component.num_samples == 0:
            raise ValueError(f"MixtureDataset: sources must hold at least one row with a target, got none in {name!r}")
        if component.fingerprint in seen:
            other = seen[component.fingerprint]
            raise ValueError(f"MixtureDataset: sources must be different data sets, got {name!r} equal to {other!r}")
        seen[component.fingerprint] = name


def _interleave(
    parts: list[tuple[np.ndarray, Batch]], batch_size: int, seqlen: int, isolated: bool, out: Batch | None
) -> Batch:
    """One batch from batches of single sources, each with the places [n] of its samples."""
    shape = (1, batch_size * seqlen) if isolated else (batch_size, seqlen)
    input_ids, labels = batch_memory(shape, out)
    ids, targets = (tensor.numpy().reshape(batch_size, seqlen) for tensor in (input_ids, labels))
    lengths, order = [], []
    for places, batch in parts:
        ids[places] = batch.input_ids.numpy().reshape(-1, seqlen)
        targets[places] = batch.labels.numpy().reshape(-1, seqlen)
        if isolated:
            boundaries = batch.cu_seqlens.numpy()
            lengths.append(np.diff(boundaries))
            order.append(places[boundaries[:-1] // seqlen])
    cu_seqlens = None
    if isolated:
        by_place = np.argsort(np.concatenate(order), kind="stable")
        ends = np.cumsum(np.concatenate(lengths)[by_place])
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    return Batch(input_ids, labels, cu_seqlens, sum(batch.num_tokens for _, batch in parts))
