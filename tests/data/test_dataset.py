"""PackedDataset: every token a target once, documents kept apart, a pure function of (seed, position), no damage."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from arfast.data import PackedDataset, Tokenizer, prepare_dataset

PACKINGS = ["contiguous", "documents", "padded"]
SHAPES = [([50, 3, 2, 17, 33, 9, 64, 65, 2], 16, None), ([3] * 40, 8, None), ([100], 7, None), ([2, 2], 4, None)]
SHAPES += [([50, 3, 2, 17, 33, 9, 64, 65, 2], 16, 2), ([7] * 9, 2, 4)]


def epoch_of(data, batch_size=1, epoch=0):
    first = epoch * data.num_samples
    return [data.batch(position, batch_size) for position in range(first, first + data.num_samples, batch_size)]


def targets_of(batches):
    """How often each stream position is a target, after the shift that the model makes, and the inputs before it."""
    targets = Counter()
    for batch in batches:
        ids, labels = batch.input_ids, batch.labels
        assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape
        shifted, previous = labels[:, 1:], ids[:, :-1]
        scored = shifted != -100
        assert torch.equal(shifted[scored], ids[:, 1:][scored])
        # In a numbered data set, the input before a target is the token before it.
        assert torch.equal(previous[scored], shifted[scored] - 1)
        assert (labels[:, 0] == -100).all()
        assert batch.num_tokens == int(scored.sum())
        targets.update(shifted[scored].tolist())
    return targets


def wanted_targets(lengths):
    starts = np.cumsum([0, *lengths[:-1]])
    return Counter(range(sum(lengths))) - Counter(starts.tolist())


@pytest.mark.parametrize("lengths, seqlen, shard_documents", SHAPES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_is_a_target_once(numbered_dataset, lengths, seqlen, shard_documents, packing):
    data = PackedDataset(numbered_dataset(lengths, shard_documents), "train", seqlen, packing)
    wanted = wanted_targets(lengths)
    assert (data.num_tokens, data.num_documents, data.num_bytes) == (sum(lengths), len(lengths), sum(lengths))
    for batch_size in (1, 2, 5):
        assert targets_of(data.evaluation_batches(batch_size)) == wanted
    if packing == "padded":
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        wanted = Counter(
            s + i for s, length in zip(starts, lengths, strict=True) for i in range(1, min(length, seqlen))
        )
        assert data.statistics.num_truncated == sum(max(0, length - seqlen) for length in lengths)
    if packing != "contiguous" or sum(lengths) >= seqlen:
        for epoch in (0, 1, 7):
            assert targets_of(epoch_of(data, epoch=epoch)) == wanted
    assert data.statistics.num_targets == sum(wanted.values())


@pytest.mark.parametrize("lengths, seqlen, shard_documents", SHAPES)
def test_documents_are_kept_apart(numbered_dataset, lengths, seqlen, shard_documents):
    """Each segment of cu_seqlens is a run inside one document, or padding; rows end where segments end."""
    data = PackedDataset(numbered_dataset(lengths, shard_documents), "train", seqlen, "documents")
    document = np.repeat(np.arange(len(lengths)), lengths)
    batch_size = min(2, data.num_samples)
    padding = 0
    for batch in [*epoch_of(data, batch_size), *data.evaluation_batches(batch_size)]:
        ids, labels = batch.input_ids[0].numpy(), batch.labels[0].numpy()
        boundaries = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert boundaries[0] == 0 and boundaries[-1] == len(ids) == batch.input_ids.numel()
        assert set(range(0, len(ids), seqlen)) <= set(boundaries)
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
            assert end > start and labels[start] == -100
            if end - start > 1 and (labels[start + 1 : end] != -100).all():
                run = ids[start:end]
                np.testing.assert_array_equal(run, np.arange(run[0], run[0] + len(run)))
                assert document[run[0]] == document[run[-1]]
            else:
                assert (ids[start:end] == data.pad_token_id).all() and (labels[start:end] == -100).all()
                padding += end - start
    if data.num_samples % batch_size == 0:
        assert padding == 2 * data.statistics.num_padding


@pytest.mark.parametrize("packing", ["contiguous", "padded"])
def test_padding_is_ignored(numbered_dataset, packing):
    lengths, seqlen = [50, 3, 2, 17, 33, 9, 64, 65, 3], 16
    data = PackedDataset(numbered_dataset(lengths), "train", seqlen, packing)
    padding = 0
    for batch in epoch_of(data):
        assert batch.cu_seqlens is None and batch.input_ids.shape == (1, seqlen)
        ids = batch.input_ids[0].tolist()
        filled = next((i for i in range(1, seqlen) if ids[i] != ids[i - 1] + 1), seqlen)
        assert ids[filled:] == [data.pad_token_id] * (seqlen - filled)
        assert (batch.labels[0, filled:] == -100).all()
        padding += seqlen - filled
    assert padding == data.statistics.num_padding > 0


def equal(first, second):
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)
    assert first.num_tokens == second.num_tokens
    if first.cu_seqlens is not None:
        assert torch.equal(first.cu_seqlens, second.cu_seqlens)
    return True


@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_anywhere_gives_the_same_batches(dataset_path, packing):
    """Also across the ends of epochs, from another object, in another order, and into used buffers."""
    data = PackedDataset(dataset_path, "train", 64, packing, seed=5)
    step, count = 3, 2 * data.num_samples // 3 + 2
    straight = [data.batch(step * number, step) for number in range(count)]
    resumed = PackedDataset(dataset_path, "train", 64, packing, seed=5)
    buffer = resumed.batch(1, step)
    for number in np.random.default_rng(0).permutation(count).tolist():
        assert equal(resumed.batch(step * number, step), straight[number])
        reused = resumed.batch(step * number, step, out=buffer)
        assert equal(reused, straight[number])
        assert reused.input_ids is buffer.input_ids and reused.labels is buffer.labels


@pytest.mark.parametrize("packing", ["contiguous", "padded"])
def test_batch_size_does_not_change_the_stream(dataset_path, packing):
    data = PackedDataset(dataset_path, "train", 32, packing)
    whole = data.batch(data.num_samples - 3, 6)
    parts = [data.batch(data.num_samples - 3 + first, size) for first, size in ((0, 1), (1, 2), (3, 3))]
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    assert whole.num_tokens == sum(part.num_tokens for part in parts)


def test_epochs_and_seeds_have_their_own_order(dataset_path):
    first, second = (PackedDataset(dataset_path, "train", 64, seed=seed) for seed in (0, 1))
    num_samples = first.num_samples
    orders = [first.batch(0, num_samples), first.batch(num_samples, num_samples), second.batch(0, num_samples)]
    rows = [order.input_ids.tolist() for order in orders]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert sum(map(list.__eq__, rows[i], rows[j])) < num_samples / 4


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_scores_exactly_the_bytes_that_are_counted(dataset_path, tokenizer, packing):
    data = PackedDataset(dataset_path, "validation", 64, packing)
    scored = [batch.labels[batch.labels != -100].tolist() for batch in data.evaluation_batches(3)]
    # In byte-level BPE each character of a token's name stands for one byte.
    vocab = json.loads((dataset_path / "tokenizer.json").read_text())["model"]["vocab"]
    num_bytes = {token: len(name) for name, token in vocab.items()} | {tokenizer.eos_token_id: 0}
    assert sum(num_bytes[token] for batch in scored for token in batch) == data.num_bytes


def test_fingerprint_tells_streams_apart(dataset_path, corpus, tokenizer, tmp_path):
    arguments = {"path": dataset_path, "split": "train", "seqlen": 16, "packing": "contiguous", "seed": 0}
    prepare_dataset(corpus[1:], tmp_path / "other", tokenizer)
    changes = [{}, {"seqlen": 17}, {"packing": "padded"}, {"seed": 1}, {"split": "test"}, {"path": tmp_path / "other"}]
    found = {PackedDataset(**(arguments | change)).fingerprint for change in changes}
    assert len(found) == len(changes)
    assert PackedDataset(copy(dataset_path, tmp_path), "train", 16).fingerprint in found


def copy(dataset_path, tmp_path):
    return shutil.copytree(dataset_path, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["dataset.json", "train-00000.bin", "tokenizer.json", "tokenizer_config.json", "validation-00000.bin"]
)
def test_damage_anywhere_is_found_when_opening(dataset_path, tmp_path, name):
    path = copy(dataset_path, tmp_path)
    split = "validation" if name.startswith("validation") else "train"
    data = bytearray((path / name).read_bytes())
    generator = np.random.default_rng(0)
    for position in [0, len(data) - 1, *generator.integers(0, len(data), 60).tolist()]:
        bit = 1 << int(generator.integers(0, 8))
        data[position] ^= bit
        (path / name).write_bytes(data)
        with pytest.raises(ValueError, match="^(dataset|Shard|Tokenizer)"):
            PackedDataset(path, split, 16)
        data[position] ^= bit
    for length in generator.integers(0, len(data), 10).tolist():
        (path / name).write_bytes(data[:length])
        with pytest.raises(ValueError, match="^(dataset|Shard|Tokenizer)"):
            PackedDataset(path, split, 16)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError):
        PackedDataset(path, split, 16)


def test_tokenizer_that_does_not_match(dataset_path, tmp_path, corpus, tokenizer):
    path = copy(dataset_path, tmp_path)
    other = Tokenizer.train((document.text for document in corpus), vocab_size=300)
    data = PackedDataset(path, "train", 16)
    data.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer must be the one of the shards, {tokenizer.fingerprint}, got"):
        data.check_tokenizer(other)
    other.save(path)
    with pytest.raises(ValueError, match="dataset: tokenizer.json must be the file that made the shards, got another"):
        PackedDataset(path, "train", 16)


def test_shard_of_another_data_set(dataset_path, tmp_path, corpus, tokenizer):
    path = copy(dataset_path, tmp_path)
    prepare_dataset(corpus[:40], tmp_path / "other", tokenizer)
    shutil.copy(tmp_path / "other" / "train-00000.bin", path)
    with pytest.raises(ValueError, match="train-00000.bin must be the shard that was prepared, got another one"):
        PackedDataset(path, "train", 16)
    prepare_dataset(corpus[:40], tmp_path / "third", vocab_size=300)
    shutil.copy(tmp_path / "third" / "train-00000.bin", path)
    with pytest.raises(ValueError, match="train-00000.bin must be made with the tokenizer .*, got "):
        PackedDataset(path, "train", 16)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"shards": {"../train-00000.bin": "0"}}, "shards with names unlike train-00000.bin"),
        ({"shards": {"/etc/passwd": "0"}}, "shards with names unlike train-00000.bin"),
        ({"shards": ["train-00000.bin"]}, "shards with names unlike train-00000.bin"),
        ({"num_tokens": "7"}, "num_tokens must be an integer in"),
    ],
)
def test_hostile_manifest_with_a_valid_checksum(dataset_path, tmp_path, splits, message):
    from arfast.data.manifest import canonical_hash

    path = copy(dataset_path, tmp_path)
    record = json.loads((path / "dataset.json").read_text())
    record["splits"]["train"] |= splits
    del record["checksum"]
    record["checksum"] = canonical_hash(record)
    (path / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"dataset.json' must be an intact manifest, got: {message}"):
        PackedDataset(path, "train", 16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"split": "val"}, ValueError, "split must be one of train, validation, test, got 'val'"),
        ({"packing": "none"}, ValueError, "packing must be one of contiguous, documents, padded, got 'none'"),
        ({"seqlen": 1}, ValueError, r"seqlen must be an integer in \[2, 16777216\], got 1"),
        ({"seqlen": 8.0}, ValueError, r"seqlen must be an integer in \[2, 16777216\], got 8.0"),
        ({"seqlen": True}, ValueError, r"seqlen must be an integer in \[2, 16777216\], got True"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 18446744073709551615\], got -1"),
        ({"path": "/nowhere"}, FileNotFoundError, "path must hold a dataset.json, got '/nowhere'"),
    ],
)
def test_argument_errors(dataset_path, arguments, error, message):
    with pytest.raises(error, match=message):
        PackedDataset(**({"path": dataset_path, "split": "train", "seqlen": 16} | arguments))


def test_batch_errors(dataset_path, numbered_dataset):
    data = PackedDataset(dataset_path, "train", 16)
    with pytest.raises(ValueError, match="batch: position must be an integer at least 0, got -1"):
        data.batch(-1, 2)
    with pytest.raises(ValueError, match="batch: batch_size must be an integer at least 1, got 0"):
        data.batch(0, 0)
    with pytest.raises(ValueError, match="evaluation_batches: batch_size must be an integer at least 1, got 0"):
        data.evaluation_batches(0)
    wrong = r"batch: out must hold contiguous int64 tensors \[2, 16\] on the CPU, got torch.int64 \[3, 16\] on cpu"
    with pytest.raises(ValueError, match=wrong):
        data.batch(0, 2, out=data.batch(0, 3))
    small = numbered_dataset([10, 8])
    with pytest.raises(ValueError, match="seqlen must be at most the corpus, got 19: the train split has 18 tokens"):
        PackedDataset(small, "train", 19).batch(0, 1)
    PackedDataset(small, "train", 18).batch(0, 1)
    for packing, num_samples in (("contiguous", 3), ("padded", 2), ("documents", 3)):
        data = PackedDataset(small, "train", 8, packing)
        with pytest.raises(ValueError, match=f"batch_size must be at most num_samples={num_samples}, got 4: the train"):
            data.batch(0, 4)
        data.batch(0, num_samples)
    with pytest.raises(ValueError, match="split must hold at least one document, got an empty 'validation'"):
        PackedDataset(small, "validation", 8)


@pytest.mark.parametrize("packing", PACKINGS)
def test_shorter_samples_are_the_pieces_of_the_rows(numbered_dataset, packing):
    """Any way through the lengths reads the same tokens, each once; a cut takes the first token's target away."""
    data = PackedDataset(numbered_dataset([50, 3, 2, 17, 33, 9, 64, 65, 2]), "train", 16, packing, seed=3)
    for first in (0, data.num_samples - 2):
        whole = data.batch(first, 4)
        for seqlen in (2, 4, 8, 16):
            pieces = 16 // seqlen
            cut = data.batch(first * pieces, 4 * pieces, seqlen=seqlen)
            parts = [data.batch(first * pieces + i, 1, seqlen=seqlen) for i in range(4 * pieces)]
            assert torch.equal(cut.input_ids.flatten(), whole.input_ids.flatten())
            assert torch.equal(torch.cat([p.input_ids.flatten() for p in parts]), whole.input_ids.flatten())
            assert torch.equal(torch.cat([p.labels.flatten() for p in parts]), cut.labels.flatten())
            expected = whole.labels.flatten().clone()
            expected[::seqlen] = -100
            assert torch.equal(cut.labels.flatten(), expected)
            assert cut.num_tokens == int((expected != -100).sum())
            if packing == "documents":
                assert cut.input_ids.shape == (1, 64)
                edges = {*whole.cu_seqlens.tolist(), *range(0, 65, seqlen)}
                assert cut.cu_seqlens.tolist() == sorted(edges)
            else:
                assert cut.input_ids.shape == (4 * pieces, seqlen)
            assert equal(data.batch(first * pieces, 4 * pieces, out=cut, seqlen=seqlen), cut)


@pytest.mark.parametrize("packing", PACKINGS)
def test_shorter_evaluation(numbered_dataset, packing):
    """The same tokens in the same order; of each piece the first is no target."""
    data = PackedDataset(numbered_dataset([50, 3, 2, 17, 33, 9, 64, 65, 2]), "train", 16, packing)
    for whole, cut in zip(data.evaluation_batches(3), data.evaluation_batches(3, seqlen=4), strict=True):
        assert torch.equal(cut.input_ids.flatten(), whole.input_ids.flatten())
        expected = whole.labels.flatten().clone()
        expected[::4] = -100
        assert torch.equal(cut.labels.flatten(), expected)
        size = whole.input_ids.numel()
        assert cut.input_ids.shape == ((1, size) if packing == "documents" else (size // 4, 4))
    with pytest.raises(ValueError, match="evaluation_batches: seqlen must divide the rows' 16 tokens, got 5"):
        data.evaluation_batches(1, seqlen=5)


def test_shorter_samples_over_an_epoch(numbered_dataset):
    """From the middle of a row, over the end of an epoch, back to the middle of a row."""
    data = PackedDataset(numbered_dataset([40, 30]), "train", 8, seed=1)
    last = data.num_samples * 4
    parts = [data.batch(last - 3 + i, 1, seqlen=2).input_ids for i in range(last)]
    assert torch.equal(data.batch(last - 3, last, seqlen=2).input_ids, torch.cat(parts))


def test_wrong_length_of_samples(numbered_dataset):
    data = PackedDataset(numbered_dataset([40, 30]), "train", 8)
    for seqlen in (3, 16):
        with pytest.raises(ValueError, match=f"batch: seqlen must divide the rows' 8 tokens, got {seqlen}"):
            data.batch(0, 1, seqlen=seqlen)
    with pytest.raises(ValueError, match="PackedDataset.batch: seqlen must be"):
        data.batch(0, 1, seqlen=1)
    with pytest.raises(ValueError, match=f"batch_size must be at most num_samples={2 * data.num_samples}"):
        data.batch(0, 2 * data.num_samples + 1, seqlen=4)
