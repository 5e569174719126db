"""Shards: what was written comes back, and any damaged bit is found."""

import hashlib
import os
import struct

import numpy as np
import pytest

from arfast.data.shards import HEADER_BYTES, Shard, ShardHeader, ShardWriter
from arfast.data.stream import TokenStream

FINGERPRINT = hashlib.sha256(b"tokenizer").hexdigest()


def write(path, documents, vocab_size=1000):
    with ShardWriter(path, vocab_size, FINGERPRINT) as writer:
        for tokens in documents:
            writer.add(tokens, num_bytes=3 * len(tokens))
        return writer.close()


def open_and_verify(path):
    shard = Shard(path)
    shard.verify()
    return shard


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.bin"
    write(path, [[1, 2, 3], [4, 5], [6, 999]])
    return path


@pytest.mark.parametrize("vocab_size, dtype", [(1000, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 33])
def test_round_trip(tmp_path, vocab_size, dtype, count):
    generator = np.random.default_rng(count)
    documents = [generator.integers(0, vocab_size, int(generator.integers(2, 40))) for _ in range(count)]
    if documents:
        documents[0][:2] = 0, vocab_size - 1
    header = write(tmp_path / "a.bin", documents, vocab_size)
    shard = open_and_verify(tmp_path / "a.bin")
    assert shard.header == header
    assert shard.tokens.dtype == dtype and not shard.tokens.flags.writeable
    num_tokens = sum(map(len, documents))
    assert header[1:5] == (vocab_size, num_tokens, count, 3 * num_tokens)
    assert header.tokenizer_fingerprint == FINGERPRINT
    for document, start, end in zip(documents, shard.offsets[:-1], shard.offsets[1:], strict=True):
        np.testing.assert_array_equal(shard.tokens[start:end], document)


def test_layout(small):
    """The documented layout, read with struct alone."""
    data = small.read_bytes()
    magic, version, token_bytes, vocab_size, num_tokens, num_documents, num_bytes = struct.unpack("<8s2I4Q", data[:48])
    assert (magic, version, token_bytes) == (b"arfshard", 1, 2)
    assert (vocab_size, num_tokens, num_documents, num_bytes) == (1000, 7, 3, 21)
    assert data[48:80].hex() == FINGERPRINT
    assert data[80:112] == hashlib.sha256(data[256:]).digest()
    assert data[224:256] == hashlib.sha256(data[:224]).digest()
    assert struct.unpack("<7H", data[256:270]) == (1, 2, 3, 4, 5, 6, 999)
    assert struct.unpack("<4Q", data[272:]) == (0, 3, 5, 7)


def test_a_flipped_bit_in_any_byte_is_found(small):
    data = bytearray(small.read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        small.write_bytes(data)
        with pytest.raises(ValueError, match="Shard: .*small.bin' must"):
            open_and_verify(small)
        data[position] ^= 1 << position % 8
    small.write_bytes(data)
    open_and_verify(small)


def test_every_truncation_is_found(small):
    data = small.read_bytes()
    for length in range(len(data)):
        small.write_bytes(data[:length])
        with pytest.raises(ValueError, match="Shard: .*small.bin' must"):
            Shard(small)


def test_swapped_and_zeroed_blocks_are_found(tmp_path):
    path = tmp_path / "large.bin"
    write(path, [np.arange(2, 1000)] * 30)
    data = path.read_bytes()
    for start in range(0, len(data) - 4096, 4096):
        zeroed = data[:start] + bytes(4096) + data[start + 4096 :]
        swapped = data[:start] + data[start + 2048 : start + 4096] + data[start : start + 2048] + data[start + 4096 :]
        for damaged in (zeroed, swapped):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="Shard: "):
                open_and_verify(path)


def test_appended_bytes_are_found(small):
    small.write_bytes(small.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="must have 304 bytes, got 305"):
        Shard(small)


def forge(path, **changes):
    """Rewrites a shard with valid checksums over invalid content."""
    data = path.read_bytes()
    header = ShardHeader.unpack(data[:HEADER_BYTES], "")
    body = bytearray(data[HEADER_BYTES:])
    for position, value in changes.pop("offsets", {}).items():
        struct.pack_into("<Q", body, 16 + 8 * position, value)
    for position, value in changes.pop("tokens", {}).items():
        struct.pack_into("<H", body, 2 * position, value)
    header = header._replace(content_sha256=hashlib.sha256(body).hexdigest(), **changes)
    path.write_bytes(header.pack() + body)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": {3: 1000}}, "must hold token ids below 1000, got 1000"),
        ({"offsets": {0: 1}}, "must have rising offsets from 0 to 7"),
        ({"offsets": {1: 5}}, "must have rising offsets from 0 to 7"),
        ({"offsets": {1: 2**63}}, "must have rising offsets from 0 to 7"),
        ({"offsets": {3: 8}}, "must have rising offsets from 0 to 7"),
        ({"num_tokens": 8}, "must have rising offsets from 0 to 8"),
        ({"num_tokens": 2**63}, "must have 18446744073709551904 bytes, got 304"),
        ({"num_documents": 2**63}, "must have 73786976294838206744 bytes, got 304"),
        ({"token_bytes": 3}, "must have version 1 or 2 with 2 or 4 bytes per token, got version 1 with 3"),
        ({"vocab_size": 0}, r"must have a vocab_size in \[1, 2\*\*31\), got 0"),
        ({"vocab_size": 2**63}, r"must have a vocab_size in \[1, 2\*\*31\), got 9223372036854775808"),
    ],
)
def test_hostile_content_with_valid_checksums(small, changes, message):
    forge(small, **changes)
    with pytest.raises(ValueError, match=message):
        open_and_verify(small)


def test_other_version(small):
    data = bytearray(small.read_bytes())
    struct.pack_into("<I", data, 8, 3)
    data[224:256] = hashlib.sha256(data[:224]).digest()
    small.write_bytes(data)
    with pytest.raises(ValueError, match="must have version 1 or 2 .*, got version 3"):
        Shard(small)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1], "tokens must hold a start and an end at least, got 1 tokens"),
        ([], "tokens must hold a start and an end at least, got 0 tokens"),
        ([1, 1000], r"tokens must be in \[0, vocab_size=1000\), got 1 to 1000"),
        ([-1, 3], r"tokens must be in \[0, vocab_size=1000\), got -1 to 3"),
    ],
)
def test_writer_refuses(tmp_path, tokens, message):
    with pytest.raises(ValueError, match="ShardWriter.add: " + message):
        write(tmp_path / "bad.bin", [[1, 2], tokens])
    assert not list(tmp_path.iterdir())


def test_writer_never_overwrites(small):
    before = small.read_bytes()
    with pytest.raises(FileExistsError):
        write(small, [[1, 2]])
    assert small.read_bytes() == before


def test_unfinished_shard_is_no_shard(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", 1000, FINGERPRINT)
    writer.add(np.arange(900), 1)
    writer._file.flush()
    with pytest.raises(ValueError, match="must be a token shard"):
        Shard(tmp_path / "a.bin")


def test_refuses_links_and_special_files(small, tmp_path):
    (tmp_path / "link.bin").symlink_to(small)
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("link.bin", "folder.bin", "pipe.bin"):
        with pytest.raises(ValueError, match=f"path must be a regular file, got .*{name}"):
            Shard(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "absent.bin")


@pytest.mark.parametrize("sizes", [[9], [5, 4], [2, 0, 3, 0, 0, 4], [0, 9]])
def test_stream_is_the_concatenation(tmp_path, sizes):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 1000, int(generator.integers(2, 9))) for _ in range(sum(sizes))]
    shards, first = [], 0
    for number, size in enumerate(sizes):
        write(tmp_path / f"{number}.bin", documents[first : first + size])
        shards.append(Shard(tmp_path / f"{number}.bin"))
        first += size
    stream, whole = TokenStream(shards), np.concatenate(documents)
    assert stream.num_tokens == len(whole)
    np.testing.assert_array_equal(stream.offsets, np.concatenate([[0], np.cumsum([len(d) for d in documents])]))
    for start in range(len(whole)):
        for length in range(len(whole) - start + 1):
            out = np.empty(length, dtype=np.int64)
            stream.read(start, out)
            np.testing.assert_array_equal(out, whole[start : start + length])
