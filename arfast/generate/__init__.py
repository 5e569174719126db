"""Decoding: greedy, sampling and beam search with a key-value cache; scoring of given text, ranking, perplexity,
calibration."""

from arfast.generate.calibration import ReliabilityDiagram, reliability
from arfast.generate.continuations import ContinuationScore, encode_pair, score_continuations
from arfast.generate.decode import DecodeStep
from arfast.generate.loop import generate
from arfast.generate.output import GenerationOutput
from arfast.generate.perplexity import CorpusScores, corpus_perplexity
from arfast.generate.ranking import FewShotPrompt, Ranked, rank
from arfast.generate.score import SequenceScores, score
from arfast.generate.speculative import DraftStatistics

__all__ = [
    "ContinuationScore",
    "CorpusScores",
    "DecodeStep",
    "DraftStatistics",
    "FewShotPrompt",
    "GenerationOutput",
    "Ranked",
    "ReliabilityDiagram",
    "SequenceScores",
    "corpus_perplexity",
    "encode_pair",
    "generate",
    "rank",
    "reliability",
    "score",
    "score_continuations",
]
