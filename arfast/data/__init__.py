"""Data: from text to batches of token ids."""

from arfast.data.builtin import builtin
from arfast.data.dataset import Batch, PackedDataset
from arfast.data.documents import Document, read_documents
from arfast.data.manifest import DatasetManifest
from arfast.data.packing import PackingStatistics
from arfast.data.pipeline import PreparedCorpus, Recipe, prepare_corpus
from arfast.data.prepare import prepare_dataset
from arfast.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "DatasetManifest",
    "Document",
    "PackedDataset",
    "PackingStatistics",
    "PreparedCorpus",
    "Recipe",
    "Tokenizer",
    "builtin",
    "prepare_corpus",
    "prepare_dataset",
    "read_documents",
]
