"""A loss mask survives shards and every packing: each marked token is a target exactly once, and no other is."""

import hashlib
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arfast import CausalLM, CausalLMConfig, TrainConfig, Trainer
from arfast.data import Document, PackedDataset, packing_statistics, prepare_dataset
from arfast.data.manifest import DatasetManifest, SplitInfo, describe_tokenizer
from arfast.data.packing import ContiguousRows, pack_documents, pad_documents, pad_segments
from arfast.data.shards import HEADER_BYTES, Shard, ShardHeader, ShardWriter
from arfast.data.stream import TargetSpans, TokenStream
from arfast.train import evaluate

IGNORE = -100


def make_dataset(path, tokenizer, masks, documents_per_shard):
    """Documents whose tokens are numbered through, with a mask each (None: all targets)."""
    tokenizer.save(path)
    vocab_size, first, shards = 1 << 17, 0, {}
    for number, start in enumerate(range(0, len(masks), documents_per_shard)):
        name = f"train-{number:05d}.bin"
        with ShardWriter(path / name, vocab_size, tokenizer.fingerprint) as writer:
            for size, mask in masks[start : start + documents_per_shard]:
                writer.add(np.arange(first, first + size), num_bytes=size, targets=mask)
                first += size
            shards[name] = writer.close().content_sha256
    empty = SplitInfo(0, 0, 0, {})
    splits = {"train": SplitInfo(len(masks), first, first, shards), "validation": empty, "test": empty}
    description = describe_tokenizer(tokenizer, path) | {"vocab_size": vocab_size}
    DatasetManifest(path, {}, {}, description, splits).write(path)
    return path


def random_masks(generator, count, largest=40):
    masks = []
    for _ in range(count):
        size = int(generator.integers(2, largest))
        mask = generator.random(size) < generator.choice([0.0, 0.1, 0.5, 1.0])
        if generator.random() < 0.5:  # a prompt, then a completion
            mask = np.arange(size) >= generator.integers(1, size)
        mask[0] = False
        masks.append((size, None if generator.random() < 0.3 else mask))
    return masks


def wanted_targets(masks):
    marked = [np.arange(size) > 0 if mask is None else mask for size, mask in masks]
    return Counter(np.flatnonzero(np.concatenate(marked)).tolist())


def brute_force(rows, ids_of, target_of, seqlen, padding):
    """Token ids and labels of rows of segments, one position at a time."""
    ids, labels = [], []
    for segments in rows:
        row_ids, row_labels = [], []
        for start, length in segments:
            for place in range(length):
                row_ids.append(ids_of[start + place])
                row_labels.append(ids_of[start + place] if place > 0 and target_of[start + place] else IGNORE)
        row_ids += [padding] * (seqlen - len(row_ids))
        labels.append(row_labels + [IGNORE] * (seqlen - len(row_labels)))
        ids.append(row_ids)
    return ids, labels


def targets_of(batches):
    """How often each position of the stream is a target after the model's shift, each after the token before it."""
    found = Counter()
    for batch in batches:
        scored = batch.labels[:, 1:] != IGNORE
        targets = batch.labels[:, 1:][scored]
        assert torch.equal(batch.input_ids[:, :-1][scored], targets - 1)
        assert batch.num_tokens == int(scored.sum()) and (batch.labels[:, 0] == IGNORE).all()
        found.update(targets.tolist())
    return found


@pytest.mark.parametrize("packing", ["contiguous", "documents", "padded"])
@pytest.mark.parametrize("seed", range(6))
def test_every_marked_token_is_a_target_once(tmp_path, tokenizer, packing, seed):
    generator = np.random.default_rng(seed)
    masks = random_masks(generator, 40)
    seqlen = int(generator.integers(2, 60))
    path = make_dataset(tmp_path / "data", tokenizer, masks, documents_per_shard=int(generator.integers(1, 50)))
    data = PackedDataset(path, "train", seqlen, packing)
    wanted = wanted_targets(masks)
    assert targets_of(data.evaluation_batches(3)) == wanted and data.num_targets == sum(wanted.values())
    for epoch in (0, 3):
        batches = [data.batch(epoch * data.num_samples + row, 1) for row in range(data.num_samples)]
        if packing == "padded":
            ends = np.cumsum([size for size, _ in masks])
            starts = np.repeat(ends - [size for size, _ in masks], [size for size, _ in masks])
            expected = Counter(token for token in wanted.elements() if token - starts[token] < seqlen)
            assert targets_of(batches) == expected
            assert data.statistics.num_targets == sum(expected.values())
        else:
            assert targets_of(batches) == wanted
            assert data.statistics.num_targets == sum(wanted.values())
        if packing != "contiguous":
            assert all(batch.num_tokens > 0 for batch in batches)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(2, 25), min_size=1, max_size=12), st.integers(2, 20), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("make_rows", [ContiguousRows, pack_documents, pad_documents, pad_segments])
def test_statistics_and_labels_are_those_of_brute_force(make_rows, lengths, seqlen, seed):
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = generator.random(offsets[-1]) < generator.choice([0.0, 0.2, 0.8])
    mask[offsets[:-1]] = False
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    rows = make_rows(offsets, seqlen, TargetSpans(edges))
    found = [rows.segments(row) for row in range(rows.statistics.num_samples)]
    ids, labels = brute_force(found, np.arange(offsets[-1]), mask, seqlen, padding=-1)
    flat = [label for row in labels for label in row if label != IGNORE]
    held = {token for row in ids for token in row} - {-1}
    statistics = rows.statistics
    assert all(len(row) == seqlen for row in ids)
    assert len(flat) == len(set(flat)) == statistics.num_targets
    assert statistics.num_padding == sum(row.count(-1) for row in ids)
    assert statistics.num_truncated == offsets[-1] - len(held)
    assert (statistics.num_positions, statistics.num_tokens) == (len(ids) * seqlen, offsets[-1])
    if make_rows is not pad_documents:
        assert set(flat) == set(np.flatnonzero(mask).tolist())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("packing", ["contiguous", "documents", "padded"])
def test_batches_are_those_of_brute_force(tmp_path_factory, tokenizer, packing, seed):
    generator = np.random.default_rng(seed)
    masks = random_masks(generator, int(generator.integers(1, 9)), largest=20)
    path = make_dataset(tmp_path_factory.mktemp("data") / "a", tokenizer, masks, int(generator.integers(1, 6)))
    seqlen = int(generator.integers(2, 24))
    data = PackedDataset(path, "train", seqlen, packing)
    targets = np.zeros(data.num_tokens, dtype=bool)
    targets[list(wanted_targets(masks))] = True
    rows = [data._evaluation_rows.segments(row) for row in range(data._evaluation_rows.statistics.num_samples)]
    ids, labels = brute_force(rows, np.arange(data.num_tokens), targets, seqlen, data.pad_token_id)
    found = list(data.evaluation_batches(4))
    assert [row for batch in found for row in batch.input_ids.view(-1, seqlen).tolist()] == ids
    assert [row for batch in found for row in batch.labels.view(-1, seqlen).tolist()] == labels


def test_spans_against_a_mask():
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = generator.random(60) < generator.random()
        spans = TargetSpans(np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2))
        starts, ends = np.sort(generator.integers(0, 61, (2, 40)), axis=0)
        np.testing.assert_array_equal(spans.count(starts, ends), [mask[a:b].sum() for a, b in zip(starts, ends)])
        for start, end in zip(starts.tolist(), ends.tolist()):
            rebuilt = np.zeros(60, dtype=bool)
            for first, last in spans.within(start, end):
                assert start <= first <= last <= end
                rebuilt[first:last] = True
            np.testing.assert_array_equal(rebuilt[start:end], mask[start:end])


def test_shards_with_and_without_masks(tmp_path):
    """Version 2 only where there is a mask; a stream of both has the targets of both."""
    fingerprint = "0" * 64
    masked = np.array([False, False, True, True, False, True])
    for name, masks in {"a": [None, None], "b": [None, masked], "c": [np.zeros(6, dtype=bool)]}.items():
        with ShardWriter(tmp_path / name, 100, fingerprint) as writer:
            for mask in masks:
                writer.add(np.arange(6), 6, mask)
    shards = [Shard(tmp_path / name) for name in "abc"]
    for shard, version in zip(shards, (1, 2, 2), strict=True):
        shard.verify()
        assert struct.unpack_from("<I", shard.path.read_bytes(), 8) == (version,)
    assert shards[0].spans is None and shards[1].spans.tolist() == [[1, 6], [8, 10], [11, 12]]
    assert len(shards[2].spans) == 0 and not shards[1].spans.flags.writeable
    stream = TokenStream(shards)
    assert np.stack([stream.targets.starts, stream.targets.ends], 1).tolist() == [
        [1, 6], [7, 12], [13, 18], [20, 22], [23, 24]
    ]  # fmt: skip
    assert TokenStream(shards[:1]).targets is None
    # The documented layout: spans behind the offsets.
    data = shards[1].path.read_bytes()
    assert struct.unpack("<6Q", data[-48:]) == (1, 6, 8, 10, 11, 12) and len(data) == 256 + 24 + 24 + 48


def test_a_flipped_bit_and_every_truncation_is_found(tmp_path):
    path = tmp_path / "a.bin"
    with ShardWriter(path, 100, "0" * 64) as writer:
        writer.add(np.arange(7), 7, np.array([False, True, False, True, True, False, True]))
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(ValueError, match="Shard: "):
            Shard(path).verify()
        path.write_bytes(data[:position])
        with pytest.raises(ValueError, match="Shard: "):
            Shard(path)


@pytest.mark.parametrize(
    "spans",
    [[0, 2], [1, 1], [3, 2], [1, 3, 3, 5], [2, 3, 1, 2], [3, 9], [1, 6], [5, 6], [1, 99], [2**63, 2**63 + 1]],
    ids=str,
)
def test_hostile_spans_with_valid_checksums(tmp_path, spans):
    path = tmp_path / "a.bin"
    with ShardWriter(path, 100, "0" * 64) as writer:
        for _ in range(2):
            writer.add(np.arange(5), 5, np.array([False, True, False, False, False]))
    data = path.read_bytes()
    header = ShardHeader.unpack(data[:HEADER_BYTES], "")
    body = data[HEADER_BYTES:-32] + struct.pack(f"<{len(spans)}Q", *spans)
    changes = dict(content_sha256=hashlib.sha256(body).hexdigest(), num_spans=len(spans) // 2)
    path.write_bytes(header._replace(**changes).pack() + body)
    with pytest.raises(ValueError, match="must have rising spans of targets within documents, got others"):
        Shard(path).verify()


@pytest.mark.parametrize("targets", [[True, False], [False], [0, 1]])
def test_writer_refuses_a_wrong_mask(tmp_path, targets):
    writer = ShardWriter(tmp_path / "a.bin", 100, "0" * 64)
    with pytest.raises(ValueError, match=r"targets must be bool \[2\] and False for the first token, got"):
        writer.add([1, 2], 1, np.array(targets))


def test_bytes_per_target(tmp_path, tokenizer):
    """Bits per byte count the completions alone: num_bytes is the text of the targets."""
    documents = [Document(f"question {i}: réponse {i}", "", ((12 + (i > 9), 21 + 2 * (i > 9)),)) for i in range(60)]
    prepare_dataset(documents, tmp_path / "a", tokenizer)
    data = PackedDataset(tmp_path / "a", "train", 32, "documents")
    decoded = 0
    for batch in data.evaluation_batches(5):
        ids = batch.labels[batch.labels != IGNORE].tolist()
        decoded += len(tokenizer.decode(ids).encode())
    assert decoded == data.num_bytes


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_training_learns_the_completions_alone(tmp_path, tokenizer, packing):
    """After training on the completions, they are much likelier than at the start, and the prompts are not."""
    prompts = [f"{generator.random():.12f} = " for generator in map(np.random.default_rng, range(120))]
    documents = [Document(prompt + "the answer", "", ((len(prompt), len(prompt) + 10),)) for prompt in prompts]
    prepare_dataset(documents, tmp_path / "data", tokenizer, validation_fraction=0.1)
    prepare_dataset([Document(prompt, "") for prompt in prompts], tmp_path / "prompts", tokenizer)
    shape = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = CausalLM(CausalLMConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **shape), seed=0)
    config = TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=30, seqlen=64, batch_size=8, packing=packing, learning_rate=1e-2,
        progress=False,
    )  # fmt: skip
    trainer = Trainer(model, config, tmp_path / "data")
    result = trainer.fit()
    assert result.evaluation.num_tokens == trainer.datasets["validation"].num_targets
    others = PackedDataset(tmp_path / "prompts", "train", 64, packing)
    on_prompts = evaluate(model, others.evaluation_batches(4))
    uniform = np.log(tokenizer.vocab_size)
    assert result.evaluation.loss < 0.3 * uniform < 0.8 * uniform < on_prompts.loss


def test_packing_statistics(dataset_path):
    found = packing_statistics(dataset_path, "train", 64)
    assert list(found) == ["contiguous", "documents", "padded"]
    for packing, statistics in found.items():
        data = PackedDataset(dataset_path, "train", 64, packing)
        labels = torch.cat([data.batch(row, 1).labels.view(-1) for row in range(data.num_samples)])
        assert statistics == data.statistics
        assert statistics.target_share == int((labels != IGNORE).sum()) / len(labels)
        assert statistics.num_positions == len(labels)
        assert statistics.truncated_share == statistics.num_truncated / data.num_tokens
    assert found["padded"].truncated_share > 0.5 and found["documents"].truncated_share == 0
    longer = packing_statistics(dataset_path, "train", 1024)
    assert longer["documents"].padding_share < 0.05 < 0.3 < longer["padded"].padding_share
