"""From raw documents to data sets: the stages of `arfast prepare`, one small module each, in the order of their use.

source          documents in blocks             parts, spill    what the stages leave on the disk
extract         text of web pages               duplicates      exact and near-copies (minhash)
normalize       Unicode, line ends              tokenize        token shards
language        language tags                   mixture         shares of several sources
quality         published heuristics            report          what was dropped and why
safety          word and URL lists              stages, run     all of it, once, in order
privacy         personal data masked            recipe          what it can be told
decontaminate   evaluation text
"""

from arfast.data.pipeline.recipe import Recipe
from arfast.data.pipeline.run import PreparedCorpus, prepare_corpus

__all__ = ["PreparedCorpus", "Recipe", "prepare_corpus"]
