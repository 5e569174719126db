"""Words and characters behind the interface of the byte-level tokenizer: round trips, unknown ones, files, shards."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arfast.cli.main import main
from arfast.data import PackedDataset, Tokenizer, prepare_dataset
from arfast.data.tokenizer import SPECIAL_TOKENS, UNKNOWN_TOKEN

ALPHABET = "ab_1Éß世🌍 \t\n\r\u00a0.,(<|"
TEXTS = st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=20), st.just(f"x{UNKNOWN_TOKEN} <|pad|>"))
KINDS = ("word", "character")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def learned(kind, corpus):
    return Tokenizer.train((document.text for document in corpus), 400, kind)


def pieces(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]


@given(text=TEXTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip_of_known_text(kind, text):
    tokenizer = Tokenizer.train([text], 1000, kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    assert not set(ids) & set(tokenizer.special_token_ids.values())
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), tokenizer.encode("")]


def test_what_a_word_is():
    text = "def f(self_1, x):\n\n    return  x+1\n\tÉtat 世界"
    expected = ["def", " f", "(", "self_1", ",", " x", ")", ":", "\n\n   ", " return", " ", " x", "+", "1", "\n", "\t"]
    assert pieces(Tokenizer.train([text], 100, "word"), text) == [*expected, "État", " 世界"]
    assert pieces(Tokenizer.train([text], 100, "character"), text) == list(text)


def test_most_frequent_are_kept(kind, corpus):
    """Against counts by hand; of ASCII, since Python's \\w has no combining marks."""
    texts = [document.text for document in corpus if document.text.isascii()]
    learned = Tokenizer.train(texts, 400, kind)
    split = list if kind == "character" else re.compile(r" ?\w+| ?[^\w\s]|\s+(?=\s\S)|\s+").findall
    counts = Counter(piece for text in texts for piece in split(text))
    kept = {learned.decode([token], skip_special_tokens=False) for token in range(4, learned.vocab_size)}
    assert learned.vocab_size == min(400, len(counts) + 4) and len(kept) == learned.vocab_size - 4
    least = min(counts[piece] for piece in kept)
    assert all(count <= least for piece, count in counts.items() if piece not in kept)


def test_unknown(learned, kind):
    unknown = learned.unk_token_id
    assert learned.special_token_ids[UNKNOWN_TOKEN] == unknown == 3
    text, count = ("import 東京東京 os", 1) if kind == "word" else ("im\ue000po\ue001rt", 2)
    ids = learned.encode(text, add_special_tokens=False)
    assert ids.count(unknown) == count
    assert learned.decode(ids) == ("import os" if kind == "word" else "import")
    assert UNKNOWN_TOKEN in learned.decode(ids, skip_special_tokens=False)
    for name in (*SPECIAL_TOKENS, UNKNOWN_TOKEN):
        assert not {0, 1, 2} & set(learned.encode(name, add_special_tokens=False))


def test_byte_pairs_know_everything(tokenizer):
    assert tokenizer.unk_token_id is None


def test_independent_of_order(kind, corpus, learned):
    again = Tokenizer.train((document.text for document in reversed(corpus)), 400, kind)
    assert again.fingerprint == learned.fingerprint


def test_files(learned, corpus, tmp_path):
    learned.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.fingerprint, again.unk_token_id) == (learned.fingerprint, learned.unk_token_id)
    assert theirs.unk_token == UNKNOWN_TOKEN
    for document in corpus[::10]:
        ids = learned.encode(document.text)
        assert again.encode(document.text) == ids == theirs(document.text).input_ids
        assert theirs.decode(ids, skip_special_tokens=True) == learned.decode(ids)


def test_data_sets(kind, corpus, learned, tmp_path):
    manifest = prepare_dataset(corpus, tmp_path / "data", vocab_size=400, tokenizer_kind=kind)
    assert manifest.recipe["tokenizer"] == {"vocab_size": 400, "kind": kind}
    tokenizer = Tokenizer.load(tmp_path / "data")
    assert tokenizer.unk_token_id == 3
    data = PackedDataset(tmp_path / "data", "train", 64)
    data.check_tokenizer(tokenizer)
    assert prepare_dataset(corpus, tmp_path / "data", vocab_size=400, tokenizer_kind=kind).recipe == manifest.recipe
    with pytest.raises(ValueError, match="hold the same data set, got another tokenizer"):
        prepare_dataset(corpus, tmp_path / "data", vocab_size=400)


def test_command_line(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps({"text": f"some words, document {i}"}) + "\n" for i in range(60))
    (tmp_path / "a.jsonl").write_text(text)
    arguments = ["tokenize", "--data", "a.jsonl", "--tokenizer-type", kind, "--output-dir"]
    assert main([*arguments, "data", "--vocab-size", "30"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["vocab_size"] == Tokenizer.load("data").vocab_size <= 30
    assert main([*arguments, "more", "--tokenizer", "data"]) == 2
    assert f"tokenizer_type must be left out with a tokenizer, got {kind}" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_errors(kind, corpus, tmp_path):
    with pytest.raises(ValueError, match="Tokenizer.train: kind must be one of bpe, word, character, got 'words'"):
        Tokenizer.train(["a"], 100, "words")
    with pytest.raises(ValueError, match="Tokenizer.train: vocab_size must be an integer in \\[5, "):
        Tokenizer.train(["a"], 4, kind)
    with pytest.raises(ValueError, match="prepare_dataset: tokenizer_kind must be one of bpe, word, character, got ''"):
        prepare_dataset(corpus, tmp_path / "data", tokenizer_kind="")
    with pytest.raises(ValueError, match="prepare_dataset: vocab_size must be an integer in \\[5, "):
        prepare_dataset(corpus, tmp_path / "data", vocab_size=4, tokenizer_kind=kind)
    assert not (tmp_path / "data").exists()
