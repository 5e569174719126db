"""The recipe "small" against plain training as nanoGPT does it: bits per byte over tokens and over seconds.

    python benchmarks/compare_training.py sweep                # learning rates and batch sizes, on short runs
    python benchmarks/compare_training.py run                  # writes results/training-comparison.json and .png

One model of 11 M parameters, the same initial weights, the same training split of the standard library, as many tokens.
Ours: `Trainer` with the recipe, whose stages are scaled to the length of the run. Plain: `plain_training.py`, compiled.
Both run in one process with one allocator setting and take turns, step by step, so that both see the same load of the
machine; seconds are those in which a run had its turn, with its data, without compilation and evaluation. Both are
scored by one evaluation: their weights, rounded to bfloat16, in one `CausalLM`, on the same windows of the validation
split, bytes counted without the end tokens, whose loss is included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import report
import torch
from llama import LLAMA_11M
from plain_training import PlainConfig, PlainLlama, PlainTrainer

from arfast.data import PackedDataset, prepare_dataset
from arfast.data.manifest import DatasetManifest
from arfast.data.stream import TokenStream
from arfast.figures import save_figure
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer
from arfast.train.evaluation import evaluate
from arfast.train.recipes import RECIPES

# As many parameters as LLAMA_11M, fewer of them in the vocabulary.
MODEL = LLAMA_11M.replace(
    vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
)
# Plain training, to be swept; the last two with the learning rate that was best.
LEARNING_RATES, BATCH_SIZES = (6e-4, 1e-3, 1.5e-3, 3e-3), (2, 8)
OUR_LEARNING_RATES = (1e-3, 1.5e-3, 3e-3)


def recipe_of(max_tokens: int, name: str = "small", **overrides) -> dict:
    """The settings of a recipe whose every length in tokens is scaled to a run of ``max_tokens``."""
    settings = {**RECIPES[name], **overrides}
    scale = max_tokens / settings["max_tokens"]
    for key in ("max_tokens", "warmup_tokens", "decay_tokens"):
        settings[key] = round(scale * settings[key])
    for key in ("batch_ramp", "seqlen_ramp"):
        settings[key] = [[round(scale * start), *values] for start, *values in settings[key]]
    return settings


class Scorer:
    """Bits per byte of weights on a split, in bfloat16: (state dict, number of targets or None for all) -> float."""

    def __init__(self, config: CausalLMConfig, data: str, seqlen: int, dtype: torch.dtype) -> None:
        self._model = CausalLM(config, dtype=dtype)
        self._data = PackedDataset(data, "validation", seqlen)

    def __call__(self, weights: dict, max_tokens: int | None = None) -> float:
        self._model.load_state_dict(weights)
        batches = self._data.evaluation_batches(8)
        bytes_per_token = self._data.num_bytes / self._data.num_targets
        return evaluate(self._model, batches, bytes_per_token=bytes_per_token, max_tokens=max_tokens).bits_per_byte


class TurnTaking(Trainer):
    """A Trainer that, after every step, hands over to ``others``, a function of the tokens so far.

    seconds: of training, from the first step on, data and logs included, without the turns of others.
    """

    def __init__(self, *arguments, others, **options) -> None:
        super().__init__(*arguments, **options)
        self.seconds, self._others, self._turn = 0.0, others, None

    def step(self, batches):
        start = time.perf_counter() if self._turn is None else self._turn
        result = super().step(batches)
        self.seconds += time.perf_counter() - start
        self._others(self.state.tokens)
        self._turn = time.perf_counter()
        return result


def training_stream(data: str) -> np.ndarray:
    """All tokens of the training split, int64 [N]."""
    stream = TokenStream(DatasetManifest.load(data).open_split("train"))
    tokens = np.empty(stream.num_tokens, dtype=np.int64)
    stream.read(0, tokens)
    return tokens


def plain_trainer(model: CausalLM, data: str, settings: PlainConfig) -> PlainTrainer:
    plain = PlainLlama(model.config)
    plain.load_state_dict(model.state_dict())
    return PlainTrainer(plain, settings, training_stream(data))


def compare(model_config, data, ours, plain, output_dir, *, points=16, score_tokens=65_536, save=lambda result: None):
    """Train both, in turns, and give both curves; ``save`` is called with what there is after every point.

    Args:
        ours: fields of a TrainConfig. plain: of a PlainConfig.
        points: of each curve, after its first at 0 tokens; score_tokens: targets of each, but for "final", of all.
    """
    model = CausalLM(model_config, seed=0)
    config = TrainConfig(output_dir=str(output_dir), progress=False, **ours)
    score = Scorer(model_config, data, config.seqlen, getattr(torch, config.dtype))
    peer = plain_trainer(model, data, PlainConfig(**plain))
    curves = {"ours": [], "plain": []}
    result = {"ours": config.to_dict(), "plain": plain, "parameters": model.num_parameters(), "curves": curves}
    plain_seconds, reached = 0.0, 0

    def note(tokens: int) -> None:
        runs = {"ours": (trainer.seconds, trainer.model), "plain": (plain_seconds, peer.model)}
        for name, (seconds, trained) in runs.items():
            bits = score(trained.state_dict(), score_tokens)
            curves[name].append({"tokens": tokens, "seconds": round(seconds, 2), "bits_per_byte": round(bits, 5)})
        if tokens >= config.total_tokens:
            result["final"] = {name: round(score(run[1].state_dict()), 5) for name, run in runs.items()}
        save(result)

    def plain_turn(tokens: int) -> None:
        nonlocal plain_seconds, reached
        start = time.perf_counter()
        while peer.tokens < tokens:
            peer.step()
        plain_seconds += time.perf_counter() - start
        if tokens * points // config.total_tokens > reached:
            reached = tokens * points // config.total_tokens
            note(tokens)

    trainer = TurnTaking(model, config, data, others=plain_turn)
    peer.warm_up()
    note(0)
    trainer.fit()
    assert peer.tokens == trainer.state.tokens, (peer.tokens, trainer.state.tokens)
    return result


def sweep(model_config, data, max_tokens, dtype, folder):
    """Final bits per byte of short runs, as rows {"run", settings..., "bits_per_byte"}, while they come."""
    warmup = round(0.02 * max_tokens)
    score = Scorer(model_config, data, 512, getattr(torch, dtype))
    fixed = dict(max_tokens=max_tokens, warmup_tokens=warmup, seqlen=512, dtype=dtype)

    def plain_run(**chosen):
        trainer = plain_trainer(CausalLM(model_config, seed=0), data, PlainConfig(**fixed, **chosen))
        while trainer.tokens < max_tokens:
            trainer.step()
        return {"run": "plain", **chosen, "bits_per_byte": round(score(trainer.model.state_dict()), 5)}

    rows = []
    for rate in LEARNING_RATES:
        rows.append(plain_run(learning_rate=rate, batch_size=4))
        yield rows[-1]
    best = min(rows, key=lambda row: row["bits_per_byte"])["learning_rate"]
    for batch_size in BATCH_SIZES:
        yield plain_run(learning_rate=best, batch_size=batch_size)
    for rate in OUR_LEARNING_RATES:
        settings = recipe_of(max_tokens, learning_rate=rate) | dict(dtype=dtype, eval_every=0, progress=False)
        trainer = Trainer(
            CausalLM(model_config, seed=0), TrainConfig(output_dir=f"{folder}/ours-{rate}", **settings), data
        )
        trainer.fit()
        bits = round(score(trainer.model.state_dict()), 5)
        yield {"run": "ours", "learning_rate": rate, "bits_per_byte": bits}


def plot(result: dict, path: Path) -> None:
    labels = {"ours": "arfast, recipe small", "plain": "plain torch, as nanoGPT trains (compiled)"}

    def draw(figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, scale, label in ((left, "tokens", 1e6, "tokens (M)"), (right, "seconds", 1, "seconds")):
            for name, color in (("ours", "tab:blue"), ("plain", "tab:orange")):
                rows = [row for row in result["curves"][name] if row["tokens"]]
                x, y = [row[key] / scale for row in rows], [row["bits_per_byte"] for row in rows]
                axes.plot(x, y, marker="o", markersize=3, color=color, label=labels[name])
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        left.set_ylabel("bits per byte, validation")
        right.legend()

    save_figure(path, draw, (10, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("sweep", "run"))
    parser.add_argument("--data", help="prepared data set (default: builtin:python, prepared anew)")
    parser.add_argument("--max-tokens", type=int, help="of each run (default: 1638400; of a sweep 409600)")
    parser.add_argument("--learning-rate", type=float, help="of ours (default: the recipe's)")
    parser.add_argument("--plain-learning-rate", type=float, default=1e-3, help="see sweep")
    parser.add_argument("--plain-batch-size", type=int, default=4, help="rows of 512 tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=report.FOLDER / "training-comparison.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or f"{folder}/data"
        if arguments.data is None:
            prepare_dataset("builtin:python", data, vocab_size=MODEL.vocab_size)
        vocab_size = DatasetManifest.load(data).tokenizer["vocab_size"]
        model_config = MODEL.replace(vocab_size=vocab_size)
        max_tokens = arguments.max_tokens or (409_600 if arguments.command == "sweep" else 1_638_400)
        if arguments.command == "sweep":
            for row in sweep(model_config, data, max_tokens, arguments.dtype, folder):
                print(json.dumps({"max_tokens": max_tokens, **row}), flush=True)
            return
        overrides = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
        ours = recipe_of(max_tokens, **overrides) | dict(dtype=arguments.dtype, eval_every=0)
        plain = dict(
            max_tokens=max_tokens,
            warmup_tokens=ours["warmup_tokens"],
            learning_rate=arguments.plain_learning_rate,
            batch_size=arguments.plain_batch_size,
            seqlen=ours["seqlen"],
            dtype=arguments.dtype,
        )

        def save(result: dict) -> None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({"machine": report.machine(), **result}, indent=1) + "\n")
            print({name: curve[-1] for name, curve in result["curves"].items()}, flush=True)

        result = compare(model_config, data, ours, plain, f"{folder}/run", save=save)
        plot(result, arguments.output.with_suffix(".png"))
        print(json.dumps(result["final"]))


if __name__ == "__main__":
    main()
