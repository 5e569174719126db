"""Token shards: one file of token ids that is memory-mapped, and that tells when any of its bits has changed.

All numbers are little-endian. The file is
    header    256 bytes: the fields of ``ShardHeader``, zeros, and the SHA-256 of what stands before it
    tokens    uint16 or uint32 [num_tokens], zeros up to a multiple of 8 bytes
    offsets   uint64 [num_documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    targets   version 2 only: uint64 [num_spans, 2], rising: a loss counts for tokens[start:end] alone
and the header holds the SHA-256 of all that follows it. In version 1 every token but each document's first is a target.
"""

import array
import contextlib
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arfast.data.files import open_regular, sha256

HEADER_BYTES = 256
SHARD_MAGIC = b"arfshard"
_FIELDS = struct.Struct("<8sIIQQQQ32s32sQ")
_CHECKSUM_BYTES = 32
_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_ALIGNMENT = 8


class ShardHeader(NamedTuple):
    """What a shard says about itself.

    ``num_bytes`` counts the UTF-8 bytes of the text that is a target; ``num_spans`` is None in version 1.
    """

    token_bytes: int
    vocab_size: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    tokenizer_fingerprint: str
    content_sha256: str
    num_spans: int | None = None

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.token_bytes]

    @property
    def offsets_start(self) -> int:
        """Position of the offsets in the file, in bytes."""
        return HEADER_BYTES + -(-self.num_tokens * self.token_bytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def spans_start(self) -> int:
        return self.offsets_start + 8 * (self.num_documents + 1)

    @property
    def file_bytes(self) -> int:
        return self.spans_start + 16 * (self.num_spans or 0)

    def pack(self) -> bytes:
        hashes = bytes.fromhex(self.tokenizer_fingerprint), bytes.fromhex(self.content_sha256)
        version = 1 if self.num_spans is None else 2
        fields = _FIELDS.pack(SHARD_MAGIC, version, *self[:5], *hashes, self.num_spans or 0)
        fields = fields.ljust(HEADER_BYTES - _CHECKSUM_BYTES, b"\0")
        return fields + hashlib.sha256(fields).digest()

    @classmethod
    def unpack(cls, data: bytes, name: str) -> "ShardHeader":
        fields, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if len(data) != HEADER_BYTES or not fields.startswith(SHARD_MAGIC):
            raise ValueError(f"Shard: {name} must be a token shard, got a file that does not start like one")
        if hashlib.sha256(fields).digest() != checksum:
            raise ValueError(f"Shard: {name} must have an intact header, got one that fails its checksum")
        _, version, *numbers, fingerprint, content, num_spans = _FIELDS.unpack_from(fields)
        header = cls(*numbers, fingerprint.hex(), content.hex(), None if version == 1 else num_spans)
        if version not in (1, 2) or header.token_bytes not in _DTYPES:
            actual = f"version {version} with {header.token_bytes} bytes per token"
            raise ValueError(f"Shard: {name} must have version 1 or 2 with 2 or 4 bytes per token, got {actual}")
        if not 1 <= header.vocab_size < 1 << 31:
            raise ValueError(f"Shard: {name} must have a vocab_size in [1, 2**31), got {header.vocab_size}")
        return header


class ShardWriter:
    """Writes one shard from front to back; it is complete and durable when ``close`` returns.

    Leaving a ``with`` block by an exception removes the file.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int, tokenizer_fingerprint: str):
        self._path = Path(path)
        self._vocab_size = vocab_size
        self._fingerprint = tokenizer_fingerprint
        self._dtype = _DTYPES[2 if vocab_size <= 1 << 16 else 4]
        self._offsets = array.array("Q", [0])
        self._spans = array.array("Q")  # starts and ends in turn
        self._masked = False
        self._num_bytes = 0
        self._digest = hashlib.sha256()
        self._complete = False
        self._file = open(self._path, "xb")
        self._file.write(bytes(HEADER_BYTES))

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add(self, tokens: Sequence[int] | np.ndarray, num_bytes: int, targets: np.ndarray | None = None) -> None:
        """Appends a document.

        Args:
            tokens: its token ids [T], T >= 2.
            num_bytes: UTF-8 bytes of the text of its targets.
            targets: bool [T], False for the first; None: every token but the first is a target.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.size < 2:
            raise ValueError(f"ShardWriter.add: tokens must hold a start and an end at least, got {tokens.size} tokens")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            actual = f"{tokens.min()} to {tokens.max()}"
            raise ValueError(f"ShardWriter.add: tokens must be in [0, vocab_size={self._vocab_size}), got {actual}")
        self._add_spans(tokens.size, targets)
        self._write(tokens.astype(self._dtype).data.cast("B"))
        self._offsets.append(self.num_tokens + tokens.size)
        self._num_bytes += num_bytes

    def _add_spans(self, size: int, targets: np.ndarray | None) -> None:
        if targets is None:
            self._spans.extend((self.num_tokens + 1, self.num_tokens + size))
            return
        if targets.shape != (size,) or targets.dtype != np.bool_ or targets[0]:
            rule = f"targets must be bool [{size}] and False for the first token"
            raise ValueError(f"ShardWriter.add: {rule}, got {targets.dtype} {list(targets.shape)}")
        self._masked = True
        edges = np.flatnonzero(np.diff(targets, append=False)) + 1  # where the mask changes
        self._spans.extend((edges + self.num_tokens).tolist())

    def _write(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> ShardHeader:
        """Writes the offsets, the spans where there is a mask, and the header, and waits for the disk."""
        num_tokens, token_bytes = self.num_tokens, self._dtype.itemsize
        self._write(bytes(-num_tokens * token_bytes % _ALIGNMENT))
        self._write(np.asarray(self._offsets).astype("<u8").data.cast("B"))
        num_spans = None
        if self._masked:
            num_spans = len(self._spans) // 2
            self._write(np.asarray(self._spans).astype("<u8").tobytes())
        counts = token_bytes, self._vocab_size, num_tokens, len(self._offsets) - 1, self._num_bytes
        header = ShardHeader(*counts, self._fingerprint, self._digest.hexdigest(), num_spans)
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._complete = True
        return header

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, exception_type: type | None, *unused: object) -> None:
        try:
            if exception_type is None and not self._complete:
                self.close()
        finally:
            if not self._complete:
                # Closing flushes, and fails again on the full disk that brought us here.
                with contextlib.suppress(OSError):
                    self._file.close()
                self._path.unlink()


class Shard:
    """A shard, memory-mapped. Opening checks the header and the size of the file; ``verify`` checks every bit.

    Attributes:
        header: ``ShardHeader``.
        tokens: uint16 or uint32 [num_tokens], read-only.
        offsets: uint64 [num_documents + 1], read-only.
        spans: uint64 [num_spans, 2], read-only: the targets; None in version 1.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises ValueError when the file is no shard, or damaged; FileNotFoundError when it is absent."""
        self.path = Path(path)
        with open(open_regular(self.path), "rb") as file:
            self.header = header = ShardHeader.unpack(file.read(HEADER_BYTES), repr(str(self.path)))
            size = os.fstat(file.fileno()).st_size
            if size != header.file_bytes:
                raise ValueError(f"Shard: {str(self.path)!r} must have {header.file_bytes} bytes, got {size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = np.frombuffer(self._map, header.dtype, header.num_tokens, HEADER_BYTES)
        self.offsets = np.frombuffer(self._map, "<u8", header.num_documents + 1, header.offsets_start)
        self.spans = None
        if header.num_spans is not None:
            self.spans = np.frombuffer(self._map, "<u8", 2 * header.num_spans, header.spans_start).reshape(-1, 2)

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, with those that open and close it: views of ``tokens``."""
        bounds = self.offsets.astype(np.int64)
        return (self.tokens[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True))

    def verify(self) -> None:
        """Reads the whole file and checks its hash, the order of the offsets and the range of the token ids.

        Raises:
            ValueError: the content is not what was written, or breaks a rule of the format.
        """
        name, header = repr(str(self.path)), self.header
        if sha256(memoryview(self._map)[HEADER_BYTES:]) != header.content_sha256:
            raise ValueError(f"Shard: {name} must have the content that its header names, got other bytes")
        # Compared before they become signed, where differences of hostile numbers would wrap round.
        beyond = (self.offsets > header.num_tokens).any()
        lengths = np.diff(self.offsets.astype(np.int64))
        if beyond or self.offsets[0] != 0 or self.offsets[-1] != header.num_tokens or (lengths < 2).any():
            raise ValueError(f"Shard: {name} must have rising offsets from 0 to {header.num_tokens}, got others")
        if self.spans is not None and not _within_documents(self.spans, self.offsets):
            raise ValueError(f"Shard: {name} must have rising spans of targets within documents, got others")
        largest = int(self.tokens.max(initial=0))
        if largest >= header.vocab_size:
            raise ValueError(f"Shard: {name} must hold token ids below {header.vocab_size}, got {largest}")


def _within_documents(spans: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether spans rise, do not touch, and each lies in one document, behind its first token."""
    if (spans > offsets[-1]).any():  # before they become signed
        return False
    edges, offsets = spans.astype(np.int64).reshape(-1), offsets.astype(np.int64)
    if len(edges) == 0:
        return True
    if (np.diff(edges) <= 0).any():
        return False
    document = np.searchsorted(offsets, edges[::2], side="right") - 1
    return bool((edges[::2] > offsets[document]).all() and (edges[1::2] <= offsets[document + 1]).all())
