"""A small corpus, a tokenizer and prepared data sets for the tests of arfast.data."""

import random

import numpy as np
import pytest

from arfast.data import Document, Tokenizer, builtin, prepare_dataset
from arfast.data.manifest import DatasetManifest, SplitInfo, describe_tokenizer
from arfast.data.shards import ShardWriter


@pytest.fixture(scope="session")
def corpus():
    """About 120 documents of 20 to 3000 characters: real code, and text in several scripts."""
    generator = random.Random(0)
    documents = [
        Document(source.text[: generator.randrange(20, 3000)], f"{number}.py")
        for number, source in enumerate(builtin("python")[::6])
    ]
    foreign = ["Grüße, 世界! ", "Привет 🌍\r\n", "\t\u200bשלום\u0301 ", "<|end_of_text|> <|pad|>"]
    return documents + [Document(text * 20 + str(i), f"{i}.txt") for i, text in enumerate(foreign * 3)]


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return Tokenizer.train((document.text for document in corpus), vocab_size=400)


@pytest.fixture(scope="session")
def dataset_path(corpus, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus"
    prepare_dataset(corpus, path, tokenizer, validation_fraction=0.1, test_fraction=0.1)
    return path


@pytest.fixture
def numbered_dataset(tokenizer, tmp_path):
    """Makes a data set in which every token's id is its position, so that a batch shows where each token came from."""

    def make(lengths, shard_documents=None):
        path = tmp_path / f"numbered-{len(list(tmp_path.iterdir()))}"
        tokenizer.save(path)
        total = int(sum(lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        step = shard_documents or max(1, len(lengths))
        shards = {}
        for number, first in enumerate(range(0, max(1, len(lengths)), step)):
            name = f"train-{number:05d}.bin"
            with ShardWriter(path / name, max(total, 2**17), tokenizer.fingerprint) as writer:
                for start, end in zip(offsets[first:-1][:step], offsets[first + 1 :][:step], strict=True):
                    writer.add(np.arange(start, end), num_bytes=int(end - start))
                shards[name] = writer.close().content_sha256
        empty = SplitInfo(0, 0, 0, {})
        splits = {"train": SplitInfo(len(lengths), total, total, shards), "validation": empty, "test": empty}
        description = describe_tokenizer(tokenizer, path) | {"vocab_size": max(total, 2**17)}
        DatasetManifest(path, {}, {}, description, splits).write(path)
        return path

    return make
