"""Scaling laws: plan a sweep of small runs, run it, fit the laws to their losses, predict larger runs.

Examples:
  arfast scale plan sweep --budgets 8e11 1.6e12 3.2e12 6.4e12 --target 2e13
  arfast scale run sweep
  arfast scale fit sweep
  arfast scale fit runs.csv --columns N=params D=tokens L=loss --hold-out 2 --loss huber --output-dir fits
  arfast scale predict sweep --budget 1e15
  arfast scale predict sweep --parameters 5e6 --tokens 1e8
"""

import argparse
import os
import sys
from pathlib import Path

# All runs are measured on the same text, so a small part of it will do: more would cost as much as a small run.
_VALIDATION_FRACTION = 0.02
_RUNS = "a sweep's directory, or a .csv or .jsonl table of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    plan = actions.add_parser("plan", help="write plan.json: models, tokens and settings for budgets of compute")
    _add_plan_arguments(plan)
    run = actions.add_parser(
        "run", help="do the runs of plan.json that are not done; kill it and start it again at will"
    )
    run.add_argument("directory", help="with a plan.json")
    run.add_argument("--max-runs", type=int, help="end after so many (default: all)")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    fit = actions.add_parser("fit", help="fit the laws, write fit.json and scaling.png")
    fit.add_argument("runs", help=_RUNS)
    fit.add_argument("--columns", nargs="+", default=[], metavar="KEY=NAME", help="names of the columns N, D, L and C")
    fit.add_argument(
        "--hold-out", type=int, metavar="K", help="leave out the K largest runs (default: those planned so)"
    )
    fit.add_argument("--loss", choices=("squared", "huber"), default="squared", help="(default: squared)")
    fit.add_argument("--resamples", type=int, default=200, help="of the bootstrap (default: 200)")
    fit.add_argument("--confidence", type=float, default=0.9, help="of the intervals (default: 0.9)")
    fit.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    fit.add_argument("--output-dir", help="for fit.json and scaling.png (default: where the runs are)")
    predict = actions.add_parser("predict", help="loss of a run, or the best run of a budget, from fit.json")
    predict.add_argument("fit", help="fit.json, or its directory")
    predict.add_argument("--parameters", type=float, metavar="N", help="all of a model's, a tied head once")
    predict.add_argument("--tokens", type=float, metavar="D", help="that it is trained on")
    predict.add_argument("--budget", type=float, metavar="FLOPS", help="of training")


def _add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("directory", help="where the sweep is to be")
    plan.add_argument("--budgets", type=float, nargs="+", required=True, metavar="FLOPS", help="of one run each")
    plan.add_argument("--target", type=float, metavar="FLOPS", help="of one more run, which the fit is to predict")
    plan.add_argument("--data", default="builtin:python", help="as for `arfast train` (default: builtin:python)")
    plan.add_argument("--vocab-size", type=int, default=1024, help="of a tokenizer that is learned (default: 1024)")
    defaults = dict(
        num_sizes=4, size_range=2.0, tokens_per_parameter=12.0, seqlen=128, batch_size=4, learning_rate=1e-3
    )
    helps = dict(
        num_sizes="models per budget",
        size_range="the largest of them has this times the parameters of the middle one",
        tokens_per_parameter="of the middle one; about 20 for models of 1e8 parameters and more",
        batch_size="rows of seqlen tokens per step",
        learning_rate="of a model of width 256",
    )
    for name, default in defaults.items():
        text = f"{helps.get(name, 'tokens per row')} (default: {default})"
        plan.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=text)
    plan.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: bfloat16)")


def run(arguments: argparse.Namespace) -> dict:
    return {"plan": _plan, "run": _run, "fit": _fit, "predict": _predict}[arguments.action](arguments)


def _plan(arguments):
    from arfast.data import DatasetManifest, dataset_directories, is_prepared, prepare_dataset
    from arfast.scaling import plan_sweep

    names = (
        "num_sizes",
        "size_range",
        "tokens_per_parameter",
        "seqlen",
        "batch_size",
        "learning_rate",
        "dtype",
        "target",
    )
    settings = {name: getattr(arguments, name) for name in names}
    root, data = Path(arguments.directory), arguments.data
    if not is_prepared(data):
        # Before minutes go into data: what is wrong with the numbers.
        plan_sweep(arguments.budgets, vocab_size=arguments.vocab_size, **settings)
        print(f"arfast scale: preparing {data} in {root / 'data'}", file=sys.stderr)
        split = dict(validation_fraction=_VALIDATION_FRACTION, test_fraction=0.0)
        prepare_dataset(data, root / "data", vocab_size=arguments.vocab_size, progress=True, **split)
        data = str(root / "data")
    manifests = [DatasetManifest.load(directory) for directory in dataset_directories(data)]
    vocabulary = manifests[0].vocabulary
    plan = plan_sweep(
        arguments.budgets,
        vocab_size=vocabulary.pop("vocab_size"),
        special_tokens=vocabulary,
        data=os.path.relpath(data, root),
        data_tokens=sum(manifest.splits["train"].num_tokens for manifest in manifests),
        **settings,
    )
    path = plan.save(root)
    print(plan.table())
    return dict(plan=str(path), runs=len(plan.runs), flops=sum(run.flops for run in plan.runs))


def _run(arguments):
    import torch

    from arfast.data.checks import check_at_least
    from arfast.scaling import run_sweep

    check_at_least("scale", arguments, threads=1, max_runs=1)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows = run_sweep(arguments.directory, max_runs=arguments.max_runs, progress=not arguments.quiet)
    return dict(runs=len(rows), results=str(Path(arguments.directory) / "results.jsonl"))


def _fit(arguments):
    from arfast.scaling import fit_runs, plot_fit, read_results
    from arfast.scaling.report import FIT_NAME, table

    pairs = [text.partition("=") for text in arguments.columns]
    if bad := [key + sign for key, sign, name in pairs if not (sign and name)]:
        raise ValueError(f"scale: columns must be KEY=NAME, got {bad[0]!r}")
    runs = read_results(arguments.runs, {key: name for key, _, name in pairs})
    if arguments.hold_out is not None:
        runs = runs.hold_out_largest(arguments.hold_out)
    fit = fit_runs(
        runs,
        loss=arguments.loss,
        num_resamples=arguments.resamples,
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    where = Path(arguments.runs)
    output_dir = Path(arguments.output_dir or (where if where.is_dir() else where.parent))
    output_dir.mkdir(parents=True, exist_ok=True)
    fit.save(output_dir / FIT_NAME)
    print(table(fit))
    for note in fit.notes:
        print(f"arfast scale: {note}", file=sys.stderr)
    drawn = plot_fit(fit, output_dir / "scaling.png")
    if not drawn:
        print("arfast scale: scaling.png needs matplotlib (pip install 'arfast[plot]')", file=sys.stderr)
    result = dict(
        fit=str(output_dir / FIT_NAME), **fit.parametric.parameters, size_exponent=fit.parametric.size_exponent
    )
    return result | dict(held_out=fit.held_out)


def _predict(arguments):
    from arfast.scaling import ScalingFit

    given = [name for name in ("parameters", "tokens", "budget") if getattr(arguments, name) is not None]
    if given not in (["parameters", "tokens"], ["budget"]):
        raise ValueError(f"scale: predict must be given parameters and tokens, or a budget, got {given or 'neither'}")
    fit = ScalingFit.load(arguments.fit)
    if arguments.budget is None:
        values = fit.parametric.predict(arguments.parameters, arguments.tokens, return_interval=True)
        return dict(zip(("loss", "low", "high"), map(float, values), strict=True))
    best = fit.parametric.optimum(arguments.budget, fit.flops_factor)
    result = {name: getattr(best, key) for name, key in (("parameters", "N"), ("tokens", "D"), ("loss", "L"))}
    if fit.power_law is not None:
        result["loss_by_compute"] = tuple(map(float, fit.power_law.predict(arguments.budget, return_interval=True)))
    if fit.isoflop is not None:
        result["parameters_by_isoflop"] = tuple(map(float, fit.isoflop.predict(arguments.budget, return_interval=True)))
    return result
