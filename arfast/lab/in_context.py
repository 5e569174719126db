"""In-context learning: a small model that has read many tasks, each as a list of examples "input -> output", does the
task that the examples in its prompt show; and does it better the more of them there are.

Brown et al., "Language Models are Few-Shot Learners" (arXiv:2005.14165, section 2): zero-, one- and few-shot prompts,
no update of weights. The tasks are number words, dates, and operations on letters, each in one of four frames: see
arfast.lab.string_tasks. The inputs that are asked for are in no document that the model is trained on, and of every
operation one frame is held out too. The words are those of --data.

Example:
  arfast lab in-context
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arfast.data import DatasetManifest, Document, Tokenizer, builtin, prepare_dataset, read_documents
from arfast.data.checks import check_at_least
from arfast.data.prepare import BUILTIN_PREFIX
from arfast.generate import FewShotPrompt, score_continuations
from arfast.models import CausalLM, CausalLMConfig

from .result import save_result
from .string_tasks import OPERATIONS, Task, family_inputs, frequent_words, split_inputs, split_tasks
from .training import train, training_config

SHOTS = (0, 1, 2, 4, 8)
_SEQLEN, _BATCH_SIZE, _LEARNING_RATE = 336, 4, 4e-3
_OPTIMIZER = "muon"  # after a million tokens 0.88 nats per token of an answer, with AdamW at 3e-3 1.21
_WORDS, _HELD_OUT_INPUTS = 4000, 0.1
_END = "\n"  # of an example


@dataclass(frozen=True)
class Question:
    """A task, an input that was held out, and examples of the task to be shown before it."""

    task: Task
    text: str
    examples: tuple[tuple[str, str], ...]

    def prompt(self, shots: int) -> str:
        return render(self.examples[:shots], self.text)


def render(examples: Sequence[tuple[str, str]], text: str) -> str:
    """Examples, and the input of one more.

    >>> render([("17", "18")], "41")
    '17 -> 18\\n41 -> '
    """
    return FewShotPrompt(examples=examples, question_prefix="", answer_prefix=" -> ", separator=_END).render(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="builtin:python", help="text to take words from (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2_000_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="per family (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of tasks, examples and weights (default: 0)")


def run(arguments: argparse.Namespace) -> dict:
    check_at_least("lab in-context", arguments, max_tokens=1, questions=1, seed=0)
    settings = dict(hidden_size=arguments.hidden_size, intermediate_size=3 * arguments.hidden_size)
    config = CausalLMConfig.preset("tiny", vocab_size=1, max_position_embeddings=_SEQLEN, **settings)
    generator = np.random.default_rng(arguments.seed)
    inputs, unseen = split_inputs(family_inputs(_words(arguments.data)), _HELD_OUT_INPUTS, generator)
    tasks, new_tasks = split_tasks(generator)
    questions = {
        name: list(draw_questions(some, inputs, unseen, arguments.questions, generator))
        for name, some in (("known tasks", tasks), ("new frames", new_tasks))
    }
    directory = Path(arguments.output_dir) / "data"
    documents = draw_documents(tasks, inputs, arguments.max_tokens, generator)
    tokenizer = line_tokenizer([document.text for document in documents])
    prepare_dataset(documents, directory, tokenizer, validation_fraction=0.02, test_fraction=0.0)
    model, seconds = _train(config, directory, arguments)
    found = {name: evaluate(model, tokenizer, some) for name, some in questions.items()}
    print(describe(found), flush=True)
    print(_example(model, tokenizer, questions["new frames"]))
    figure = save_result(arguments, lambda figure: draw(figure, found), (9, 4))
    return {"parameters": model.num_parameters(), "seconds": seconds, "accuracy": found, "figure": figure}


def _words(data: str) -> list[str]:
    is_builtin = data.startswith(BUILTIN_PREFIX)
    documents = builtin(data.removeprefix(BUILTIN_PREFIX)) if is_builtin else read_documents(data)
    words = frequent_words((document.text for document in documents), _WORDS)
    if len(words) < 100:
        raise ValueError(f"lab in-context: data must hold 100 frequent words of 3 to 5 letters, got {len(words)}")
    return words


def line_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Characters as tokens, and the end of a line as the token that ends an answer."""
    characters = Tokenizer.train([*texts, _END], 256, "character")
    with tempfile.TemporaryDirectory() as path:
        characters.save(path)
        content = (Path(path) / "tokenizer.json").read_text()
    special = characters.special_tokens
    return Tokenizer(content, special["bos_token"], _END, special["pad_token"])


def draw_documents(
    tasks: Sequence[Task], inputs: dict[str, list[str]], max_tokens: int, generator: np.random.Generator
) -> list[Document]:
    """One task each, drawn at random, with as many examples as a sequence has room for; of max_tokens tokens, and as
    many more as are held out for validation. The outputs are targets, each closed by the end of its line."""
    documents, total = [], 0
    while total < 1.05 * max_tokens:
        task = tasks[generator.integers(len(tasks))]
        texts, text, targets = inputs[task.family], "", []
        while True:
            asked = texts[generator.integers(len(texts))]
            question, answer = render([], asked), task(asked)
            if 1 + len(text) + len(question + answer) + len(targets) + 1 > _SEQLEN:
                break
            text += question + answer
            targets.append((len(text) - len(answer), len(text)))
        documents.append(Document(text, str(task), tuple(targets)))
        total += 1 + len(text) + len(targets)
    return documents


def draw_questions(
    tasks: Sequence[Task],
    inputs: dict[str, list[str]],
    unseen: dict[str, list[str]],
    count: int,
    generator: np.random.Generator,
) -> Iterator[Question]:
    """`count` questions of each family, of its tasks in turn, about unseen inputs; the examples are others."""
    for family in OPERATIONS:
        own = [task for task in tasks if task.family == family]
        for number in range(count):
            task, texts = own[number % len(own)], unseen[family]
            shown = generator.choice(len(inputs[family]), size=max(SHOTS), replace=False)
            examples = tuple((inputs[family][i], task(inputs[family][i])) for i in shown)
            yield Question(task, texts[generator.integers(len(texts))], examples)


def _train(config: CausalLMConfig, directory: Path, arguments: argparse.Namespace) -> tuple[CausalLM, float]:
    """The trained model, and its seconds of training."""
    model = CausalLM(config.replace(**DatasetManifest.load(directory).vocabulary), seed=arguments.seed)
    path, sizes = Path(arguments.output_dir) / "model", (arguments.max_tokens, _SEQLEN, _BATCH_SIZE)
    settings = dict(seed=arguments.seed, packing="documents", learning_rate=_LEARNING_RATE, optimizer=_OPTIMIZER)
    return model, train(model, training_config(path, *sizes, **settings), directory).seconds


def evaluate(model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> dict[str, dict]:
    """By family: share of right answers by the number of examples shown, its 95 % interval, and the share by operation
    with the most examples."""
    right = np.stack([answered(model, tokenizer, questions, shots) for shots in SHOTS], axis=1)  # [questions, shots]
    found = {}
    for family, operations in OPERATIONS.items():
        own = np.array([question.task.family == family for question in questions])
        names = np.array([question.task.operation for question in questions])
        counts, total = right[own].sum(0), int(own.sum())
        found[family] = {
            "shots": list(SHOTS),
            "accuracy": (counts / total).tolist(),
            "interval": [wilson_interval(int(count), total) for count in counts],
            "by_operation": {name: float(right[own & (names == name), -1].mean()) for name in operations},
        }
    return found


def answered(model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question], shots: int) -> np.ndarray:
    """bool [N]: whether greedy decoding gives the whole answer, up to its end, after so many examples."""
    prompts = tokenizer.encode_batch([question.prompt(shots) for question in questions])
    answers = [question.task(question.text) + _END for question in questions]
    pairs = zip(prompts, tokenizer.encode_batch(answers, add_special_tokens=False), strict=True)
    scored = score_continuations(model, [[pair] for pair in pairs])
    return np.array([one.is_greedy for [one] in scored])


def wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Of a probability of which `count` of `total` were seen (Wilson 1927); z = 1.96: 95 %.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share, weight = count / total, z * z / total
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (share + weight / 2 - half) / (1 + weight), (share + weight / 2 + half) / (1 + weight)


def describe(found: dict[str, dict[str, dict]]) -> str:
    lines = [f"{'right answers after':>24} {' '.join(f'{shots:>5}' for shots in SHOTS)} examples"]
    for name, families in found.items():
        for family, one in families.items():
            shares = " ".join(f"{value:>5.0%}" for value in one["accuracy"])
            lines.append(f"{f'{family}, {name}':>24} {shares}")
    return "\n".join(lines)


def _example(model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> str:
    """A prompt with two examples, and what the model makes of it."""
    question = questions[0]
    ids = torch.tensor([tokenizer.encode(question.prompt(2))])
    new = model.generate(ids, max_new_tokens=40)[0, ids.shape[1] :]
    return f"for example:\n{question.prompt(2)}{tokenizer.decode(new).rstrip(_END)}"


def draw(figure, found: dict[str, dict[str, dict]]) -> None:
    panels = figure.subplots(1, len(found), sharey=True)
    places = range(len(SHOTS))
    for panel, (name, families) in zip(panels, found.items(), strict=True):
        for family, one in families.items():
            shares = 100 * np.array(one["accuracy"])
            low, high = 100 * np.array(one["interval"]).T
            panel.errorbar(places, shares, [shares - low, high - shares], marker="o", capsize=3, label=family)
        panel.set_xticks(places, [str(shots) for shots in SHOTS])
        panel.set_xlabel("examples in the prompt")
        panel.set_title(f"{name}, unseen inputs", fontsize="medium")
    panels[0].set_ylabel("right answers (%)")
    panels[0].legend()
