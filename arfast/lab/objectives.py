"""What a model is trained to say: the next token's likelihood, label smoothing, scheduled sampling, and likelihood of
answers alone, on the same tokens of real text.

Calibration of the next token, as expected calibration error on the validation split. Exposure bias after prompts from
the test split: 32 tokens that a model generates cost more nats under a 4-gram model of the training split than the
32 real ones; how many more, after a prefix of the model's own and after a real one, by the prefix's length. And
log P(answer | question) of models that were trained on all tokens, and on those of answers.

Runs are kept in --output-dir: a study that was interrupted goes on, and one that is finished is only measured again.

Example:
  arfast lab objectives
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from arfast.data import DatasetManifest, PackedDataset, Tokenizer
from arfast.data.checks import check_at_least
from arfast.generate import ReliabilityDiagram, reliability
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig

from .conditional import compare_masks
from .exposure import measure_exposure, repetition
from .held_out import draw_windows
from .ngram import NGramModel
from .result import save_result
from .training import prepared_data, train, training_config

_PROMPT, _LENGTHS, _PASSAGE = 32, (8, 16, 32, 64, 128, 224), 32
_SEQLEN, _BATCH_SIZE, _LEARNING_RATE = _PROMPT + _LENGTHS[-1] + _PASSAGE, 4, 4e-3
_JUDGE_ORDER, _BINS, _FEWEST = 4, 15, 50  # a bin with fewer predictions is not drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="builtin:python", help="text or a data set (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=600_000, metavar="N", help="per model (default: 600000)")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--label-smoothing", type=float, default=0.1, metavar="X", help="(default: %(default)s)")
    peak = "probability at the end of the run, to which it rises from 0 (default: %(default)s)"
    parser.add_argument("--scheduled-sampling", type=float, default=0.25, metavar="P", help=peak)
    parser.add_argument("--prompts", type=int, default=300, metavar="N", help="to continue (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def run(arguments: argparse.Namespace) -> dict:
    check_at_least("lab objectives", arguments, max_tokens=1, prompts=2, seed=0)
    objectives = {
        "plain": {},
        f"label smoothing {arguments.label_smoothing}": {"label_smoothing": arguments.label_smoothing},
        f"scheduled sampling {arguments.scheduled_sampling}": {"scheduled_sampling": arguments.scheduled_sampling},
    }
    configs = {name: _settings(name, objective, arguments) for name, objective in objectives.items()}
    sizes = dict(hidden_size=arguments.hidden_size, intermediate_size=3 * arguments.hidden_size)
    model_config = CausalLMConfig.preset("tiny", vocab_size=1, max_position_embeddings=_SEQLEN, **sizes)
    directory = prepared_data(arguments)
    windows, judge = _windows(directory, arguments), _judge(directory)
    nats = -judge.log_prob(windows.numpy())[:, _PROMPT:]
    repeated = np.mean([repetition(row, _PROMPT) for row in windows.numpy()])
    text = {"judge_perplexity": float(np.exp(nats.mean())), "repeated": float(repeated)}
    found, diagrams = {}, {}
    for name, config in configs.items():
        found[name], diagrams[name] = _study(model_config, config, directory, windows, judge, arguments.seed)
    masks = compare_masks(Path(arguments.output_dir) / "conditional", max(1, arguments.max_tokens // 2), arguments.seed)
    print(describe(found, text, masks), flush=True)
    figure = save_result(arguments, lambda figure: draw(figure, found, diagrams), (11, 4.5))
    return {"objectives": found, "real_text": text, "loss_on": masks, "figure": figure}


def _settings(name: str, objective: dict[str, float], arguments: argparse.Namespace) -> TrainConfig:
    path, sizes = Path(arguments.output_dir) / name.replace(" ", "-"), (arguments.max_tokens, _SEQLEN, _BATCH_SIZE)
    settings = dict(seed=arguments.seed, learning_rate=_LEARNING_RATE, optimizer="muon")
    return training_config(path, *sizes, **settings, **objective)


def _windows(directory: str, arguments: argparse.Namespace) -> torch.Tensor:
    """int64 [N, prompt and continuation] of test documents."""
    shards = DatasetManifest.load(directory).open_split("test")
    documents = [tokens.astype(np.int64) for shard in shards for tokens in shard.documents()]
    return draw_windows(documents, arguments.prompts, _SEQLEN, np.random.default_rng(arguments.seed))


def _judge(directory: str) -> NGramModel:
    """Of the whole training split, of which the models see a part."""
    manifest = DatasetManifest.load(directory)
    documents = [tokens.astype(np.int64) for shard in manifest.open_split("train") for tokens in shard.documents()]
    return NGramModel(documents, _JUDGE_ORDER, manifest.tokenizer["vocab_size"])


def _study(
    model_config: CausalLMConfig,
    config: TrainConfig,
    directory: str,
    windows: torch.Tensor,
    judge: NGramModel,
    seed: int,
) -> tuple[dict, ReliabilityDiagram]:
    """Train with an objective; perplexity, calibration, exposure bias."""
    vocabulary = DatasetManifest.load(directory).vocabulary
    model = CausalLM(model_config.replace(**vocabulary), seed=config.seed)
    result = train(model, config, directory)
    diagram = reliability(
        model, PackedDataset(directory, "validation", _SEQLEN).evaluation_batches(_BATCH_SIZE), num_bins=_BINS
    )
    allowed = torch.ones(vocabulary["vocab_size"], dtype=torch.bool)
    allowed[list(Tokenizer.load(directory).special_token_ids.values())] = False
    exposure = measure_exposure(model, judge, windows, _PROMPT, _LENGTHS, _PASSAGE, allowed, seed)
    return {
        "perplexity": result.evaluation.perplexity,
        "accuracy": diagram.accuracy,
        "confidence": diagram.confidence,
        "calibration_error": diagram.expected_calibration_error,
        "repeated": float(exposure.repeated.mean()),
        "by_length": exposure.rows(),
        "seconds": result.seconds,
    }, diagram


def describe(found: dict[str, dict], text: dict[str, float], masks: dict[str, dict[str, float]]) -> str:
    """Tables of next tokens, of lengths, and of answers."""
    lines = [f"{'':>24} perplexity  accuracy  confidence    ECE  repeated  seconds"]
    for name, one in found.items():
        shares = f"{one['accuracy']:>8.1%}  {one['confidence']:>10.1%}  {one['calibration_error']:>5.1%}"
        lines.append(
            f"{name:>24} {one['perplexity']:>10.1f}  {shares}  {one['repeated']:>8.1%}  {one['seconds']:>7.0f}"
        )
    judged = f"the judge's perplexity {text['judge_perplexity']:.1f}"
    lines.append(f"{'real text':>24} {judged}, repeated {text['repeated']:.1%}")
    lengths = " ".join(f"{length:>7}" for length in _LENGTHS)
    lines.append(f"{'nats above real text, after a prefix of':>46} {lengths} tokens")
    for name, one in found.items():
        for key, what in (("own", "its own"), ("real", "real ones"), ("bias", "difference"), ("bias_error", "+-")):
            values = " ".join(f"{row[key]:>7.3f}" for row in one["by_length"])
            lines.append(f"{f'{name}, {what}':>46} {values}")
    for name, one in masks.items():
        scores = f"{one['nats_per_token']:.3f} nats per token of an answer, {one['right']:.1%} right"
        lines.append(f"{f'loss on {name}':>24} {scores}")
    return "\n".join(lines)


def draw(figure, found: dict[str, dict], diagrams: dict[str, ReliabilityDiagram]) -> None:
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="tab:gray", linestyle=":", label="calibrated")
    for place, (name, one) in enumerate(found.items()):
        diagram, color = diagrams[name], f"C{place}"
        full = diagram.counts >= _FEWEST
        label = f"{name}: ECE {one['calibration_error']:.1%}"
        left.plot(diagram.bin_confidence[full], diagram.bin_accuracy[full], marker="o", color=color, label=label)
        for key, style, prefix in (("own", "-", "its own text"), ("real", "--", "real text")):
            values = [row[key] for row in one["by_length"]]
            right.plot(_LENGTHS, values, style, marker="o", color=color, label=f"{name}, after {prefix}")
    left.set_xlabel("confidence in the next token")
    left.set_ylabel("accuracy")
    left.legend(fontsize="small")
    right.set_xlabel("tokens between prompt and passage")
    right.set_ylabel("nats per token above a real passage, by a 4-gram model")
    right.set_xscale("log", base=2)
    right.legend(fontsize="small")
