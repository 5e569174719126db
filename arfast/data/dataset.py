"""Batches of token ids from a prepared data set: a pure function of (seed, position), and an exact evaluation pass."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arfast.data.checks import MAX_SEED, check_integer
from arfast.data.manifest import DatasetManifest, canonical_hash
from arfast.data.order import permute
from arfast.data.packing import (
    ContiguousRows,
    PackingStatistics,
    Rows,
    pack_documents,
    pad_documents,
    pad_segments,
)
from arfast.data.split import SPLITS
from arfast.data.stream import TokenStream
from arfast.data.tokenizer import Tokenizer

IGNORE_INDEX = -100
MAX_SEQLEN = 1 << 24
# Rows for training, and rows for evaluation, in which nothing is truncated.
_PACKINGS = {
    "contiguous": (ContiguousRows, ContiguousRows),
    "documents": (pack_documents, pack_documents),
    "padded": (pad_documents, pad_segments),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of a model.

    input_ids: int64 [B, T]; with documents kept apart [1, B * T], the packed form.
    labels: int64, as ``input_ids``: aligned with it (the model shifts), -100 where there is no target.
    cu_seqlens: int32 [num_segments + 1], the boundaries of documents in the packed form, or None.
    num_tokens: number of targets, labels other than -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None
    num_tokens: int


def batch_memory(shape: tuple[int, int], out: Batch | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors for the input_ids and labels of a batch, those of ``out`` where it is given."""
    if out is None:
        return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    for tensor in (out.input_ids, out.labels):
        on_cpu = tensor.device.type == "cpu"
        if tensor.shape != shape or tensor.dtype != torch.int64 or not (on_cpu and tensor.is_contiguous()):
            rule = f"hold contiguous int64 tensors {list(shape)} on the CPU"
            actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"PackedDataset.batch: out must {rule}, got {actual}")
    return out.input_ids, out.labels


def checked_seqlen(where: str, seqlen: int | None, row: int) -> int:
    """The length of samples that rows of ``row`` tokens are cut into; None: that length."""
    seqlen = row if seqlen is None else check_integer(f"{where}: seqlen", seqlen, 2)
    if row % seqlen:
        raise ValueError(f"{where}: seqlen must divide the rows' {row} tokens, got {seqlen}")
    return seqlen


def _cut(segments: list[tuple[int, int]], first: int, length: int) -> Iterator[tuple[int, int]]:
    """What of a row's segments (start, length) lies in its places ``first`` to ``first + length - 1``."""
    place = 0
    for start, size in segments:
        low, high = max(place, first), min(place + size, first + length)
        if low < high:
            yield start + low - place, high - low
        place += size


class PackedDataset:
    """One split of a prepared data set, packed into rows of ``seqlen`` tokens.

    packing="contiguous": windows of the whole stream that overlap by one token; a model sees across documents.
    packing="documents": several documents per row, best fit first, kept apart by ``cu_seqlens``; a document longer than
        a row continues in another row. Padding is a segment of its own, without targets.
    packing="padded": one document per row, padded; what does not fit is truncated, in training.

    In the first two every token but each document's first is a target exactly once per epoch. Of documents with a loss
    mask (``Document.targets``) only the marked tokens are, and rows hold no segment without a target.

    Opening reads every byte of the split once and checks its hash (about 2 s per GB), so that no damaged token is ever
    trained on.

    Attributes:
        seqlen, packing, split, seed: as given.
        num_samples: rows per epoch.
        num_tokens: tokens of the split, with one start and one end token per document.
        num_documents: documents of the split.
        num_targets: targets of one pass of ``evaluation_batches``.
        num_bytes: UTF-8 bytes of the text that is a target: the bytes that one such pass scores. Start and end tokens
            have no bytes; the loss of the end tokens is part of the total. Bits per byte = total loss in nats /
            (ln 2 * num_bytes).
        statistics: ``PackingStatistics`` of one epoch: targets, padding, truncation.
        vocab_size, tokenizer_fingerprint: of the tokenizer that made the shards.
        pad_token_id: of the same, or its end token where it has no padding token.
        fingerprint: SHA-256, in hex, of the tokens and of all that chooses batches: equal fingerprints, equal batches.

    >>> import tempfile
    >>> from arfast.data import Document, prepare_dataset
    >>> documents = [Document(f"text number {i}", source="") for i in range(40)]
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = prepare_dataset(documents, path, vocab_size=270)
    ...     PackedDataset(path, "train", seqlen=16).batch(position=0, batch_size=8).input_ids.shape
    torch.Size([8, 16])
    """

    def __init__(self, path: str | os.PathLike, split: str, seqlen: int, packing: str = "contiguous", seed: int = 0):
        """Opens and verifies a split.

        Args:
            path: directory made by ``prepare_dataset``.
            split: "train", "validation" or "test".
            seqlen: length T of a row, in [2, 2**24].
            packing: "contiguous", "documents" or "padded".
            seed: of the order of the samples, in [0, 2**64).

        Raises:
            FileNotFoundError: ``path`` is no data set, or lacks a file.
            ValueError: an argument is out of range, the split is empty, or a file is damaged or does not belong.
        """
        if split not in SPLITS:
            raise ValueError(f"PackedDataset: split must be one of {', '.join(SPLITS)}, got {split!r}")
        if packing not in _PACKINGS:
            raise ValueError(f"PackedDataset: packing must be one of {', '.join(_PACKINGS)}, got {packing!r}")
        self.seqlen = check_integer("PackedDataset: seqlen", seqlen, 2, MAX_SEQLEN)
        self.seed = check_integer("PackedDataset: seed", seed, 0, MAX_SEED)
        manifest = DatasetManifest.load(path)
        manifest.verify_tokenizer()
        self._stream = TokenStream(manifest.open_split(split))
        if self._stream.num_tokens == 0:
            raise ValueError(f"PackedDataset: split must hold at least one document, got an empty {split!r}")
        info, tokenizer = manifest.splits[split], manifest.tokenizer
        self.split, self.packing = split, packing
        self.num_documents, self.num_tokens, self.num_bytes = info.num_documents, info.num_tokens, info.num_bytes
        self.vocab_size, self.tokenizer_fingerprint = tokenizer["vocab_size"], tokenizer["fingerprint"]
        padding = tokenizer["pad_token_id"]
        self.pad_token_id = tokenizer["eos_token_id"] if padding is None else padding
        make_rows, make_evaluation_rows = _PACKINGS[packing]
        corpus = self._stream.offsets, self.seqlen, self._stream.targets
        self._rows: Rows = make_rows(*corpus)
        self._evaluation_rows: Rows = self._rows if make_evaluation_rows is make_rows else make_evaluation_rows(*corpus)
        self.statistics: PackingStatistics = self._rows.statistics
        self.num_targets = self._evaluation_rows.statistics.num_targets
        self.num_samples = self.statistics.num_samples
        order = {"seqlen": self.seqlen, "packing": packing, "seed": self.seed}
        self.fingerprint = canonical_hash(order | {"shards": list(info.shards.values())})

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless ``tokenizer`` is the one that made the shards."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            expected, found = self.tokenizer_fingerprint, tokenizer.fingerprint
            raise ValueError(f"PackedDataset: tokenizer must be the one of the shards, {expected}, got {found}")

    def batch(self, position: int, batch_size: int, out: Batch | None = None, *, seqlen: int | None = None) -> Batch:
        """Samples ``position`` to ``position + batch_size - 1`` of an endless order.

        Sample p is row ``permute(p % num_samples)`` of epoch ``p // num_samples``: a function of the seed and p alone,
        so that a run resumes, on any number of ranks and with any batch size, from one integer.

        With a shorter ``seqlen`` a row is cut into n = self.seqlen / seqlen pieces: sample p is piece ``p % n`` of
        what would be sample ``p // n``. So a run that has consumed so many tokens, in sequences of whatever length,
        stands at one place of one order. A document that is cut loses one target, the first token of the later piece.

        Args:
            position: index of the first sample, at least 0.
            batch_size: number of samples B, in [1, num_samples * n].
            out: a batch of the same shape, from an earlier call, to overwrite.
            seqlen: length of the samples, at least 2, a divisor of the rows' length; None: that length.

        Raises:
            ValueError: an argument is out of range, or the split is smaller than one sequence or one batch.
        """
        position = check_integer("PackedDataset.batch: position", position, 0)
        batch_size = check_integer("PackedDataset.batch: batch_size", batch_size, 1)
        seqlen = checked_seqlen("PackedDataset.batch", seqlen, self.seqlen)
        size = f"the {self.split} split has {self.num_tokens} tokens"
        if self.packing == "contiguous" and self.num_tokens < self.seqlen:
            raise ValueError(f"PackedDataset.batch: seqlen must be at most the corpus, got {self.seqlen}: {size}")
        pieces = self.seqlen // seqlen
        if batch_size > self.num_samples * pieces:
            rule = f"batch_size must be at most num_samples={self.num_samples * pieces}"
            raise ValueError(f"PackedDataset.batch: {rule}, got {batch_size}: {size}, seqlen={seqlen}")
        first = position // pieces
        rows = self._rows_in_order(first, (position + batch_size - 1) // pieces + 1 - first)
        samples = [(rows[p // pieces - first], p % pieces) for p in range(position, position + batch_size)]
        return self._make_batch(self._rows, samples, seqlen, out)

    def _rows_in_order(self, first: int, count: int) -> list[int]:
        """Rows at the places ``first`` to ``first + count - 1`` of the endless order, at most num_samples + 1."""
        epoch, first = divmod(first, self.num_samples)
        in_epoch = min(count, self.num_samples - first)
        rows = permute(np.arange(first, first + in_epoch), self.num_samples, seed=self.seed, epoch=epoch).tolist()
        if rest := count - in_epoch:
            rows += permute(np.arange(rest), self.num_samples, seed=self.seed, epoch=epoch + 1).tolist()
        return rows

    def evaluation_batches(self, batch_size: int, *, seqlen: int | None = None) -> Iterator[Batch]:
        """Walks the split once, in its own order; every token but each document's first is a target exactly once.

        Nothing is truncated or left out; the last batch may be smaller. The targets have ``num_bytes`` bytes of text,
        but with a shorter ``seqlen``, where the first token of every piece of a row is none.

        Args:
            batch_size: number of rows, at least 1.
            seqlen: cut the rows into samples of this length: a divisor of their own. None: leave them whole.
        """
        batch_size = check_integer("PackedDataset.evaluation_batches: batch_size", batch_size, 1)
        num_rows = self._evaluation_rows.statistics.num_samples
        batches = (range(first, min(first + batch_size, num_rows)) for first in range(0, num_rows, batch_size))
        seqlen = checked_seqlen("PackedDataset.evaluation_batches", seqlen, self.seqlen)
        pieces = range(self.seqlen // seqlen)
        samples = ([(row, piece) for row in batch for piece in pieces] for batch in batches)
        return (self._make_batch(self._evaluation_rows, batch, seqlen, None) for batch in samples)

    def _make_batch(self, rows: Rows, samples: Sequence[tuple[int, int]], seqlen: int, out: Batch | None) -> Batch:
        """The batch of samples (row, piece of the row), each of ``seqlen`` tokens."""
        shape = (1, len(samples) * seqlen) if rows.isolated else (len(samples), seqlen)
        input_ids, labels = batch_memory(shape, out)
        ids, targets = input_ids.numpy().reshape(-1), labels.numpy().reshape(-1)
        place, boundaries = 0, [0]
        for row, piece in samples:
            end_of_sample = place + seqlen
            for start, length in _cut(rows.segments(row), piece * seqlen, seqlen):
                self._fill_segment(start, ids[place : place + length], targets[place : place + length])
                place += length
                boundaries.append(place)
            if place < end_of_sample:
                ids[place:end_of_sample] = self.pad_token_id
                targets[place:end_of_sample] = IGNORE_INDEX
                place = end_of_sample
                boundaries.append(place)
        num_tokens = int(np.count_nonzero(targets != IGNORE_INDEX))
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32) if rows.isolated else None
        return Batch(input_ids, labels, cu_seqlens, num_tokens)

    def _fill_segment(self, start: int, ids: np.ndarray, targets: np.ndarray) -> None:
        """Reads the tokens from ``start`` on, int64 [N], and marks those that are no targets."""
        self._stream.read(start, ids)
        targets[:] = ids
        # The first token was a target at the end of another segment, or is the first of its document.
        targets[0] = IGNORE_INDEX
        if self._stream.targets is not None:
            place = 1
            for first, last in self._stream.targets.within(start + 1, start + len(ids)):
                targets[place : first - start] = IGNORE_INDEX
                place = last - start
            targets[place:] = IGNORE_INDEX
            return
        offsets = self._stream.offsets
        first, last = np.searchsorted(offsets, (start, start + len(ids)))
        targets[offsets[first:last] - start] = IGNORE_INDEX


def packing_statistics(path: str | os.PathLike, split: str, seqlen: int) -> dict[str, PackingStatistics]:
    """What an epoch of a prepared split wastes under each packing, by its name; arguments as of ``PackedDataset``.

    >>> packing_statistics("data", "train", seqlen=4096)["documents"].padding_share  # doctest: +SKIP
    0.0012
    """
    return {packing: PackedDataset(path, split, seqlen, packing).statistics for packing in _PACKINGS}
