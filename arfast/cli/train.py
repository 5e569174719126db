"""Train a language model on text, or continue the run that stands in --output-dir.

Without arguments it trains the default model on the source files of Python's standard library, which every machine has,
in a few minutes on two cores, and prints samples.

Examples:
  arfast train
  arfast train --data corpus.jsonl --preset tiny --output-dir runs/mine --max-tokens 20000000 --save-every 500
  torchrun --nproc_per_node=2 -m arfast train --output-dir runs/two
"""

import argparse
import contextlib
import dataclasses
import sys

# What the default run is made of: chosen so that it ends in under five minutes on two cores.
DEFAULTS = dict(
    max_tokens=2_600_000,
    seqlen=256,
    batch_size=8,
    learning_rate=3e-3,
    save_every=200,
    eval_every=400,
    eval_tokens=50_000,
    log_every=10,
    sample_prompts=("def ", "import os\n", "class "),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from arfast.models import CausalLMConfig
    from arfast.train import TrainConfig

    parser.add_argument(
        "--data",
        default="builtin:python",
        help="text file, JSON-lines file, directory, data set made by `arfast tokenize`, or builtin:python",
    )
    parser.add_argument("--preset", default="tiny", choices=CausalLMConfig.presets(), metavar="NAME", help="model size")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer that is learned (default: the preset's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    dtype = "of the arithmetic; auto: bfloat16 where the CPU has instructions for it, or on a GPU (default: auto)"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=dtype)
    for field in dataclasses.fields(TrainConfig):
        if field.name != "dtype":
            _add_field(parser, field)


def _add_field(parser, field):
    """A flag for a field of TrainConfig, whose own checks have the last word."""
    flag = "--" + field.name.replace("_", "-")
    default = DEFAULTS.get(field.name, field.default)
    kind = str(field.type).partition(" | ")[0]
    shown = f"(default: {' | '.join(map(repr, default)) if isinstance(default, tuple) else default})"
    if kind == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=shown)
    elif kind.startswith("tuple"):
        parser.add_argument(flag, nargs="*", default=argparse.SUPPRESS, metavar="TEXT", help=shown)
    else:
        types = {"int": int, "float": float, "str": str}
        parser.add_argument(flag, type=types[kind], default=argparse.SUPPRESS, metavar=kind.upper(), help=shown)


def run(arguments: argparse.Namespace) -> dict | None:
    import torch

    from arfast.train import TrainConfig

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"train: threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    config = TrainConfig(**_settings(arguments, TrainConfig))
    with _strategy(config) as strategy:
        return _train(arguments, config, strategy)


@contextlib.contextmanager
def _strategy(config):
    """One process, or the ranks that torchrun has started."""
    import torch

    from arfast.distributed import DataParallel, Launch, process_group
    from arfast.train.strategy import OneProcess

    launch = Launch.from_environment()
    if launch is None:
        yield OneProcess(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    with process_group(launch, launch.device):
        yield DataParallel(device=launch.device, dtype=config.dtype)


def _train(arguments, config, strategy):
    from arfast.data import DatasetManifest, prepare_dataset
    from arfast.models import CausalLMConfig
    from arfast.train import Trainer

    def prepare():
        print(f"arfast train: preparing {arguments.data} in {directory}", file=sys.stderr)
        prepare_dataset(arguments.data, directory, vocab_size=vocab_size, progress=config.progress)

    preset = CausalLMConfig.preset(arguments.preset)
    vocab_size = preset.vocab_size if arguments.vocab_size is None else arguments.vocab_size
    directory = _dataset_directory(arguments.data, config.output_dir)
    if directory != arguments.data:
        strategy.from_main(prepare)
    tokenizer = DatasetManifest.load(directory).tokenizer
    model_config = preset.replace(
        vocab_size=tokenizer["vocab_size"],
        max_position_embeddings=max(preset.max_position_embeddings, config.seqlen),
        **{name: tokenizer[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    model = strategy.build_model(model_config, seed=config.seed)
    if strategy.is_main:
        size = f"{model.num_parameters():,} parameters, {config.dtype}"
        print(f"arfast train: {size}, on {strategy.describe()}", file=sys.stderr)
    result = Trainer(model, config, directory, strategy=strategy).fit()
    if not strategy.is_main:
        return None
    for sample in result.samples:
        print(f"--- {sample['prompt']!r}\n{sample['prompt']}{sample['text']}\n")
    summary = dict(output_dir=result.output_dir, step=result.step, tokens=result.tokens, loss=result.loss)
    if result.evaluation is not None:
        evaluation = result.evaluation
        print(
            f"validation: {evaluation.loss:.4f} nats per token, perplexity {evaluation.perplexity:.2f}, "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )
        summary |= dict(
            val_loss=evaluation.loss,
            val_perplexity=evaluation.perplexity,
            val_bits_per_byte=evaluation.bits_per_byte,
        )
    return summary


def _settings(arguments, config_class):
    """What the user said, over the defaults of the command, as fields of TrainConfig."""
    given = vars(arguments)
    settings = {f.name: given[f.name] for f in dataclasses.fields(config_class) if f.name in given}
    limits = ("max_tokens", "max_steps")
    defaults = {k: v for k, v in DEFAULTS.items() if k not in limits or not any(name in settings for name in limits)}
    settings = defaults | settings
    settings["dtype"] = _best_dtype() if arguments.dtype == "auto" else arguments.dtype
    return settings


def _best_dtype():
    import torch

    instructions = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_available() or any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if fast else "float32"


def _dataset_directory(data, output_dir):
    """Where the shards are, or are to be: the given directory when it is a data set already."""
    from pathlib import Path

    return data if Path(data, "dataset.json").is_file() else str(Path(output_dir) / "data")
