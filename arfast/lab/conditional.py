"""Masked conditional likelihood: the same documents "task: input -> output" with a loss on all tokens, and with one on
the output alone, which is -log P(output | task, input); what each does for outputs of unseen inputs.
"""

from pathlib import Path

import numpy as np

from arfast.data import DatasetManifest, Document, Tokenizer, prepare_dataset
from arfast.generate import score_continuations
from arfast.models import CausalLM, CausalLMConfig

from .string_tasks import OPERATIONS, Task, family_inputs, split_inputs
from .training import train, training_config

_SEQLEN, _BATCH_SIZE, _LEARNING_RATE = 128, 8, 4e-3
_FAMILIES = ("numbers", "dates")
_HELD_OUT_INPUTS, _QUESTIONS = 0.1, 400
_FEWEST = 400  # documents: more than a batch of them


def compare_masks(directory: Path, max_tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Train both ways on as many tokens; by loss: nats per token of unseen outputs, and how many are right."""
    generator = np.random.default_rng(seed)
    known, unseen = split_inputs(family_inputs([]), _HELD_OUT_INPUTS, generator)
    tasks = [Task(family, operation, "plain") for family in _FAMILIES for operation in OPERATIONS[family]]
    pairs = [_pair(tasks, known, generator) for _ in range(max(_FEWEST, max_tokens // 30))]
    questions = [_pair(tasks, unseen, generator) for _ in range(_QUESTIONS)]
    found = {}
    for name in ("all tokens", "answers"):
        path = directory / name.replace(" ", "-")
        texts = [(x + y, ((len(x), len(x + y)),) if name == "answers" else None) for x, y in pairs]
        documents = [Document(text, "", targets) for text, targets in texts]
        options = dict(tokenizer_kind="character", validation_fraction=0.0, test_fraction=0.0)
        prepare_dataset(documents, path / "data", vocab_size=256, **options)
        found[name] = _score(_train(path, max_tokens, seed), Tokenizer.load(path / "data"), questions)
    return found


def _pair(tasks: list[Task], inputs: dict[str, list[str]], generator: np.random.Generator) -> tuple[str, str]:
    """(x, y) of a task and an input drawn at random."""
    task = tasks[generator.integers(len(tasks))]
    text = inputs[task.family][generator.integers(len(inputs[task.family]))]
    return f"{task.operation}: {text} -> ", task(text)


def _train(path: Path, max_tokens: int, seed: int) -> CausalLM:
    vocabulary = DatasetManifest.load(path / "data").vocabulary
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=_SEQLEN)
    model = CausalLM(CausalLMConfig.preset("tiny", **sizes, **vocabulary), seed=seed)
    settings = dict(seed=seed, packing="documents", learning_rate=_LEARNING_RATE, optimizer="muon")
    train(model, training_config(path, max_tokens, _SEQLEN, _BATCH_SIZE, **settings), path / "data")
    return model


def _score(model: CausalLM, tokenizer: Tokenizer, questions: list[tuple[str, str]]) -> dict[str, float]:
    answers = tokenizer.encode_batch([y for _, y in questions], add_special_tokens=False)
    pairs = [(tokenizer.encode(x), [*y, tokenizer.eos_token_id]) for (x, _), y in zip(questions, answers, strict=True)]
    scored = [one for [one] in score_continuations(model, [[pair] for pair in pairs])]
    nats = -sum(one.logprob for one in scored) / sum(one.num_tokens for one in scored)
    return {"nats_per_token": nats, "right": sum(one.is_greedy for one in scored) / len(scored)}
