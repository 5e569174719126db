"""Loss, perplexity and bits per byte of a model on text, or its results on tasks of lm-evaluation-harness.

A data set directory of `arfast tokenize` is scored by its validation split, unless --split names another; plain text is
scored whole, document by document, or with --stride as one stream by a sliding window. --tasks needs the harness:
pip install 'arfast[eval]'.

Examples:
  arfast eval runs/default --data runs/default/data --split test
  arfast eval runs/default --data notes.txt
  arfast eval runs/default --data notes.txt --seqlen 256 --stride 128
  arfast eval runs/default --tasks arc_easy,piqa --num-fewshot 5 --limit 100
"""

import argparse
import sys

from arfast.cli.common import add_checkpoint_arguments, load_checkpoint, read_text

_ONLY_WITH_TASKS = ("task_path", "num_fewshot", "limit")
_ONLY_WITH_DATA = ("split", "stride", "max_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="data set directory, text, JSON lines, or builtin:python")
    what.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of lm-evaluation-harness")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="of a data set directory")
    parser.add_argument("--seqlen", type=int, help="tokens per window (default: 512; for tasks the model's context)")
    parser.add_argument("--stride", type=int, help="tokens from window to window, over a text file as one stream")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or task rows at a time (default: 8)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many targets")
    parser.add_argument("--task-path", metavar="DIR", help="directory with tasks of your own, as YAML files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples per prompt (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")


def run(arguments: argparse.Namespace) -> dict:
    from arfast.data.checks import check_at_least

    other, names = ("data", _ONLY_WITH_DATA) if arguments.tasks is not None else ("tasks", _ONLY_WITH_TASKS)
    for name in names:
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"eval: {name} must be left out without {other}, got {value!r}")
    check_at_least("eval", arguments, batch_size=1, max_tokens=1, limit=1, num_fewshot=0)
    if arguments.tasks is not None:
        return _run_tasks(arguments)
    result = _score_documents(arguments) if arguments.stride is None else _score_stream(arguments)
    print(
        f"{result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte, {result.num_tokens:,} tokens"
    )
    return dict(
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        tokens=result.num_tokens,
    )


def _score_documents(arguments):
    import tempfile
    from pathlib import Path

    from tqdm import tqdm

    from arfast.data import MixtureDataset, PackedDataset, is_prepared, prepare_dataset
    from arfast.train import evaluate

    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        directory, split = arguments.data, arguments.split or "validation"
        if not is_prepared(directory):
            if arguments.split is not None:
                raise ValueError(f"eval: split must be left out unless data is a data set directory, got {split!r}")
            directory, split = str(Path(temporary, "data")), "train"
            prepare_dataset(arguments.data, directory, tokenizer, validation_fraction=0.0, test_fraction=0.0)
        open_split = MixtureDataset.load if Path(directory).is_file() else PackedDataset
        data = open_split(directory, split, _seqlen(arguments))
        data.check_tokenizer(tokenizer)
        total = -(-data.num_samples // arguments.batch_size)
        batches = tqdm(data.evaluation_batches(arguments.batch_size), total=total, file=sys.stderr, unit="batch")
        bytes_per_token = data.num_bytes / data.num_targets
        return evaluate(model, batches, bytes_per_token=bytes_per_token, max_tokens=arguments.max_tokens)


def _score_stream(arguments):
    from pathlib import Path

    from arfast.generate import corpus_perplexity

    if arguments.max_tokens is not None:
        raise ValueError(f"eval: max_tokens must be left out with stride, got {arguments.max_tokens}")
    if not Path(arguments.data).is_file():
        raise ValueError(f"eval: data must be a text file with stride, got {arguments.data!r}")
    text = read_text("eval: data", arguments.data)
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.dtype)
    return corpus_perplexity(
        model,
        tokenizer.encode(text),
        seqlen=_seqlen(arguments),
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        num_bytes=len(text.encode()),
        progress=True,
    )


def _seqlen(arguments):
    return 512 if arguments.seqlen is None else arguments.seqlen


def _run_tasks(arguments):
    import importlib.util
    from pathlib import Path

    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("eval: tasks must have lm-evaluation-harness (pip install 'arfast[eval]'), got none")
    if arguments.task_path is not None and not Path(arguments.task_path).is_dir():
        raise ValueError(f"eval: task_path must be a directory, got {arguments.task_path!r}")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from arfast.lm_eval import ArfastLM

    manager = TaskManager(include_path=arguments.task_path)
    names = arguments.tasks.split(",")
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(f"eval: tasks must be known to the harness (see `lm_eval ls tasks`), got {name!r}")
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.dtype)
    adapter = ArfastLM(model, tokenizer, batch_size=arguments.batch_size, max_length=arguments.seqlen)
    results = simple_evaluate(
        model=adapter,
        tasks=manager.match_tasks(names),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        log_samples=False,
    )
    print(make_table(results))
    return dict(
        tasks={
            task: {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
            for task, metrics in results["results"].items()
        }
    )
