"""The files of a sweep of scaling laws as a stranger may have made them: see parsers."""

import json
from pathlib import Path
from random import Random

import numpy as np
from mutations import mutate_bytes, mutate_value, to_json

from arfast.scaling import SweepPlan, plan_sweep, read_results
from arfast.scaling.report import read_fit
from arfast.scaling.results import COLUMNS


def make_sweep(path: Path) -> None:
    plan = plan_sweep([1e11, 2e11], vocab_size=280, num_sizes=2, seqlen=32, batch_size=2, target=4e11)
    plan.save(path)
    rows = [dict(parameters=r.parameters, tokens=r.tokens, loss=4.0 - i / 9, flops=r.flops, held_out=r.held_out)
            for i, r in enumerate(plan.runs)]  # fmt: skip
    (path / "results.jsonl").write_bytes(b"".join(to_json(Random(0), row) + b"\n" for row in rows))
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (path / "results.csv").write_text("\n".join(lines) + "\n")
    runs = {name: [row[column] for row in rows] for name, column in (*COLUMNS.items(), ("held_out", "held_out"))}
    settings = dict(loss="squared", num_resamples=200, confidence=0.9, seed=0)
    (path / "fit.json").write_text(json.dumps({"format": "arfast-scaling-fit-1", "settings": settings, "runs": runs}))


def mutate_sweep(generator: Random, data: bytes) -> bytes:
    """A field of a run, or any byte."""
    if generator.random() < 0.3 or data.startswith(b"parameters,"):
        return mutate_bytes(generator, data, reach=len(data))
    lines = data.splitlines()
    if len(lines) == 5:  # results.jsonl
        at = generator.randrange(len(lines))
        lines[at] = to_json(generator, mutate_value(generator, json.loads(lines[at])))
        return b"\n".join(lines)
    value = json.loads(data)
    if isinstance(value["runs"], list):  # plan.json
        at, part = generator.randrange(len(value["runs"])), generator.choice(("model", "train", ""))
        run = value["runs"][at]
        changed = run | {part: mutate_value(generator, run[part])} if part else mutate_value(generator, run)
        value["runs"][at] = changed
    else:
        part = generator.choice(("runs", "settings"))
        value[part] = mutate_value(generator, value[part])
    return to_json(generator, value)


def read_sweep(path: Path) -> None:
    """All that `arfast scale` makes of the files before it trains or fits."""
    plan = SweepPlan.load(path)
    plan.table()
    for run in plan.runs:
        assert (path / "runs" / run.name).parent == path / "runs"
        run.model_config()
        run.train_config(str(path / "runs" / run.name))
    for runs in (read_results(path), read_results(path / "results.csv"), read_fit(path)[0]):
        columns = np.array([runs.N, runs.D, runs.L, runs.C])
        assert np.isfinite(columns).all() and (columns > 0).all() and len(runs.held_out) == len(runs)
