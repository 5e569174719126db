"""prepare_dataset: the text comes back, the same input gives the same files, and no accident leaves a half data set."""

import doctest
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from arfast.data import DatasetManifest, Document, PackedDataset, Tokenizer, prepare, prepare_dataset, split_writer
from arfast.data.split import SPLITS


def stored(path):
    """The documents of each split, as token ids."""
    found = {}
    for split in SPLITS:
        shards = DatasetManifest.load(path).open_split(split)
        spans = [(shard, *span) for shard in shards for span in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
        found[split] = [shard.tokens[start:end].tolist() for shard, start, end in spans]
    return found


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def texts_of(path):
    tokenizer = Tokenizer.load(path)
    return {split: [tokenizer.decode(ids) for ids in documents] for split, documents in stored(path).items()}


def test_text_comes_back(dataset_path, corpus, tokenizer):
    """Through transformers, each document framed by the start and the end token, in the order of the corpus."""
    auto_tokenizer = AutoTokenizer.from_pretrained(dataset_path)
    order = {document.text: number for number, document in enumerate(corpus)}
    manifest, seen = DatasetManifest.load(dataset_path), []
    for split, documents in stored(dataset_path).items():
        texts = []
        for ids in documents:
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert not {0, 1, 2} & set(ids[1:-1])
            texts.append(auto_tokenizer.decode(ids, skip_special_tokens=True))
            assert auto_tokenizer(texts[-1]).input_ids == ids[:-1]
        assert sorted(texts, key=order.get) == texts
        info = manifest.splits[split]
        assert (info.num_documents, info.num_tokens) == (len(texts), sum(map(len, documents)))
        assert info.num_bytes == sum(len(text.encode()) for text in texts)
        seen += texts
    assert sorted(seen) == sorted(order)
    assert sorted(os.listdir(dataset_path)) == sorted(
        ["dataset.json", "test-00000.bin", "tokenizer.json", "tokenizer_config.json"]
        + ["train-00000.bin", "validation-00000.bin"]
    )


def test_same_input_gives_the_same_files(corpus, tmp_path):
    for name in "ab":
        prepare_dataset(corpus, tmp_path / name, vocab_size=300)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tokenizer_learns_from_the_training_split_alone(corpus, tmp_path):
    prepare_dataset(corpus, tmp_path / "a", vocab_size=300, validation_fraction=0.3)
    learned = Tokenizer.train(texts_of(tmp_path / "a")["train"], vocab_size=300)
    assert learned.fingerprint == Tokenizer.load(tmp_path / "a").fingerprint


def test_large_corpus_is_thinned_out_for_training(corpus, tmp_path, monkeypatch):
    lengths = []
    train = Tokenizer.train
    monkeypatch.setattr(
        Tokenizer, "train", lambda texts, **options: train([lengths.append(len(t)) or t for t in texts], **options)
    )
    prepare_dataset(corpus, tmp_path / "a", vocab_size=300)
    whole = DatasetManifest.load(tmp_path / "a").splits["train"].num_bytes
    lengths.clear()
    monkeypatch.setattr(prepare, "_MAX_TRAINING_BYTES", whole // 4)
    prepare_dataset(corpus, tmp_path / "b", vocab_size=300)
    assert 0.15 * whole < sum(lengths) < 0.35 * whole


def test_copies_are_dropped(corpus, tokenizer, dataset_path, tmp_path):
    doubled = [document for pair in zip(corpus, corpus[::-1], strict=True) for document in pair]
    manifest = prepare_dataset(doubled, tmp_path / "a", tokenizer, validation_fraction=0.1, test_fraction=0.1)
    assert manifest.source["num_documents"] == 2 * len(corpus) and manifest.source["num_copies"] == len(corpus)
    for split, texts in texts_of(dataset_path).items():
        assert sorted(texts_of(tmp_path / "a")[split]) == sorted(texts)


def test_several_shards_are_one_split(corpus, tokenizer, dataset_path, tmp_path, monkeypatch):
    monkeypatch.setattr(split_writer, "MAX_SHARD_TOKENS", 3000)
    prepare_dataset(corpus, tmp_path / "a", tokenizer, validation_fraction=0.1, test_fraction=0.1)
    assert stored(tmp_path / "a") == stored(dataset_path)
    shards = DatasetManifest.load(tmp_path / "a").open_split("train")
    assert len(shards) > 5 and all(len(s.tokens) <= 3000 or s.header.num_documents == 1 for s in shards)
    for packing in ("contiguous", "documents"):
        many, one = (PackedDataset(path, "train", 100, packing) for path in (tmp_path / "a", dataset_path))
        for position in range(0, many.num_samples, 7):
            assert many.batch(position, 5).input_ids.tolist() == one.batch(position, 5).input_ids.tolist()


def test_memory_is_bounded_by_the_batch(corpus, tokenizer, dataset_path, tmp_path, monkeypatch):
    sizes = []
    encode_batch = Tokenizer.encode_batch

    def spy(self, texts, **options):
        sizes.append(sum(map(len, texts)))
        return encode_batch(self, texts, **options)

    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 10_000)
    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    prepare_dataset(corpus, tmp_path / "a", tokenizer, validation_fraction=0.1, test_fraction=0.1)
    assert len(sizes) > 5 and max(sizes) < 10_000 + max(len(document.text) for document in corpus)
    assert contents(tmp_path / "a") == contents(dataset_path)


def test_sources(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40)))
    for i in range(40):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"document {i}")
    (tmp_path / "lone.txt").write_text("".join(f"line {i} of a long text\n" for i in range(3000)))
    documents = [Document(f"document {i}", "") for i in range(40)]
    sources = [str(tmp_path / "lines.jsonl"), tmp_path / "text", iter(documents), tmp_path / "lone.txt"]
    found = []
    for number, source in enumerate(sources):
        prepare_dataset(source, tmp_path / str(number), vocab_size=260)
        found.append(texts_of(tmp_path / str(number)))
    assert found[0] == found[1] == found[2] and all(found[3].values())
    assert sum(len(text) for texts in found[3].values() for text in texts) == (tmp_path / "lone.txt").stat().st_size


def test_progress_goes_to_stderr(corpus, tmp_path, capfd):
    prepare_dataset(corpus, tmp_path / "a", vocab_size=300, progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "learn tokenizer: 100%" in captured.err and "tokenize: 100%" in captured.err
    prepare_dataset(corpus, tmp_path / "b", vocab_size=300)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", ["builtin", "dataset", "order", "prepare", "tokenizer"])
def test_examples_of_the_documentation(name):
    results = doctest.testmod(importlib.import_module(f"arfast.data.{name}"))
    assert results.attempted > 0 and results.failed == 0


def test_builtin_records_the_interpreter(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "builtin", lambda name: [Document(f"{name} {i}", "") for i in range(9)])
    manifest = prepare_dataset("builtin:python", tmp_path / "a", tokenizer)
    assert manifest.source["name"] == "builtin:python"
    assert manifest.source["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest == DatasetManifest.load(tmp_path / "a")


def test_tokenizer_without_a_start_token(tokenizer, corpus, tmp_path):
    config = {"bos_token": None, "eos_token": "<|end_of_text|>", "pad_token": None}
    tokenizer.save(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    prepare_dataset(corpus, tmp_path / "a", Tokenizer.load(tmp_path / "t"))
    assert all(ids[0] == ids[-1] == 1 for ids in stored(tmp_path / "a")["train"])
    data = PackedDataset(tmp_path / "a", "train", 64)
    assert data.pad_token_id == 1
    num_targets = sum(batch.num_tokens for batch in data.evaluation_batches(4))
    assert num_targets == data.num_tokens - data.num_documents


def test_complete_data_set_is_reused(corpus, tokenizer, tmp_path, monkeypatch):
    first = prepare_dataset(corpus, tmp_path / "a", tokenizer)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(prepare, "_build", None)
    renamed = [Document(document.text, "elsewhere") for document in corpus]
    assert prepare_dataset(renamed, tmp_path / "a", tokenizer) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "changes, different",
    [
        ({"source": [Document(f"other {i}", "") for i in range(9)]}, "corpus_sha256"),
        ({"tokenizer": None, "vocab_size": 300}, "tokenizer"),
        ({"seed": 1}, "corpus_sha256, seed"),
        ({"validation_fraction": 0.2, "test_fraction": 0}, "validation_fraction, test_fraction"),
    ],
)
def test_another_data_set_is_never_overwritten(corpus, tokenizer, tmp_path, changes, different):
    prepare_dataset(corpus, tmp_path / "a", tokenizer)
    before = contents(tmp_path / "a")
    arguments = {"source": corpus, "tokenizer": tokenizer} | changes
    with pytest.raises(
        ValueError, match=f"out_dir must be empty or hold the same data set, got another {different} in"
    ):
        prepare_dataset(out_dir=tmp_path / "a", **arguments)
    assert contents(tmp_path / "a") == before


def test_damaged_data_set_is_reported(corpus, tokenizer, tmp_path):
    prepare_dataset(corpus, tmp_path / "a", tokenizer)
    for name, content in contents(tmp_path / "a").items():
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        (tmp_path / "a" / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="^(dataset|Shard): .* must .*, got"):
            prepare_dataset(corpus, tmp_path / "a", tokenizer)
        (tmp_path / "a" / name).write_bytes(content)
    prepare_dataset(corpus, tmp_path / "a", tokenizer)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"vocab_size": 258}, ValueError, r"prepare_dataset: vocab_size must be an integer in \[259, .*\], got 258"),
        ({"seed": "x"}, ValueError, r"prepare_dataset: seed must be an integer in \[0, .*\], got 'x'"),
        ({"test_fraction": 1.5}, ValueError, r"assign_splits: test_fraction must be in \[0, 1\), got 1.5"),
        ({"tokenizer": "gpt2"}, TypeError, "prepare_dataset: tokenizer must be a Tokenizer or None, got str"),
        ({"source": ["text"]}, TypeError, "prepare_dataset: source must be a path or hold Documents, got a str"),
        ({"source": [Document(3, "")]}, TypeError, "the text of a document must be a str, got int"),
        ({"source": [Document("\ud800", "")]}, ValueError, "document must be valid Unicode, got a lone surrogate at 0"),
        ({"source": []}, ValueError, "corpus must hold at least 3 different documents, got 0"),
        ({"source": [Document("a", "")] * 9}, ValueError, "corpus must hold at least 3 different documents, got 1"),
        ({"source": "builtin:c"}, ValueError, r"builtin: name must be one of \['python'\], got 'c'"),
        ({"source": "/nowhere"}, FileNotFoundError, "read_documents: source must exist, got '/nowhere'"),
        ({"out_dir": "file"}, ValueError, "prepare_dataset: out_dir must be a directory, got the file '.*file'"),
        ({"out_dir": "full"}, ValueError, "prepare_dataset: out_dir must be empty or a data set, got other files in"),
        ({"source": "full", "out_dir": "full/a"}, ValueError, "prepare_dataset: out_dir must lie outside of source"),
    ],
)
def test_errors_leave_nothing(corpus, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("content")
    Path("full").mkdir()
    Path("full/file.txt").write_text("content")
    with pytest.raises(error, match=message):
        prepare_dataset(**({"source": corpus, "out_dir": "new", "vocab_size": 300} | arguments))
    assert sorted(os.listdir()) == ["file", "full"] and os.listdir("full") == ["file.txt"]


def test_no_end_token(tokenizer, corpus, tmp_path):
    tokenizer.save(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer must have an end-of-text token, got none"):
        prepare_dataset(corpus, tmp_path / "a", Tokenizer.load(tmp_path / "t"))


@pytest.mark.parametrize("change", ["more", "fewer", "other"])
def test_source_that_changes_while_it_is_read(tmp_path, tokenizer, monkeypatch, change):
    lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(30)]
    later = {"more": [*lines, '{"text": "new"}'], "fewer": lines[:-1], "other": [*lines[:-1], '{"text": "new"}']}[
        change
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(lines))
    assign_splits = prepare.assign_splits
    monkeypatch.setattr(
        prepare, "assign_splits", lambda *args: source.write_text("".join(later)) and assign_splits(*args)
    )
    with pytest.raises(ValueError, match="source must not change while it is read, got other text in '.*a.jsonl'"):
        prepare_dataset(source, tmp_path / "out", tokenizer)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_accidents(corpus, tmp_path):
    """Killed at each system call and at random, several at once, a full disk: see prepare_faults.py."""
    source = tmp_path / "corpus.jsonl"
    documents = random.Random(0).sample(corpus, 30)
    source.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("prepare_faults.py")), str(source), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
