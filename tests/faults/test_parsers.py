"""S6: whatever a file of data holds, it is read or refused in a sentence, in time and memory that its size bounds."""

import hashlib
import json
import struct
import urllib.parse

import numpy as np
import pytest
from growth import seconds
from hostile import fuzz
from parsers import MESSAGES, PARSERS, SEQLEN, TEXTS, make_dataset, read_dataset

from arfast.data import Document, PackedDataset, Tokenizer, open_mixture, prepare_dataset, read_documents
from arfast.data.formats import _Source, _TokenFile
from arfast.data.manifest import MANIFEST_NAME, canonical_hash
from arfast.data.pipeline.normalize import normalize
from arfast.data.pipeline.privacy import mask_personal_data
from arfast.data.pipeline.quality import check_code, check_fineweb, check_gopher, clean_c4
from arfast.data.pipeline.recipe import MASKS, CodeQuality, FineWebQuality, GopherQuality, GopherRepetition, Recipe
from arfast.data.pipeline.recipe import C4Quality as C4
from arfast.data.pipeline.record import Dropped, Record
from arfast.data.pipeline.repetition import check_repetition
from arfast.data.pipeline.safety import UrlList, WordList
from arfast.data.pipeline.words import shingles
from arfast.data.shards import HEADER_BYTES, Shard, ShardHeader
from arfast.models import CausalLM, CausalLMConfig
from arfast.nn.lora import LoraConfig
from arfast.train import TrainConfig


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_files(name, memory_path, amount, record):
    parser, count = PARSERS[name], amount(250, 100_000)
    directory = memory_path / "files"
    directory.mkdir()
    parser.make(directory)
    parser.load(directory)
    refused = fuzz(directory, list(parser.files), parser.mutate, parser.load, count, seed=60)
    assert refused > parser.refused * count, refused
    record("S6", f"hostile {name}", count, f"{refused} refused in a sentence, the rest valid")


# What the inputs above found, each by itself.


def test_an_arrow_file_whose_offsets_point_anywhere(tmp_path):
    """Arrow's buffers are used as they lie in the file: without a check this reads the memory of the process."""
    import pyarrow as pa
    import pyarrow.ipc

    table = pa.table({"text": ["a" * 1000, "b" * 333]})
    with pyarrow.ipc.new_stream(tmp_path / "x.arrow", table.schema) as stream:
        stream.write_table(table)
    data = (tmp_path / "x.arrow").read_bytes()
    offsets = struct.pack("<3i", 0, 1000, 1333)
    assert data.count(offsets) == 1
    for wrong in ((0, 2**31 - 2, 2**31 - 1), (0, 2_000_000, 1333), (0, -5, 1333), (5000, 6000, 7000)):
        (tmp_path / "x.arrow").write_bytes(data.replace(offsets, struct.pack("<3i", *wrong)))
        with pytest.raises(ValueError, match="must be an intact Arrow file, got: "):
            list(read_documents(tmp_path / "x.arrow"))


@pytest.mark.parametrize("offsets", [(0, 2**63 - 1, 2**63 + 1, 0, 12), (0, 2**64 - 2, 12, 12, 12), (0, 6, 14, 8, 12)])
def test_offsets_of_a_shard_that_wrap_round(tmp_path, offsets):
    """Differences of 64-bit numbers rise for ever."""
    body = np.arange(12, dtype="<u2").tobytes() + np.array(offsets, "<u8").tobytes()
    header = ShardHeader(2, 12, 12, 4, 10, "ab" * 32, hashlib.sha256(body).hexdigest())
    (tmp_path / "train-00000.bin").write_bytes(header.pack() + body)
    with pytest.raises(ValueError, match="must have rising offsets from 0 to 12, got others"):
        Shard(tmp_path / "train-00000.bin").verify()


def test_spans_of_a_shard_that_wrap_round(tmp_path):
    make_dataset(tmp_path / "data")
    file = tmp_path / "data" / "train-00000.bin"
    data = file.read_bytes()
    header = ShardHeader.unpack(data[:HEADER_BYTES], "x")
    body = bytearray(data[HEADER_BYTES:])
    struct.pack_into("<2Q", body, len(body) - 16, 2**63 - 1, 2**63 + 1)
    header = header._replace(content_sha256=hashlib.sha256(body).hexdigest())
    file.write_bytes(header.pack() + bytes(body))
    with pytest.raises(ValueError, match="must have rising spans of targets within documents, got others"):
        Shard(file).verify()


@pytest.mark.parametrize(
    "keys,value,message",
    [
        (("tokenizer",), 3, "must be an intact manifest, got: "),
        (("tokenizer", "vocab_size"), "x", "vocab_size must be an integer in"),
        (("tokenizer", "pad_token_id"), 280, "pad_token_id must be an integer in .0, 279., got 280"),
        (("tokenizer", "eos_token_id"), None, "eos_token_id must be an integer"),
        (("tokenizer", "files"), {}, "must be an intact manifest"),
        (("tokenizer", "fingerprint"), "a" * 5000, "hashes of the tokenizer that are none"),
        (("tokenizer", "vocab_size"), 299, "must have the tokenizer's vocab_size=299, got 280"),
        (("recipe",), [], "a recipe or a source that is no object"),
        (("splits", "train", "num_tokens"), True, "num_tokens must be an integer"),
        (("splits", "train", "num_bytes"), 1, "the shards of train must have num_bytes=1, got"),
    ],
)
def test_a_forged_manifest(tmp_path, keys, value, message):
    """Its checksum is right: anybody can compute one."""
    make_dataset(tmp_path / "data")
    file = tmp_path / "data" / MANIFEST_NAME
    record = json.loads(file.read_text())
    del record["checksum"]
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(record | {"checksum": canonical_hash(record)}))
    with pytest.raises(ValueError, match=message):
        PackedDataset(tmp_path / "data", "train", SEQLEN)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda huge: TrainConfig(max_steps=1, learning_rate=huge), "learning_rate must be a finite float"),
        (lambda huge: TrainConfig(max_steps=huge), "max_steps must be int below 2..63"),
        (lambda huge: TrainConfig(max_steps=9, batch_ramp=[[0, huge]]), "batch_ramp must hold"),
        (lambda huge: TrainConfig(max_steps=9, seqlen_ramp=[[0, 256, huge]]), "seqlen_ramp must hold"),
        (lambda huge: Recipe.from_json({"sources": [{"name": "a", "path": "a", "fraction": huge}]}), "of type float"),
        (lambda huge: LoraConfig(alpha=huge), "alpha must be a positive number"),
    ],
)
def test_numbers_that_no_float_holds(make, message):
    with pytest.raises(ValueError, match=message):
        make(10**400)


@pytest.mark.parametrize("data", ["a\x00b", "\ud800", "a" * 5000, 10**400])
def test_paths_of_a_mixture_that_are_none(tmp_path, data):
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": [{"data": data, "fraction": 1}]}))
    with pytest.raises((ValueError, FileNotFoundError), match="(read_mixture|dataset): .* must .*, got"):
        open_mixture(tmp_path / "mixture.json", SEQLEN)


def test_a_tokenizer_that_panics_when_it_is_used(tmp_path):
    """Its template names a token that it does not have; the library's panic is no Exception."""
    tokenizer = Tokenizer.train(TEXTS, vocab_size=280)
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Tokenizer: content must .*, got: "):
        Tokenizer.load(tmp_path).encode("a")


def json_lines(path, n):
    path.write_bytes(b'{"text": "a line of text"}\n' * n)


def one_text(path, n):
    path.write_text(json.dumps({"text": 'ü"\n' * n}) + "\n")


def one_conversation(path, n):
    path.write_text(json.dumps({"messages": MESSAGES * n}) + "\n")


def nested(path, n):
    path.write_text('{"text": "a", "x": ' + "[" * 900 + '"' + "b" * n + '"' + "]" * 900 + "}\n")


def text_lines(path, n):
    path.write_text("a line of text\n" * n)


def parquet(path, n):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": [f"row {i}" for i in range(n)]}), path)


def token_ids(path, n):
    path.write_bytes(np.arange(n, dtype="<u2").tobytes())


def read_token_ids(path):
    class Ids:
        vocab_size, eos_token_id, bos_token_id = 1 << 16, 3, 3

    assert sum(len(tokens) for _, tokens in _Source({"": [_TokenFile.open(path)]}, Ids, 3).documents())


def dataset(path, n):
    documents = [Document("word " * (i % 50) + str(i), "") for i in range(n)]
    prepare_dataset(documents, path, Tokenizer.train(TEXTS, vocab_size=280), validation_fraction=0, test_fraction=0)


def recipe(path, n):
    path.write_text(json.dumps({"sources": [{"name": f"s{i}", "path": "x", "fraction": 1 / n} for i in range(n)]}))


def tensors(path, n):
    CausalLM(CausalLMConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1)).save_pretrained(path)  # fmt: skip
    header = ",".join(f'"model.x.{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(n)).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header) + 2) + b"{" + header + b"}")


def read_tensors(path):
    with pytest.raises(ValueError, match="the stored tensors must be those of"):
        CausalLM.from_pretrained(path)


def vocabulary(path, n):
    Tokenizer.train(TEXTS, vocab_size=280).save(path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{i}": 300 + i for i in range(n)}
    (path / "tokenizer.json").write_text(json.dumps(content))


def read_all(path):
    return sum(len(document.text) for document in read_documents(path))


# How it is made and read, its size, and by how much the time may grow: 10,000 words fit the processor's cache.
FILES = {
    "lines.jsonl": (json_lines, read_all, 5000, 12),
    "text.jsonl": (one_text, read_all, 100_000, 12),
    "messages.jsonl": (one_conversation, read_all, 5000, 12),
    "nested.jsonl": (nested, read_all, 1_000_000, 12),
    "lines.txt": (text_lines, read_all, 20_000, 12),
    "rows.parquet": (parquet, read_all, 5000, 12),
    "ids.bin": (token_ids, read_token_ids, 200_000, 12),
    "data": (dataset, read_dataset, 1000, 12),
    "recipe.json": (recipe, Recipe.load, 2000, 12),
    "tensors": (tensors, read_tensors, 3000, 12),
    "tokenizer": (vocabulary, Tokenizer.load, 10_000, 30),
}


@pytest.mark.parametrize("name", FILES)
def test_files_take_linear_time(name, memory_path, record):
    make, read, size, most = FILES[name]
    paths = [memory_path / str(n) / name for n in (size, 10 * size)]
    for path, n in zip(paths, (size, 10 * size), strict=True):
        path.parent.mkdir()
        make(path, n)
        read(path)
    short, long = seconds(read, *paths)
    assert long < most * short + 0.1, (short, long)
    record("S6", f"a file {name}, 10 times larger", 2, f"at most {most} times the time")


PIECES = (
    "a", "ab ", "\n", "a\n", " ", " \n", "漢", "a\u0315\u0300", "\u0315\u0300", "\u0f71\u0f72\u0f74", "\u1100\u1161",
    "a@", "a.", ".", "...!x", "a@b.", "1", "1.", "1 ", "12-", "+1", "(212", ":", "a:", "[", "[1", "<", "<a ", "<!--",
    "</", "&", "<b>x", "'", '"', "/", "?a=", "//", "%", "word ", "Lorem ipsum ", "- a\n", "\u2026", "\r", "\t", "🙂",
)  # fmt: skip


def extraction(text):
    from arfast.data.pipeline.extract import extract

    extract(Record("<html><body>" + text, "x.html"))


STAGES = {
    "NFC": lambda text: normalize(text, "NFC"),
    "NFKC": lambda text: normalize(text, "NFKC"),
    "personal data": lambda text: mask_personal_data(text, MASKS),
    "C4": lambda text: clean_c4(text, C4()),
    "Gopher": lambda text: check_gopher(text, "en", GopherQuality(max_words=10**9)),
    "repetition": lambda text: check_repetition(text, GopherRepetition(1, 1, 1, 1, (1, 1, 1), (1,) * 6)),
    "FineWeb": lambda text: check_fineweb(text, FineWebQuality()),
    "code": lambda text: check_code(text, CodeQuality(max_line_characters=10**9, max_mean_line_characters=1e9)),
    "word list": WordList(["bad", "very wrong", "漢字"]).find,
    "URL list": lambda text: UrlList(["bad.example", "good.example/spam"]).find("http://" + text),
    "URL list, a path": lambda text: UrlList(["bad.example", "good.example/spam"]).find("http://x.y/" + text),
    "shingles": lambda text: shingles(text, 5),
    "extraction": extraction,
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_take_linear_time(name, record):
    if name == "extraction":
        pytest.importorskip("resiliparse")
    stage = STAGES[name]

    def run(text):
        urllib.parse.clear_cache()
        try:
            stage(text)
        except Dropped:
            pass

    run("a")
    for piece in PIECES:
        short, long = seconds(run, *(piece * (characters // len(piece)) for characters in (10_000, 100_000)))
        assert long < 12 * short + 0.05, (piece, short, long)
    record("S6", f"texts of one repeated piece, 10 times longer ({name})", len(PIECES), "at most 12 times the time")
