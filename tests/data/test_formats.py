"""Token files of nanoGPT and llm.c become the data set that the same text gives, and each bad file an error."""

import errno
import os

import numpy as np
import pytest

from arfast.data import DatasetManifest, PackedDataset, Tokenizer, formats, import_tokens, prepare_dataset
from arfast.data.split import SPLITS


def write_nanogpt(path, ids):
    np.array(ids, dtype=np.uint16).tofile(path)


def write_llmc(path, ids, magic=20240520, version=1, dtype=np.uint16):
    """As dev/data/data_common.py lays it out."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())


def write_llama3(path, ids):
    write_llmc(path, ids, 20240801, 7, np.uint32)


def stored(path, splits=SPLITS):
    """The documents of each split, as token ids."""
    found = {}
    for split in splits:
        shards = DatasetManifest.load(path).open_split(split)
        spans = [(shard, *span) for shard in shards for span in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
        found[split] = [shard.tokens[start:end].tolist() for shard, start, end in spans]
    return found


@pytest.fixture(scope="module")
def bodies(corpus, tokenizer):
    return [tokenizer.encode(document.text, add_special_tokens=False) for document in corpus]


def joined(bodies, end, before=False):
    return [token for body in bodies for token in ([end, *body] if before else [*body, end])]


@pytest.mark.parametrize("write", [write_nanogpt, write_llmc, write_llama3])
@pytest.mark.parametrize("before", [False, True], ids=["end token behind", "end token before"])
@pytest.mark.parametrize("chunk_tokens", [7, 1 << 22])
def test_the_same_as_from_text(tmp_path, tokenizer, corpus, bodies, write, before, chunk_tokens, monkeypatch):
    """Documents, bytes and all, in whatever pieces the files are read."""
    monkeypatch.setattr(formats, "_CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(formats, "_BATCH_TOKENS", 500)
    (tmp_path / "files").mkdir()
    parts = {"train": slice(0, -20), "val": slice(-20, -10), "test": slice(-10, None)}
    for name, part in parts.items():
        ids = joined(bodies[part], tokenizer.eos_token_id, before)
        write(tmp_path / "files" / f"corpus_{name}_000000.bin", ids)
    manifest = import_tokens(tmp_path / "files", tmp_path / "imported", tokenizer)
    manifest.verify()
    found = stored(tmp_path / "imported")
    for split, part in zip(SPLITS, parts.values(), strict=True):
        prepare_dataset(corpus[part], tmp_path / split, tokenizer, validation_fraction=0, test_fraction=0)
        assert found[split] == stored(tmp_path / split)["train"]
        expected = DatasetManifest.load(tmp_path / split).splits["train"]
        assert manifest.splits[split].num_bytes == expected.num_bytes
        assert list(manifest.splits[split].shards.values()) == list(expected.shards.values())
    PackedDataset(tmp_path / "imported", "train", 32, "documents").batch(0, 4)
    assert import_tokens(tmp_path / "files", tmp_path / "imported", tokenizer) == manifest


def test_a_document_goes_on_in_the_next_file(tmp_path, tokenizer, bodies):
    """llm.c cuts its shards at a fixed number of tokens, in the midst of documents."""
    ids = joined(bodies[:40], tokenizer.eos_token_id, before=True)
    (tmp_path / "files").mkdir()
    for number, start in enumerate(range(0, len(ids), 1000)):
        write_llmc(tmp_path / "files" / f"fineweb_train_{number:06d}.bin", ids[start : start + 1000])
    write_llmc(tmp_path / "files" / "fineweb_val_000000.bin", ids[:1000])
    import_tokens(tmp_path / "files", tmp_path / "data", tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert stored(tmp_path / "data")["train"] == [[start, *body, end] for body in bodies[:40]]


def test_start_tokens_in_the_file_are_not_doubled(tmp_path, tokenizer, bodies):
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    framed = [[start, *body, end] for body in bodies[:60]]
    write_nanogpt(tmp_path / "a.bin", sum(framed, []))
    expected = None
    # Cut at the end token, or, as llm.c does with Llama 3, at the start token.
    for separator in (None, end, start):
        manifest = import_tokens(tmp_path / "a.bin", tmp_path / str(separator), tokenizer, end_token_id=separator)
        found = stored(tmp_path / str(separator))
        assert sorted(sum(found.values(), [])) == sorted(framed)
        assert expected in (None, found)
        expected = found
    assert all(info.num_documents for info in manifest.splits.values())


def test_empty_documents_are_left_out(tmp_path, tokenizer):
    end = tokenizer.eos_token_id
    write_nanogpt(tmp_path / "a.bin", [end, end, 50, 51, end, end, 52, end, 53])
    import_tokens(tmp_path / "a.bin", tmp_path / "data", tokenizer, validation_fraction=0, test_fraction=0)
    frames = [[tokenizer.bos_token_id, *body, end] for body in ([50, 51], [52], [53])]
    assert stored(tmp_path / "data")["train"] == frames


def test_undivided_files(tmp_path, tokenizer):
    """nanoGPT's Shakespeare: one text per split, without end tokens."""
    (tmp_path / "files").mkdir()
    write_nanogpt(tmp_path / "files" / "train.bin", range(50, 150))
    write_nanogpt(tmp_path / "files" / "val.bin", range(60, 90))
    with pytest.raises(ValueError, match="train.bin' must hold the end token 1 at least once in 268435456 tokens, got"):
        import_tokens(tmp_path / "files", tmp_path / "data", tokenizer)
    assert not (tmp_path / "data").exists()
    import_tokens(tmp_path / "files", tmp_path / "data", tokenizer, undivided=True)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert stored(tmp_path / "data") == {
        "train": [[start, *range(50, 150), end]],
        "validation": [[start, *range(60, 90), end]],
        "test": [],
    }


def test_splits_by_content(tmp_path, tokenizer, bodies):
    """The same document stays on its side, wherever it stands and whatever stands beside it."""
    write_nanogpt(tmp_path / "a.bin", joined(bodies, tokenizer.eos_token_id))
    write_nanogpt(tmp_path / "b.bin", joined(bodies[20:][::-1], tokenizer.eos_token_id))
    options = dict(validation_fraction=0.2, test_fraction=0.2)
    for name in "ab":
        import_tokens(tmp_path / f"{name}.bin", tmp_path / name, tokenizer, **options)
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert all(len(documents) > 10 for documents in first.values())
    for split in SPLITS:
        assert {tuple(ids) for ids in second[split]} <= {tuple(ids) for ids in first[split]}


def test_end_token_far_away(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(formats, "_MAX_DOCUMENT_TOKENS", 1000)
    monkeypatch.setattr(formats, "_CHUNK_TOKENS", 100)
    write_nanogpt(tmp_path / "a.bin", [50] * 5000 + [tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="a.bin' must hold the end token 1 at least once in 1000 tokens, got none"):
        import_tokens(tmp_path / "a.bin", tmp_path / "data", tokenizer)


def header(magic=20240520, version=1, count=4):
    fields = np.zeros(256, dtype=np.int32)
    fields[:3] = magic, version, count
    return fields.tobytes()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "hold token ids of 2 or 4 bytes, got 0 bytes"),
        (b"abc", "hold token ids of 2 or 4 bytes, got 3 bytes"),
        (b"arfshard" * 40, "be a file of nanoGPT or llm.c, got a shard of a prepared data set"),
        (header() + bytes(6), "have 1024 bytes of header and 2 for each of the 4 tokens .*, got 1030 bytes"),
        (header() + bytes(10), "have 1024 bytes of header and 2 for each of the 4 tokens .*, got 1034 bytes"),
        (header(20240801, 7) + bytes(8), "have 1024 bytes of header and 4 for each of the 4 tokens .*, got 1032"),
        (header(count=-1), "2 for each of the -1 tokens that it names, got 1024 bytes"),
        (header()[:600], "2 for each of the 4 tokens that it names, got 600 bytes"),
        (header(version=2) + bytes(8), "have version 1 with magic 20240520 or 7 with .*, got version 2 with magic"),
        (header(20240801, 1) + bytes(8), "got version 1 with magic 20240801"),
        (np.uint16([50, 1, 400, 1]).tobytes(), r"hold ids below the tokenizer's vocab_size=400, got 400 at token 2"),
        (
            header() + np.uint16([5, 1, 6, 65535]).tobytes(),
            r"below the tokenizer's vocab_size=400, got 65535 at token 3",
        ),
        (header(20240801, 7) + np.uint32([5, 1, 2**31, 6]).tobytes(), "got 2147483648 at token 2"),
        (np.uint16([50, 51]).tobytes(), "hold the end token 1 at least once in .* tokens, got none"),
    ],
)
def test_bad_files(tmp_path, tokenizer, content, message):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"^import_tokens: '.*bad.bin' must .*{message}"):
        import_tokens(tmp_path / "bad.bin", tmp_path / "data", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.bin"]


def test_bad_arguments(tmp_path, tokenizer):
    path, out_dir = tmp_path / "a.bin", tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="import_tokens: path must exist, got '.*a.bin'"):
        import_tokens(path, out_dir, tokenizer)
    with pytest.raises(ValueError, match="import_tokens: path must hold .bin files, got none in"):
        import_tokens(tmp_path, out_dir, tokenizer)
    write_nanogpt(path, [50, 1] * 50)
    with pytest.raises(ValueError, match="tokenizer must be a Tokenizer with an end-of-text token, got NoneType"):
        import_tokens(path, out_dir, None)
    with pytest.raises(ValueError, match="tokenizer must be a Tokenizer with an end-of-text token, got none"):
        import_tokens(path, out_dir, Tokenizer(tokenizer._content, None, None, None))
    with pytest.raises(ValueError, match=r"end_token_id must be an integer in \[0, 399\], got 400"):
        import_tokens(path, out_dir, tokenizer, end_token_id=400)
    with pytest.raises(ValueError, match="end_token_id must be left out of undivided files, got 1"):
        import_tokens(path, out_dir, tokenizer, end_token_id=1, undivided=True)
    with pytest.raises(ValueError, match="corpus must hold at least 3 different documents, got 1"):
        import_tokens(path, out_dir, tokenizer, undivided=True)
    out_dir.mkdir()
    (out_dir / "notes.txt").write_text("mine")
    options = dict(validation_fraction=0, test_fraction=0)
    with pytest.raises(ValueError, match="import_tokens: out_dir must be empty or a data set, got other files"):
        import_tokens(path, out_dir, tokenizer, **options)
    import_tokens(path, tmp_path / "b", tokenizer, **options)
    with pytest.raises(ValueError, match="import_tokens: out_dir must be empty or hold the same data set, got another"):
        import_tokens(path, tmp_path / "b", tokenizer, seed=1, **options)
    (tmp_path / "val.bin").write_bytes(path.read_bytes())
    path.unlink()
    with pytest.raises(ValueError, match="path must hold a file to train on, got val.bin"):
        import_tokens(tmp_path, tmp_path / "c", tokenizer)


def test_nothing_is_left_when_a_file_changes(tmp_path, tokenizer, bodies, monkeypatch):
    write_nanogpt(tmp_path / "a.bin", joined(bodies, tokenizer.eos_token_id))
    save = Tokenizer.save

    def change(self, path):
        save(self, path)
        write_nanogpt(tmp_path / "a.bin", joined(bodies[::-1], tokenizer.eos_token_id))

    monkeypatch.setattr(Tokenizer, "save", change)
    with pytest.raises(ValueError, match="import_tokens: path must not change while it is read, got other tokens"):
        import_tokens(tmp_path / "a.bin", tmp_path / "data", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer, bodies, monkeypatch):
    write_nanogpt(tmp_path / "a.bin", joined(bodies, tokenizer.eos_token_id))

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats.SplitWriter, "add", full)
    with pytest.raises(OSError, match="import_tokens: out_dir must have room for the data set, got 'No space left"):
        import_tokens(tmp_path / "a.bin", tmp_path / "data", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
