"""Decoding: greedy, sampling and beam search with a key-value cache, and scoring of given text."""

from arfast.generate.decode import DecodeStep
from arfast.generate.loop import generate
from arfast.generate.perplexity import CorpusScores, corpus_perplexity
from arfast.generate.score import SequenceScores, score

__all__ = ["CorpusScores", "DecodeStep", "SequenceScores", "corpus_perplexity", "generate", "score"]
