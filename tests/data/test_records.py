"""Records of every format give the documents that the libraries that wrote them give, and each bad one an error."""

import gzip
import json
import random
import subprocess
import sys

import pytest

from arfast.data import Document, Tokenizer, prepare_dataset, read_documents
from arfast.data.split_writer import _encode

pyarrow = pytest.importorskip("pyarrow")
ipc, parquet = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow.parquet")

TEXTS = ["first\r\n\tend  ", "Grüße 世界 🌍", "a\u200bb", "x" * 5000, "<|end_of_text|>", "last"]


def texts(source, column=None):
    return [document.text for document in read_documents(source, column)]


def write_lines(path, some):
    data = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(some)).encode()
    if path.suffix == ".gz":
        # Two members, as gzip files that were joined have.
        path.write_bytes(gzip.compress(data[:40]) + gzip.compress(data[40:]))
    elif path.suffix == ".zst":
        path.write_bytes(bytes(pyarrow.compress(data[:40], "zstd")) + bytes(pyarrow.compress(data[40:], "zstd")))
    else:
        path.write_bytes(data)


def write_parquet(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)


def write_arrow(path, columns, writer=ipc.new_stream):
    table = pyarrow.table(columns)
    with writer(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.gz"])
def test_json_lines(tmp_path, name):
    write_lines(tmp_path / name, TEXTS)
    expected = [Document(text, f"{tmp_path / name}:{i}") for i, text in enumerate(TEXTS, 1)]
    assert list(read_documents(tmp_path / name)) == expected == list(read_documents(tmp_path))


STRING_TYPES = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]


@pytest.mark.parametrize("kind", STRING_TYPES, ids=str)
def test_tables(tmp_path, kind):
    column = pyarrow.array(TEXTS, pyarrow.string()).cast(kind)
    columns = {"id": range(len(TEXTS)), "text": column, "body": [text + "!" for text in TEXTS]}
    write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    write_arrow(tmp_path / "stream.arrow", columns)
    write_arrow(tmp_path / "file.arrow", columns, ipc.new_file)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        expected = [Document(text, f"{tmp_path / name}:{i}") for i, text in enumerate(TEXTS, 1)]
        assert list(read_documents(tmp_path / name)) == expected
        assert texts(tmp_path / name, "body") == [text + "!" for text in TEXTS]


def test_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    generator = random.Random(0)
    rows = [f"document {i} " + "word " * generator.randrange(1, 50) for i in range(57)]
    dataset = datasets.Dataset.from_dict({"id": list(range(57)), "text": rows})
    dataset.save_to_disk(tmp_path / "whole", num_shards=3)
    shuffled = dataset.shuffle(seed=1).select(range(20))
    shuffled.save_to_disk(tmp_path / "more" / "part")
    (tmp_path / "more" / "note.txt").write_text("beside it")
    for path in ("whole", "more/part"):
        peer = datasets.load_from_disk(tmp_path / path)
        assert texts(tmp_path / path) == peer["text"][:]
    assert texts(tmp_path / "more") == ["beside it", *shuffled["text"][:]]
    assert texts(tmp_path / "whole", "text") == rows

    splits = datasets.DatasetDict({"train": dataset, "test": shuffled})
    splits.save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "splits" / "test") == shuffled["text"][:]
    with pytest.raises(ValueError, match="source must be one split of a dataset, got a .* with test, train in"):
        texts(tmp_path / "splits")
    with pytest.raises(ValueError, match="must have a column 'content' of strings, got id, text"):
        texts(tmp_path / "whole", "content")
    (tmp_path / "whole" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="must name the files of .*, got 'data-00001-of-00003.arrow', which is absent"):
        texts(tmp_path / "whole")
    (tmp_path / "whole" / "state.json").write_text("[1]")
    with pytest.raises(ValueError, match="state.json' must name the files of a Hugging Face dataset, got: TypeError"):
        texts(tmp_path / "whole")


def test_every_format_makes_the_same_data_set(tmp_path):
    rows = [f"document {i} of many" for i in range(60)]
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "b.jsonl.zst", rows)
    write_parquet(tmp_path / "c.parquet", {"text": rows})
    write_arrow(tmp_path / "d.arrow", {"text": rows})
    write_parquet(tmp_path / "e.parquet", {"content": rows})
    manifests = [
        prepare_dataset(tmp_path / name, tmp_path / name[0], vocab_size=270, column=column)
        for name, column in [(f"{n}", None) for n in ("a.jsonl", "b.jsonl.zst", "c.parquet", "d.arrow")]
        + [("e.parquet", "content")]
    ]
    assert all(manifest.splits == manifests[0].splits for manifest in manifests)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, 世界."},
]
# Tulu 3 (open-instruct), with the marks by which transformers tells what the assistant says.
TULU = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:3], MESSAGES[1:]])
def test_conversations_are_those_of_transformers(tmp_path, messages, tokenizer):
    """Tokens and targets; from JSON lines and from Parquet."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer", split_special_tokens=False)
    expected = peer.apply_chat_template(
        messages, chat_template=TULU, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    write_parquet(tmp_path / "a.parquet", {"messages": [messages], "id": [1]})
    for name in ("a.jsonl", "a.parquet"):
        for column in (None, "messages"):
            (document,) = read_documents(tmp_path / name, column)
            ((tokens, num_bytes, targets),) = _encode([document], tokenizer)
            assert tokens == expected["input_ids"]
            assert targets.tolist() == [bool(mask) for mask in expected["assistant_masks"]]
            assert num_bytes == sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")


def test_prompt_and_completion(tmp_path, tokenizer):
    rows = {"prompt": ["2 + 2 =", "", "no answer"], "completion": [" 4", "alone", ""]}
    lines = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_parquet(tmp_path / "a.parquet", rows | {"messages": [1, 2, 3]})
    for name in ("a.jsonl", "a.parquet"):
        documents = list(read_documents(tmp_path / name))
        assert [(d.text, d.targets) for d in documents] == [
            ("2 + 2 = 4", ((7, 9),)),
            ("alone", ((0, 5),)),
            ("no answer", ((9, 9),)),
        ]
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        for line, (tokens, num_bytes, targets) in zip(lines, _encode(documents, tokenizer), strict=True):
            prompt = tokenizer.encode(line["prompt"], add_special_tokens=False)
            completion = tokenizer.encode(line["completion"], add_special_tokens=False)
            assert tokens == [start, *prompt, *completion, end]
            assert targets.tolist() == [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)
            assert num_bytes == len(line["completion"])


def test_text_after_the_last_target(tokenizer):
    document = Document("abcdef", "", ((1, 3),))
    assert document.pieces() == [("a", False), ("bc", True), ("def", False)]
    ((tokens, num_bytes, targets),) = _encode([document], tokenizer)
    a, bc, rest = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "bc", "def"))
    end = tokenizer.eos_token_id
    assert tokens == [tokenizer.bos_token_id, *a, *bc, end, *rest, end] and num_bytes == 2
    assert targets.tolist() == [False] * (1 + len(a)) + [True] * (len(bc) + 1) + [False] * (len(rest) + 1)


@pytest.mark.parametrize("targets", [((3, 2),), ((-1, 2),), ((0, 7),), ((2, 4), (3, 5))])
def test_targets_outside_the_text(targets):
    with pytest.raises(ValueError, match="Document: targets must be rising ranges of the text, got"):
        Document("abcdef", "", targets)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "'messages' that are no list of records"),
        ({"messages": "hello"}, "'messages' that are no list of records"),
        ({"messages": ["hello"]}, "'messages' that are no list of records"),
        ({"messages": MESSAGES[:2]}, "'messages' of which none is the assistant's"),
        ({"messages": [{"role": "tool", "content": ""}]}, "a message with the role 'tool' instead of system, user"),
        ({"messages": [{"role": "user"}]}, "dict with a 'content' of type NoneType"),
        ({"prompt": "a", "completion": 3}, "dict with a 'completion' of type int"),
        ({"prompt": "a"}, "dict with a 'text' of type NoneType"),
    ],
)
def test_bad_records(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"line 1 of .*a.jsonl' must be a JSON object with .*, got: {message}"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "columns, column, message",
    [
        ({"id": [1], "body": ["a"]}, None, "have a column 'text' of strings .or .*, got id, body"),
        ({"id": [1], "text": ["a"]}, "body", "have a column 'body' of strings, got id, text"),
        ({"text": [1]}, None, "have a column 'text' of strings, got 'text' of type int64"),
        ({"text": [["a"]]}, None, "have a column 'text' of strings, got 'text' of type list"),
        (
            {"prompt": ["a"], "completion": [1.0]},
            None,
            "have a column 'completion' of strings, got 'completion' of type double",
        ),
        ({"messages": ["a"]}, None, "have a column 'messages' of messages, got 'messages' of type string"),
        ({"id": [1]}, "messages", "have a column 'messages' of messages, got id"),
    ],
)
@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")])
def test_wrong_columns(tmp_path, write, name, columns, column, message):
    write(tmp_path / name, columns)
    with pytest.raises(ValueError, match=f"^read_documents: '.*{name}' must {message}"):
        texts(tmp_path / name, column)
    out_dir = tmp_path / "out"
    with pytest.raises(ValueError, match="^read_documents: "):
        prepare_dataset(tmp_path / name, out_dir, vocab_size=270, column=column)
    assert not out_dir.exists()


@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")])
def test_missing_values(tmp_path, write, name):
    write(tmp_path / name, {"text": pyarrow.array(["a", None], pyarrow.string())})
    with pytest.raises(ValueError, match=f"row 2 of '.*{name}' must hold text, got: dict with a 'text' of type None"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_files(tmp_path, name):
    """Cut anywhere, or another file altogether: an error that names the file, or, at a seam, whole documents."""
    some = [f"{i} " + "".join(random.Random(i).choices("abcdefgh ", k=300)) for i in range(40)]
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {"text": some}, row_group_size=7)
    elif name.endswith("arrow"):
        write_arrow(tmp_path / name, {"text": some}, ipc.new_stream if "stream" in name else ipc.new_file)
    else:
        write_lines(tmp_path / name, some)
    assert texts(tmp_path / name) == some
    data, refused = (tmp_path / name).read_bytes(), 0
    for length in [1, 4, 8, *random.Random(0).sample(range(9, len(data)), 25)]:
        (tmp_path / name).write_bytes(data[:length])
        try:
            found = texts(tmp_path / name)
            assert found == some[: len(found)]
        except ValueError as error:
            assert str(error).startswith("read_documents: ") and name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20
    (tmp_path / name).write_bytes(b"something else" * 50)
    with pytest.raises(ValueError, match=f"{name}' must be an intact (Parquet file|Arrow file|archive), got: "):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_without_pyarrow(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"")
    for module in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name}' must have pyarrow to be read .pip install 'arfast\[data\]'., got"):
        texts(tmp_path / name)


def test_nothing_is_imported_that_is_not_needed():
    code = "import sys, arfast.data; assert not {'pyarrow', 'datasets'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_that_of_a_row_group(tmp_path):
    """Four times the rows, in groups of the same size: the same peak."""
    peaks = []
    for groups in (4, 16):
        rows = [random.Random(i).randbytes(1000).hex() for i in range(groups * 250)]
        write_parquet(tmp_path / f"{groups}.parquet", {"text": rows}, row_group_size=250)
        before, held = pyarrow.total_allocated_bytes(), []
        for document, row in zip(read_documents(tmp_path / f"{groups}.parquet"), rows, strict=True):
            assert document.text == row
            held.append(pyarrow.total_allocated_bytes() - before)
        peaks.append(max(held))
    assert peaks[1] < 1.2 * peaks[0] and 0 < peaks[1] < 16 * 250 * 2000 / 2


def test_copies_and_splits_of_masked_documents(tmp_path):
    """The same text with other targets is a copy; other targets alone make another data set."""
    documents = [Document(f"question {i} answer", "", ((10, 12),)) for i in range(50)]
    again = [Document(document.text, "", ((0, 3),)) for document in documents]
    manifest = prepare_dataset(documents + again, tmp_path / "a", vocab_size=270)
    assert manifest.source["num_copies"] == 50
    prepare_dataset(documents, tmp_path / "b", Tokenizer.load(tmp_path / "a"))
    with pytest.raises(ValueError, match="must be empty or hold the same data set, got another corpus_sha256"):
        prepare_dataset(again, tmp_path / "b", Tokenizer.load(tmp_path / "a"))
