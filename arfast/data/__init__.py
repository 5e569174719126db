"""Data: from text to batches of token ids."""

from arfast.data.builtin import builtin
from arfast.data.dataset import Batch, PackedDataset, packing_statistics
from arfast.data.documents import Document, read_documents
from arfast.data.formats import import_tokens
from arfast.data.manifest import DatasetManifest
from arfast.data.mixture import (
    MixtureDataset,
    MixtureSource,
    dataset_directories,
    is_prepared,
    open_mixture,
    read_mixture,
)
from arfast.data.packing import PackingStatistics
from arfast.data.pipeline import PreparedCorpus, Recipe, prepare_corpus
from arfast.data.prepare import prepare_dataset
from arfast.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "DatasetManifest",
    "Document",
    "MixtureDataset",
    "MixtureSource",
    "PackedDataset",
    "PackingStatistics",
    "PreparedCorpus",
    "Recipe",
    "Tokenizer",
    "builtin",
    "dataset_directories",
    "import_tokens",
    "is_prepared",
    "open_mixture",
    "packing_statistics",
    "prepare_corpus",
    "prepare_dataset",
    "read_documents",
    "read_mixture",
]
