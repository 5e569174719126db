"""Decoding: greedy, sampling and beam search with a key-value cache, and scoring of given text."""

from arfast.generate.decode import DecodeStep
from arfast.generate.loop import generate
from arfast.generate.score import SequenceScores, score
from arfast.generate.speculative import DraftStatistics

__all__ = ["DecodeStep", "DraftStatistics", "SequenceScores", "generate", "score"]
