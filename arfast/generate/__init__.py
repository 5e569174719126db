"""Decoding: greedy, sampling and beam search with a key-value cache, and scoring of given text."""

from arfast.generate.decode import DecodeStep
from arfast.generate.loop import generate
from arfast.generate.output import GenerationOutput
from arfast.generate.score import SequenceScores, score

__all__ = ["DecodeStep", "GenerationOutput", "SequenceScores", "generate", "score"]
