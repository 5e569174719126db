"""Train a language model on text, or continue the run that stands in --output-dir.

Without arguments it trains the default model on the source files of Python's standard library, which every machine has,
in a few minutes on two cores, and prints samples.

Examples:
  arfast train
  arfast train --data corpus.jsonl --preset tiny --output-dir runs/mine --max-tokens 20000000 --save-every 500
  arfast train --init-from runs/default --data notes.txt --output-dir runs/notes --max-steps 100 --lora-rank 8
  arfast train --label-smoothing 0.1 --scheduled-sampling 0.25 --output-dir runs/objectives
  arfast train --model linear --linear-window 4 --linear-ngram --output-dir runs/ngram
  arfast train --recipe small --max-tokens 1228800 --batch-ramp 0:4 614400:8 --seqlen-ramp 0:256 409600:512
  arfast train --recipe llama3-8b --print-config > llama3.json
  torchrun --nproc_per_node=2 --no-python arfast train --output-dir runs/two
  torchrun --nproc_per_node=4 --no-python arfast train --output-dir runs/split --tensor-parallel 2 --context-parallel 2
"""

import argparse
import contextlib
import dataclasses
import json
import sys

# For a model that is trained already.
FINE_TUNING = dict(learning_rate=2e-5, sample_prompts=())
LORA = FINE_TUNING | dict(learning_rate=2e-4)


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
        help="file or directory of text or records, data set made by `arfast tokenize`, JSON file of a mixture of such "
        "data sets, or builtin:python",
    )
    parser.add_argument("--preset", choices=CausalLMConfig.presets(), metavar="NAME", help="model size (default: tiny)")
    kinds = "transformer, or linear: the mean of the tokens' embeddings, and the output head (default: transformer)"
    parser.add_argument("--model", choices=("transformer", "linear"), help=kinds)
    parser.add_argument("--linear-size", type=int, metavar="N", help="of its embeddings (default: 256)")
    parser.add_argument("--linear-window", type=int, metavar="N", help="how many last tokens count (default: all)")
    parser.add_argument(
        "--linear-ngram", action="store_true", default=None, help="an embedding for each place in the window, summed"
    )
    parser.add_argument("--init-from", metavar="DIR", help="start from this model directory, with its tokenizer")
    parser.add_argument("--lora-rank", type=int, help="freeze the model and train adapters of this rank beside it")
    parser.add_argument("--lora-alpha", type=float, help="their output is multiplied by alpha / rank (default: 16)")
    parser.add_argument("--lora-dropout", type=float, help="of their input (default: 0)")
    parser.add_argument(
        "--lora-targets", nargs="+", metavar="NAME", help="layers, as q_proj (default: all but lm_head)"
    )
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer that is learned (default: the preset's)")
    recipes = (
        f"settings to start from: {', '.join(TrainConfig.recipes())} (default: those of this command, shown below)"
    )
    parser.add_argument("--recipe", choices=TrainConfig.recipes(), metavar="NAME", help=recipes)
    parser.add_argument("--config", metavar="FILE", help="JSON object of settings, over those of the recipe")
    parser.add_argument("--print-config", action="store_true", help="print all settings as JSON, and end")
    for name, shared in (
        ("tensor", "heads, channels and vocabulary"),
        ("context", "every sequence"),
        ("expert", "the experts, of those that have other data or context"),
    ):
        parser.add_argument(
            f"--{name}-parallel", type=int, default=1, metavar="RANKS", help=f"ranks that share {shared} (default: 1)"
        )
    between = "split what is between the layers over the tensor ranks too"
    parser.add_argument("--sequence-parallel", action="store_true", help=between)
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
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=shown)
    elif kind == "tuple":
        form = "FROM_TOKENS:VALUE"
        parser.add_argument(flag, nargs="*", type=_stage, default=argparse.SUPPRESS, metavar=form, help=shown)
    elif kind.startswith("tuple"):
        parser.add_argument(flag, nargs="*", default=argparse.SUPPRESS, metavar="TEXT", help=shown)
    else:
        types = {"int": int, "float": float, "str": str}
        parser.add_argument(flag, type=types[kind], default=argparse.SUPPRESS, metavar=kind.upper(), help=shown)


def _stage(text):
    """An entry of a ramp: integers, and behind them the base of the rotary frequencies."""
    try:
        return [int(value) if value.isdigit() else float(value) for value in text.split(":")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must hold FROM_TOKENS:VALUE, got {text!r}") from None


def run(arguments: argparse.Namespace) -> dict | None:
    import torch

    from arfast.data.checks import check_at_least
    from arfast.train import TrainConfig

    check_at_least("train", arguments, threads=1)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    config = TrainConfig.from_dict(_settings(arguments, TrainConfig))
    if arguments.print_config:
        return config.to_dict()
    with _strategy(arguments, config) as strategy:
        return _train(arguments, config, strategy)


@contextlib.contextmanager
def _strategy(arguments, config):
    """One process, or the ranks that torchrun has started."""
    import torch

    from arfast.distributed import Launch, Parallel, ParallelConfig, process_group
    from arfast.train.strategy import OneProcess

    launch = Launch.from_environment()
    sizes = {name: getattr(arguments, f"{name}_parallel") for name in ("context", "tensor", "expert")}
    if launch is None:
        for name, size in sizes.items():
            if size != 1:
                raise ValueError(f"train: {name}_parallel must be 1 in one process (start with torchrun), got {size}")
        yield OneProcess(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    parallel = ParallelConfig.for_ranks(launch.world_size, **sizes)
    with process_group(launch, launch.device):
        options = dict(device=launch.device, dtype=config.dtype, sequence_parallel=arguments.sequence_parallel)
        yield Parallel(parallel, **options)


def _train(arguments, config, strategy):
    from arfast.data import MixtureDataset, prepare_dataset
    from arfast.models import CausalLMConfig, LinearLM
    from arfast.train import Trainer

    def prepare():
        print(f"arfast train: preparing {arguments.data} in {directory}", file=sys.stderr)
        prepare_dataset(arguments.data, directory, tokenizer, vocab_size=vocab_size, progress=config.progress)

    linear = _linear_settings(arguments, strategy)
    preset = CausalLMConfig.preset(arguments.preset or "tiny")
    vocab_size = preset.vocab_size if arguments.vocab_size is None else arguments.vocab_size
    directory = _dataset_directory(arguments.data, config.output_dir)
    expected_size = _vocabulary_of(directory)["vocab_size"] if directory == arguments.data else vocab_size
    strategy.check_settings(config, None if arguments.init_from else preset.replace(vocab_size=expected_size))
    pretrained, tokenizer = _pretrained(arguments, config, strategy)
    if directory != arguments.data:
        strategy.from_main(prepare)
    if pretrained is None:
        vocabulary = _vocabulary_of(directory)
        context = max(preset.max_position_embeddings, config.seqlen)
        model_config = preset.replace(**vocabulary, max_position_embeddings=context)
    if linear is not None:
        model = LinearLM(**vocabulary, **linear, seed=config.seed, device=strategy.device)
    else:
        model = pretrained or strategy.build_model(model_config, seed=config.seed)
    trainable, total = strategy.count_parameters(model)
    if strategy.is_main:
        share = "" if trainable == total else f", {trainable:,} of them ({trainable / total:.2%}) trained"
        print(f"arfast train: {total:,} parameters{share}, {config.dtype}, on {strategy.describe()}", file=sys.stderr)
    trainer = Trainer(model, config, directory, tokenizer, strategy=strategy)
    result = trainer.fit()
    sources = _report_sources(trainer) if isinstance(trainer.datasets["train"], MixtureDataset) else None
    if not strategy.is_main:
        return None
    summary = _summary(result) | dict(parameters=total, trainable_parameters=trainable)
    return summary if sources is None else summary | dict(sources=sources)


def _vocabulary_of(data):
    """Of a data set, or the first of a mixture."""
    from arfast.data import DatasetManifest, dataset_directories

    return DatasetManifest.load(dataset_directories(data)[0]).vocabulary


def _summary(result):
    """Prints samples and evaluation."""
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


def _report_sources(trainer):
    """How often each source of a mixture was seen, and the loss on its own validation split."""
    report = {}
    for name, epochs in trainer.datasets["train"].epochs(trainer.state.position // trainer.config.seqlen).items():
        report[name] = dict(epochs=epochs)
        line = f"{name}: {epochs:.3f} epochs"
        if (split := f"validation/{name}") in trainer.datasets:
            evaluation = trainer.evaluate(split)
            report[name] |= dict(val_loss=evaluation.loss, val_bits_per_byte=evaluation.bits_per_byte)
            line += f", {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte"
        if trainer.strategy.is_main:
            print(line)
    return report


def _linear_settings(arguments, strategy):
    """Sizes of the LinearLM that is asked for, or None."""
    from arfast.models import LinearLMConfig
    from arfast.train.strategy import OneProcess

    given = {name: getattr(arguments, f"linear_{name}") for name in ("size", "window", "ngram")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.model != "linear":
        if given:
            raise ValueError(f"train: model must be linear with linear_{next(iter(given))}, got {arguments.model}")
        return None
    for name in ("preset", "init_from", "lora_rank"):
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"train: {name} must be left out with a linear model, got {value!r}")
    if type(strategy) is not OneProcess:
        raise ValueError("train: model must be transformer on several ranks, got linear")
    settings = {"hidden_size": given.pop("size", 256), **given}
    LinearLMConfig(vocab_size=1, **settings)  # refuses what is wrong before the data are prepared
    return settings


def _pretrained(arguments, config, strategy):
    """(model, tokenizer) of --init-from; None for each without it."""
    import torch

    from arfast.finetune import PretrainedTokenizer, check_tokenizer, load_pretrained
    from arfast.nn.lora import LoraConfig
    from arfast.train.strategy import OneProcess

    given = {name: getattr(arguments, f"lora_{name}") for name in ("rank", "alpha", "dropout", "targets")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and "rank" not in given:
        raise ValueError(f"train: lora_rank must be given with lora_{next(iter(given))}, got none")
    if arguments.init_from is None:
        if given:
            raise ValueError("train: init_from must be given with lora_rank, got none")
        return None, None
    for name in ("preset", "vocab_size"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"train: {name} must be left out with init_from, got {getattr(arguments, name)!r}")
    lora = LoraConfig(**given) if given else None
    if type(strategy) is not OneProcess:
        if lora is not None:
            raise ValueError(f"train: lora_rank must be left out on several ranks, got {lora.rank}")
        tokenizer, model = PretrainedTokenizer.load(arguments.init_from), strategy.load_model(arguments.init_from)
        check_tokenizer(model.config, tokenizer)
        return model, tokenizer
    options = dict(dtype=getattr(torch, config.dtype), device=strategy.device, seed=config.seed)
    return load_pretrained(arguments.init_from, lora=lora, **options)


def _settings(arguments, config_class):
    """What the user said, over a file, over a recipe or the defaults of the command, as fields of TrainConfig."""
    from arfast.train.performance import best_dtype
    from arfast.train.recipes import RECIPES

    given = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(config_class)}
    given = {name: value for name, value in given.items() if name in vars(arguments) and name != "dtype"}
    if arguments.config is not None:
        given = _read_config(arguments.config) | given
    base = DEFAULTS if arguments.recipe is None else RECIPES[arguments.recipe]
    limits = ("max_tokens", "max_steps")
    if arguments.recipe is None and arguments.init_from is not None:
        base = base | (FINE_TUNING if arguments.lora_rank is None else LORA)
    base = {k: v for k, v in base.items() if k not in limits or not any(name in given for name in limits)}
    settings = base | given
    if arguments.dtype != "auto":
        settings["dtype"] = arguments.dtype
    return {"dtype": best_dtype()} | settings


def _read_config(path):
    try:
        with open(path, "rb") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"train: config must be a JSON file, got {path!r} ({error!s:.200})") from None
    if not isinstance(values, dict):
        raise ValueError(f"train: config must hold a JSON object, got {type(values).__name__} in {path!r}")
    return values


def _dataset_directory(data, output_dir):
    """Where the shards are, or are to be: as given when that is a data set already, or a mixture of data sets."""
    from pathlib import Path

    from arfast.data import is_prepared

    return data if is_prepared(data) else str(Path(output_dir) / "data")
