"""The parsers of data: for each the files that a stranger may have made, hostile variants, and how they are read.

``load`` reads a directory and uses what it gets as training would; what is not refused must be valid.
"""

import gzip
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from hostile import mutate_json
from mutations import NUMBERS, VALUES, mutate_bytes, mutate_safetensors, mutate_value, to_json
from sweep_files import make_sweep, mutate_sweep, read_sweep

from arfast.adapter import load_adapter, save_adapter
from arfast.data import (
    Document,
    PackedDataset,
    Tokenizer,
    open_mixture,
    prepare_dataset,
    read_documents,
)
from arfast.data.manifest import MANIFEST_NAME, DatasetManifest, canonical_hash
from arfast.data.packing import ContiguousRows, pack_documents, pad_documents, pad_segments
from arfast.data.parallel import handbook_pairs, pair_documents, read_pairs
from arfast.data.pipeline.recipe import Recipe
from arfast.data.shards import HEADER_BYTES, Shard, ShardHeader
from arfast.data.stream import TokenStream
from arfast.models import CausalLM, CausalLMConfig, ImageTokenizer, ImageTokenizerConfig
from arfast.nn.lora import apply_lora
from arfast.train import TrainConfig

TEXTS = [f"text number {i}, which the model is to say" for i in range(60)]
SEQLEN = 8
MODEL = CausalLMConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_experts=4
)


class Parser(NamedTuple):
    """make: writes valid files; files: those that are changed, by mutate; refused: at least this share of them is."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    mutate: Callable[[Random, bytes], bytes]
    load: Callable[[Path], object]
    refused: float


def anywhere(generator: Random, data: bytes) -> bytes:
    return mutate_bytes(generator, data, reach=len(data))


# Shards and data sets


def make_dataset(path: Path, texts: list[str] = TEXTS) -> None:
    """Of documents of which a part is the target, so that the shards are of version 2."""
    documents = [Document(text, "", ((7, len(text)),)) for text in texts]
    prepare_dataset(documents, path, Tokenizer.train(TEXTS, vocab_size=280))


def make_shards(path: Path) -> None:
    """train-00000.bin of version 2, validation-00000.bin of version 1."""
    make_dataset(path / "masked")
    prepare_dataset([Document(text, "") for text in TEXTS], path / "whole", Tokenizer.load(path / "masked"))
    (path / "masked" / "train-00000.bin").rename(path / "train-00000.bin")
    (path / "whole" / "train-00000.bin").rename(path / "validation-00000.bin")


def mutate_shard(generator: Random, data: bytes) -> bytes:
    """Any byte; a number of the header; or a number of the tables behind the tokens, with the hashes made right."""
    if generator.random() < 0.25:
        return anywhere(generator, data)
    header, body = ShardHeader.unpack(data[:HEADER_BYTES], "shard"), bytearray(data[HEADER_BYTES:])
    for _ in range(generator.randint(1, 3)):
        if generator.random() < 0.4:
            name = generator.choice(header._fields[:5] + header._fields[7:])
            bits = 32 if name in ("token_bytes", "vocab_size") else 64
            header = header._replace(**{name: generator.choice((*NUMBERS, header.num_tokens)) % 2**bits})
        else:
            at = generator.randrange(len(body) // 8)
            (old,) = struct.unpack_from("<Q", body, 8 * at)
            new = generator.choice((*NUMBERS, old + 1, old - 1, old + 2**63, 2**63 + 1, 2**63 - 2))
            struct.pack_into("<Q", body, 8 * at, new % 2**64)
    header = header._replace(content_sha256=hashlib.sha256(body).hexdigest())
    return header.pack() + bytes(body)


def read_shards(path: Path) -> None:
    """Every row of every packing of each shard."""
    for name in ("train-00000.bin", "validation-00000.bin"):
        shard = Shard(path / name)
        shard.verify()
        stream = TokenStream([shard])
        for make in (ContiguousRows, pack_documents, pad_documents, pad_segments):
            rows = make(stream.offsets, SEQLEN, stream.targets)
            for start, length in itertools.chain.from_iterable(map(rows.segments, range(rows.statistics.num_samples))):
                assert 0 <= start and 1 <= length <= SEQLEN and start + length <= stream.num_tokens
                ids = np.empty(length, np.int64)
                stream.read(start, ids)
                assert 0 <= ids.min() and ids.max() < shard.header.vocab_size


def mutate_dataset_manifest(generator: Random, data: bytes) -> bytes:
    """Most of them with a right checksum, as somebody would make it who knows how."""
    if generator.random() < 0.2:
        return anywhere(generator, data)
    record = json.loads(data)
    del record["checksum"]
    for _ in range(generator.randint(1, 3)):
        part = generator.choice(("tokenizer", "splits", ""))
        if isinstance(record, dict) and part in record:
            record[part] = mutate_value(generator, record[part])
        else:
            record = mutate_value(generator, record)
    if isinstance(record, dict) and generator.random() < 0.9:
        record["checksum"] = canonical_hash(record)
    return to_json(generator, record)


def read_dataset(path: Path) -> None:
    check_batches(PackedDataset(path, "train", SEQLEN, "documents"))
    DatasetManifest.load(path).verify()


def check_batches(dataset: PackedDataset) -> None:
    """What a model and its optimizer get is in range."""
    vocab_size = dataset.vocab_size
    assert type(vocab_size) is int and 1 <= vocab_size < 2**31 and len(dataset.fingerprint) == 64
    for batch in (dataset.batch(3, 2), *itertools.islice(dataset.evaluation_batches(4), 3)):
        assert 0 <= batch.input_ids.min() and batch.input_ids.max() < vocab_size
        labels = batch.labels[batch.labels != -100]
        assert len(labels) == batch.num_tokens and (not len(labels) or 0 <= labels.min() <= labels.max() < vocab_size)
    assert 0 <= dataset.num_bytes < 2**64 and dataset.num_documents > 0


# Mixtures


def make_mixture(path: Path) -> None:
    make_dataset(path / "a", TEXTS[:30])
    make_dataset(path / "b", TEXTS[30:])
    sources = [{"data": "a", "fraction": 0.75, "max_epochs": 2}, {"data": "b", "fraction": 0.25, "max_epochs": None}]
    (path / "mixture.json").write_text(json.dumps({"sources": sources}))


def mutate_mixture(generator: Random, data: bytes) -> bytes:
    if generator.random() < 0.5:
        return mutate_json(generator, data)
    value = json.loads(data)
    source = generator.choice(value["sources"])
    values = (*VALUES, "a", "b", "a/", "./a", "../a", "a\x00", "a/" * 100, 0.25, 0.75, 0.50000001, 1e-5, 1e-300)
    source[generator.choice(("data", "fraction", "max_epochs", "x"))] = generator.choice(values)
    return to_json(generator, value)


def read_mixture(path: Path) -> None:
    check_batches(open_mixture(path / "mixture.json", SEQLEN, "documents", num_samples=4)["train"])


# Token ids of nanoGPT and llm.c


def make_token_files(path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS, vocab_size=280)
    tokenizer.save(path / "tokenizer")
    ids = [id for text in TEXTS for id in [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]]
    header = np.zeros(256, "<i4")
    for name, numbers, kind in (("two.bin", (20240520, 1), "<u2"), ("four.bin", (20240801, 7), "<u4")):
        header[:3] = *numbers, len(ids)
        (path / name).write_bytes(header.tobytes() + np.array(ids, kind).tobytes())
    (path / "raw.bin").write_bytes(np.array(ids, "<u2").tobytes())


def mutate_token_file(generator: Random, data: bytes) -> bytes:
    """Numbers of the header, or any byte."""
    if generator.random() < 0.5:
        return anywhere(generator, data)
    result, size = bytearray(data), len(data)
    at = generator.choice((0, 4, 8, 8, 8, 12))
    counts = (20240520, 20240801, 7, (size - 1024) // 2, (size - 1024) // 4, (size - 1024) // 4 - 1)
    struct.pack_into("<I", result, at, generator.choice((*NUMBERS, *counts)) % 2**32)
    return bytes(result[: generator.choice((size, size, size - 1, size - 2, 11, 12, 1023, 1024))])


def read_token_files(path: Path) -> None:
    from arfast.data.formats import _find_files, _make_plan, _Source, _TokenFile

    tokenizer = Tokenizer.load(path / "tokenizer")
    for name in ("two.bin", "four.bin", "raw.bin"):
        # What import_tokens does before it writes, which would take most of the time.
        files = {"": [_TokenFile.open(file) for file in _find_files(path / name)[""]]}
        source = _Source(files, tokenizer, tokenizer.eos_token_id)
        _make_plan(source, 0, (0.05, 0.05))
        for _, tokens in source.documents():
            assert len(tokens) and 0 <= tokens.min() and tokens.max() < tokenizer.vocab_size


# Documents


MESSAGES = [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}]
RECORDS = [{"text": "a ü\n"}, {"prompt": "2 + 2 =", "completion": " 4", "x": [1]}, {"messages": MESSAGES}]


def make_records(path: Path) -> None:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    (path / "records.jsonl").write_bytes(lines)
    (path / "records.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (path / "text.txt").write_bytes(b"\xef\xbb\xbf" + "first line\nsecond ü line\n".encode() * 20)


def mutate_records(generator: Random, data: bytes) -> bytes:
    """A field of a record; any byte, of the text or of what is compressed."""
    if not data.startswith(b"{") or generator.random() < 0.3:
        return anywhere(generator, data)
    records = [json.loads(line) for line in data.splitlines()]
    at = generator.randrange(len(records))
    records[at] = mutate_value(generator, records[at], (*VALUES, "\ud800", "user", MESSAGES[:1], [None]))
    return b"\n".join(to_json(generator, record) for record in records)


def read_records(path: Path) -> None:
    for name in ("records.jsonl", "records.jsonl.gz", "text.txt"):
        check_documents(path / name)


def check_documents(path: Path, column: str | None = None) -> None:
    for document in read_documents(path, column):
        document.text.encode()
        assert "".join(text for text, _ in document.pieces()) == document.text


def make_tables(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet

    columns = {
        "text": ["ä", None, "b" * 50],
        "number": [1, 2, 3],
        "messages": [MESSAGES] * 3,
    }
    table = pa.table(columns).set_column(0, "text", pa.array(["ä", "", "b" * 50]).dictionary_encode())
    for kind in ("none", "zstd"):
        pyarrow.parquet.write_table(table, path / f"{kind}.parquet", compression=kind)
    with pyarrow.ipc.new_stream(path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(path / "file.arrow", table.schema) as file:
        file.write_table(table)


def read_tables(path: Path) -> None:
    for name in ("none.parquet", "zstd.parquet", "stream.arrow", "file.arrow"):
        for column in (None, "messages"):
            check_documents(path / name, column)


def make_saved_dataset(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)


def mutate_saved_dataset(generator: Random, data: bytes) -> bytes:
    if generator.random() < 0.5:
        return mutate_json(generator, data)
    value = json.loads(data)
    names = (*VALUES, "..", ".", "../../etc/passwd", "/etc/passwd", "a\x00b", "state.json")
    value["_data_files"] = [{"filename": generator.choice(names)} for _ in range(generator.randint(0, 3))]
    return to_json(generator, value)


# Parallel text


def make_pairs(path: Path) -> None:
    """Lines, and pages of a language each."""
    for folder in ("en-US", "de-DE"):
        (path / folder).mkdir()
        texts = [f"„{text}“ {folder} – …" for text in TEXTS[:20]]
        (path / f"{folder}.txt").write_text("\n".join(texts))
        (path / folder / "page.html").write_text("".join(f"<p>{text} <b>It is</b> so.</p>\n" for text in texts))


def read_pairs_of_both(path: Path) -> None:
    for pairs in (read_pairs(path / "en-US.txt", path / "de-DE.txt"), handbook_pairs(path, "de")):
        for document in pair_documents(pairs, "", max_bytes=200):
            (start, end), text = document.targets[0], document.text
            assert len(text.encode()) <= 200 and text.count("\n") == 1 and text[start - 1] == "\n" and end == len(text)


# Settings


def make_settings(path: Path) -> None:
    recipe = Recipe.from_json({"sources": [{"name": "web", "path": "pages", "suffixes": [".html"], "fraction": 1}]})
    (path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    config = TrainConfig.recipe("small", batch_ramp=[[0, 4], [1_024_000, 8]], sample_prompts=["a"])
    (path / "config.json").write_text(json.dumps(config.to_dict()))


def read_settings(path: Path) -> None:
    from arfast.cli.train import _read_config

    recipe = Recipe.load(path / "recipe.json")
    assert Recipe.from_json(recipe.to_json()) == recipe
    config = TrainConfig.from_dict(_read_config(path / "config.json"))
    assert config.num_steps >= 1 and 0 <= config.num_warmup_tokens <= config.total_tokens
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Adapters


def make_adapter(path: Path) -> None:
    save_adapter(apply_lora(CausalLM(MODEL, dtype=torch.float32), rank=2), path)


def mutate_adapter(generator: Random, data: bytes) -> bytes:
    return mutate_json(generator, data) if data.startswith(b"{") else mutate_safetensors(generator, data)


def read_adapter(path: Path) -> None:
    model = CausalLM(MODEL)
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        load_adapter(model, path, check_base=False)
    except (ValueError, FileNotFoundError):
        assert all(map(torch.equal, model.parameters(), before)) and getattr(model, "lora", None) is None
        raise
    model(torch.tensor([[1, 2]]))


# Image tokenizers


def make_image_tokenizer(path: Path) -> None:
    ImageTokenizer(ImageTokenizerConfig(image_size=4, num_codes=4, code_dim=2, hidden_size=4)).save_pretrained(path)


def read_image_tokenizer(path: Path) -> None:
    ImageTokenizer.from_pretrained(path)


PARSERS = {
    "token shards": Parser(
        make_shards, ("train-00000.bin", "validation-00000.bin"), mutate_shard, read_shards, refused=0.6
    ),
    "dataset.json of a data set": Parser(make_dataset, (MANIFEST_NAME,), mutate_dataset_manifest, read_dataset, 0.5),
    "mixture.json": Parser(make_mixture, ("mixture.json",), mutate_mixture, read_mixture, 0.7),
    "token files of nanoGPT and llm.c": Parser(
        make_token_files, ("two.bin", "four.bin", "raw.bin"), mutate_token_file, read_token_files, 0.6
    ),
    "JSON lines (also gzip) and text": Parser(
        make_records, ("records.jsonl", "records.jsonl.gz", "text.txt"), mutate_records, read_records, 0.5
    ),
    "Parquet and Arrow files": Parser(
        make_tables, ("none.parquet", "zstd.parquet", "stream.arrow", "file.arrow"), anywhere, read_tables, 0.5
    ),
    "state.json of a Hugging Face dataset": Parser(
        make_saved_dataset, ("state.json",), mutate_saved_dataset, check_documents, 0.5
    ),
    "parallel text": Parser(
        make_pairs, ("en-US.txt", "de-DE.txt", "en-US/page.html", "de-DE/page.html"), anywhere, read_pairs_of_both, 0.5
    ),
    "recipe.json and config.json": Parser(
        make_settings, ("recipe.json", "config.json"), mutate_json, read_settings, 0.5
    ),
    "plan, results and fit of a sweep": Parser(
        make_sweep, ("plan.json", "results.jsonl", "results.csv", "fit.json"), mutate_sweep, read_sweep, 0.5
    ),
    "adapters": Parser(
        make_adapter, ("adapter_config.json", "adapter_model.safetensors"), mutate_adapter, read_adapter, 0.5
    ),
    "image tokenizers": Parser(
        make_image_tokenizer, ("config.json", "model.safetensors"), mutate_adapter, read_image_tokenizer, 0.5
    ),
}
