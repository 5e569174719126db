"""Tokenizer: exact round trips, no special tokens from text, the ids of transformers, and clear errors."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arfast.data import Tokenizer
from arfast.data.tokenizer import SPECIAL_TOKENS

# Any Unicode scalar value, with the names of the special tokens and the white space of code mixed in.
PIECES = st.one_of(
    st.text(max_size=20), st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "\n    ", "\r\n", "\0", "\ufeff"])
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@given(text=TEXTS)
@SETTINGS
def test_round_trip_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text


def test_every_byte_and_every_plane(tokenizer):
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000 and point % 17 in (0, 3))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {len(tokenizer.encode(chr(p), add_special_tokens=False)) for p in range(128)} == {1}


def test_batch(tokenizer, corpus):
    texts = [document.text for document in corpus]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_decode_accepts_arrays_and_tensors(tokenizer):
    ids = tokenizer.encode("def f(x): return x")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(iter(ids))
    shown = tokenizer.decode([0, *ids[1:], 1, 2], skip_special_tokens=False)
    assert shown == "<|begin_of_text|>def f(x): return x<|end_of_text|><|pad|>"


def test_special_tokens_are_never_learned():
    text = "".join(SPECIAL_TOKENS) * 50
    tokenizer = Tokenizer.train([text] * 20, vocab_size=1000)
    assert not {0, 1, 2} & set(tokenizer.encode(text, add_special_tokens=False))


@given(text=TEXTS)
@SETTINGS
def test_ids_of_transformers(tokenizer, auto_tokenizer, text):
    assert auto_tokenizer(text).input_ids == tokenizer.encode(text)
    ids = tokenizer.encode(text)
    assert auto_tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module", params=["alone", "beside a Llama config"])
def auto_tokenizer(request, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("auto")
    tokenizer.save(path)
    if request.param != "alone":
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.vocab_size}
        (path / "config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(path)


def test_special_tokens_of_transformers(tokenizer, auto_tokenizer):
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(auto_tokenizer, key) == getattr(tokenizer, key)
    assert len(auto_tokenizer) == tokenizer.vocab_size


def test_special_tokens_by_their_text(tokenizer):
    ids = tokenizer.special_token_ids
    assert list(ids) == SPECIAL_TOKENS
    assert list(ids.values()) == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_save_and_load(tokenizer, saved):
    loaded = Tokenizer.load(saved)
    for key in ("fingerprint", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded, key) == getattr(tokenizer, key)
    assert loaded.encode("x = '世界'") == tokenizer.encode("x = '世界'")
    canonical = json.dumps(json.loads((saved / "tokenizer.json").read_text()), sort_keys=True, separators=(",", ":"))
    assert loaded.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()
    assert sorted(os.listdir(saved)) == ["tokenizer.json", "tokenizer_config.json"]


def test_fingerprint_ignores_layout_only(tokenizer, saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_training_depends_on_the_texts_alone(tokenizer, corpus):
    """Not on their order, nor on the number of threads, nor on the hash seed of another process."""
    texts = [document.text for document in corpus]
    shuffled = random.Random(1).sample(texts, len(texts))
    assert Tokenizer.train(shuffled, vocab_size=400).fingerprint == tokenizer.fingerprint
    code = (
        "import json, sys; from arfast.data import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), vocab_size=400).fingerprint)"
    )
    environment = os.environ | {
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == tokenizer.fingerprint


def test_small_corpus_gives_fewer_tokens():
    assert Tokenizer.train(["ab"], vocab_size=1000).vocab_size == 259
    assert Tokenizer.train(["ab ab"], vocab_size=1000).vocab_size == 260


def test_loads_a_tokenizer_made_by_others(tokenizer, saved, tmp_path):
    """One special token, a record instead of a string, truncation and padding switched on: as found in the wild."""
    content = json.loads((saved / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": None, "eos_token": {"content": "<|end_of_text|>", "lstrip": False}, "extra": [1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (None, 1, None)
    assert len(loaded.encode("a much longer text than four tokens")) > 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t: Tokenizer.train(["a"], 258), ValueError, r"vocab_size must be an integer in \[259, .*\], got 258"),
        (lambda t: Tokenizer.train(["a"], 1e3), ValueError, "vocab_size must be an integer .*, got 1000.0"),
        (lambda t: Tokenizer.train("one text", 300), TypeError, "texts must be an iterable of str, got one str"),
        (lambda t: Tokenizer.train(["a", b"b"], 300), TypeError, "text must be a str, got bytes"),
        (
            lambda t: Tokenizer.train(["a\ud800"], 300),
            ValueError,
            "text must be valid Unicode, got a lone surrogate at 1",
        ),
        (lambda t: t.encode(None), TypeError, "text must be a str, got NoneType"),
        (lambda t: t.encode("ab\udfff"), ValueError, "text must be valid Unicode, got a lone surrogate at 2"),
        (lambda t: t.encode_batch("ab"), TypeError, "texts must be an iterable of str, got one str"),
        (lambda t: t.encode_batch(["ab", 3]), TypeError, "text must be a str, got int"),
        (lambda t: t.decode([400]), ValueError, r"ids must be integers in \[0, 400\), got 400"),
        (lambda t: t.decode([-1]), ValueError, r"ids must be integers in \[0, 400\), got -1"),
        (lambda t: t.decode([[1]]), ValueError, r"ids must be integers in \[0, 400\), got \[1\]"),
        (lambda t: t.decode([1.0]), ValueError, r"ids must be integers in \[0, 400\), got 1.0"),
    ],
)
def test_argument_errors(tokenizer, call, error, message):
    with pytest.raises(error, match=message):
        call(tokenizer)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "", "content must be a valid tokenizer.json, got: "),
        ("tokenizer.json", "{}", "content must be a valid tokenizer.json, got: "),
        ("tokenizer.json", "[" * 10**5, "content must be a valid tokenizer.json, got: "),
        ("tokenizer.json", b"\xff\xfe", "files in .* must be JSON, got: "),
        ("tokenizer_config.json", "{", "files in .* must be JSON, got: "),
        ("tokenizer_config.json", "[" * 10**5, "files in .* must be JSON, got: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must be an object, got list"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token must be a string, got 3"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "eos_token must be in the vocabulary, got '</s>'"),
    ],
)
def test_damaged_files(tokenizer, tmp_path, name, content, message):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="Tokenizer(.load)?: " + message):
        Tokenizer.load(tmp_path)


def test_missing_and_oversized_files(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="path must hold a tokenizer.json, got "):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    monkeypatch.setattr("arfast.data.tokenizer.MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="tokenizer.json' must hold at most 1000 bytes, got more"):
        Tokenizer.load(tmp_path)


def test_mutated_files_load_or_raise_one_error(tokenizer, saved):
    generator = random.Random(0)
    content = (saved / "tokenizer.json").read_bytes()
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            position = generator.randrange(len(mutated))
            mutated[position : position + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        try:
            Tokenizer(mutated.decode(errors="replace"), *SPECIAL_TOKENS).encode("text")
        except ValueError as error:
            assert str(error).startswith("Tokenizer: ")
            refused += 1
    assert refused > 100


def test_save_replaces_whole_files_only(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    other = Tokenizer.train(["other text " * 9], vocab_size=270)
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            other.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def test_save_refuses_to_replace_a_link(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="path must be a regular file or absent, got .*tokenizer.json"):
        tokenizer.save(tmp_path)
